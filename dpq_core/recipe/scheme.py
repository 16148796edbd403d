"""How a layer is quantized: the `scheme` section of a recipe, the tables of methods and presets."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dpq_core.number_formats import FORMATS, NumberFormat

MethodName = Literal["none", "rtn", "gptq", "naive", "dpq", "keep"]
OrderName = Literal["none", "gar", "activation"]


@dataclass(frozen=True)
class Method:
    """What separates one method from another.

    compensate: distribute each column's error over the columns still to come (GPTQ).
    round_inside: the error that is distributed includes the rounding to the inner format (DPQ).
    """

    compensate: bool
    round_inside: bool


METHODS: dict[MethodName, Method] = {
    "rtn": Method(compensate=False, round_inside=True),
    "gptq": Method(compensate=True, round_inside=False),
    "naive": Method(compensate=True, round_inside=False),
    "dpq": Method(compensate=True, round_inside=True),
    "keep": Method(compensate=False, round_inside=True),
}


# `preset: name` in a scheme stands for these fields; those written beside it count more.
PRESETS: dict[str, dict[str, Any]] = {
    # The grid that vLLM's W4A8 kernel for Hopper multiplies with: what is gated is what is served.
    "hopper-vllm": {
        "group_size": 128,
        "symmetric": True,
        "group_scale": "e4m3",
        "activations": "dynamic",
    },
    # Marlin with FP8 inputs (VLLM_MARLIN_INPUT_DTYPE=fp8): it multiplies E4M3 by the codes
    # themselves, and each group's sum by its scale, so that no weight is rounded to E4M3.
    "ada-vllm": {
        "method": "gptq",
        "inner": "none",
        "group_size": 128,
        "symmetric": True,
        "activations": "dynamic",
    },
    # Intel Neural Compressor on Gaudi 2, and AutoRound's variant of it.
    "gaudi-inc": {
        "group_size": 128,
        "symmetric": True,
        "fp8_max": 240,
        "channel_scale": "tensor",
        "power_of_two": True,
    },
}


_OF_CACHE = ("kv_cache", "kv_cache_scale")


class Scheme(BaseModel):
    """Number formats and algorithm for every linear layer. Symbols as in DPQ's paper (DESIGN)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: MethodName = Field(
        "dpq",
        description="none leaves the weights in 16 bits (to measure activations alone); keep takes "
        "the codes of a checkpoint of four bits as they are",
    )
    order: OrderName = Field(
        "activation",
        description="column order: as stored, Group-Aware Reordering, or all columns by diag(H)",
    )
    rounding: Literal["nearest", "gradient"] = Field(
        "gradient", description="gradient: move codes one step where that lowers the objective"
    )
    bits: Literal[4, 8] = Field(
        4, description="of a stored weight; 8 stores it in the inner format, one scale a row"
    )
    inner: Literal["e4m3", "int8", "none"] = Field(
        "e4m3",
        description="8-bit format of the arithmetic; none rounds no weight to 8 bits: it computes "
        "in 16 bits (W4A16), or with activations: dynamic in E4M3, a group's sum times its scale",
    )
    group_size: int = Field(128, ge=8, description="columns that share one group scale")
    symmetric: bool = Field(False, description="no zero points: codes are signed")
    fp8_max: Literal[240, 448] = Field(
        448, description="E4M3 maximum: 240 on Gaudi 2, 448 on Gaudi 3 and Hopper"
    )
    channel_scale: Literal["row", "tensor"] = Field(
        "row", description="one 16-to-8-bit scale per …"
    )
    power_of_two: bool = Field(False, description="round channel scales up to powers of two")
    group_scale: Literal["bf16", "e4m3"] = Field(
        "bf16",
        description="type of group scales; e4m3: none above 56, which each row's largest takes",
    )
    scale_search: Literal["minmax", "mse", "hessian"] = Field(
        "minmax",
        description="group ranges: as they are, or shrunk to lower the (weighted) error; with "
        "method keep row scales: to the largest, or to the least error in an octave",
    )
    activations: Literal["static", "dynamic", "none"] = Field(
        "static", description="8-bit activations: one calibrated scale, one a token, or 16 bits"
    )
    activation_range: Literal["amax", "percentile", "mse"] = Field(
        "amax", description="how a static scale is chosen from the calibration's histogram"
    )
    kv_cache: Literal["none", "fp8"] = Field(
        "none",
        description="keys and values that an engine keeps: 16 bits, or E4M3 with calibrated scales",
    )
    kv_cache_scale: Literal["tensor", "head"] = Field(
        "tensor", description="one scale for the keys (values) of a layer, or one a head"
    )
    damp_frac: float = Field(0.01, gt=0, le=1, description="of the Hessian's mean diagonal")
    block_columns: int = Field(128, ge=1, description="columns a block of the loop")
    max_passes: int = Field(8, ge=1, description="most passes of gradient-aware rounding")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "preset" not in data:
            return data
        name, own = data["preset"], {key: data[key] for key in data if key != "preset"}
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: there are {', '.join(PRESETS)}")
        return {**PRESETS[name], **own}

    @model_validator(mode="after")
    def _combinations_make_sense(self) -> "Scheme":
        if self.method == "gptq" and self.bits == 4 and self.inner != "none":
            raise ValueError(
                f"method gptq computes in 16 bits, but inner is {self.inner!r}: set inner: none, "
                "or choose naive (GPTQ, then 8-bit rounding) or dpq (8-bit rounding in the loop)"
            )
        if self.method in ("naive", "dpq") and self.inner == "none":
            raise ValueError(
                f"method {self.method} needs an 8-bit inner format, but inner is 'none': "
                "set inner: e4m3 or int8, or choose gptq or rtn"
            )
        if self.group_scale == "e4m3" and self.bits == 4 and self.method != "none":
            self._check_e4m3_scales()
        if self.keeps and self.scale_search != "minmax":
            self._check_row_scales()
        if self.bits == 8 and self.inner == "none":
            raise ValueError("bits is 8 but inner is 'none': set inner: e4m3 or int8, or bits: 4")
        if self.inner == "none" and self.activations == "static":
            raise ValueError(
                "activations are 'static' but inner is 'none' (16-bit arithmetic): "
                "set activations: none, or dynamic for E4M3 inputs, or inner: e4m3"
            )
        if self.kv_cache == "none" and self.kv_cache_scale != "tensor":
            raise ValueError(
                f"kv_cache_scale is {self.kv_cache_scale!r} but kv_cache is 'none', which has no"
                " scales: set kv_cache: fp8, or leave kv_cache_scale out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_cache(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is not asked for is not written: digests of schemes without it stay."""
        written: dict[str, Any] = handler(self)
        if self.kv_cache == "none":
            written = {name: value for name, value in written.items() if name not in _OF_CACHE}
        return written

    def _check_row_scales(self) -> None:
        """With method keep it is a row's scale that is searched for."""
        fixed = {
            "inner": self.inner == "none",
            "group_scale": self.group_scale == "e4m3",
            "channel_scale": self.channel_scale == "tensor",
            "power_of_two": self.power_of_two,
        }
        for field, is_fixed in fixed.items():
            if is_fixed:
                raise ValueError(
                    f"scale_search {self.scale_search} has no row scale to choose with method keep"
                    f" and {field} {getattr(self, field)!r}: set scale_search: minmax"
                )

    def _check_e4m3_scales(self) -> None:
        needs = {"inner": "e4m3", "fp8_max": 448, "symmetric": True, "channel_scale": "row"}
        for field, value in needs.items():
            if (found := getattr(self, field)) != value:
                raise ValueError(
                    f"group_scale e4m3 needs {field}: {value}, but it is {found}: "
                    f"set {field}: {value}, or group_scale: bf16"
                )

    @property
    def inner_format(self) -> NumberFormat | None:
        """Format of the 8-bit arithmetic, or None for 16 bits."""
        if self.inner == "none":
            return None
        return FORMATS["e4m3_240" if self.inner == "e4m3" and self.fp8_max == 240 else self.inner]

    @property
    def of_layers(self) -> "Scheme":
        """What the scheme says of linear layers, which keep no keys and values."""
        return self.model_copy(
            update={name: type(self).model_fields[name].default for name in _OF_CACHE}
        )

    @property
    def input_format(self) -> NumberFormat | None:
        """Format that inputs are rounded to where they are, or None for 16-bit arithmetic."""
        if self.inner == "none" and self.activations != "none":
            return FORMATS["e4m3" if self.fp8_max == 448 else "e4m3_240"]
        return self.inner_format

    @property
    def keeps(self) -> bool:
        """Whether a layer's codes are those that the checkpoint has."""
        return self.method == "keep" and self.bits == 4

    @property
    def reads_hessian(self) -> bool:
        """Whether codes or grids are chosen by a Hessian, and not from the weights alone."""
        if self.method == "none" or self.bits == 8:
            return False
        if self.keeps:
            return self.scale_search == "hessian"
        chosen = METHODS[self.method].compensate or self.rounding == "gradient"
        return chosen or self.scale_search == "hessian"

    @property
    def rounds_inside(self) -> bool:
        """Whether scales and errors take the rounding to the inner format into account."""
        return self.method != "none" and METHODS[self.method].round_inside
