"""The model card as hubs read it: what was measured as `model-index`, and the model it is of."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from dpq_core.errors import InputError
from dpq_core.evaluation.scores import ACCURACIES, PERPLEXITIES
from dpq_core.recipe import Recipe
from dpq_core.verdict.closeness import NATS
from dpq_core.verdict.standing import Metric

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_RELATION = "quantized"
_TYPES = {  # what hubs call our metrics; others keep their name
    **dict.fromkeys(PERPLEXITIES, "perplexity"),
    **dict.fromkeys(ACCURACIES, "accuracy"),
    NATS: "kl_divergence",
}


class HubCardError(InputError):
    """A card that huggingface_hub does not read as it was written."""


def hub_card(card: str, recipe: Recipe, revision: str | None, metrics: Mapping[str, Metric]) -> str:
    """A release's README.md with the metadata of hubs. The licence is that of the base model's
    card, as the README has it already.

    revision: the hub's commit of the base model; None where that is of no hub, and is not named.

    Raises:
        HubCardError: what was written is not what huggingface_hub's own parser reads.
    """
    from huggingface_hub import ModelCard, ModelCardData  # imported late: slow, and seldom needed

    written = ModelCard(card)
    data = written.data
    assert isinstance(data, ModelCardData)
    data.base_model = recipe.model.id if revision else None
    if revision:
        data["base_model_relation"] = _RELATION
    data.pipeline_tag = "text-generation"
    data.model_name = recipe.registered_name
    data.eval_results = eval_results(recipe, metrics) or None
    if vars(ModelCard(str(written)).data) != vars(data):
        raise HubCardError(f"{data.model_name}: the model card's metadata are not read as written")
    return str(written)


def eval_results(recipe: Recipe, metrics: Mapping[str, Metric]) -> "list[EvalResult]":
    """What the candidate scored, a result a metric; what is missing or not finite is left out."""
    from huggingface_hub import EvalResult

    results = []
    for name, metric in metrics.items():
        value = metric.candidate
        if value is None or not math.isfinite(value):
            continue
        kind, shown = _data_set(name, recipe)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=kind,
                dataset_name=shown,
                metric_type=_TYPES.get(metric.metric, metric.metric),
                metric_name=name,
                metric_value=float(value),
            )
        )
    return sorted(results, key=lambda result: result.dataset_name)  # as `model-index` groups them


def _data_set(metric: str, recipe: Recipe) -> tuple[str, str]:
    """Type and name of what a metric is of: a suite, or the perplexity's text. No local path."""
    suite = metric.rpartition(".")[2]
    if suite in recipe.evaluation.suites:
        return suite, suite
    section = recipe.evaluation.perplexity
    averaged = "accuracy" in metric or metric.startswith("flips")
    if section is None or averaged:
        return "lm-evaluation-harness", ", ".join(recipe.evaluation.suites) or metric
    path, files = section.dataset.path, section.dataset.data_files
    named = [files] if isinstance(files, str) else files or []
    return path, ", ".join(PurePath(file).name for file in named) or path
