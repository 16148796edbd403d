"""What a deployment's caller may set: of recipes that are not theirs, on a machine that is not."""

import json
import re

import pytest

from dpq_core.recipe import Recipe, RecipeError
from flows.deployments import deployed
from flows.deployments.doors import TEXTS, check_source, is_open
from flows.deployments.form import COMMON, Overrides, admitted

DATA = "calibration.dataset"
CLOSED = "is closed to a deployment's settings: write it in a recipe of a folder in DPQ_RECIPE_"
NO_FOLDER = r"lies in no folder of DPQ_RECIPE_ROOTS and DPQ_SETTING_ROOTS \(empty\)"
NO_CODE = r"lies in no folder of DPQ_RECIPE_ROOTS \(empty\)"
NO_ADDRESS = r"matches none of DPQ_SETTING_ADDRESSES \(hub:\*/\*\)"


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in ("DPQ_RECIPE_ROOTS", "DPQ_SETTING_ROOTS", "DPQ_SETTING_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("execution.store=/srv/others", CLOSED),
        ("execution={store: /srv/others}", CLOSED),  # however it is written
        ("execution.scratch=/srv/others", CLOSED),
        ("execution={runner: dask, dask_address: 'tcp://evil:8786'}", NO_ADDRESS),
        ("registry.destination=s3://evil/releases", NO_ADDRESS),
        ("registry.hub={repo: evil/releases, private: false}", CLOSED),
        ("evaluation.suites_path=/srv/suites", NO_CODE),
        ("evaluation={suites: [piqa], suites_path: /srv/suites}", NO_CODE),
        ("evaluation.data_mirror=http://169.254.169.254/latest", NO_ADDRESS),
        ("evaluation.data_mirror=/etc", NO_FOLDER),
        ("model.id=/srv/models/secret", NO_FOLDER),
        ("model.id=../../etc", NO_FOLDER),
        ("model.id=~/models/x", NO_FOLDER),
        ("model.id=s3://bucket/model", NO_ADDRESS),
        ("model.id=file:///srv/models/secret", NO_ADDRESS),
        (f"{DATA}.data_files=/etc/passwd", NO_FOLDER),
        (f"{DATA}.data_files=[/etc/*.conf]", NO_FOLDER),
        (f"{DATA}.data_files=http://127.0.0.1:4200/api/flows", NO_ADDRESS),
        (f"{DATA}.data_files=zip://x.json::http://inside/x.zip", NO_ADDRESS),
        (f"{DATA}.data_files=a/b::http://inside/x.zip", NO_ADDRESS),
        (f"{DATA}={{path: text, data_files: /etc/passwd}}", NO_FOLDER),
        (f"{DATA}.path=/etc", NO_FOLDER),
        (f"{DATA}.path=pandas", NO_ADDRESS),  # of `datasets`, which unpickles
        ("evaluation.perplexity.dataset.data_files=/etc/passwd", NO_FOLDER),
    ],
)
def test_what_would_read_write_or_run_elsewhere_is_refused(setting, said):
    with pytest.raises(RecipeError, match=said):
        admitted("quickstart", [setting])


@pytest.mark.parametrize(
    "setting",
    [
        "gates.accuracy_drop=0.3",
        "scheme={preset: hopper-vllm}",
        "scheme.order=gar",
        "evaluation.suites=[piqa]",
        "evaluation={suites: [piqa], num_fewshot: {piqa: 2}, limit: 5}",
        "calibration.samples=4",
        "execution.workers=1",
        "execution={runner: dask, resources: {GPU: 1}}",
        "execution.device=cpu",
        "layers={model.layers.0.mlp.down_proj: w8a8}",
        "registry.name=another",
        "export=[gptq]",
        "model.id=org/model",
        f"{DATA}={{path: org/texts, split: train, text_column: body}}",
        f"{DATA}={{path: python_docs}}",
    ],
)
def test_what_stays_on_its_path_is_taken(setting):
    assert admitted("quickstart", [setting])


def test_roots_and_patterns_open_what_they_name(tmp_path, monkeypatch):
    models, recipes, outside = (tmp_path / name for name in ("models", "recipes", "outside"))
    for folder in (models / "mine", recipes / "suites", outside):
        folder.mkdir(parents=True)
    (models / "link").symlink_to(outside)
    monkeypatch.setenv("DPQ_SETTING_ROOTS", str(models))
    monkeypatch.setenv("DPQ_RECIPE_ROOTS", str(recipes))
    monkeypatch.setenv("DPQ_SETTING_ADDRESSES", "s3://models/* tcp://scheduler:8786")
    taken = [
        f"model.id={models / 'mine'}",
        f"model.id={recipes / 'mine'}",
        "model.id=s3://models/llama",
        f"evaluation.suites_path={recipes / 'suites'}",
        "execution={runner: dask, dask_address: 'tcp://scheduler:8786'}",
    ]
    for setting in taken:
        assert admitted("quickstart", [setting])
    refused = [
        f"model.id={models / 'link'}",
        f"model.id={models}/../outside",
        "model.id=s3://models/../secret",
        "model.id=s3://models-of-others/llama",
        "model.id=org/model",
        f"evaluation.suites_path={models}",  # whoever may put models there may run no code
        "execution={runner: dask, dask_address: 'tcp://scheduler:8787'}",
    ]
    for setting in refused:
        with pytest.raises(RecipeError, match=r"DPQ_(SETTING|RECIPE)_\w+ "):
            admitted("quickstart", [setting])


def test_a_recipe_says_what_its_author_wants(tmp_path, monkeypatch, content):
    monkeypatch.setenv("DPQ_RECIPE_ROOTS", str(tmp_path))
    store = tmp_path / "store"
    written = {**content, "execution": {"store": str(store)}}
    (tmp_path / "own.yaml").write_text(json.dumps(written))
    found = admitted("own.yaml", ["gates.accuracy_drop=0.3", f"execution.store={store}"])
    assert found.execution.store == str(store)
    for setting in ("execution.store=null", "execution={workers: 1}"):
        with pytest.raises(RecipeError):
            admitted("own.yaml", [setting])


@pytest.mark.parametrize("source", ["/srv/models", "s3://bucket/model", "../model"])
def test_a_checkpoint_is_named_as_a_model_is(source, tmp_path, monkeypatch):
    for flow, arguments in (
        (deployed.evaluate, {"checkpoint": source}),
        (deployed.evaluate, {"checkpoint": "org/model", "against": source}),
        (deployed.benchmark, {"checkpoint": source}),
    ):
        with pytest.raises(RecipeError, match=f"(checkpoint|against): {re.escape(repr(source))} "):
            flow.fn(**arguments)
    check_source("checkpoint", "org/model")
    monkeypatch.setenv("DPQ_SETTING_ROOTS", str(tmp_path))
    check_source("checkpoint", str(tmp_path / "model"))


def leaves(model, prefix=""):
    for name, field in model.model_fields.items():
        inner = field.annotation
        yield from (
            leaves(inner, f"{prefix}{name}.") if hasattr(inner, "model_fields") else [prefix + name]
        )


def test_the_form_shows_what_is_open_and_says_what_opens_the_rest():
    assert all(is_open(f"{section}.{field}") for section in COMMON for field in COMMON[section])
    shown = Overrides.model_json_schema()["$defs"]
    fields = {f"{section}.{name}" for section in COMMON for name in shown[section]["properties"]}
    assert fields == {f"{section}.{field}" for section in COMMON for field in COMMON[section]}
    assert "DPQ_SETTING_ROOTS" in shown["model"]["properties"]["id"]["description"]
    closed = {name for name in leaves(Recipe) if not is_open(name)}
    assert {"execution.store", "execution.scratch"} <= closed
    assert not closed & (fields | TEXTS.keys())
    assert not is_open("no.such")
