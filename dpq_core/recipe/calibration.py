"""`calibration`: what the layers' inputs are counted on, and how."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dpq_core.recipe.datasets import BOS_DESCRIPTION, Bos, TextDataset
from dpq_core.recipe.section import Section


class CalibrationSection(Section):
    dataset: TextDataset
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

    @model_validator(mode="after")
    def _correction_has_two_models(self) -> Self:
        if self.correction and self.propagation != "groups":
            raise ValueError(
                f"correction is {self.correction:g}, and propagation: {self.propagation} does not"
                " feed a linear what the quantized model will: set propagation: groups, or leave"
                " correction out"
            )
        return self
