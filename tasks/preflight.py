"""Everything that can be wrong with a recipe's inputs, found before any long work starts."""

from dataclasses import dataclass, replace

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from dpq_core.device import resolve_device
from dpq_core.linear import stored_bytes
from dpq_core.plan import Plan, kept_lines, plan_layers
from dpq_core.recipe import Recipe, RecipeError
from infra.store import ArtifactRef, Store
from tasks import windows
from tasks.evaluate import EvaluationData, prepare
from tasks.model import Model, inspect, load_tokenizer, stream_of


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
    plan = plan_layers(stream_of(recipe, model), recipe.scheme, recipe.layers)
    for line in kept_lines(plan.skipped):
        get_run_logger().warning(line)
    _check_budget(recipe, plan)
    tokenizer = load_tokenizer(model.folder, recipe.model.trust_remote_code)
    return Inputs(
        model=model,
        plan=plan,
        calibration=windows.store_calibration(recipe.calibration, tokenizer, model.folder, store),
        evaluation=prepare(recipe.evaluation, tokenizer, store),
    )


def replanned(inputs: Inputs, recipe: Recipe) -> Inputs:
    """The same model and data with a plan for `recipe`, whose scheme or layers may differ."""
    stream = stream_of(recipe, inputs.model)
    return replace(inputs, plan=plan_layers(stream, recipe.scheme, recipe.layers))


def _check_budget(recipe: Recipe, plan: Plan) -> None:
    taken = sum(stored_bytes(layer.rows, layer.features, layer.scheme) for layer in plan.layers)
    bits = 8 * taken / sum(layer.weights for layer in plan.layers)
    if recipe.repair.enabled and bits > recipe.repair.max_bits_per_weight:
        raise RecipeError(
            f"repair.max_bits_per_weight is {recipe.repair.max_bits_per_weight:g}, and the scheme"
            f" alone takes {bits:.2f}: raise it, or choose a larger scheme.group_size"
        )
