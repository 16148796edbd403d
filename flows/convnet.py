"""The second pipeline: a convolutional classifier in integers, measured, gated, registered.

float baseline → post-training quantization → gates → more bits, or fine-tuning, where they fail
→ register
"""

from dataclasses import asdict, dataclass
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact

from dpq_core.convnet.executor import saturates
from dpq_core.convnet.gates import accuracy_change, chance_warning, float_checks, judge_classifier
from dpq_core.convnet.recipe import ConvRecipe, ConvScheme
from dpq_core.convnet.repair import bits_within, mean_bits, raised
from dpq_core.errors import InputError
from dpq_core.machine.device import share_machine
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.halves import ALL, CHOOSING, JUDGING
from flows.reporting.prefect_artifacts import publish_verdict
from flows.running.liveness import attended
from infra.registry import Registry
from infra.registry.tracking import TrackedRun, tracked_run, tracking_store
from infra.settings import home
from infra.store import ArtifactRef, Store
from tasks.convnet import (
    FLOAT,
    ImageScores,
    Method,
    base_of_classifier,
    classes_of,
    images,
    left_in_float,
    quantize_classifier,
    register_classifier,
    score_classifier,
    sizes_of,
    time_classifier,
    train,
    worst_layers,
)
from tasks.layer_losses import layer_losses
from tasks.log import log_metrics, log_verdict
from tasks.publish import destination_of, published
from tasks.register import Registration


def _paper(
    bits: int = 8, per: str = "channel", symmetric: bool = True, activations: int | None = 8
) -> ConvScheme:
    """A row of the whitepaper's: the nearest codes, and nothing given back."""
    return ConvScheme.model_validate(
        {
            "weights": {"bits": bits, "per": per, "symmetric": symmetric, "rounding": "nearest"},
            "activations": {"bits": activations} if activations else None,
            "bias_correction": False,
        }
    )


def _compensated(bits: int, rounding: str, biases: bool, per: str = "channel") -> ConvScheme:
    symmetric = per == "channel"
    weights = {"bits": bits, "rounding": rounding, "per": per, "symmetric": symmetric}
    return ConvScheme.model_validate({"weights": weights, "bias_correction": biases})


# The whitepaper's ladder, and what is given back after training: how each row is made, its scheme.
LADDER: dict[str, tuple[Method, ConvScheme]] = {
    "weights only, per channel": ("post-training", _paper(activations=None)),
    "weights only, per layer": ("post-training", _paper(8, "layer", False, None)),
    "activations only": ("post-training", ConvScheme(weights=None)),
    "per channel": ("post-training", _paper()),
    "per channel, asymmetric": ("post-training", _paper(symmetric=False)),
    "per layer": ("post-training", _paper(8, "layer", False)),
    "4-bit weights, per channel": ("post-training", _paper(4)),
    "4-bit weights, per layer": ("post-training", _paper(4, "layer", False)),
    "4-bit activations": ("post-training", _paper(activations=4)),
    "16 bits": ("post-training", _paper(16, activations=16)),
    "biases": ("post-training", _compensated(8, "nearest", True)),
    "codes and biases": ("post-training", _compensated(8, "outputs", True)),
    "per layer, biases": ("post-training", _compensated(8, "nearest", True, "layer")),
    "per layer, codes and biases": ("post-training", _compensated(8, "outputs", True, "layer")),
    "4-bit weights, biases": ("post-training", _compensated(4, "nearest", True)),
    "4-bit weights, codes": ("post-training", _compensated(4, "outputs", False)),
    "4-bit weights, codes and biases": ("post-training", _compensated(4, "outputs", True)),
    "QAT per channel": ("fine-tuned", ConvScheme()),
    "QAT per layer": ("fine-tuned", _paper(8, "layer", False)),
    "QAT 4-bit weights, per channel": ("fine-tuned", _paper(4)),
    "QAT 4-bit weights, codes and biases": ("fine-tuned", _compensated(4, "outputs", True)),
    "QAT 4-bit activations": ("fine-tuned", _paper(activations=4)),
}


@dataclass(frozen=True)
class ConvRelease:
    """What came of a release; `method`: post-training, or fine-tuned where that failed."""

    verdict: Verdict
    method: Method
    classifier: str
    run_id: str
    registration: Registration
    attempts: list[dict[str, Any]]
    latency: list[dict[str, float]]
    notes: list[str]
    worst_layers: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The object that `dpq convnet --json` prints."""
        return {
            **self.verdict.as_dict(),
            "method": self.method,
            "classifier": self.classifier,
            "run_id": self.run_id,
            "model_version": self.registration.version,
            "registered_model": self.registration.name,
            "attempts": self.attempts,
            "latency": self.latency,
            "notes": self.notes,
            "worst_layers": self.worst_layers,
        }


@dataclass(frozen=True)
class _Measured:
    """A classifier, its scores, and what the gates say where it is looked at: on all images, or on
    those that choose whether to fine-tune."""

    method: Method
    classifier: ArtifactRef
    scheme: ConvScheme
    found: ImageScores
    look: Verdict

    @property
    def missed(self) -> list[str]:
        """Gates."""
        checks = [] if self.found.wrong is None else ["integers"]
        return checks + [name for name, m in self.look.metrics.items() if not m.passed]

    def as_row(self) -> dict[str, Any]:
        metrics = self.look.metrics
        return {
            "method": self.method,
            "layers raised": len(self.scheme.weights.layers) if self.scheme.weights else 0,
            "gates missed": ", ".join(self.missed) or "none",
            "accuracy": metrics["accuracy"].candidate,
            "delta": metrics["accuracy"].delta,
            "arithmetic": self.found.arithmetic,
            "other_answers": self.found.other_answers,
            "file_bytes": sizes_of(self.classifier).file_bytes,
        }


@dataclass(frozen=True)
class _Inputs:
    """What every classifier of a recipe is made from and compared with."""

    recipe: ConvRecipe
    pictures: ArtifactRef
    trained: ArtifactRef
    baseline: ArtifactRef
    scores: ImageScores

    @classmethod
    def of(cls, recipe: ConvRecipe, pictures: ArtifactRef) -> "_Inputs":
        trained = train(recipe, pictures)
        baseline = quantize_classifier(recipe, FLOAT, "post-training", pictures, trained)
        scores = score_classifier(recipe, baseline, pictures)
        inputs = cls(recipe, pictures, trained, baseline, scores)
        for note in inputs.notes:
            get_run_logger().warning(note)
        for which in (CHOOSING, JUDGING) if recipe.looks else (ALL,):
            inputs.judge(baseline, scores, which).or_error("the float network")
        return inputs

    def measure(self, method: Method, scheme: ConvScheme, which: str = ALL) -> _Measured:
        here = scheme.on(saturates())
        made = quantize_classifier(self.recipe, here, method, self.pictures, self.trained)
        found = score_classifier(self.recipe, made, self.pictures)
        return _Measured(method, made, scheme, found, self.judge(made, found, which))

    def repaired(self, which: str) -> list[_Measured]:
        """Classifiers of more and more bits, until one misses no gate or the budget is spent."""
        section, attempts = self.recipe.repair, list[_Measured]()
        measured = layer_losses(self.recipe, self.pictures, self.trained)
        least = mean_bits(measured, self.recipe.scheme)
        for part in range(1, section.max_rounds + 1):
            budget = least + (section.max_bits_per_weight - least) * part / section.max_rounds
            scheme = raised(self.recipe.scheme, bits_within(measured, budget))
            attempts.append(self.measure("post-training", scheme, which))
            if not attempts[-1].missed:
                break
        return attempts

    def judge(self, classifier: ArtifactRef, found: ImageScores, which: str) -> Verdict:
        """On the images that `which` says (`dpq_core.verdict.halves`)."""
        gates, of = self.recipe.gates, (self.scores.scores, found.scores)
        change = accuracy_change(*of, gates.confidence, which)
        checks = {"integers": found.wrong, **float_checks(self.scores.scores, gates)}
        before = sizes_of(self.baseline).file_bytes
        limited = "images.test_samples" if self.recipe.images.test_samples else None
        return judge_classifier(change, sizes_of(classifier), before, checks, gates, limited, which)

    @property
    def notes(self) -> list[str]:
        """What a reader should know before anything is quantized: whether the network guesses, what
        stays in floating point and why, and whether a bit is left out for this processor."""
        guess = chance_warning(self.scores.scores, classes_of(self.baseline))
        left = [f"{n} stays float: {why}" for n, why in left_in_float(self.baseline).items()]
        scheme = self.recipe.scheme
        weights, here = scheme.weights, scheme.on(saturates()).weights
        chosen = here is not None and weights != here and here.reduce_range
        reduced = ["weights of 7 bits: this processor's sums of products of bytes saturate"]
        return [*([guess] if guess else []), *left, *(reduced if chosen else [])]

    def latency(self, classifier: ArtifactRef) -> list[dict[str, float]]:
        return time_classifier(self.recipe, self.baseline, classifier, self.pictures)


@flow(name="convnet")
@attended
def convnet(recipe: ConvRecipe) -> ConvRelease:
    """Quantize a classifier, measure it against the float one, and promote it within the gates.

    With `repair.enabled` or `qat.enabled` half of the images say whether to give more bits or to
    fine-tune, and the other half judge.

    Raises:
        The errors of the stages; a rejection is a result and no error.
    """
    share_machine(recipe.execution.threads_per_worker)
    Store(recipe.execution.store).clean()
    tracking_uri, artifact_root = tracking_store(home())
    name, registry = recipe.registered_name, Registry(tracking_uri)
    destination = destination_of(None, registry)
    champion = registry.champion(name)
    tags = {"recipe_digest": recipe.digest, "champion_at_start": str(champion or "")}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        pictures = images(recipe)
        base_of_classifier(recipe).check(registry, name, champion)
        inputs = _Inputs.of(recipe, pictures)
        look, judges = (CHOOSING, JUDGING) if recipe.looks else (ALL, ALL)
        attempts = [inputs.measure("post-training", recipe.scheme, look)]
        if attempts[0].missed and recipe.repair.enabled:
            attempts += inputs.repaired(look)
        if attempts[-1].missed and recipe.qat.enabled:
            attempts.append(inputs.measure("fine-tuned", recipe.scheme, look))
        last = attempts[-1]
        judged = inputs.judge(last.classifier, last.found, judges).or_error("the classifier")
        latency = inputs.latency(last.classifier) if last.found.kernels["integer"] else []
        rows = [attempt.as_row() for attempt in attempts]
        source = published(destination, registry, judged, name, last.classifier)
        registration = register_classifier(
            tracking_uri, run.run_id, recipe, last.classifier, judged, champion, source
        )
        verdict = registration.verdict
        worst = worst_layers(attempts[0].classifier)
        run.log_table(worst, "worst-layers")
        _log(run, recipe, verdict, last.classifier, rows, latency)
        publish_verdict(verdict, last.classifier.folder, registration, run.url)
    folder = str(last.classifier.folder)
    return ConvRelease(
        verdict,
        last.method,
        folder,
        run.run_id,
        registration,
        rows,
        latency,
        inputs.notes,
        worst,
    )


@flow(name="convnet ladder")
@attended
def convnet_ladder(
    recipe: ConvRecipe, only: list[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The whitepaper's comparisons on one network: `rows`, and `latency` of the integer one.

    Args:
        only: names of rows; without, all, but for those that are fine-tuned unless `qat.enabled`.

    Raises:
        LadderError: no such row.
    """
    chosen = _rows(recipe, only)
    share_machine(recipe.execution.threads_per_worker)
    inputs = _Inputs.of(recipe, images(recipe))
    rows = [{"variant": "float", "accuracy": inputs.scores.scores.value, "delta": 0.0}]
    rows += [_ladder_row(inputs, name, *chosen[name]) for name in chosen]
    integers = inputs.measure(*LADDER["per channel"])
    latency = inputs.latency(integers.classifier)
    create_table_artifact(rows, key="convnet-ladder", description=recipe.network.kind)
    tracking_uri, artifact_root = tracking_store(home())
    name, tags = f"{recipe.registered_name} ladder", {"recipe_digest": recipe.digest}
    with tracked_run(tracking_uri, recipe.registry.experiment, name, tags, artifact_root) as run:
        run.log_table(rows, "ladder")
        run.log_table(latency, "latency")
    return {"rows": rows, "latency": latency}


class LadderError(InputError):
    """A row that the ladder does not have."""


def _rows(recipe: ConvRecipe, only: list[str] | None) -> dict[str, tuple[Method, ConvScheme]]:
    for name in only or ():
        if name not in LADDER:
            raise LadderError(f"row {name!r} is unknown: there are {'; '.join(LADDER)}")
    left_out = () if recipe.qat.enabled else ("fine-tuned",)
    known = [name for name, (method, _) in LADDER.items() if method not in left_out]
    return {name: LADDER[name] for name in only or known}


def _ladder_row(inputs: _Inputs, name: str, method: Method, scheme: ConvScheme) -> dict[str, Any]:
    measured = inputs.measure(method, scheme)
    metric, sizes = measured.look.metrics["accuracy"], sizes_of(measured.classifier)
    before = sizes_of(inputs.baseline).file_bytes
    return {
        "variant": name,
        "accuracy": metric.candidate,
        "delta": metric.delta,
        "interval": list(metric.interval or ()),
        "turned_right": metric.turned_right,
        "turned_wrong": metric.turned_wrong,
        "arithmetic": measured.found.arithmetic,
        "other_answers": measured.found.other_answers,
        "file_bytes": sizes.file_bytes,
        "size_ratio": sizes.ratio(before),
    }


def _log(
    run: TrackedRun,
    recipe: ConvRecipe,
    verdict: Verdict,
    classifier: ArtifactRef,
    attempts: list[dict[str, Any]],
    latency: list[dict[str, float]],
) -> None:
    """To MLflow, and on the Prefect run's page."""
    run.log_params(recipe.model_dump(mode="json"))
    log_metrics(run, verdict.metrics)
    log_verdict(run, verdict)
    run.log_dict(asdict(sizes_of(classifier)), "weights.json")
    run.log_table(attempts, "attempts")
    for row in latency:
        run.log_metrics({f"latency.{key}.{row['batch']}": row[key] for key in row})
    create_table_artifact(attempts, key="attempts", description="Post-training, fine-tuned")
    if latency:
        create_table_artifact(_shown(latency), key="latency", description="Milliseconds")


def _shown(latency: list[dict[str, float]]) -> list[dict[str, Any]]:
    return [{key: round(value, 3) for key, value in row.items()} for row in latency]
