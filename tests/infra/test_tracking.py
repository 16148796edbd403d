"""Runs in a real MLflow store on SQLite."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from web_server import MLFLOW, web_server

from infra.registry.tracking import TrackingError, mlflow_client, tracked_run, tracking_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri, artifact_root = tracking_store(tmp_path_factory.mktemp("with space"))
    return uri, artifact_root


@pytest.fixture
def run(store):
    with tracked_run(store[0], "dpq", "a run", {"recipe_digest": "abc"}, store[1]) as run:
        yield run


def data(store, run):
    return mlflow_client(store[0]).get_run(run.run_id).data


def artifact(store, run, path: str) -> Path:
    uri = mlflow_client(store[0]).get_run(run.run_id).info.artifact_uri
    return Path(unquote(urlparse(uri).path)) / path


def test_a_run_finishes_with_its_name_and_tags(store):
    with tracked_run(store[0], "dpq", "a run", {"recipe_digest": "abc"}, store[1]) as run:
        assert run.url == f"runs:/{run.run_id}"
    stored = mlflow_client(store[0]).get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a run"
    assert stored.info.end_time is not None
    assert stored.data.tags["recipe_digest"] == "abc"


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (SystemExit, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_an_exception_passes_through_and_marks_the_run(store, error, status):
    with pytest.raises(error), tracked_run(store[0], "dpq", "x", {}, store[1]) as run:
        raise error("gone wrong")
    assert mlflow_client(store[0]).get_run(run.run_id).info.status == status


def test_parameters_are_flattened_and_long_values_are_cut(store, run):
    suites = {f"suite{i}": i for i in range(150)}  # more than one request's worth
    run.log_params(
        {
            "scheme": {"bits": 4, "order": {"name": "gar"}},
            "suites": ["a", "b"],
            "empty": {},
            "none": None,
            "long": "x" * 7000,
            "odd,key": 1,
        }
        | suites
    )
    params = data(store, run).params
    assert params["scheme.bits"] == "4"
    assert params["scheme.order.name"] == "gar"
    assert json.loads(params["suites"]) == ["a", "b"]
    assert params["empty"] == "{}"
    assert params["none"] == "None"
    assert params["long"] == "x" * 6000
    assert params["odd_key"] == "1"
    assert params["suite149"] == "149"


def test_only_finite_values_are_metrics_and_the_others_are_not_lost(store, run):
    values = {"ppl": 5.25, "acc/arc,none": 1, "nan": math.nan, "inf": math.inf, "missing": None}
    run.log_metrics(values)
    stored = data(store, run)
    assert stored.metrics == {"ppl": 5.25, "acc/arc_none": 1.0}
    lost = {k: v for k, v in stored.tags.items() if k.startswith("nonfinite.")}
    assert lost == {"nonfinite.nan": "nan", "nonfinite.inf": "inf", "nonfinite.missing": "None"}


@pytest.mark.parametrize("path", ["tables/suites", "tables/suites.json", "tables/suites.csv"])
def test_a_table_is_logged_for_the_page_and_as_csv(store, run, path):
    run.log_table([{"suite": "piqa", "acc": 0.5}, {"suite": 'arc, "easy"', "n": 3}], path)
    table = json.loads(artifact(store, run, "tables/suites.json").read_text())
    assert table["columns"] == ["suite", "acc", "n"]
    assert table["data"] == [["piqa", 0.5, None], ['arc, "easy"', None, 3]]
    shown = json.loads(data(store, run).tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "tables/suites.json", "type": "table"}]
    text = artifact(store, run, "tables/suites.csv").read_text()
    assert text == 'suite,acc,n\npiqa,0.5,\n"arc, ""easy""",,3\n'


def test_files_lie_in_the_artifact_root(store, run):
    from matplotlib.figure import Figure

    run.log_text("hello", "notes/report.md")
    run.log_dict({"a": [1, 2]}, "verdict.json")
    run.log_figure(Figure(), "figure.png")
    folder = store[1] / run.run_id / "artifacts"
    assert (folder / "notes" / "report.md").read_text() == "hello"
    assert json.loads((folder / "verdict.json").read_text()) == {"a": [1, 2]}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_parallel_runs_share_an_experiment_that_did_not_exist_and_do_not_mix(store):
    def one(number: int) -> str:
        with tracked_run(store[0], "new", f"run {number}", {}, store[1]) as run:
            run.log_metrics({"number": number})
            run.log_params({"number": number})
        return run.run_id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(one, range(8)))
    client = mlflow_client(store[0])
    assert len({client.get_run(i).info.experiment_id for i in ids}) == 1
    for number, run_id in enumerate(ids):
        stored = client.get_run(run_id)
        assert stored.info.status == "FINISHED"
        assert stored.data.metrics == {"number": number}
        assert stored.data.params == {"number": str(number)}


def test_no_active_run_is_left_or_used(run):
    import mlflow

    assert mlflow.active_run() is None


def test_a_named_tracking_server_wins_over_the_local_store(tmp_path, monkeypatch):
    with web_server(MLFLOW) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert tracking_store(tmp_path) == (address, None)
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_was_deleted_is_named_with_the_way_out(store):
    with tracked_run(store[0], "deleted", "x", {}, store[1]):
        pass
    client = mlflow_client(store[0])
    number = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(number)
    with (
        pytest.raises(TrackingError, match=f"'deleted' was deleted .* restore -x {number}"),
        tracked_run(store[0], "deleted", "x", {}, store[1]),
    ):
        pass


@pytest.mark.parametrize(
    "uri",
    [
        "https://someone:planted@tracking.example/",
        "https://someone:pla/nted@tracking.example:5000",  # no URL, but somebody's mistake
        "https://planted@tracking.example:5000",
        "postgresql://dpq:planted@tracking.example/mlflow",
    ],
)
def test_a_tracking_address_with_a_password_is_refused_and_not_repeated(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as found:
        tracking_store(tmp_path)
    assert "nted" not in str(found.value)


@pytest.mark.parametrize(
    "uri", ["postgresql://dpq@host/mlflow", "http://host:5000", "sqlite:////srv/a@b/mlflow.db"]
)
def test_a_tracking_address_without_a_password_is_taken(tmp_path, monkeypatch, uri):
    monkeypatch.setattr("infra.registry.tracking._check_answers", lambda _: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_store(tmp_path) == (uri, None)


def test_a_logged_file_has_an_address_for_a_browser(store, run):
    run.log_text("<p>", "a page.html")
    assert Path(unquote(urlparse(run.link("a page.html")).path)).read_text() == "<p>"
    run.url = "https://tracking.example/#/experiments/1/runs/2"
    assert run.link("page.html") == f"{run.url}/artifacts/page.html"


def test_mlflow_says_nothing(store, capfd):
    with tracked_run(store[0], "quiet", "x", {"long": "y" * 9000}, store[1]) as run:
        run.log_params({"long": "y" * 9000})
    assert capfd.readouterr() == ("", "")
    assert mlflow_client(store[0]).get_run(run.run_id).data.tags["long"] == "y" * 8000
