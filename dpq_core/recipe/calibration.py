"""`calibration`: what the layers' inputs are counted on, and how."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dpq_core.recipe.datasets import BOS_DESCRIPTION, Bos, MixedDataset, TextDataset
from dpq_core.recipe.section import Section

WhereRoundingWins = Literal["name", "round", "refuse"]


class ActivationsSection(Section):
    """What static scales of activations are counted on, where that is not what Hessians are."""

    dataset: TextDataset
    samples: int = Field(128, ge=1, description="windows of calibration.sequence_length tokens")


class CalibrationSection(Section):
    dataset: TextDataset
    mixed_in: tuple[MixedDataset, ...] = Field(
        (),
        exclude_if=lambda mixed: not mixed,  # a recipe is what it was before the field
        description="other data sets with their shares of the windows; `dataset` has what is left",
    )
    activations: ActivationsSection | None = Field(
        None,
        exclude_if=lambda section: section is None,  # as above
        description="texts for static scales alone, beside those for Hessians; none: the same",
    )
    image_column: str | None = Field(
        None, description="of images that go with the texts: calibrates a vision tower too"
    )
    samples: int = Field(128, ge=1, description="windows of sequence_length tokens")
    sequence_length: int = Field(2048, ge=2, description="tokens a window")
    bos: Bos = Field("auto", description=BOS_DESCRIPTION)
    propagation: Literal["original", "quantized", "groups"] = Field(
        "original",
        description="what feeds a linear: the 16-bit model, the quantized blocks before its own,"
        " or all linears that are quantized before it",
    )
    correction: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=lambda share: not share,  # a recipe is what it was before the field
        description="of each weight towards the 16-bit model's outputs on what the quantized model"
        " feeds it: the share that is taken of it, 0.5 say; with propagation: groups",
    )
    hessian_inputs: Literal["bf16", "fp8"] = Field(
        "fp8", description="inputs as they are, or rounded as the scheme's activations will be"
    )
    token_weights: Literal["equal", "plain"] = Field(
        "equal",
        description="in Hessians: all tokens' inputs of one norm, or as they are (GPTQ), where the "
        "largest count most",
    )
    first_token_share: float = Field(
        0.125,
        ge=0,
        lt=1,
        description="of each window's weight in Hessians, for the token that all others read; 0: "
        "as any other",
    )
    batch_size: int = Field(4, ge=1, description="windows a forward pass; with images always one")
    min_tokens_per_input: float = Field(
        1.0, ge=0, description="a layer (an expert) that saw fewer stays in 16 bits, by name"
    )
    required_tokens_per_input: float = Field(
        4.0,
        ge=0,
        description="of all windows, for each input of the widest layer whose codes a Hessian"
        " chooses: with fewer nothing is begun",
    )

    unseen: int = Field(
        2,
        ge=0,
        description="windows of `dataset` that no Hessian sees, at most an eighth of what there is:"
        " layers are tried on their tokens, beside codes that are rounded to nearest",
    )
    where_rounding_wins: WhereRoundingWins = Field(
        "name",
        description="a layer whose chosen codes do worse there than rounded ones: is named, is"
        " rounded, or is an error",
    )

    @property
    def counted_samples(self) -> int:
        """Windows for Hessians, and those for scales."""
        return self.samples + (self.activations.samples if self.activations else 0)

    @property
    def all_samples(self) -> int:
        """Windows that are run, those that no Hessian sees included."""
        return self.counted_samples + self.unseen

    @property
    def windows_of(self) -> list[tuple[TextDataset, int]]:
        """The data sets for Hessians, and how many of the samples are of each."""
        mixed = [(each, round(each.share * self.samples)) for each in self.mixed_in]
        return [(self.dataset, self.samples - sum(count for _, count in mixed)), *mixed]

    @model_validator(mode="after")
    def _shares_leave_some(self) -> Self:
        shares = [f"{each.share:g}" for each in self.mixed_in]
        if (given := sum(each.share for each in self.mixed_in)) >= 1:
            raise ValueError(
                f"the shares of mixed_in ({', '.join(shares)}) sum to {given:g}, and dataset has"
                " what is left of 1: lower them"
            )
        if any(count < 1 for _, count in self.windows_of):
            raise ValueError(
                f"of {self.samples} samples a share of mixed_in ({', '.join(shares)}), or what is"
                " left for dataset, is no window: raise samples, or leave that data set out"
            )
        return self

    @model_validator(mode="after")
    def _images_are_of_one_data_set(self) -> Self:
        if self.image_column is None:
            return self
        others = {
            "mixed_in": bool(self.mixed_in),
            "activations": self.activations is not None,
            "dataset.messages_column": self.dataset.messages_column is not None,
        }
        for name, there in others.items():
            if there:
                raise ValueError(
                    f"image_column is {self.image_column!r}, whose windows are of one data set and"
                    f" its text_column: leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def _correction_has_two_models(self) -> Self:
        if self.correction and self.propagation != "groups":
            raise ValueError(
                f"correction is {self.correction:g}, and propagation: {self.propagation} does not"
                " feed a linear what the quantized model will: set propagation: groups, or leave"
                " correction out"
            )
        return self
