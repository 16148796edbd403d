"""Everything that can be wrong with a recipe's inputs, found before any long work starts."""

from dataclasses import dataclass

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.device import resolve_device
from dpq_core.plan import Plan, plan_layers
from dpq_core.recipe import Recipe
from dpq_core.streaming import StreamedModel
from infra.store import ArtifactRef, Store
from tasks import windows
from tasks.evaluate import EvaluationData, prepare
from tasks.model import Model, inspect, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked: a model, its plan, tokens, and the evaluation's data."""

    model: Model
    plan: Plan
    calibration: ArtifactRef
    evaluation: EvaluationData


@task(name="preflight", cache_policy=NO_CACHE)
def preflight(recipe: Recipe) -> Inputs:
    """Check device, model, layers, suites and data sets; tokenise the data sets.

    Raises:
        CheckpointError, DataError, DeviceError, MirrorError, SuiteError: one line that says what
            and where.
    """
    resolve_device(recipe.execution.device)
    store = Store(recipe.execution.store)
    store.clean()
    model = inspect(recipe.model, store)
    plan = plan_layers(StreamedModel(model.folder), recipe.scheme)
    tokenizer = load_tokenizer(model.folder)
    return Inputs(
        model=model,
        plan=plan,
        calibration=windows.store_calibration(recipe.calibration, tokenizer, store),
        evaluation=prepare(recipe.evaluation, tokenizer, store),
    )
