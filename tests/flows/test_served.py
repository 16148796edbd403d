"""A candidate that is scored by the runtime that serves it."""

import dataclasses

import pytest
from conftest import run_flow
from test_same_bytes import in_store
from torch import nn
from typer.testing import CliRunner

from dpq_core.recipe import parse_recipe
from dpq_core.serving import avx2, cpu, runtimes
from flows.cli.main import app
from flows.release.release import release

SERVED = ["--set", "evaluation.arithmetic=served"]


@pytest.fixture
def served(content, services_home):
    section = {**content["evaluation"], "arithmetic": "served"}
    return parse_recipe({**content, "evaluation": section})


@pytest.fixture
def put_after(monkeypatch):
    """Put what a function makes after each linear of a CPU's runtimes; how many were made."""
    made = []

    def put(module):
        def after(make):
            def both(layer, bias):
                made.append(layer)
                return nn.Sequential(make(layer, bias), module())

            return both

        for kernels in (cpu, avx2):
            monkeypatch.setattr(kernels, "make", after(kernels.make))
        return made

    return put


def test_it_is_scored_by_the_runtime_alone_and_promoted(served, recipe, put_after, tmp_path):
    defined, made = run_flow(release, recipe), put_after(nn.Identity)
    found = run_flow(release, in_store(served, tmp_path / "store"))
    assert found.verdict.verdict == "promoted"
    assert len(made) >= 2 * 35  # linears, to be looked at and to score with
    ours, theirs = (each.verdict.metrics["perplexity_token"] for each in (found, defined))
    assert ours.baseline == theirs.baseline
    assert ours.candidate == pytest.approx(theirs.candidate, rel=0.01)
    made.clear()
    run_flow(release, in_store(recipe, tmp_path / "store"))
    assert made == []


def test_a_runtime_that_computes_otherwise_is_no_release(served, put_after, tmp_path):
    put_after(lambda: nn.Hardtanh(-0.5, 0.5))
    found = run_flow(release, in_store(served, tmp_path / "store"))
    assert found.verdict.verdict == "rejected"
    (reason,) = [each for each in found.verdict.reasons if "integrity" in each]
    assert "nats a token from the formula's, limit 0.002" in reason


def test_without_a_runtime_it_ends_before_any_work(dpq, monkeypatch):
    gone = dataclasses.replace(runtimes.RUNTIMES["hopper"], device="cpu")
    monkeypatch.setattr(runtimes, "RUNTIMES", {"hopper": gone})
    done = dpq("release", *SERVED, "--json")
    assert done.exit_code == 1
    assert "evaluation.arithmetic is served, and the hopper runtime cannot run" in done.stderr
    assert done.stderr.count("set it to definition") == 1


def test_a_checkpoint_of_others_has_no_runtime(dpq, quickstart_model, recipe_file):

    asked = ["evaluate", str(quickstart_model), "--recipe", str(recipe_file), *SERVED]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    assert "runtimes serve native checkpoints alone" in done.stderr
