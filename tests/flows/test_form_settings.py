"""What is typed into a deployment's form is what its recipe says."""

import pytest

from dpq_core.recipe import RecipeError, load_recipe
from flows.deployments.form import SHIPPED, Overrides, admitted


@pytest.mark.parametrize("text", ["/data/a #b", 'say "x"', "it's", "ü 😀", "a\\nb", "3", "[x]", ""])
def test_text_survives_the_form(text):
    settings = Overrides.model_validate({"model": {"revision": text}}).settings()
    assert load_recipe(SHIPPED / "quickstart.yaml", settings).model.revision == text


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}/y.yaml"])
def test_a_name_too_long_for_a_file_is_no_recipe(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DPQ_RECIPE_ROOTS", str(tmp_path))
    with pytest.raises(RecipeError, match="is none that this deployment takes"):
        admitted(name, [])
