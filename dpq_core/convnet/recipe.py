"""A recipe of the second pipeline: an image classifier, how its weights and activations are
quantized, and what that may cost.

The words are those of Krishnamoorthi's whitepaper (2018): weights a scale per channel or per layer,
symmetric or affine; activations a scale per layer, affine; either left out (weight-only,
activation-only); quantization-aware training where post-training quantization is not enough.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpq_core.digests import digest
from dpq_core.recipe import ExecutionSection, read_recipe, validated
from dpq_core.recipe.registered_names import ExperimentName, RegisteredName, default_name
from dpq_core.recipe.section import Section

Bits = Literal[4, 8, 16]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
PresetName = Literal["half", "imagenet", "inception", "efficientnet-lite"]


@dataclass(frozen=True)
class Preset:
    """How a picture becomes a network's input: resized, the middle cut out, (x / 255 − mean) / std.

    crop_ratio: side of what is cut out over the shorter side before.
    """

    crop_ratio: float
    interpolation: Interpolation
    mean: list[float]
    std: list[float]


# timm's names for the statistics are IMAGENET_DEFAULT and IMAGENET_INCEPTION.
PRESETS: dict[PresetName, Preset] = {
    "half": Preset(1.0, "bicubic", [0.5], [0.5]),
    "imagenet": Preset(0.875, "bilinear", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "inception": Preset(0.875, "bicubic", [0.5], [0.5]),
    "efficientnet-lite": Preset(0.875, "bicubic", [127 / 255], [128 / 255]),
}


class NetworkSection(Section):
    kind: Literal["mobilenet", "resnet", "transformers", "exported"] = Field(
        "mobilenet",
        description="a small network of dpq_core/convnet/networks.py, transformers', or an archive",
    )
    width: float = Field(1.0, gt=0, le=8, description="multiplies the small networks' channels")
    id: str | None = Field(
        None,
        description="transformers: hub id or folder of a trained classifier; exported: file of"
        " torch.export.save, for any number of images",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="transformers: model_type (mobilenet_v1, mobilenet_v2, resnet) and its fields",
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.kind == "transformers" and not (self.id or "model_type" in self.config):
            raise ValueError("kind transformers needs id, or config.model_type")
        if self.kind == "exported" and not self.id:
            raise ValueError("kind exported needs id, a file of torch.export.save")
        if self.id and self.kind in ("mobilenet", "resnet"):
            raise ValueError(f"id is of kinds transformers and exported, not of {self.kind}")
        if self.config and self.kind != "transformers":
            raise ValueError(f"config is of kind transformers, not of {self.kind}")
        return self


class ImagesSection(Section):
    source: Literal["digits", "idx", "datasets"] = Field(
        "digits", description="scikit-learn's digits, a folder of idx files, datasets.load_dataset"
    )
    folder: str | None = Field(None, description="idx: of the four files, gzipped or not")
    path: str | None = Field(None, description="datasets: hub id or builder (imagefolder)")
    data_dir: str | None = Field(None, description="datasets: folder of a builder's files")
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    size: int = Field(224, ge=8, description="datasets: side of the square that a network reads")
    preset: PresetName = Field(
        "half", description="how the network was trained to see pictures; the next four change it"
    )
    crop_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="datasets: size over the shorter side that pictures are resized to, before the"
        " middle is cut out",
    )
    interpolation: Interpolation | None = Field(None, description="datasets: of resizing")
    mean: list[float] | None = Field(
        None, min_length=1, description="of pixels in 0 … 1, for all channels or each"
    )
    std: list[float] | None = Field(None, min_length=1, description="deviation, as mean")
    train_samples: int | None = Field(None, ge=1, description="the first of the training images")
    test_samples: int | None = Field(None, ge=1, description="the first of the test images")

    @model_validator(mode="after")
    def _path_is_given(self) -> Self:
        needed = {"idx": "folder", "datasets": "path"}.get(self.source)
        if needed and not getattr(self, needed):
            raise ValueError(f"source {self.source} needs {needed}")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std is {self.std}: deviations are above zero")
        return self

    @property
    def pictures(self) -> Preset:
        """The preset, as changed."""
        own = {name: getattr(self, name) for name in Preset.__dataclass_fields__}
        return replace(PRESETS[self.preset], **{k: v for k, v in own.items() if v is not None})


class TrainingSection(Section):
    epochs: int = Field(10, ge=0, description="of the float network; 0 takes network.id as it is")
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(0.1, gt=0, description="largest; a cosine takes it to zero")
    weight_decay: float = Field(1e-4, ge=0)
    seed: int = 0


class WeightScheme(Section):
    bits: Bits = 8
    per: Literal["channel", "layer"] = "channel"
    symmetric: bool = True
    reduce_range: bool | None = Field(
        None,
        description="leave out a bit, for processors whose products of bytes saturate; null: where"
        " this one's do",
    )
    rounding: Literal["nearest", "outputs"] | None = Field(
        None,
        description="after training: outputs chooses codes that keep a layer's outputs; null: those"
        " where bits are 4, and else the nearest",
    )

    layers: dict[str, Bits] = Field(
        default_factory=dict, description="bits of single layers, by their names in the network"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.per == "layer" and self.symmetric:
            raise ValueError("weights per layer are asymmetric: set symmetric: false")
        return self

    def bits_of(self, layer: str) -> Bits:
        return self.layers.get(layer, self.bits)

    def in_bits(self, bits: Bits) -> "WeightScheme":
        """Of a layer. Eight bits are what saturates (`ConvScheme.on`)."""
        reduce = self.reduce_range and (bits == 8 or (bits == self.bits and not self.layers))
        return self.model_copy(update={"bits": bits, "reduce_range": reduce, "layers": {}})


class ActivationScheme(Section):
    bits: Bits = 8
    range: Literal["min_max", "moving_average", "percentile", "mse"] = Field(
        "moving_average", description="what the range of a layer's input is taken from"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of each end, with percentile")


class ConvScheme(Section):
    """What is quantized, and how; a part that is null stays in floating point."""

    weights: WeightScheme | None = WeightScheme()
    activations: ActivationScheme | None = ActivationScheme()
    bias_correction: bool = Field(
        True, description="after training: keep the mean of each channel of a layer's outputs"
    )

    @property
    def chooses_codes(self) -> bool:
        if self.weights is None:
            return False
        by_itself = "outputs" if self.weights.bits == 4 else "nearest"
        return (self.weights.rounding or by_itself) == "outputs"

    @property
    def corrects_biases(self) -> bool:
        return self.weights is not None and self.bias_correction

    @property
    def compensates(self) -> bool:
        return self.chooses_codes or self.corrects_biases

    def on(self, saturates: bool) -> "ConvScheme":
        """With `reduce_range` decided: whether the processor's products of bytes saturate."""
        if self.weights is None or self.weights.reduce_range is not None:
            return self
        bits = {self.weights.bits, *self.weights.layers.values()}
        eight = self.activations is not None and self.activations.bits == 8 and 8 in bits
        reduce = saturates and eight
        weights = self.weights.model_copy(update={"reduce_range": reduce})
        return self.model_copy(update={"weights": weights})


class CalibrationSection(Section):
    batches: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=1)
    compensation_pictures: int = Field(
        64,
        ge=1,
        description="held in memory at once: weights.rounding outputs, and bias_correction",
    )


class QatSection(Section):
    enabled: bool = Field(True, description="fine-tune where the post-training gate fails")
    epochs: int = Field(3, ge=1)
    frozen_epochs: int = Field(
        1, ge=0, description="of these, the last: batch norm uses its running statistics"
    )
    learning_rate: float = Field(0.01, gt=0)
    loss: Literal["labels", "distillation"] = Field(
        "labels",
        description="cross entropy with the pictures' classes, or with the float network's own"
        " probabilities for them, which needs no labels",
    )
    start: Literal["float", "post-training"] = Field(
        "float",
        description="the float network, whose batch norm goes on to learn, or what was quantized"
        " after training, batch norm folded",
    )
    average: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights; null: none"
    )

    @model_validator(mode="after")
    def _frozen_within(self) -> Self:
        if self.frozen_epochs > self.epochs:
            raise ValueError(f"frozen_epochs {self.frozen_epochs} exceed epochs {self.epochs}")
        return self


class ConvRepair(Section):
    enabled: bool = Field(False, description="give layers more bits where a gate fails")
    candidates: list[Bits] = Field([8, 16], min_length=1, description="bits besides the scheme's")
    max_bits_per_weight: float = Field(8.0, gt=4, le=16, description="budget of all layers")
    max_rounds: int = Field(3, ge=1, description="equal parts in which the budget is spent")
    pictures: int = Field(32, ge=1, description="of the training split, to measure losses on")


class ConvGates(Section):
    accuracy_drop: float = Field(2.0, gt=0, description="points; candidate must stay below")
    size_ratio: float = Field(
        3.5, ge=0, description="bytes of the float network's file over those of this one, at least"
    )
    float_accuracy_at_least: float | None = Field(
        None,
        ge=0,
        le=100,
        description="percent: below, the pictures are not what the network was trained to see",
    )
    confidence: float | None = Field(
        None, gt=0, lt=1, description="judge the worse end of this interval (0.95, say)"
    )
    allow_limited: bool = Field(False, description="judge on images.test_samples, not on all")


class BenchmarkSection(Section):
    batches: list[int] = Field([1, 32], min_length=1, description="images at a time")
    runs: int = Field(50, ge=3, description="timed, float and integer in turn; medians are shown")


class ConvRegistry(Section):
    name: RegisteredName | None = Field(
        None, description="registered model; by default of the network and its images"
    )
    any_base_model: bool = Field(
        False, description="take the alias from a champion that was made of another network"
    )
    experiment: ExperimentName = "dpq-convnet"


class ConvRecipe(Section):
    network: NetworkSection = NetworkSection()
    images: ImagesSection = ImagesSection()
    training: TrainingSection = TrainingSection()
    scheme: ConvScheme = ConvScheme()
    calibration: CalibrationSection = CalibrationSection()
    repair: ConvRepair = ConvRepair()
    qat: QatSection = QatSection()
    gates: ConvGates = ConvGates()
    benchmark: BenchmarkSection = BenchmarkSection()
    registry: ConvRegistry = ConvRegistry()
    execution: ExecutionSection = ExecutionSection(device="cpu")

    @field_validator("execution")
    @classmethod
    def _on_the_cpu(cls, execution: ExecutionSection) -> ExecutionSection:
        """Accelerators are left to others: networks of this pipeline run on the CPU."""
        if execution.devices == "auto":
            return execution.model_copy(update={"device": "cpu"})
        raise ValueError(
            f"devices is {execution.devices}, and convolutional networks run on the CPU: leave it"
            " out, and say how many tasks run at a time by workers"
        )

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.training.epochs == 0 and not self.network.id:
            raise ValueError("training.epochs 0 needs network.id, a network that is trained")
        return self

    @model_validator(mode="after")
    def _something_can_be_repaired(self) -> Self:
        if self.repair.enabled and self.scheme.weights is None:
            raise ValueError(
                "repair gives weights more bits: set scheme.weights, or enabled: false"
            )
        return self

    @model_validator(mode="after")
    def _an_archive_is_trained(self) -> Self:
        if self.network.kind == "exported" and self.training.epochs:
            raise ValueError("an exported network is trained: set training.epochs: 0")
        return self

    @property
    def looks(self) -> bool:
        """Whether half of the images choose, and the other half judge."""
        return self.repair.enabled or self.qat.enabled

    @property
    def base_model(self) -> str:
        """What is quantized, in words: a network by id, or one that is trained on these images."""
        return self.network.id or f"{self._network} on {self._images}"

    @property
    def _network(self) -> str:
        network = self.network
        return str(network.id or network.config.get("model_type") or network.kind)

    @property
    def _images(self) -> str:
        images = self.images
        return images.data_dir or images.folder or images.path or images.source

    @property
    def registered_name(self) -> str:
        """Name in the model registry: `<network>-<images>-int8` unless the recipe has one."""
        if self.registry.name:
            return self.registry.name
        return f"{default_name(self._network)}-{default_name(self._images)}-int8"

    @property
    def digest(self) -> str:
        """Identity of the run's instructions: everything but how and where it is executed."""
        return digest(self.model_dump(mode="json", exclude={"execution"}))


def load_conv_recipe(path: str | Path, overrides: list[str] | None = None) -> ConvRecipe:
    """Read a recipe and apply `key.path=value` overrides, whose values are YAML.

    Raises:
        RecipeError: missing file, bad YAML, unknown field, or a value outside its limits.
    """
    return validated(ConvRecipe, read_recipe(path, overrides), str(path))
