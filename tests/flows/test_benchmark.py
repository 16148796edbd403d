"""Throughput as a flow and in a release: numbers, plot, gate, and what is not measured here."""

import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from conftest import run_flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from dpq_core.recipe import parse_recipe
from dpq_core.serving import avx2
from flows.release.release import release
from infra.orchestration.deployments import QUEUE_OF, QUEUES
from infra.registry.tracking import mlflow_client, tracking_store
from tasks.benchmark import THROUGHPUT

SMALL = {
    "variants": ["bf16", "w4a8"],
    "batches": [1, 2],
    "prompt_tokens": 8,
    "new_tokens": 4,
    "repeats": 1,
}
ABSENT = "not measured here: this machine has no hpu device"
needs_runtime = pytest.mark.skipif(bool(avx2.unavailable()), reason=avx2.unavailable() or "-")
needs_no_gaudi = pytest.mark.skipif(hasattr(torch, "hpu"), reason="this machine has a Gaudi")


@pytest.fixture
def run_of(services_home):
    """An MLflow run: its metrics, and the folder of its files."""
    client = mlflow_client(tracking_store(services_home)[0])

    def read(run_id):
        run = client.get_run(run_id)
        return run.data.metrics, Path(unquote(urlparse(run.info.artifact_uri).path))

    return read


@needs_runtime
@needs_no_gaudi
def test_a_benchmark_is_in_mlflow_on_the_run_page_and_in_json(dpq, run_of):
    small = f"benchmark={json.dumps(SMALL)}"
    done = dpq("bench", "--json", "--device", "cpu", "--device", "hpu", "--set", small)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    *rows, absent = found["rows"]
    assert [(r["device"], r["variant"], r["batch"]) for r in rows] == [
        ("cpu", variant, batch) for variant in SMALL["variants"] for batch in SMALL["batches"]
    ]
    assert absent["wrong"] == ABSENT
    assert not any(isinstance(value, float) for value in absent.values())
    ratio = found["throughput_ratio"]
    assert ratio == {"cpu": pytest.approx(rows[2]["ratio_to_bf16"]), "hpu": None}

    metrics, folder = run_of(found["run_id"])
    for row in rows:
        name = f"benchmark.cpu.{row['variant']}.{row['batch']}.decode_tokens_per_second"
        assert metrics[name] == pytest.approx(row["decode_tokens_per_second"])
    assert metrics[THROUGHPUT] == pytest.approx(rows[2]["decode_tokens_per_second"])
    assert metrics["benchmark.cpu.throughput_ratio"] == pytest.approx(ratio["cpu"])
    assert json.loads((folder / "benchmark.json").read_text())["asked"]["batches"] == [1, 2]
    assert (folder / "benchmark-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "benchmark-hpu.png").exists()
    assert "| hpu | – | – | not measured here" in (folder / "benchmark.md").read_text()
    with get_client(sync_client=True) as prefect:
        key = ArtifactFilter(key=ArtifactFilterKey(any_=["benchmark"]))
        tables = [json.loads(a.data) for a in prefect.read_artifacts(artifact_filter=key)]
    assert found["rows"] in tables


@needs_no_gaudi
def test_a_release_that_cannot_be_timed_shows_a_gap(content, run_of):
    benchmark = SMALL | {"devices": ["hpu"]}
    result = run_flow(release, parse_recipe(content | {"benchmark": benchmark}))
    assert result.verdict.verdict == "promoted"
    metrics, folder = run_of(result.run_id)
    assert THROUGHPUT not in metrics
    report = (folder / "report.html").read_text()
    assert "<h2>Throughput</h2>" in report
    assert ABSENT in report


@needs_no_gaudi
def test_a_gate_on_the_speed_of_what_is_not_here_ends_before_any_work(dpq, tmp_path):
    """No number, no verdict: it was a rejection once, and registered."""
    benchmark = json.dumps(SMALL | {"devices": ["hpu"]})
    settings = ("gates.throughput_ratio=0.001", f"benchmark={benchmark}")
    store = tmp_path / "store"
    sets = [part for each in (*settings, f"execution.store={store}") for part in ("--set", each)]
    done = dpq("release", "--json", *sets)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["verdict"] == "error"
    assert "gates.throughput_ratio is 0.001, and this machine has no hpu device" in done.stderr
    assert not (store / "scores").exists()


@needs_runtime
@pytest.mark.slow
def test_a_release_is_timed_and_gated(content, run_of):
    benchmark = SMALL | {"devices": ["cpu"], "batches": [1]}
    gates = content["gates"] | {"throughput_ratio": 1e-3}
    result = run_flow(release, parse_recipe(content | {"benchmark": benchmark, "gates": gates}))
    assert result.verdict.verdict == "promoted"
    found = result.verdict.metrics["throughput_ratio.cpu"]
    metrics, folder = run_of(result.run_id)
    assert metrics["throughput_ratio.cpu.candidate"] == found.candidate > 0
    assert metrics[THROUGHPUT] > 0
    assert 'id="speeds-cpu-wide' in (folder / "report.html").read_text()
    assert "throughput_ratio.cpu" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "--device tpu: choose cpu, cuda, hpu"),
        (["--shape", "llama-9b"], "llama-160m"),
        (["--shape", "llama-160m", "--checkpoint", "x"], "give one of the two"),
        (["--checkpoint", "no-such"], "not a (complete) checkpoint"),
        (["--set", "benchmark.prompt_tokens=100000"], "context"),
        (["--set", "gates.throughput_ratio=2"], "benchmark.devices: [cpu]"),
        (["--set", "benchmark.batches=[1, 1]"], "batches names 1 twice"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_any_work(dpq, arguments, said):
    done = dpq("bench", "--device", "cpu", *arguments)
    assert done.exit_code == 1
    assert said in done.stderr


def test_every_kind_of_device_has_a_queue():
    assert set(QUEUE_OF.values()) == set(QUEUES)
