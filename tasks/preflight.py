"""Everything that can be wrong with a recipe's inputs, found before any long work starts."""

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE
from transformers import AutoTokenizer

from dpq_core.accuracy import check_suites
from dpq_core.device import resolve_device
from dpq_core.plan import Plan, plan_layers
from dpq_core.reader import CheckpointError
from dpq_core.recipe import Recipe
from dpq_core.streaming import StreamedModel
from infra.store import ArtifactRef, Store
from tasks import windows
from tasks.evaluate import suites_folder
from tasks.model import Model, inspect


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked: a model, its plan, and tokens.

    perplexity: None where the recipe measures none.
    """

    model: Model
    plan: Plan
    calibration: ArtifactRef
    perplexity: ArtifactRef | None


@task(name="preflight", cache_policy=NO_CACHE)
def preflight(recipe: Recipe) -> Inputs:
    """Check device, model, layers, suites and data sets; tokenise the data sets.

    Raises:
        CheckpointError, DataError, DeviceError, SuiteError: one line that says what and where.
    """
    resolve_device(recipe.execution.device)
    store = Store(recipe.execution.store)
    store.clean()
    model = inspect(recipe.model, store)
    plan = plan_layers(StreamedModel(model.folder), recipe.scheme)
    if recipe.evaluation.suites:
        check_suites(recipe.evaluation.suites, suites_folder(recipe.evaluation))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.folder)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model.folder}: no usable tokenizer: {first_line}") from error
    section = recipe.evaluation.perplexity
    return Inputs(
        model=model,
        plan=plan,
        calibration=windows.store_calibration(recipe.calibration, tokenizer, store),
        perplexity=windows.store_perplexity(section, tokenizer, store) if section else None,
    )
