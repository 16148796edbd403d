"""A rejected candidate gets more bits: as few as needed, from the store, within the budget."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import dpq_process, run_flow

from dpq_core.model.plan import PlannedLayer
from dpq_core.recipe import parse_recipe
from dpq_core.verdict.gates import NotMeasuredError, Verdict
from dpq_core.verdict.halves import ALL, JUDGING
from dpq_core.verdict.standing import Metric
from flows.release import repair_options
from flows.release.candidate import Attempt
from flows.release.release import release
from flows.release.repair import repair
from infra.registry import Registry
from infra.registry.tracking import PARENT, mlflow_client, tracking_store


@pytest.fixture
def content(content, store):
    """A gate that four bits miss by far; scheme and data are the session's."""
    return content | {
        "gates": {"perplexity_increase": 0.01},
        "repair": {
            "enabled": True,
            "candidates": ["w4a8-g32", "w8a8", "w8a16"],
            "samples": 4,
            "max_bits_per_weight": 8.5,
            "max_rounds": 6,  # BF16 alone moves what is measured by a third of this gate
        },
        "registry": {"name": "repair-tests"},
    }


def artifacts(store, stage):
    complete = (store / stage).glob("*/.artifact.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in complete}


def measured(content, changes):
    return run_flow(release, parse_recipe(content | changes))


def test_rejected_then_promoted_without_touching_a_gate(content, services_home, store, tmp_path):
    unrepaired = measured(content, {"repair": {"enabled": False}})
    assert unrepaired.verdict.verdict == "rejected"
    assert len(unrepaired.rounds) == 1
    result = measured(content, {})
    assert result.verdict.verdict == "promoted", result.rounds
    asked, judged = (r.verdict.metrics["perplexity_token"].documents for r in (unrepaired, result))
    assert (unrepaired.verdict.judged_on, result.verdict.judged_on) == (ALL, JUDGING)
    assert 0 < judged < asked
    assert Registry(tracking_store(services_home)[0]).champion("repair-tests") is not None
    before, *after = result.rounds
    assert before["gates missed"] == "perplexity_token"
    assert after[-1]["gates missed"] == "none"
    assert before["measured increase"] >= 0.01 > after[-1]["measured increase"]
    assert before["bits per weight"] < after[-1]["bits per weight"] <= 8.5
    assert 0 < after[-1]["predicted increase"] < before["measured increase"]
    assert result.manifest["bytes_per_weight"] * 8 == after[-1]["bits per weight"]
    changed = [row["name"] for row in result.manifest["layers"] if row["scheme"]]
    assert 0 < len(changed) == after[-1]["layers raised"] <= 35

    client = mlflow_client(tracking_store(services_home)[0])
    run = client.get_run(result.run_id)
    nested = client.search_runs(
        [run.info.experiment_id], filter_string=f"tags.`{PARENT}` = '{result.run_id}'"
    )
    assert {r.info.run_name for r in nested} == {f"round {row['round']}" for row in result.rounds}
    files = {file.path for file in client.list_artifacts(result.run_id)}
    assert {"rounds.json", "sensitivity.json"} <= files
    table = Path(client.download_artifacts(result.run_id, "sensitivity.csv", str(tmp_path)))
    costs = list(csv.DictReader(table.open()))
    assert {(row["layer"], row["choice"]) for row in costs} == {
        (layer["name"], choice)
        for layer in result.manifest["layers"]
        for choice in ("w4a8", "w4a8-g32", "w8a8", "w8a16")
    }
    assert all(float(row["loss"]) >= 0 for row in costs)

    stages = ("layers", "statistics", "sensitivity", "checkpoints", "scores")
    made = {stage: artifacts(store, stage) for stage in stages}
    again = measured(content, {})
    assert {stage: artifacts(store, stage) for stage in stages} == made
    assert again.rounds == result.rounds


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_layers_are_tried_alone_without_a_correction(content, correction, monkeypatch):
    """For what comes before a layer there is nothing to correct where that is in 16 bits."""
    fed = {"propagation": "groups", "correction": correction}
    recipe = parse_recipe(content | {"calibration": content["calibration"] | fed})
    layers = [PlannedLayer(name, 0, "q", 64, 128, recipe.scheme) for name in ("q", "k")]
    first = SimpleNamespace(layers={"q": "own q", "k": "own k"}, statistics={"q": "statistics"})
    made, measured = [], []

    def quantized(recipe, model, readers, statistics):
        made.append((recipe.calibration.correction, readers.corrected, statistics))
        own = [each for each in readers.layers if each.scheme == recipe.scheme]
        names = {each.name: f"{'alone' if own else 'other'} {each.name}" for each in readers.layers}
        return SimpleNamespace(result=lambda: SimpleNamespace(made=names))

    def costs(recipe, model, windows, block, trials):
        measured.append(trials)
        return SimpleNamespace(result=dict)

    for name, submit in (("quantize_readers", quantized), ("sensitivity", costs)):
        monkeypatch.setattr(repair_options, name, SimpleNamespace(submit=submit))
    inputs = SimpleNamespace(model=None, calibration=None, plan=SimpleNamespace(blocks=1))
    repair_options._measure(recipe, inputs, layers, first)
    own = "alone" if correction else "own"
    assert [trials["k"][repair_options.OWN] for trials in measured] == [f"{own} k"]
    assert len(made) == (4 if correction else 3)
    assert set(made) == {(0.0, correction > 0, "statistics")}


@pytest.mark.parametrize(("confidence", "most"), [(None, 0.9 * 0.5), (0.95, 0.9 * 0.4)])
def test_a_missed_divergence_says_how_much_loss_is_left(content, confidence, most):
    """Half of it may stay, and less where the interval's end is judged."""
    gates = content.get("gates", {}) | {"divergence": 0.05, "confidence": confidence}
    recipe = parse_recipe(content | {"gates": gates})
    missed = Metric("nats a token", 0.0, 0.1, 0.1, (0.09, 0.11), 50, limit=0.05)
    look = Verdict("rejected", ("divergence: …",), {"divergence": missed})
    found = SimpleNamespace(recipe=recipe, look=look)
    assert repair_options.Options._loss_to_aim_at(None, found, 2.0, 1.0) == pytest.approx(2 * most)
    passed = replace(look, metrics={"divergence": replace(missed, passed=True)})
    found = SimpleNamespace(recipe=recipe, look=passed)
    assert repair_options.Options._loss_to_aim_at(None, found, 2.0, 1.0) == pytest.approx(2 * 0.7)


@pytest.mark.parametrize("judged", ["promoted", "rejected"])
def test_the_half_that_judges_has_the_last_word(content, judged, monkeypatch):
    """And no round follows it: it is looked at once."""
    recipe, looks = parse_recipe(content), []
    metric = Metric("perplexity_token", 3.0, 3.0, 0.0, limit=0.01, passed=True)
    look = Verdict("promoted", (), {"perplexity_token": metric})
    reasons = () if judged == "promoted" else ("perplexity_token: increase",)
    missed = replace(metric, delta=0.02, passed=judged == "promoted")
    said = Verdict(judged, reasons, {"perplexity_token": missed})

    def gate(*arguments, **keywords):
        looks.append(keywords.get("chooses", False))
        return said

    monkeypatch.setattr("flows.release.candidate.gate", gate)
    candidate = SimpleNamespace(integrity={})
    found = repair(recipe, None, {}, Attempt(recipe, candidate, {}, look, look))
    assert looks == [False]
    assert len(found.attempts) == 1
    assert (found.last.look, found.last.verdict.verdict) == (look, judged)
    why = [
        "the half of the documents that chooses lets it pass" in r
        for r in found.last.verdict.reasons
    ]
    assert any(why) is (judged == "rejected")


def test_a_budget_that_is_too_small_says_what_is_needed(content):
    repair = content["repair"] | {"max_bits_per_weight": 4.4}
    result = measured(content, {"repair": repair})
    assert result.verdict.verdict == "rejected"
    assert result.rounds[-1]["bits per weight"] <= 4.4
    assert any("are predicted to be needed" in reason for reason in result.verdict.reasons)


def test_a_budget_below_the_scheme_is_told_before_any_work(dpq, tmp_path):
    store = tmp_path / "store"
    settings = ["--set", "repair.max_bits_per_weight=4.1", "--set", f"execution.store={store}"]
    result = dpq("release", *settings)
    assert result.exit_code == 1
    assert "repair.max_bits_per_weight is 4.1, and the scheme alone takes 4.2" in result.stderr
    assert not (store / "statistics").exists()


def test_layers_that_are_read_together_take_the_same_choice(content):
    repair = content["repair"] | {"together": True}
    result = measured(content, {"repair": repair})
    schemes = {row["name"]: row["scheme"] for row in result.manifest["layers"]}
    for block in range(5):
        for group in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        ):
            chosen = [schemes[f"model.layers.{block}.{member}"] for member in group]
            assert all(scheme == chosen[0] for scheme in chosen)
    assert any(schemes.values())


def test_a_layer_that_the_recipe_gives_a_choice_keeps_it(content):
    given = {"model.layers.0.mlp.gate_proj": "w8a8", "model.layers.4.mlp.down_proj": "w4a8-g32"}
    result = measured(content, {"layers": given})
    schemes = {row["name"]: row["scheme"] for row in result.manifest["layers"]}
    assert result.rounds[-1]["layers raised"] > len(given)
    assert schemes["model.layers.0.mlp.gate_proj"] == {"bits": 8}
    assert schemes["model.layers.4.mlp.down_proj"] == {"group_size": 32}


def test_a_head_is_raised_too(content):
    """The scheme's own choice asks for it, and says no more."""
    result = measured(content, {"layers": {"model.embed_tokens": "w4a8"}})
    *_, head = result.manifest["layers"]
    assert head["name"] == "model.embed_tokens"  # tied: the head's inputs, one set of codes
    assert head["tokens"] > 0
    assert head["scheme"]
    assert result.rounds[-1]["measured increase"] < result.rounds[0]["measured increase"]


def test_a_baseline_that_was_not_measured_ends_before_the_quantization(content, tmp_path):
    """It was quantized, rejected for its baseline, and registered once."""
    evaluation = content["evaluation"] | {"suites": ["python_docs"], "timeout": 1e-6}
    execution = content["execution"] | {"store": str(tmp_path / "store")}
    with pytest.raises(NotMeasuredError, match=r"the baseline was not measured.*TimeoutError"):
        measured(content, {"evaluation": evaluation, "execution": execution})
    assert not (tmp_path / "store" / "statistics").exists()


def test_killed_in_a_round_and_run_again(content, recipe_file, dpq, tmp_path):
    undisturbed = measured(content, {})
    store = tmp_path / "killed"
    settings = ["--json", "--set", f"execution.store={store}"]
    killed = dpq_process("release", recipe_file, *settings)
    deadline = time.monotonic() + 900
    while len(artifacts(store, "sensitivity")) < 2:
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    stages = ("layers", "statistics", "sensitivity", "scores")
    kept = {stage: artifacts(store, stage) for stage in stages}
    second = dpq("release", *settings)
    assert second.exit_code == 0, second.stderr
    for stage in stages:
        now = artifacts(store, stage)
        assert {key: now[key] for key in kept[stage]} == kept[stage]
    assert json.loads(second.stdout)["rounds"] == undisturbed.rounds
