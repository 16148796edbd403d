"""The ladder: rows for all variants, and a row that says why for one that fails."""

import json

import pytest

from dpq_core.recipe import RecipeError
from flows.compare import STANDARD_LADDER, variant_recipes


def test_rows_and_a_failing_variant(dpq):
    variants = {
        "activations-alone": {"method": "none"},
        "rtn": {"method": "rtn", "rounding": "nearest", "order": "none"},
        "dpq": {},
        "too-wide": {"group_size": 4096},
    }
    result = dpq("compare", "--json", "--set", f"variants={json.dumps(variants)}")
    assert result.exit_code == 0, result.stderr
    rows = {row["variant"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == ["bf16", *variants]
    assert rows["bf16"]["increase"] == 0
    assert rows["activations-alone"]["layer_error"] == 0
    assert rows["activations-alone"]["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert rows["dpq"]["layer_error"] < rows["rtn"]["layer_error"]
    assert rows["dpq"]["bits_per_weight"] <= 8 * 0.54
    assert rows["dpq"]["increase"] == rows["dpq"]["perplexity"] - rows["bf16"]["perplexity"]
    assert rows["dpq"]["gates"].startswith(("shown", "not shown", "failed"))
    assert rows["bf16"]["gates"] is None
    assert rows["too-wide"]["perplexity"] is None
    assert "4096" in rows["too-wide"]["error"]


def test_standard_ladder_is_valid_at_any_group_size(recipe):
    narrow = recipe.scheme.model_copy(update={"group_size": 32})
    recipes = variant_recipes(recipe.model_copy(update={"scheme": narrow}))
    assert list(recipes) == list(STANDARD_LADDER)
    assert {r.scheme.group_size for r in recipes.values()} == {32}


def test_a_variant_that_is_no_scheme_is_refused_before_any_work(recipe):
    with pytest.raises(RecipeError, match=r"variants\.odd"):
        variant_recipes(recipe.model_copy(update={"variants": {"odd": {"method": "magic"}}}))
