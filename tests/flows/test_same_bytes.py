"""However it is run, a recipe gives the same bytes; what a killed run finished stays finished."""

import time
from pathlib import Path

import pytest
from conftest import dpq_process, run_flow
from model_families import save
from transformers import AutoTokenizer

from dpq_core.checkpoint.native import files_of
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, ModelSection, parse_recipe
from flows.quantize import quantize
from infra.store import Store
from tasks.assemble import provenance
from tasks.support.model import inspect
from tasks.support.tokenized_data import load_inputs, store_calibration


def contents(folder):
    """Of a checkpoint, without what a release, or MLflow, puts beside it."""
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def in_store(recipe, folder, **execution):
    update = {"store": str(folder), **execution}
    return recipe.model_copy(update={"execution": recipe.execution.model_copy(update=update)})


def propagating(recipe, how):
    """Fed so; with all that is quantized before it a layer is corrected too."""
    changes = {"propagation": how, "correction": 0.5 if how == "groups" else 0.0}
    calibration = recipe.calibration.model_copy(update=changes)
    return recipe.model_copy(update={"calibration": calibration})


@pytest.fixture(params=["original", "quantized", "groups"])
def propagated(recipe, request):
    return propagating(recipe, request.param)


def plainly(recipe, folder):
    """What `dpq_core.pipeline` makes of a recipe, with nothing orchestrated."""
    store, model = Store(recipe.execution.store), Path(recipe.model.id)
    tokenizer = AutoTokenizer.from_pretrained(model)
    section = recipe.calibration
    stored = store_calibration(section, tokenizer, model, store)
    windows = load_inputs(stored, store, section.batch_size)
    about = provenance(recipe, inspect(recipe.model, store), stored)
    quantize_checkpoint(model, folder, windows, recipe.scheme, section, about, recipe.layers)


def test_plain_python_and_prefect(propagated, tmp_path):
    recipe = in_store(propagated, tmp_path / "store")
    flow_checkpoint = run_flow(quantize, recipe).checkpoint.folder
    plainly(recipe, tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(flow_checkpoint)


@pytest.fixture(params=["original", "quantized", "groups"])
def small(two_blocks, services_home, request):
    scheme = {"group_size": 32, "max_passes": 2}
    return propagating(parse_recipe(two_blocks | {"scheme": scheme}), request.param)


@pytest.fixture(params=["tied", "untied"])
def outside(request, two_blocks, tmp_path):
    """A model's folder, and choices for what is outside its blocks: the head first."""
    if request.param == "tied":
        return save("llama-3.2", tmp_path / "tied"), {"model.embed_tokens": "w4a8"}
    return two_blocks["model"]["id"], {"lm_head": "w4a8", "model.embed_tokens": "w8a16"}


def test_head_and_embedding_too(small, outside, tmp_path):
    folder, layers = outside
    asked = {"layers": layers, "model": ModelSection(id=str(folder))}
    recipe = in_store(small.model_copy(update=asked), tmp_path / "store")
    made = run_flow(quantize, recipe)
    assert not any(made.integrity.values())
    names = [row["name"] for row in made.manifest["layers"]]
    assert [names[-1], names[0]][: len(layers)] == list(layers)
    assert not list((tmp_path / "store" / "hidden").glob("*/.artifact.json"))
    plainly(recipe, tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(made.checkpoint.folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_scales_and_hessians_of_different_texts(small, tmp_path, shards):
    """Sixteen windows for Hessians, a quarter of another data set, and eight for scales, in two
    leaves; shares of them, and plain Python."""
    other = {"path": "python_docs", "split": "validation"}
    section = CalibrationSection.model_validate(
        small.calibration.model_dump()
        | {"samples": 16, "mixed_in": [other | {"share": 0.25}]}
        | {"activations": {"dataset": other, "samples": 8}}
    )
    recipe = small.model_copy(update={"calibration": section})
    recipe = in_store(recipe, tmp_path / "store", shards=shards, blocks_per_task=1)
    made = run_flow(quantize, recipe)
    about = made.manifest["calibration"]
    assert about["mixed_in"] == [{"share": 0.25}]
    assert about["activations"] == {"samples": 8}
    assert (about["tokens"], about["scale_tokens"]) == (16 * 16, 8 * 16)
    plainly(recipe, tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(made.checkpoint.folder)


def test_threads_and_processes(recipe, tmp_path):
    checkpoints = [
        run_flow(quantize, in_store(recipe, tmp_path / runner, runner=runner)).checkpoint.folder
        for runner in ("threads", "processes")
    ]
    assert contents(checkpoints[0]) == contents(checkpoints[1])


def test_killed_in_the_fan_out_and_run_again(recipe, recipe_file, dpq, tmp_path):
    undisturbed = run_flow(quantize, recipe).checkpoint.folder
    store = tmp_path / "killed"
    setting = ["--set", f"execution.store={store}"]
    first = dpq_process("quantize", recipe_file, *setting)
    deadline = time.monotonic() + 900
    while len(finished := layer_artifacts(store)) < 5:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.communicate()
    finished = layer_artifacts(store)
    assert 5 <= len(finished) < 35

    second = dpq("quantize", *setting)
    assert second.exit_code == 0, second.stderr
    now = layer_artifacts(store)
    assert len(now) == 35
    assert {key: now[key] for key in finished} == finished
    assert not list((store / "tmp").iterdir())
    checkpoint = next((store / "checkpoints").iterdir())
    assert str(checkpoint) in second.stdout
    assert contents(checkpoint) == contents(undisturbed)


def layer_artifacts(store):
    complete = (store / "layers").glob("*/.artifact.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in complete}
