"""What a recipe would have a model read, against what that can: lengths and ids of tokens."""

from collections.abc import Mapping
from typing import Any

from prefect.logging import get_run_logger

from dpq_core.model import context
from dpq_core.recipe import Recipe
from infra.store import ArtifactRef, Store
from tasks.support import tokenized_data


def check_lengths(recipe: Recipe, config: Any, calibrated: bool = True) -> None:
    """Windows fit into the context of a text model's configuration.

    Args:
        calibrated: the recipe's calibration is run too.

    Raises:
        ContextError: naming the setting.
    """
    lengths = {}
    if calibrated and recipe.calibration.image_column is None:  # with images, as long as they are
        lengths["calibration.sequence_length"] = recipe.calibration.sequence_length
    if recipe.evaluation.perplexity is not None:
        asked = recipe.evaluation.perplexity.sequence_length
        lengths["evaluation.perplexity.sequence_length"] = asked
    context.check_lengths(config, lengths)


def check_ids(
    config: Any, tokenizer: Any, read: Mapping[str, ArtifactRef | None], store: Store
) -> None:
    """A tokenizer is the model's, and all tokens of what is read, by the setting that names it,
    have a row in its embedding. Windows with images fit into the context.

    Raises:
        ContextError: naming the token, or the setting.
    """
    for line in context.check_tokenizer(config, tokenizer):
        get_run_logger().warning(line)
    for setting, artifact in read.items():
        for each in tokenized_data.load_inputs(artifact, store, 1 << 30) if artifact else []:
            ids = each["input_ids"]
            context.check_lengths(config, {f"{setting}: a window": ids.shape[1]})
            context.check_ids(config, tokenizer, ids, setting)
