"""The short forms of `make chaos`."""

import random

import pytest
from chaos import Chaos, contents, survive, write_recipe
from model_families import save
from removal import removal_beside_reading
from team import postgres_binaries, team
from transformers import AutoTokenizer

from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import load_recipe
from infra.store import Store
from tasks.assemble import provenance
from tasks.support.model import inspect
from tasks.support.tokenized_data import load_inputs, store_calibration


@pytest.fixture
def model(tmp_path):
    save("llama-2", tmp_path / "model")
    return tmp_path / "model"


def recipe_in(folder, runner, **sections):
    execution = {"device": "cpu", "runner": runner, "shards": 2}
    return write_recipe(folder / "recipe.json", execution=execution, **sections)


def undisturbed(recipe, model, folder):
    """The checkpoint that plain Python makes, orchestrated by nothing."""
    section, store = recipe.calibration, Store(folder / "store")
    tokenizer = AutoTokenizer.from_pretrained(model)
    stored = store_calibration(section, tokenizer, model, store)
    windows = load_inputs(stored, store, section.batch_size)
    about = provenance(recipe, inspect(recipe.model, store), stored)
    quantize_checkpoint(model, folder / "checkpoint", windows, recipe.scheme, section, about)
    return contents(folder / "checkpoint")


def test_a_release_survives(tmp_path, model):
    path = recipe_in(tmp_path, "processes", model=str(model))
    chaos = Chaos(path, tmp_path / "release", random.Random(59))
    found = chaos.release([6, 28])  # between chunks of scores, between layers
    assert chaos.kills.total() == 2
    assert found == undisturbed(load_recipe(path), model, tmp_path / "plain")
    chaos.check_store()


def test_removal_beside_reading(tmp_path):
    """Any exception but that an artifact is not there any more ends a process, and this."""
    done = removal_beside_reading(tmp_path / "store", kills=10, processes=3, seed=17)
    assert {"made", "found", "removed", "read"} <= done.keys()


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["threads", "dask"])
def test_releases_survive(tmp_path, model, runner):
    recipe = recipe_in(tmp_path, runner, model=str(model))
    survive(recipe, tmp_path, releases=2, kills=8, seed=2)


@pytest.mark.slow
@pytest.mark.skipif(postgres_binaries() is None, reason="PostgreSQL is not installed")
def test_releases_survive_what_befalls_services(tmp_path, model):
    with team(model) as (environment, services, sections):
        recipe = recipe_in(tmp_path, "processes", **sections)
        survive(recipe, tmp_path, 2, 12, 3, environment, services)
