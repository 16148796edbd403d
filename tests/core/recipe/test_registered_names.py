"""What a model is called in the registry: by default, and what MLflow does not take."""

import pytest

from dpq_core.convnet.recipe import ConvRecipe
from dpq_core.recipe import RecipeError, parse_recipe, validated
from dpq_core.recipe.registered_names import default_name

HASH = "0e9e39f249a16976918f6564b8830bc894c89659"


def recipe_of(model, **registry):
    dataset = {"path": "python_docs"}
    content = {"model": {"id": model}, "calibration": {"dataset": dataset}, "registry": registry}
    return parse_recipe(content)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("/runs/llama-ft/artifacts/model", "llama-ft"),
        ("/runs/qwen-ft/artifacts/model/", "qwen-ft"),
        ("s3://bucket/team/chat/checkpoint-500", "chat"),
        (f"/hub/models--meta-llama--Llama-3.1-8B/snapshots/{HASH}", "llama-3.1-8b"),
        ("/models/llama/v2.1", "llama"),
        ("/models/My Model!", "my-model"),
        ("/models/facade", "facade"),
    ],
)
def test_a_name_is_the_last_part_that_says_something(model, name):
    assert default_name(model) == name
    assert recipe_of(model).registered_name == f"{name}-w4a8"


def test_paths_that_say_nothing_do_not_share_a_name():
    names = {default_name(f"/mlruns/{n}/{HASH[n:]}/artifacts/model") for n in range(3)}
    assert len(names) == 3
    assert all(name.startswith("model-") for name in names)


@pytest.mark.parametrize("name", ["llama", "it's", 'say "x"', "a=b", "ü 1", "x" * 256])
def test_names_that_mlflow_takes(name):
    assert recipe_of("a/b", name=name).registered_name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "no name that MLflow takes"),
        ("..", "no name that MLflow takes"),
        ("team/llama", "cannot hold '/'"),
        ("llama:7b", "cannot hold ':'"),
        ("llama@champion", "cannot hold '@'"),
        ('it\'s "x"', "cannot hold both"),
        ("a\nb", "cannot hold '\\n'"),
        ("x" * 257, "257 characters: MLflow takes 256"),
    ],
)
def test_names_that_mlflow_does_not_take_are_refused_at_once(name, said):
    with pytest.raises(RecipeError) as caught:
        recipe_of("a/b", name=name)
    assert "registry.name" in str(caught.value)
    assert said in str(caught.value)
    with pytest.raises(RecipeError):
        validated(ConvRecipe, {"registry": {"name": name}}, "recipe")


@pytest.mark.parametrize("name", ["", " ", "x" * 501])
def test_experiments_that_mlflow_does_not_take(name):
    with pytest.raises(RecipeError, match=r"registry\.experiment"):
        recipe_of("a/b", experiment=name)


def test_classifiers_of_other_images_have_other_names():
    digits = validated(ConvRecipe, {}, "recipe")
    others = {"images": {"source": "idx", "folder": "/data/fashion_mnist"}}
    assert digits.registered_name == "mobilenet-digits-int8"
    assert validated(ConvRecipe, others, "recipe").registered_name == "mobilenet-fashion_mnist-int8"
