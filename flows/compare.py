"""The ladder: the same model under several schemes, one row each."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import ValidationError

from dpq_core.device import share_machine
from dpq_core.gates import PERPLEXITY
from dpq_core.recipe import Recipe, RecipeError
from dpq_core.scheme import Scheme
from flows.quantize import make_candidate
from flows.release import measure
from infra.settings import home
from infra.tracking import tracked_run, tracking_store
from tasks.evaluate import Subject
from tasks.preflight import Inputs, preflight

_PLAIN = {"order": "none", "rounding": "nearest", "scale_search": "minmax"}
_W4A16 = {"inner": "none", "activations": "none"}

STANDARD_LADDER: dict[str, dict[str, Any]] = {
    "w16a8": {"method": "none"},
    "rtn-w4a16": {"method": "rtn", **_PLAIN, **_W4A16},
    "rtn-w4a8": {"method": "rtn", **_PLAIN},
    "gptq-w4a16": {"method": "gptq", **_PLAIN, **_W4A16},
    "gptq-w4a16-gar": {"method": "gptq", **_PLAIN, **_W4A16, "order": "gar"},
    "naive-gar": {"method": "naive", **_PLAIN, "order": "gar"},
    **{
        f"dpq-{order}-{rounding}" + ("-hessian" if search == "hessian" else ""): {
            "method": "dpq",
            "order": order,
            "rounding": rounding,
            "scale_search": search,
        }
        for order, rounding, search in itertools.product(
            ("none", "gar", "activation"), ("nearest", "gradient"), ("minmax", "hessian")
        )
    },
}


@dataclass(frozen=True)
class Row:
    """One variant. increase: of perplexity over the 16-bit model. layer_error: mean over layers of
    the relative output error. error: why there are no numbers."""

    variant: str
    perplexity: float | None = None
    increase: float | None = None
    bits_per_weight: float | None = None
    layer_error: float | None = None
    error: str | None = None


@flow(name="compare")
def compare(recipe: Recipe) -> list[Row]:
    """Quantize and measure every variant; one that fails is a row that says why.

    Raises:
        RecipeError: no perplexity to compare by, or a variant that is no scheme.
    """
    if recipe.evaluation.perplexity is None:
        raise RecipeError("compare needs evaluation.perplexity")
    variants = variant_recipes(recipe)
    share_machine(recipe.execution.threads_per_worker)
    inputs = preflight(recipe)
    baseline = measure(_perplexity_only(recipe), inputs, _baseline(inputs))[PERPLEXITY]
    assert baseline is not None
    rows = [Row("bf16", baseline, 0.0, 16.0, 0.0)]
    for name, variant in variants.items():
        rows.append(_row(name, variant, inputs, baseline))
    _publish(recipe, rows)
    return rows


def variant_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each variant: the recipe's own, or the standard ladder."""
    recipes = {}
    for name, overrides in (recipe.variants or STANDARD_LADDER).items():
        try:
            scheme = Scheme.model_validate({**recipe.scheme.model_dump(), **overrides})
        except ValidationError as error:
            raise RecipeError(f"variants.{name}: {error.errors()[0]['msg']}") from error
        recipes[name] = _perplexity_only(recipe.model_copy(update={"scheme": scheme}))
    return recipes


def _row(name: str, recipe: Recipe, inputs: Inputs, baseline: float) -> Row:
    try:
        candidate = make_candidate(recipe, inputs)
        wrong = [detail for detail in candidate.integrity.values() if detail]
        if wrong:
            return Row(name, error="; ".join(wrong))
        checkpoint = candidate.checkpoint
        subject = Subject(name, checkpoint.folder, checkpoint.sha256)
        perplexity = measure(recipe, inputs, subject)[PERPLEXITY]
    except Exception as error:  # of any stage: the other variants go on
        return Row(name, error=f"{type(error).__name__}: {error}")
    if perplexity is None or not math.isfinite(perplexity):
        return Row(name, error="perplexity is not finite")
    layers = candidate.manifest["layers"]
    return Row(
        variant=name,
        perplexity=perplexity,
        increase=perplexity - baseline,
        bits_per_weight=8 * candidate.manifest["bytes_per_weight"],
        layer_error=sum(row["error"] for row in layers) / len(layers),
    )


def _baseline(inputs: Inputs) -> Subject:
    return Subject("baseline", inputs.model.folder, inputs.model.digest)


def _perplexity_only(recipe: Recipe) -> Recipe:
    evaluation = recipe.evaluation.model_copy(update={"suites": []})
    return recipe.model_copy(update={"evaluation": evaluation})


def _publish(recipe: Recipe, rows: list[Row]) -> None:
    table = [asdict(row) for row in rows]
    create_table_artifact(table, key="ladder", description="Variants of one model")
    tracking_uri, artifact_root = tracking_store(home())
    name, tags = f"{recipe.registered_name} ladder", {"recipe_digest": recipe.digest}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        run.log_table(table, "ladder")
