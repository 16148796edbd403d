"""Whether there is enough to calibrate on: tokens got, asked for, and for each input of a Hessian.

A Hessian of n inputs is a sum over T tokens. Of white inputs its eigenvalues spread over
(1 ± √(n/T))² (Marchenko and Pastur, 1967): 14 times from end to end at T = 3 n, 9 at 4 n, 3 at
14 n, without bound at n: what is compensated then is the sample's noise. The usual 128 windows of
2,048 tokens are 18 for each input of Llama-3-8B's widest layer and 4.9 of the 405B model's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpq_core.data.texts import DataError
from dpq_core.model.plan import PlannedLayer
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme


@dataclass(frozen=True)
class CalibrationTokens:
    """asked: samples · sequence_length. got: in the windows. inputs: of the widest layer whose
    codes are chosen by a Hessian; None where no layer's are."""

    asked: int
    got: int
    inputs: int | None

    @classmethod
    def of_plan(
        cls, calibration: CalibrationSection, got: int, layers: Iterable[PlannedLayer]
    ) -> "CalibrationTokens":
        widths = (layer.features for layer in layers if layer.scheme.reads_hessian)
        asked = calibration.samples * calibration.sequence_length
        return cls(asked, got, max(widths, default=None))

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "CalibrationTokens":
        """As a checkpoint's manifest has them."""
        about, own = manifest["calibration"], manifest["scheme"]
        widths = (
            row["shape"][1]
            for row in manifest["layers"]
            if Scheme.model_validate({**own, **row["scheme"]}).reads_hessian
        )
        return cls(about["tokens_asked"], about["tokens"], max(widths, default=None))

    @property
    def per_input(self) -> float | None:
        return None if self.inputs is None else self.got / self.inputs

    @property
    def line(self) -> str:
        """`39,424 of 262,144 tokens asked for, 2.8 for each of the widest layer's 14,336 inputs`"""
        said = f"{self.got:,} of {self.asked:,} tokens asked for"
        if self.per_input is None:
            return said
        return f"{said}, {self.per_input:.3g} for each of the widest layer's {self.inputs:,} inputs"

    def check(self, required: float) -> None:
        """Whether they are `required` tokens for each input.

        Raises:
            DataError: they are fewer.
        """
        if self.per_input is None or self.per_input >= required:
            return
        more = "calibration.samples" if self.got >= self.asked else "text: calibration.dataset"
        raise DataError(
            f"calibration: {self.line}, and calibration.required_tokens_per_input is {required:g}:"
            f" give more {more}; or lower it, knowing that so few tokens make a poor Hessian"
        )
