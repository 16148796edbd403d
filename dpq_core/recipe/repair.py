"""`repair`: more bits for layers of a candidate that a gate rejects."""

from pydantic import Field

from dpq_core.recipe.section import Section


class RepairSection(Section):
    enabled: bool = Field(False, description="give layers more bits where a gate fails")
    max_rounds: int = Field(3, ge=1, description="candidates after the first")
    max_bits_per_weight: float = Field(8.0, gt=4, le=16, description="budget of the linear layers")
    candidates: list[str] = Field(
        default_factory=lambda: ["w4a8-g32", "w8a8", "bf16"],
        description="choices besides the recipe's own scheme",
    )
    samples: int = Field(16, ge=1, description="calibration windows to measure sensitivity on")
    together: bool = Field(
        False, description="layers that one kernel reads (q/k/v, gate/up) take the same choice"
    )
