"""`gates`: what a candidate may lose."""

from typing import Literal

from pydantic import Field

from dpq_core.recipe.section import Section


class GatesSection(Section):
    perplexity_increase: float = Field(0.05, gt=0, description="candidate must stay below")
    accuracy_drop: float = Field(0.5, gt=0, description="points; candidate must stay below")
    mode: Literal["absolute", "relative"] = Field(
        "absolute", description="relative: both limits are percentages of the baseline's value"
    )
    confidence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="judge the worse end of this interval (0.95, say), not the difference itself:"
        " what is not shown is rejected",
    )
    divergence: float | None = Field(
        None,
        gt=0,
        description="nats a token, mean over perplexity's text; candidate must stay below",
    )
    top1_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of perplexity's tokens whose most likely one is the same; must be"
        " reached",
    )
    flips: float | None = Field(
        None,
        gt=0,
        le=100,
        description="percent of the suites' documents whose answer changed, either way; must stay"
        " below",
    )
    throughput_ratio: float | None = Field(
        None,
        gt=0,
        description="tokens/s of W4A8 over BF16, decoding one sequence; must be reached on every"
        " device of benchmark.devices",
    )
    attested: bool = Field(
        False, description="the engine of attest computes the export within attest.limits"
    )
    allow_limited: bool = Field(False, description="judge a run whose documents were limited")
    approval: Literal["none", "required"] = Field(
        "none", description="required: a person decides on a release that passed its gates"
    )
    approval_timeout: int = Field(
        86400, ge=1, description="seconds without an answer, after which it is rejected"
    )
