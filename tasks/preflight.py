"""Everything that can be wrong with a recipe's inputs, found before any long work starts."""

import logging
from dataclasses import dataclass, replace

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from dpq_core.benchmark.formats_timed import Checkpoint
from dpq_core.benchmark.throughput import check_context
from dpq_core.calibration.reduction_tree import WINDOWS
from dpq_core.calibration.required_tokens import CalibrationTokens
from dpq_core.checkpoint.exports import check_exportable, planned_targets
from dpq_core.checkpoint.exports.format import ExportError
from dpq_core.evaluation.room import Room, Sizes
from dpq_core.footprint import Footprint, footprint
from dpq_core.layer.storage import stored_bytes
from dpq_core.machine.device import DeviceError, resolve_device
from dpq_core.model.kv_cache import cached_attentions, check_cache
from dpq_core.model.plan import Plan, kept_lines, plan_layers
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.recipe import Recipe, RecipeError
from dpq_core.recipe.layer_choices import chosen_scheme
from infra.store import ArtifactRef, Store
from tasks.evaluate import EvaluationData, compared_tokens, prepare
from tasks.score import memory_for_states
from tasks.support import fitting, tokenized_data
from tasks.support.activation_store import load_leaves
from tasks.support.memory import check_room, check_scoring_room
from tasks.support.model import Model, inspect, load_tokenizer, stream_of
from tasks.support.worker import Worker, about_worker, workers_here


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked: a model, its plan and what that takes, tokens, and the
    evaluation's data and what that takes. worker: what the run's workers are. leaves: parts of the
    calibration samples that tasks can share. kept_states: bytes of the last hidden states that are
    kept where candidates are compared."""

    worker: Worker
    model: Model
    plan: Plan
    footprint: Footprint
    calibration: ArtifactRef
    leaves: int
    evaluation: EvaluationData
    scoring: Room
    kept_states: int


@task(name="preflight", cache_policy=NO_CACHE)
def preflight(recipe: Recipe) -> Inputs:
    """Check device, model, layers, exports, suites and data sets; tokenise the data sets.

    Raises:
        CheckpointError, ContextError, DataError, DeviceError, ExportError, MirrorError,
            RoomError, RuntimeUnavailableError, SuiteError, VariantError: one line that says what
            and where.
    """
    worker = about_worker.submit(recipe).result()
    store = Store(recipe.execution.store)
    store.clean()
    if recipe.execution.scratch:
        Store(recipe.execution.scratch).clean()
    model = inspect(recipe.model, store, recipe.scheme.keeps)
    stream = stream_of(recipe, model)
    plan = plan_layers(stream, recipe.scheme, recipe.layers)
    for line in kept_lines(plan.skipped):
        get_run_logger().warning(line)
    _check_cache(recipe, plan, stream)
    _check_budget(recipe, plan)
    _check_exports(recipe, plan, stream.dtype)
    _check_benchmark(recipe, model)
    config = stream.model.config.get_text_config()
    fitting.check_lengths(recipe, config)
    needed = _footprint(plan, recipe, worker, stream.reader.widens)
    check_room(recipe, needed, store, worker)
    sizes = Sizes.of(stream, recipe.layers)
    scoring = Room.of(sizes, memory_for_states(recipe), worker.memory is not None)
    if recipe.evaluation.perplexity or recipe.evaluation.suites:
        check_scoring_room(recipe.execution, scoring, worker)
    tokenizer = load_tokenizer(model.folder, recipe.model.trust_remote_code)
    calibration = tokenized_data.store_calibration(
        recipe.calibration, tokenizer, model.folder, store
    )
    _check_tokens(recipe, plan, tokenized_data.count_tokens(calibration, store))
    evaluation = prepare(recipe.evaluation, tokenizer, config, store, worker.arithmetic)
    compared = compared_tokens(evaluation, store) if recipe.evaluation.perplexity else 0
    read = {"calibration": calibration, "evaluation.perplexity": evaluation.perplexity}
    fitting.check_ids(config, tokenizer, read, store)
    return Inputs(
        worker=worker,
        model=model,
        plan=plan,
        footprint=needed,
        calibration=calibration,
        leaves=_checked_leaves(recipe, calibration, store),
        evaluation=evaluation,
        scoring=scoring,
        kept_states=sizes.kept(compared),
    )


def replanned(inputs: Inputs, recipe: Recipe) -> Inputs:
    """The same model and data with a plan for `recipe`, whose scheme or layers may differ."""
    stream = stream_of(recipe, inputs.model)
    plan = plan_layers(stream, recipe.scheme, recipe.layers)
    needed = _footprint(plan, recipe, inputs.worker, stream.reader.widens)
    return replace(inputs, plan=plan, footprint=needed)


def _footprint(plan: Plan, recipe: Recipe, worker: Worker, fp8: bool) -> Footprint:
    execution = recipe.execution
    return footprint(
        plan,
        recipe.calibration,
        execution.shards,
        execution.blocks_per_task,
        workers_here(execution) if worker.name == "cpu" else 1,
        on_device=worker.memory is not None,
        fp8=fp8,
    )


def _check_benchmark(recipe: Recipe, model: Model) -> None:
    """What a release is to time can be made of the model, and has room in its context."""
    if not recipe.benchmark.devices:
        return
    if recipe.gates.throughput_ratio is not None:
        _check_timed(recipe)
    source = Checkpoint.of(recipe, model.folder)
    check_context(source.empty().config.get_text_config(), recipe.benchmark)
    for variant in recipe.benchmark.variants:
        source.linears(variant)


def _check_timed(recipe: Recipe) -> None:
    """A gate on speed is of devices that are here: else no release could end with a verdict."""
    for kind in recipe.benchmark.devices:
        try:
            resolve_device(kind)
        except DeviceError as error:
            raise RecipeError(
                f"gates.throughput_ratio is {recipe.gates.throughput_ratio:g}, and this machine has"
                f" no {kind} device to measure it on: run where there is one, or leave {kind} out"
                " of benchmark.devices"
            ) from error


def _checked_leaves(recipe: Recipe, calibration: ArtifactRef, store: Store) -> int:
    leaves, shards = len(load_leaves(recipe, calibration, store)), recipe.execution.shards
    if (shards or 1) > leaves:
        raise RecipeError(
            f"execution.shards: {shards}: the calibration windows make {leaves} leaves of at least"
            f" {WINDOWS}, which no more tasks than that can share: lower it, or raise"
            " calibration.samples"
        )
    return leaves


def _check_tokens(recipe: Recipe, plan: Plan, got: int) -> None:
    tokens = CalibrationTokens.of_plan(recipe.calibration, got, plan.layers)
    get_run_logger().log(
        logging.WARNING if tokens.got < tokens.asked else logging.INFO,
        "calibration: %s",
        tokens.line,
    )
    tokens.check(recipe.calibration.required_tokens_per_input)


def _check_cache(recipe: Recipe, plan: Plan, stream: StreamedModel) -> None:
    """Keys and values that are to be kept in FP8 are there, and calibration sees them."""
    if recipe.scheme.kv_cache == "none":
        return
    check_cache(empty_model(stream.reader.folder, recipe.model.trust_remote_code))
    watched = {layer.statistics for layer in plan.layers}
    for attention, made in cached_attentions(stream).items():
        if recipe.calibration.propagation == "groups" and made not in watched:
            raise RecipeError(
                f"scheme.kv_cache: propagation: groups passes {attention} only where a layer after"
                f" it is quantized, and {made} is not: set calibration.propagation: original"
            )


def _check_budget(recipe: Recipe, plan: Plan) -> None:
    taken = sum(stored_bytes(layer.rows, layer.features, layer.scheme) for layer in plan.layers)
    bits = 8 * taken / sum(layer.weights for layer in plan.layers)
    if recipe.repair.enabled and bits > recipe.repair.max_bits_per_weight:
        raise RecipeError(
            f"repair.max_bits_per_weight is {recipe.repair.max_bits_per_weight:g}, and the scheme"
            f" alone takes {bits:.2f}: raise it, or choose a larger scheme.group_size"
        )


def _check_exports(recipe: Recipe, plan: Plan, dtype: torch.dtype) -> None:
    """Every format takes every layer as it is planned, and as a repair may change it."""
    planned = planned_targets(plan, recipe.scheme, dtype)
    choices = recipe.repair.candidates if recipe.repair.enabled else []
    for name in recipe.export:
        check_exportable(name, planned)
        for choice in choices:
            scheme = chosen_scheme(recipe.scheme, choice)
            fitting = [t for t in planned if scheme.bits == 8 or t.features >= scheme.group_size]
            try:
                check_exportable(name, [replace(target, scheme=scheme) for target in fitting])
            except ExportError as error:
                raise ExportError(f"repair.candidates.{choice}: {error}") from error
