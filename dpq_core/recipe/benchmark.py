"""`benchmark`: what is timed, on which devices."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from dpq_core.recipe.section import Section

DeviceKind = Literal["cpu", "cuda", "hpu"]
VariantName = Literal["bf16", "fp8", "w4a16", "w4a8"]  # rows of `benchmark.formats_timed.VARIANTS`


class BenchmarkSection(Section):
    devices: list[DeviceKind] = Field(
        default_factory=list, description="kinds that a release is timed on; none by default"
    )
    variants: list[VariantName] = Field(
        default_factory=lambda: list(get_args(VariantName)),
        min_length=1,
        description="formats of the same model that are timed side by side",
    )
    batches: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 8, 32, 128], min_length=1, description="sequences at a time"
    )
    prompt_tokens: int = Field(128, ge=1, description="tokens of each prompt")
    new_tokens: int = Field(32, ge=2, description="tokens generated after each prompt")
    repeats: int = Field(3, ge=1, description="generations timed, of which the median counts")

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("devices", "variants", "batches"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} names {twice[0]} twice: once is enough")
        return self
