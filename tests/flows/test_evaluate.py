"""Evaluation on real services: what is scored once, what is rejected, what a kill leaves."""

import itertools
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, dpq_process, run_flow
from model_families import save
from prefect.states import Completed, Pending
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tasks.evaluate
from dpq_core.evaluation.results import suite_scores
from dpq_core.evaluation.scorer import last_states
from dpq_core.recipe import parse_recipe
from dpq_core.verdict.gates import NotMeasuredError
from flows.cli.main import app
from flows.deployments.nightly import why_due
from flows.evaluate import evaluate as evaluate_flow
from flows.release.measurements import _ended, _found, _outcome
from flows.release.release import release
from infra.registry import Registry
from infra.registry.tracking import mlflow_client, tracking_store
from infra.store import ArtifactRef, Store

SUITE = """
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: answers
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
SCORED = ("chunk-scores", "last-states", "divergences", "divergence")
BROKEN = "def process_results(doc, results):\n    raise ArithmeticError('planted')\n"


def write_suite(folder, name, documents=40):
    rows = [
        {"question": f"{name} {i}:", "answers": [" abc", " the", " 123"], "right": i % 3}
        for i in range(documents)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(SUITE.format(name=name, data=data))
    return data


@pytest.fixture
def suites(tmp_path):
    folder = tmp_path / "suites"
    folder.mkdir()
    for name in ("first", "second"):
        write_suite(folder, name)
    return folder


@pytest.fixture(scope="module")
def short_texts(text_file, tmp_path_factory):
    """The session's documents, the beginning of each: most tests here are about suites."""
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    texts = [json.loads(line)["text"][:160] for line in text_file.read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def content(content, suites, short_texts, tmp_path):
    """The session's recipe with suites, and a store of its own without scores."""
    perplexity = content["evaluation"]["perplexity"]
    dataset = perplexity["dataset"] | {"data_files": str(short_texts)}
    evaluation = {
        "perplexity": perplexity | {"dataset": dataset},
        "suites": ["first", "second"],
        "suites_path": str(suites),
    }
    gates = {"perplexity_increase": 10, "accuracy_drop": 90}
    store = shutil.copytree(content["execution"]["store"], tmp_path / "store")
    for stage in (*SCORED, "scores"):
        shutil.rmtree(store / stage, ignore_errors=True)
    execution = content["execution"] | {"store": str(store)}
    return content | {"evaluation": evaluation, "gates": gates, "execution": execution}


@pytest.fixture
def own_store(content):
    return Path(content["execution"]["store"])


@pytest.fixture
def model(quickstart_model, tmp_path):
    return shutil.copytree(quickstart_model, tmp_path / "model")


@pytest.fixture
def evaluate(recipe_file):
    """`dpq evaluate CHECKPOINT … --json`: the object that it prints."""

    def run(checkpoint, *arguments, exit_code=0):
        command = ["evaluate", str(checkpoint), "--recipe", str(recipe_file), "--json"]
        result = CliRunner().invoke(app, [*command, *arguments])
        assert result.exit_code == exit_code, result.stderr
        return json.loads(result.stdout)

    return run


def values(report):
    return {row["suite"]: row["value"] for row in report["scores"]}


def artifacts(store, stage):
    complete = (store / stage).glob("*/.artifact.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in complete}


def score_artifacts(store):
    return artifacts(store, "scores")


def test_the_same_model_twice_costs_nothing_the_second_time(evaluate, model, own_store, tmp_path):
    first = evaluate(model)
    scored = score_artifacts(own_store)
    assert list(values(first)) == ["perplexity_token", "first", "second"]
    assert [row["documents"] for row in first["scores"][1:]] == [40, 40]
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert values(evaluate(moved)) == values(first)
    assert score_artifacts(own_store) == scored


def test_another_model_at_the_same_path_gets_answers_of_its_own(evaluate, model, own_store):
    first, scored = evaluate(model), score_artifacts(own_store)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= -1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert values(evaluate(model))["perplexity_token"] > 2 * values(first)["perplexity_token"]
    assert len(score_artifacts(own_store)) == 2 * len(scored)


def test_a_changed_document_changes_the_result(evaluate, model, suites, own_store):
    data = suites / "first.jsonl"
    before, scored = evaluate(model), score_artifacts(own_store)
    stat = data.stat()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[7]["right"] = (rows[7]["right"] + 1) % 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.stat().st_size == stat.st_size
    evaluate(model)
    fresh = score_artifacts(own_store).keys() - scored.keys()
    assert len(fresh) == 1  # the second suite and the windows are found again
    assert values(before)["second"] == values(evaluate(model))["second"]


def test_a_planted_degradation_is_rejected_with_the_right_reason(recipe, own_store):
    # Other tests' schemes, where there were any: what is left is this release's.
    shutil.rmtree(own_store / "layers", ignore_errors=True)
    good = run_flow(release, recipe)
    assert good.verdict.verdict == "promoted"
    shuffle_codes_of_a_layer(own_store)
    shutil.rmtree(own_store / "checkpoints")
    gates = recipe.gates.model_copy(update={"perplexity_increase": 0.05})
    bad = run_flow(release, recipe.model_copy(update={"gates": gates}))
    assert bad.verdict.verdict == "rejected"
    (reason,) = bad.verdict.reasons
    assert reason.startswith("perplexity_token: increase from ")
    found, metric = (r.verdict.metrics["perplexity_token"] for r in (good, bad))
    assert metric.baseline == found.baseline
    assert metric.delta > 10 * abs(found.delta)
    assert metric.interval[0] > 0.05


def shuffle_codes_of_a_layer(store):
    """Replace one layer's artifact by one that is whole, and wrong."""
    path = next(
        path
        for path in sorted((store / "layers").glob("*/layer.safetensors"))
        if load_file(path)["weight_packed"].shape[1] * 8 > 256  # mlp.down_proj
    )
    tensors = load_file(path)
    shuffled = torch.randperm(len(tensors["weight_packed"]))
    tensors["weight_packed"] = tensors["weight_packed"][shuffled].contiguous()
    about = (path.parent / "layer.json").read_text()
    shutil.rmtree(path.parent)
    with Store(store).writing("layers", path.parent.name) as folder:
        save_file(tensors, folder / "layer.safetensors")
        (folder / "layer.json").write_text(about)


def test_a_baseline_s_failed_suite_ends_the_run_and_the_others_are_kept(recipe, suites, own_store):
    """It was a rejection, of a candidate that was quantized for it, and it was registered."""
    (suites / "planted.py").write_text(BROKEN)
    definition = suites / "first.yaml"
    whole = definition.read_text()
    definition.write_text(whole + "process_results: !function planted.process_results\n")
    shutil.rmtree(own_store / "statistics", ignore_errors=True)
    with pytest.raises(NotMeasuredError) as raised:
        run_flow(release, recipe)
    assert "accuracy.first: baseline failed: ArithmeticError: planted" in str(raised.value)
    assert str(raised.value).count("planted") == 1
    assert not (own_store / "statistics").exists()
    kept = score_artifacts(own_store)
    assert len(kept) == 2  # perplexity and the second suite
    definition.write_text(whole)
    (suites / "planted.py").unlink()
    assert run_flow(release, recipe).verdict.verdict == "promoted"
    assert kept.items() <= score_artifacts(own_store).items()


def test_out_of_memory_is_no_verdict_and_the_next_run_goes_on(
    dpq, own_store, services_home, content, monkeypatch
):
    """The candidate's second chunk, of the first suite, finds no memory, and a retry neither."""
    name, asked = "out-of-memory-tests", []

    def run(subject, *how):
        if subject.quantized:
            asked.append(subject)
            if len(asked) in (2, 3):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return last_states(subject, *how)

    monkeypatch.setattr("tasks.score.last_states", run)
    settings = ["--json", "--set", f"registry.name={name}", "--set", "execution.workers=1"]
    failed = dpq("release", *settings)
    assert failed.exit_code == 1
    said = json.loads(failed.stdout)
    assert said["verdict"] == "error"
    assert "the candidate was not measured" in said["reasons"][0]
    for suite in ("first", "second"):
        assert f"accuracy.{suite}: candidate failed: OutOfMemoryError: CUDA out of" in failed.stderr
    assert "perplexity_token: candidate failed" not in failed.stderr
    registry = Registry(tracking_store(services_home)[0])
    assert registry.find(name, {}) is None
    recipe = parse_recipe(content | {"registry": {"name": name}})
    assert why_due(recipe, registry)[0]  # the next night tries again
    stages = ("statistics", "layers", "checkpoints", "integrity", *SCORED, "scores")
    made = {stage: artifacts(own_store, stage) for stage in stages}
    assert len(made["chunk-scores"]) == len(made["scores"]) == 4  # of the candidate the first

    again = dpq("release", *settings)
    assert again.exit_code == 0, again.stderr
    now = {stage: artifacts(own_store, stage) for stage in stages}
    assert len(asked) == 5
    assert all(now[stage] == made[stage] for stage in stages[:4])
    assert all(made[stage].items() <= now[stage].items() for stage in stages)
    assert len(now["chunk-scores"]) == len(now["scores"]) == 6
    assert registry.champion(name) is not None
    assert not why_due(recipe, registry)[0]


def check_documents(result, services_home, tmp_path):
    """Every document is in MLflow, with what both models answered."""
    client = mlflow_client(tracking_store(services_home)[0])
    table = parquet.read_table(
        client.download_artifacts(result.run_id, "documents.parquet", str(tmp_path))
    )
    answers = {row["document"]: row for row in table.to_pylist() if row["suite"] == "first"}
    assert len(answers) == 40
    for name, role in (("baseline", "baseline"), ("candidate", "candidate")):
        mean = sum(row[role] for row in answers.values()) / 40
        metric = result.verdict.metrics["accuracy.first"]
        assert getattr(metric, name) == pytest.approx(100 * mean)
        picks = [row[f"{role}.pick"] for row in answers.values()]
        assert set(picks) <= {0, 1, 2}
        assert all(row[f"{role}.margin"] >= 0 for row in answers.values())
    changed = [r["baseline.pick"] != r["candidate.pick"] for r in answers.values()]
    turned = metric.turned_right + metric.turned_wrong + metric.turned_other
    assert sum(changed) == turned
    assert {row["metric"] for row in table.to_pylist()} == {"acc", "perplexity_token"}


def test_a_release_s_documents_and_its_scores_against_another_checkpoint(
    evaluate, recipe, quickstart_model, services_home, tmp_path
):
    released = run_flow(release, recipe)
    check_documents(released, services_home, tmp_path)
    scored = score_artifacts(Path(recipe.execution.store))
    report = evaluate(released.checkpoint, "--against", str(quickstart_model))
    assert score_artifacts(Path(recipe.execution.store)) == scored  # found again, all of it
    assert report["passed"] is True
    assert report["reasons"] == []
    for name, metric in released.verdict.as_dict()["metrics"].items():
        ends = metric["interval"] and list(metric["interval"])  # a maximum has none
        assert report["metrics"][name] == metric | {"interval": ends}
    worse = evaluate(
        released.checkpoint,
        *("--against", str(quickstart_model), "--set", "gates.perplexity_increase=0.000001"),
    )
    assert worse["passed"] is False
    assert worse["reasons"][0].startswith("perplexity_token: increase")


def test_a_limited_run_is_inspected(dpq):
    limited = dpq("release", "--json", "--set", "evaluation.limit=8")
    assert limited.exit_code == 2, limited.stderr
    report = json.loads(limited.stdout)
    assert report["verdict"] == "inspected"
    assert report["metrics"]["accuracy_average"]["documents"] == 16
    allowed = dpq(
        "release", "--json", "--set", "evaluation.limit=8", "--set", "gates.allow_limited=true"
    )
    assert allowed.exit_code == 0, allowed.stderr


@pytest.mark.parametrize("starts", [1, 3, 4])
def test_a_task_that_found_no_server_to_begin_is_submitted_again(starts):
    """On Dask such a task comes back pending."""
    artifact = ArtifactRef("a", "b", 1)
    states = [Pending()] * (starts - 1) + [Completed(data=artifact)]

    class Future:
        def __init__(self):
            self.state = states.pop(0)

        def wait(self):
            pass

    outcome = _outcome(_ended(Future(), Future))
    if starts <= 3:
        assert outcome == artifact
    else:
        assert outcome.reason.startswith("did not begin in 3 attempts, and is pending")


def test_a_killed_worker_is_a_reason_and_no_score():
    class Future:
        state = Pending()

        def wait(self):
            raise BrokenProcessPool("A process in the pool was terminated abruptly")

    found = _found(Future(), Future)
    assert found.reason.startswith("failed: its worker was killed, for lack of memory perhaps")


def test_a_time_limit_is_named_and_what_was_scored_is_kept(evaluate, model, own_store, monkeypatch):
    # A second passes whenever somebody looks at the clock, and only then.
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr("tasks.score.time", clock)
    one = ["--set", "execution.workers=1"]
    report = evaluate(model, *one, "--set", "evaluation.timeout=6.5", exit_code=1)
    assert report["complete"] is False
    assert values(report)["perplexity_token"] is not None
    assert values(report)["first"] is values(report)["second"] is None
    failed = [reason for reason in report["reasons"] if reason.startswith("first: ")]
    assert failed[0].startswith("first: failed: TimeoutError: 1 of 3 chunks were scored in 7 s")
    assert "evaluation.timeout is 6.5 s" in failed[0]
    kept = artifacts(own_store, "chunk-scores")
    assert len(kept) == 1
    assert None not in values(evaluate(model, *one)).values()
    assert kept.items() <= artifacts(own_store, "chunk-scores").items()


def test_two_suites_at_a_time_leave_stdout_to_the_json(evaluate, model, monkeypatch):
    """The first to begin is the first to end, and the other prints after that."""
    second_in, first_out = threading.Event(), threading.Event()

    def in_turn(suite, *rest):
        if suite.name == "first":
            assert second_in.wait(PATIENCE)
        else:
            second_in.set()
            assert first_out.wait(PATIENCE)
            print("what the harness prints now and then")
        found = suite_scores(suite, *rest)
        if suite.name == "first":
            first_out.set()
        return found

    monkeypatch.setattr(tasks.evaluate, "suite_scores", in_turn)
    stdout = sys.stdout
    report = evaluate(model, "--set", "execution.workers=2")
    assert values(report).keys() == {"perplexity_token", "first", "second"}
    assert sys.stdout is stdout


@pytest.mark.parametrize(("runner", "workers"), [("threads", 3), ("processes", 2)])
def test_any_number_of_workers_gives_the_same_bits(
    content, services_home, suites, tmp_path, runner, workers
):
    write_suite(suites, "second", documents=2000)
    one = content["execution"] | {"workers": 1}
    model = str(save("llama-2", tmp_path / "small"))
    quick = parse_recipe(content | {"model": {"id": model}, "execution": one})
    expected = run_flow(evaluate_flow, quick, model).scores
    execution = one | {"runner": runner, "workers": workers, "store": one["store"] + "-fresh"}
    other = quick.model_copy(update={"execution": quick.execution.model_copy(update=execution)})
    assert run_flow(evaluate_flow, other, model).scores == expected
    chunks = [artifacts(Path(each["store"]), "chunk-scores") for each in (one, execution)]
    assert chunks[0].keys() == chunks[1].keys()
    assert len(chunks[0]) > 3


def test_killed_between_two_chunks_and_run_again(evaluate, recipe_file, model, own_store):
    folder = Path(json.loads(recipe_file.read_text())["evaluation"]["suites_path"])
    write_suite(folder, "second", documents=4000)
    first = dpq_process("evaluate", model, "--recipe", recipe_file)
    deadline = time.monotonic() + PATIENCE
    while len(artifacts(own_store, "chunk-scores")) < 3:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.communicate()
    kept = artifacts(own_store, "chunk-scores")
    report = evaluate(model)
    now = artifacts(own_store, "chunk-scores")
    assert {key: now[key] for key in kept} == kept
    assert len(now) > len(kept)
    assert [row["documents"] for row in report["scores"]][1:] == [40, 4000]
