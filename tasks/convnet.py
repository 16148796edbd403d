"""The stages of the second pipeline, each found in the store where it was computed before.

images           both splits, as safetensors
float-networks   the trained parameters
classifiers      model.onnx and its manifest; the float graph too, as a scheme of nothing
image-scores     a score an image, and how the integer kernels compare with the file as written
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dpq_core.arithmetic.distance import distance
from dpq_core.convnet.artifact import (
    ArtifactError,
    WeightSizes,
    read_manifest,
    save_classifier,
)
from dpq_core.convnet.executor import (
    Classifier,
    kernel_counts,
    latencies,
    other_answers,
    too_many,
)
from dpq_core.convnet.graph import Prepared
from dpq_core.convnet.images import (
    Images,
    ImageSet,
    load_images,
    read_images,
    save_images,
    sources,
)
from dpq_core.convnet.networks import build_network, network_file
from dpq_core.convnet.noise import signal_to_noise, worst
from dpq_core.convnet.quantize import fine_tune, post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvRecipe, ConvScheme, NetworkSection
from dpq_core.convnet.train import fit, predict, score, seeded
from dpq_core.digests import digest, file_digest, write_json
from dpq_core.evaluation.scores import Scores, load_scores, save_scores
from dpq_core.machine.device import freed_memory_kept
from dpq_core.machine.device_kinds import kind_of
from dpq_core.recipe import ModelSection
from dpq_core.verdict.gates import Verdict
from infra.registry import Registry
from infra.store import ArtifactRef, Store
from tasks.register import Base, Entry, Registration, enter
from tasks.support.model import resolve
from tasks.support.progress import stepper
from tasks.support.stages import computed_by

FLOAT = ConvScheme(weights=None, activations=None)
Method = Literal["post-training", "fine-tuned"]

_IMAGES, _WEIGHTS = "images.safetensors", "weights.safetensors"
_SCORES, _CHECKS = "scores.parquet", "checks.json"
_PROBES = 64  # images on which a written model must be the one that was made
_BATCH = 32  # images at a time, scored
# Of the logits' norm: an activation that is rounded the other way moves all that follow.
_OTHER_LOGITS = 0.1
_CHECKED = 512  # images, on which the file is run as it is written, several times slower


@dataclass(frozen=True)
class ImageScores:
    """A classifier on the held-out images. kernels: how many of its layers run in integers, and how
    many in floating point. wrong: why the kernels are not what the file says, None where they are.
    """

    scores: Scores
    kernels: Mapping[str, int]
    other_answers: int  # of the integer kernels, compared with the file as it is written
    wrong: str | None

    @property
    def arithmetic(self) -> str:
        """What computed `scores`, counted where it ran."""
        integer, floating = self.kernels["integer"], self.kernels["float"]
        if integer and floating:
            return f"integer, {floating} of {integer + floating} layers simulated"
        return "integer" if integer else "simulated"


@task(name="images", cache_policy=NO_CACHE)
def images(recipe: ConvRecipe) -> ArtifactRef:
    """The recipe's images.

    Raises:
        ImagesError: they cannot be read.
    """
    section = recipe.images.model_dump(mode="json", exclude={"folder"})
    key = digest({**by_cpu("images"), "images": section, "files": sources(recipe.images)})

    def make(folder: Path) -> None:
        save_images(load_images(recipe.images), folder / _IMAGES)

    return Store(recipe.execution.store).get_or_make("images", key, make)[0]


@task(name="train", cache_policy=NO_CACHE)
def train(recipe: ConvRecipe, pictures: ArtifactRef) -> ArtifactRef:
    """The float network's parameters, trained where the recipe has epochs.

    Raises:
        NetworkError: a network that does not fit the images.
    """
    store = Store(recipe.execution.store)
    about = recipe.model_dump(mode="json", include={"network", "training"})
    of = _local(recipe.network)
    key = digest(
        {
            **by_cpu("float-networks"),
            "images": pictures.sha256,
            "weights": _weights_of(of),
            **about,
        }
    )

    def make(folder: Path) -> None:
        found, section = open_images(pictures, store), recipe.training
        with freed_memory_kept(), seeded(section.seed) as generator:
            network = build_network(of, found.shape, found.classes).train()
            step = stepper("train", section.epochs)
            fit(
                network,
                found.train,
                section,
                section.epochs,
                section.learning_rate,
                generator,
                step,
            )
        save_model(network, str(folder / _WEIGHTS))

    return store.get_or_make("float-networks", key, make)[0]


@task(name="quantize classifier", cache_policy=NO_CACHE)
def quantize_classifier(
    recipe: ConvRecipe,
    scheme: ConvScheme,
    method: Method,
    pictures: ArtifactRef,
    trained: ArtifactRef,
) -> ArtifactRef:
    """A classifier under a scheme, written and read back.

    Raises:
        ExportError, ArtifactError: torch.export does not take the network, or what it wrote is not
            what was made.
    """
    store = Store(recipe.execution.store)
    fields = {"calibration"} if method == "post-training" else {"training", "qat"}
    if recipe.qat.start == "post-training":
        fields.add("calibration")
    about = {
        "method": method,
        "scheme": scheme.model_dump(mode="json"),
        "network": recipe.network.model_dump(mode="json"),
        "pictures": asdict(recipe.images.pictures),
        **recipe.model_dump(mode="json", include=fields if scheme != FLOAT else set()),
    }
    made_of = {"trained": trained.sha256, "images": pictures.sha256}
    key = digest({**by_cpu("classifiers"), **made_of, **about})

    def make(folder: Path) -> None:
        found = open_images(pictures, store)
        network = open_network(recipe, found, trained)
        with freed_memory_kept():
            made = _quantized(recipe, scheme, method, found, network)
        content = {**about, **made_of, "classes": found.classes, "names": found.names}
        pixels = {"size": found.shape[1], "channels": found.shape[0]}
        content["pictures"] = pixels | about["pictures"]
        if method == "post-training" and scheme != FLOAT:
            content["signal_to_noise"] = _noise(network, made, found.train)
        save_classifier(folder, made, found.train.inputs(slice(2)), content)
        _check_written(folder, made, found.test.first(_PROBES))

    return store.get_or_make("classifiers", key, make)[0]


@task(name="score classifier", cache_policy=NO_CACHE)
def score_classifier(
    recipe: ConvRecipe, classifier: ArtifactRef, pictures: ArtifactRef
) -> ImageScores:
    """Accuracy on the held-out images of the file as onnxruntime runs it, and where that is in
    integers, how many other answers the same file gives in floating point."""
    store = Store(recipe.execution.store)
    of = {"classifier": classifier.sha256, "images": pictures.sha256}
    key = digest({**by_cpu("image-scores"), **of})

    def make(folder: Path) -> None:
        test, of = open_images(pictures, store).test, store.open(classifier)
        kernels, other = kernel_counts(of), 0
        step = stepper("score", -(-len(test) // _BATCH))
        logits = predict(Classifier(of), test, _BATCH, step)
        if kernels["integer"]:
            few = test.first(_CHECKED)
            step = stepper("check", -(-len(few) // _BATCH))
            written = predict(Classifier(of, "as written"), few, _BATCH, step)
            other = other_answers(logits[: len(few)], written)
        save_scores(score(logits, test, recipe.images.source), folder / _SCORES)
        write_json(folder / _CHECKS, {"other_answers": other, "kernels": kernels})

    folder = store.open(store.get_or_make("image-scores", key, make)[0])
    scores, checks = load_scores(folder / _SCORES), json.loads((folder / _CHECKS).read_text())
    other, wrong = int(checks["other_answers"]), None
    checked = min(len(scores), _CHECKED)
    if too_many(other, checked):
        wrong = (
            f"integer kernels give another class than the file says for {other} of {checked}:"
            " where their sums saturate, set scheme.weights.reduce_range: true"
        )
    return ImageScores(scores, checks["kernels"], other, wrong)


@task(name="time classifier", cache_policy=NO_CACHE)
def time_classifier(
    recipe: ConvRecipe, baseline: ArtifactRef, classifier: ArtifactRef, pictures: ArtifactRef
) -> list[dict[str, float]]:
    """Milliseconds of the float file (batch norm folded) and of the quantized one, both run by
    onnxruntime, in one run; a row a batch size. Not stored: this machine, now."""
    store = Store(recipe.execution.store)
    train = open_images(pictures, store).train
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "float_ms": Classifier(store.open(baseline)),
        "int8_ms": Classifier(store.open(classifier)),
    }
    rows: list[dict[str, float]] = []
    for batch in recipe.benchmark.batches:
        x = train.inputs(torch.arange(batch) % len(train))
        row = latencies(models, x, recipe.benchmark.runs)
        rows.append({"batch": batch, **row, "speed_up": row["float_ms"] / row["int8_ms"]})
    return rows


@task(name="register classifier", cache_policy=NO_CACHE)
def register_classifier(
    tracking_uri: str,
    run_id: str,
    recipe: ConvRecipe,
    classifier: ArtifactRef,
    verdict: Verdict,
    champion_before: int | None,
    source: str | None = None,
) -> Registration:
    """A model version whose source is the classifier, in the store or at `source`; see
    `tasks.register`."""
    identity = digest([recipe.digest, classifier.sha256])
    tags = {"recipe_digest": recipe.digest, "checkpoint_sha256": classifier.sha256}
    address = source or classifier.uri
    entry = Entry(
        recipe.registered_name, identity, address, run_id, base_of_classifier(recipe), tags
    )
    store = Store(recipe.execution.store)
    return enter(Registry(tracking_uri), store, entry, verdict, champion_before)


def base_of_classifier(recipe: ConvRecipe) -> Base:
    """What a release of a classifier is made of."""
    return Base(recipe.base_model, any=recipe.registry.any_base_model)


def sizes_of(classifier: ArtifactRef) -> WeightSizes:
    """What its manifest says of its weights."""
    fields: Mapping[str, Any] = read_manifest(classifier.folder)["weights"]
    return WeightSizes(
        fields["float_bytes"],
        fields["stored_bytes"],
        fields["grid_bytes"],
        fields["file_bytes"],
        tuple(fields["float_layers"]),
    )


def left_in_float(classifier: ArtifactRef) -> dict[str, str]:
    """Layers that no scheme quantizes → why."""
    left: dict[str, str] = read_manifest(classifier.folder)["left"]
    return left


def classes_of(classifier: ArtifactRef) -> int:
    return int(read_manifest(classifier.folder)["classes"])


def worst_layers(classifier: ArtifactRef) -> list[dict[str, Any]]:
    """Those which rounding moves most: a row a layer; none of a network that was fine-tuned."""
    noise = read_manifest(classifier.folder).get("signal_to_noise", {})
    return [{"layer": name, "signal to noise, dB": db} for name, db in worst(noise).items()]


def _noise(network: nn.Module, made: Prepared, pictures: Images) -> dict[str, float]:
    before = post_training(network, pictures, FLOAT, CalibrationSection())
    noise = signal_to_noise(before, made, pictures.first(_BATCH).inputs(slice(None)))
    return {name: round(db, 2) for name, db in noise.items() if math.isfinite(db)}


def _check_written(folder: Path, made: Prepared, probe: Images) -> None:
    """Raises ArtifactError where the file is another network than the graph."""
    with torch.no_grad():
        expected = predict(made.graph, probe)
    off = distance(predict(Classifier(folder, "as written"), probe), expected)
    if not off < _OTHER_LOGITS:
        raise ArtifactError(
            f"{folder}: the written model's logits differ by {100 * off:.1f} % of their norm"
            f" from those of the one made: at most {100 * _OTHER_LOGITS:g} % comes of rounding"
        )


def by_cpu(stage: str) -> dict[str, Any]:
    """What computes it, for a key: these networks run on the CPU."""
    return computed_by(stage, kind_of("cpu").arithmetic(0))


def _weights_of(network: NetworkSection) -> dict[str, str]:
    """SHA-256 of the files that a network with an `id` is read from: another's weights may come to
    lie at the same path, or under the same name on the hub.

    Raises:
        CheckpointError, NetworkError: they are not there.
    """
    if network.kind == "exported":
        return {"archive": file_digest(network_file(network))}
    if network.id is None:
        return {}
    folder = Path(network.id)
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _local(network: NetworkSection) -> NetworkSection:
    """The section with the folder of what its `id` stands for now, so that what is read is what was
    named."""
    if network.kind != "transformers" or network.id is None:
        return network
    folder, _ = resolve(ModelSection(id=network.id))
    return network.model_copy(update={"id": str(folder)})


def open_images(pictures: ArtifactRef, store: Store) -> ImageSet:
    return read_images(store.open(pictures) / _IMAGES)


def open_network(recipe: ConvRecipe, found: ImageSet, trained: ArtifactRef) -> nn.Module:
    with seeded(recipe.training.seed):
        network = build_network(_local(recipe.network), found.shape, found.classes)
    load_model(network, str(trained.folder / _WEIGHTS))
    return network


def _quantized(
    recipe: ConvRecipe, scheme: ConvScheme, method: Method, found: ImageSet, network: nn.Module
) -> Prepared:
    if method == "post-training":
        batches = min(
            recipe.calibration.batches, -(-len(found.train) // recipe.calibration.batch_size)
        )
        step = stepper("calibrate", batches)
        return post_training(network, found.train, scheme, recipe.calibration, step)
    with seeded(recipe.training.seed) as generator:
        step = stepper("fine-tune", recipe.qat.epochs)
        return fine_tune(
            network,
            found.train,
            scheme,
            recipe.training,
            recipe.qat,
            recipe.calibration,
            generator,
            step,
        )
