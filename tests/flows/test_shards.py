"""Calibration shared by any number of tasks: the same bytes, and a killed share repeated alone."""

import json
from collections import Counter
from contextlib import ExitStack

import pytest
from conftest import PATIENCE, run_flow
from forked import Forked, dask_cluster
from test_same_bytes import contents, in_store, layer_artifacts, propagating

from dpq_core.recipe import RecipeError, parse_recipe
from flows.quantize import quantize

LEAVES = 4
SETTINGS = [
    pytest.param(2, "processes", "original", marks=pytest.mark.slow),
    (3, "dask", "original"),
    (4, "threads", "original"),
    (3, "threads", "quantized"),
    (3, "threads", "groups"),
]

# `dpq …` that notes every leaf whose Hessians are begun, and dies at one of them.
DYING = """
import os, signal, sys
from pathlib import Path
log, last = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
from dpq_core.calibration.statistics import BlockPasses
statistics = BlockPasses.statistics
def noted(self, *arguments):
    with log.open("a") as file:
        file.write(next(iter(self.inputs)).split(".")[2] + "\\n")
    if len(log.read_text().splitlines()) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return statistics(self, *arguments)
BlockPasses.statistics = noted
from flows.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def tiny(two_blocks):
    """A recipe's content with two blocks and four leaves."""
    calibration = {"samples": 16 * LEAVES}
    return two_blocks | {"calibration": two_blocks["calibration"] | calibration}


@pytest.fixture
def four_leaves(tiny, services_home):
    return parse_recipe(tiny)


@pytest.fixture(scope="module")
def alone():
    """What one task gave, by propagation."""
    return {}


def statistics(folder):
    files = (folder / "statistics").glob("*/[!.]*")
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize(("shards", "runner", "propagation"), SETTINGS)
def test_shards_and_runners_give_the_same_bytes(
    four_leaves, alone, tmp_path, shards, runner, propagation
):
    recipe = propagating(four_leaves, propagation)
    if propagation not in alone:
        checkpoint = run_flow(quantize, in_store(recipe, tmp_path / "one")).checkpoint
        alone[propagation] = contents(checkpoint.folder), statistics(tmp_path / "one")
    shared = in_store(recipe, tmp_path / "shared", shards=shards, runner=runner)
    with ExitStack() as stack:
        if runner == "dask":
            cluster = stack.enter_context(dask_cluster(n_workers=shards))
            address = {"dask_address": cluster.scheduler_address}
            shared = in_store(shared, tmp_path / "shared", **address)
        candidate = run_flow(quantize, shared)
    assert contents(candidate.checkpoint.folder) == alone[propagation][0]
    assert statistics(tmp_path / "shared") == alone[propagation][1]
    for spent in ("partial", "hidden", "tmp", "leases"):
        assert list((tmp_path / "shared" / spent).iterdir()) == []


@pytest.mark.parametrize(("propagation", "turns"), [("original", 1), ("groups", 4)])
def test_a_share_that_is_killed_is_repeated_alone(tiny, four_leaves, tmp_path, propagation, turns):
    """turns: of a block's inputs, each of which every leaf is run for."""
    log, store, recipe = tmp_path / "log", tmp_path / "store", tmp_path / "recipe.yaml"
    four_leaves = propagating(four_leaves, propagation)
    calibration = four_leaves.calibration.model_dump(mode="json")
    recipe.write_text(json.dumps(tiny | {"calibration": calibration}))
    settings = {"store": store, "shards": 4, "workers": 1}
    options = [f"--set=execution.{key}={value}" for key, value in settings.items()]

    def run(last):
        process = Forked(log, last, "quantize", recipe, *options, program=DYING)
        _, errors = process.communicate(PATIENCE)
        return process.returncode, errors

    # at the third leaf of the second block, of its last inputs
    assert run(last=(2 * turns - 1) * LEAVES + 3)[0] == -9
    layers = layer_artifacts(store)
    assert propagation == "original" or len(layers) == 7 + 6  # all but the last, waited for
    assert list((store / "partial").iterdir()) != []
    code, errors = run(last=0)
    assert code == 0, errors
    begun = Counter(log.read_text().splitlines())
    assert begun == {"0": turns * LEAVES, "1": turns * LEAVES + 1}
    assert layer_artifacts(store).items() >= layers.items()
    assert list((store / "partial").iterdir()) == []
    undisturbed = run_flow(quantize, in_store(four_leaves, tmp_path / "one")).checkpoint.folder
    assert contents(next((store / "checkpoints").iterdir())) == contents(undisturbed)


def test_more_shards_than_leaves_are_refused(four_leaves, tmp_path):
    too_many = in_store(four_leaves, tmp_path / "store", shards=LEAVES + 1)
    with pytest.raises(RecipeError, match=r"execution.shards: 5: .* make 4 leaves .*samples"):
        run_flow(quantize, too_many)
    assert not (tmp_path / "store" / "statistics").exists()
