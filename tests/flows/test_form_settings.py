"""What is typed into a deployment's form is what its recipe says."""

import pytest

from dpq_core.recipe import load_recipe
from flows.deployed_recipe import SHIPPED, Overrides


@pytest.mark.parametrize("text", ["/data/a #b", 'say "x"', "it's", "ü 😀", "a\\nb", "3", "[x]", ""])
def test_text_survives_the_form(text):
    settings = Overrides.model_validate({"model": {"revision": text}}).settings()
    assert load_recipe(SHIPPED / "quickstart.yaml", settings).model.revision == text
