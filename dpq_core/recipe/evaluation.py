"""`evaluation`: what baseline and candidate are scored on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpq_core.recipe.datasets import BOS_DESCRIPTION, Bos, TextDataset
from dpq_core.recipe.section import Section


class PerplexitySection(Section):
    dataset: TextDataset
    sequence_length: int = Field(2048, ge=2, description="tokens a window")
    bos: Bos = Field("auto", description=BOS_DESCRIPTION + "; never: the papers' cut")


class EvaluationSection(Section):
    perplexity: PerplexitySection | None = None
    suites: list[str] = Field(default_factory=list, description="lm-evaluation-harness names")
    suites_path: str | None = Field(None, description="folder of further suite definitions (YAML)")
    data_mirror: str | None = Field(
        None, description="folder or s3://… of the suites' data, see `dpq mirror`; else the hub"
    )
    num_fewshot: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="examples by suite; 0 where it is not named"
    )
    prefer_norm: bool = Field(True, description="acc_norm where a suite defines it, else acc")
    limit: int | None = Field(None, ge=1, description="first documents of each suite, for looking")
    arithmetic: Literal["definition", "served"] = Field(
        "definition",
        description="of a candidate: the formula's, or that of the kernels that serve it here",
    )
    retries: int = Field(1, ge=0, description="of a task that fails other than by bad input")
    timeout: float | None = Field(
        None, gt=0, description="seconds a task may take; the chunks that it scored are kept"
    )

    @property
    def served(self) -> bool:
        """Whether a candidate is computed by the kernels that serve it."""
        return self.arithmetic == "served"

    @model_validator(mode="after")
    def _examples_are_of_suites(self) -> Self:
        unknown = sorted(set(self.num_fewshot) - set(self.suites))
        if unknown:
            raise ValueError(f"num_fewshot names {unknown[0]}, which is not among the suites")
        return self
