"""A release of a vision-language model, calibrated with images and texts, and with texts alone."""

import zipfile
from pathlib import Path

import pytest
from conftest import run_flow
from model_families import FAMILIES, save

from dpq_core.recipe import parse_recipe
from flows.release.release import release
from infra.registry.tracking import mlflow_client, tracking_store

IMAGES = Path(__file__).parents[3] / "shared/data/cifar10_jpeg/test.zip"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save("qwen2.5-vl", tmp_path_factory.mktemp("vision"))


def recipe_of(content, model, **calibration):
    return parse_recipe(
        content
        | {
            "model": {"id": str(model)},
            "scheme": {"group_size": 24, "rounding": "nearest"},
            "calibration": content["calibration"]
            | {"samples": 4, "sequence_length": 96}
            | calibration,
            "gates": {"perplexity_increase": 1e6},
            "registry": {"name": "vision-tests"},
        }
    )


@pytest.fixture
def images(tmp_path):
    """Six photographs of each class, a folder a class: 60 JPEG files of CIFAR-10's test split."""
    with zipfile.ZipFile(IMAGES) as archive:
        names = [name for name in archive.namelist() if name[-8:-4] < "0006"]
        archive.extractall(tmp_path, [name for name in names if name.endswith(".jpg")])
    return tmp_path


@pytest.mark.skipif(not IMAGES.is_file(), reason="needs ../shared/data")
def test_release_with_images(content, model, images, services_home):
    dataset = {"path": "imagefolder", "data_files": f"{images}/test/**", "text_column": "label"}
    recipe = recipe_of(content, model, dataset=dataset, image_column="image", samples=16)
    result = run_flow(release, recipe)
    assert result.verdict.verdict == "promoted", result.verdict.reasons
    family = FAMILIES["qwen2.5-vl"]
    layers = {row["name"] for row in result.manifest["layers"]}
    assert layers == family.language | family.vision
    assert result.manifest["calibration"]["image_column"] == "image"
    assert result.manifest["skipped"].keys() == {"lm_head", *family.matrices}
    run = mlflow_client(tracking_store(services_home)[0]).get_run(result.run_id)
    assert run.data.metrics["perplexity_token.candidate"] > 1


def test_release_with_text_alone_names_the_vision_layers(content, model, services_home):
    result = run_flow(release, recipe_of(content, model))
    assert result.verdict.verdict == "promoted", result.verdict.reasons
    family = FAMILIES["qwen2.5-vl"]
    assert {row["name"] for row in result.manifest["layers"]} == family.language
    skipped = result.manifest["skipped"]
    assert {n for n, why in skipped.items() if "image_column" in why} == family.vision
