"""`attest`: the engine whose log-likelihoods are compared with ours before a registration."""

from typing import Literal

from pydantic import Field

from dpq_core.recipe.section import Section


class AttestLimits(Section):
    """What an engine may differ by. Defaults: some five times what a right engine was measured at
    (docs/attest.md)."""

    mean_difference: float = Field(
        0.1, gt=0, description="nats, mean over the tokens of what their log-likelihoods differ by"
    )
    max_difference: float = Field(2.0, gt=0, description="nats, the largest of them")
    divergence: float = Field(
        0.002, gt=0, description="nats a token, with all but the engine's most likely pieces as one"
    )
    top1_agreement: float = Field(
        0.9, gt=0, le=1, description="share of the tokens whose most likely one is the same"
    )


class AttestSection(Section):
    engine: str | None = Field(
        None,
        pattern=r"^(vllm|transformers|https?://\S+)$",
        description="vllm, transformers (started here), or the address of an OpenAI-compatible"
        " server with vLLM's prompt_logprobs; none by default",
    )
    model: str | None = Field(None, description="name of the model that a server at an address has")
    arguments: list[str] = Field(
        default_factory=list, description="further ones of the engine's command"
    )
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors", description="the export that it serves, one of `export`"
    )
    reference: Literal["export", "checkpoint"] = Field(
        "export",
        description="what is right: the export as its loader computes it, or the native checkpoint"
        " that was gated (for engines that compute as that does)",
    )
    windows: int = Field(8, ge=1, description="of perplexity's, evenly spaced")
    tokens: int = Field(512, ge=2, description="of each window, at most")
    top: int = Field(
        20, ge=1, description="most likely pieces that are asked for; vLLM allows 20 unless told"
    )
    limits: AttestLimits = AttestLimits()
