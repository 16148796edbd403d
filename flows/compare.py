"""The ladder: the same model under several schemes, one row each."""

import itertools
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import ValidationError

from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.machine.device import share_machine
from dpq_core.recipe import Recipe, RecipeError
from dpq_core.recipe.scheme import Scheme
from dpq_core.verdict.comparison import compare as compare_scores
from dpq_core.verdict.gates import judge
from dpq_core.verdict.halves import ALL
from dpq_core.verdict.pairing import Difference, Evaluation
from flows.quantize import make_candidate
from flows.release.candidate import baseline_of, subject_of
from flows.release.measurements import measure
from flows.reporting.ladder import DISTANCES, Row, as_records, html, markdown
from flows.reporting.prefect_artifacts import shown_name
from flows.running.liveness import attended
from infra.registry.tracking import tracked_run, tracking_store
from infra.settings import home
from infra.store import Store
from tasks.evaluate import Measured, load_evaluation
from tasks.preflight import Inputs, preflight, replanned
from tasks.support.chunks import Comparison
from tasks.support.divergences import divergence_of
from tasks.support.memory import check_states_room

Differences = Mapping[str, Difference]

_PLAIN = {"order": "none", "rounding": "nearest", "scale_search": "minmax"}
_W4A16 = {"inner": "none", "activations": "none", "group_scale": "bf16"}

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


class MeasurementError(RuntimeError):
    """A baseline that could not be measured."""


@flow(name="compare")
@attended
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
    check_states_room(recipe, inputs.kept_states, inputs.footprint)
    reference, kept = baseline_of(inputs), Comparison(kept=True)
    baseline = _load(recipe, measure(recipe, inputs.evaluation, reference, kept))
    rows = [_baseline_row(baseline)]
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
        recipes[name] = recipe.model_copy(update={"scheme": scheme})
    return recipes


def _baseline_row(baseline: Evaluation) -> Row:
    """The 16-bit model against itself.

    Raises:
        MeasurementError: its perplexity is missing, and nothing can be compared with it.
    """
    found = compare_scores(baseline, baseline)
    perplexity = found[PERPLEXITY]
    if perplexity.delta is None:
        raise MeasurementError(f"bf16: {PERPLEXITY}: {perplexity.wrong}")
    return Row("bf16", perplexity.baseline, 0.0, None, 16.0, 0.0, _accuracies(found))


def _row(name: str, recipe: Recipe, inputs: Inputs, baseline: Evaluation) -> Row:
    try:
        candidate = make_candidate(recipe, replanned(inputs, recipe))
        wrong = [detail for detail in candidate.integrity.values() if detail]
        if wrong:
            return Row(name, error="; ".join(wrong))
        data, subject = inputs.evaluation, subject_of(recipe, candidate, name)
        measured = measure(recipe, data, subject, Comparison(reference=baseline_of(inputs)))
        found = _differences(recipe, baseline, measured)
    except Exception as error:  # of any stage: the other variants go on
        return Row(name, error=f"{type(error).__name__}: {error}")
    perplexity = found[PERPLEXITY]
    layers = candidate.manifest["layers"]
    return Row(
        variant=name,
        perplexity=perplexity.candidate,
        increase=perplexity.delta,
        interval=perplexity.interval,
        bits_per_weight=8 * candidate.manifest["bytes_per_weight"],
        layer_error=sum(row["error"] for row in layers) / len(layers),
        accuracy=_accuracies(found),
        distances=_distances(found),
        gates=_worst_word(found, recipe),
        error="; ".join(f"{name}: {d.wrong}" for name, d in found.items() if d.wrong) or None,
    )


def _differences(recipe: Recipe, baseline: Evaluation, measured: Measured) -> Differences:
    divergence = divergence_of(measured, Store(recipe.execution.store), ALL)
    return compare_scores(baseline, _load(recipe, measured), divergence=divergence)


def _accuracies(found: Differences) -> dict[str, float]:
    """What is neither perplexity per token nor a distance, by its shown name."""
    return {
        shown_name(name, difference): difference.candidate
        for name, difference in found.items()
        if name.partition(".")[0] not in (PERPLEXITY, *DISTANCES)
        and difference.candidate is not None
    }


def _distances(found: Differences) -> dict[str, float]:
    """How far the variant's predictions and answers are from the 16-bit model's."""
    values = {name: found[name].candidate for name in DISTANCES if name in found}
    return {name: value for name, value in values.items() if value is not None}


def _worst_word(found: Differences, recipe: Recipe) -> str | None:
    """The worst of what the gates say, and of which; None where none looks."""
    metrics = judge(found, {}, recipe.gates, None).metrics
    for word in ("failed", "not shown", "shown"):
        names = [name for name, metric in metrics.items() if metric.standing == word]
        if names:
            return word if word == "shown" else f"{word}: {', '.join(names)}"
    return None


def _load(recipe: Recipe, measured: Measured) -> Evaluation:
    return load_evaluation(measured, Store(recipe.execution.store))


def _publish(recipe: Recipe, rows: list[Row]) -> None:
    """The ladder as a table, as Markdown, as a page, on the run page and in MLflow."""
    records, text = as_records(rows), markdown(rows)
    create_table_artifact(records, key="ladder", description="Variants of one model")
    create_markdown_artifact(text, key="ladder-table", description="Variants of one model")
    tracking_uri, artifact_root = tracking_store(home())
    name, tags = f"{recipe.registered_name} ladder", {"recipe_digest": recipe.digest}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        run.log_table(records, "ladder")
        run.log_text(text, "ladder.md")
        about = {"model": recipe.model.id, "recipe": recipe.digest[:12], "MLflow run": run.run_id}
        page = html(rows, name, about, recipe.gates.perplexity_increase)
        run.log_text(page, "ladder.html")
        create_link_artifact(run.artifact_uri("ladder.html"), "ladder.html", key="ladder-page")
