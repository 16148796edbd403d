"""A recipe says everything about a run. Its schema is the dashboard's form."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dpq_core.digests import digest
from dpq_core.recipe.attest import AttestSection
from dpq_core.recipe.benchmark import BenchmarkSection
from dpq_core.recipe.calibration import CalibrationSection
from dpq_core.recipe.credentials import CREDENTIALS, credentials_in, texts
from dpq_core.recipe.evaluation import EvaluationSection
from dpq_core.recipe.execution import ExecutionSection
from dpq_core.recipe.gates import GatesSection
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.model import ModelSection
from dpq_core.recipe.registered_names import default_name
from dpq_core.recipe.registry import RegistrySection
from dpq_core.recipe.repair import RepairSection
from dpq_core.recipe.scheme import Scheme
from dpq_core.recipe.section import Section

# Rows of `dpq_core.checkpoint.exports.EXPORTS`, which is slow to import.
ExportName = Literal["compressed-tensors", "gptq", "inc", "fp8_to_int"]

_OPTIONAL_GATES = ("divergence", "top1_agreement", "flips")
OURS = "Value error, "  # what pydantic puts before a message of our own


class Recipe(Section):
    model: ModelSection
    scheme: Scheme = Scheme()
    layers: dict[str, str] = Field(
        default_factory=dict,
        description="a choice (w8a8, bf16, …) for single layers, by full name",
    )
    calibration: CalibrationSection
    evaluation: EvaluationSection = EvaluationSection()
    gates: GatesSection = GatesSection()
    benchmark: BenchmarkSection = BenchmarkSection()
    repair: RepairSection = RepairSection()
    export: list[ExportName] = Field(
        default_factory=list,
        description="formats to write and verify before a promotion",
    )
    attest: AttestSection = AttestSection()
    registry: RegistrySection = RegistrySection()
    execution: ExecutionSection = ExecutionSection()
    variants: dict[str, dict[str, Any]] | None = Field(
        None, description="rows of `dpq compare`: scheme fields to override, by name"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, content: Any) -> Any:
        for where, text in texts(content):
            if CREDENTIALS.search(text):
                raise ValueError(credentials_in(where))
        return content

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        named = {f"layers.{name}": choice for name, choice in self.layers.items()}
        if self.repair.enabled:
            named |= {f"repair.candidates.{choice}": choice for choice in self.repair.candidates}
        for where, choice in named.items():
            try:
                chosen_scheme(self.scheme, choice)
            except ValidationError as error:
                said = str(error.errors()[0]["msg"]).removeprefix(OURS)
                raise ValueError(f"{where}: {said}; or choose another") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return self

    @model_validator(mode="after")
    def _blocks_do_not_wait(self) -> Self:
        together = self.execution.blocks_per_task or 1
        fed = self.calibration.propagation
        if together > 1 and fed != "original":
            raise ValueError(
                f"execution.blocks_per_task is {together}, and with calibration.propagation:"
                f" {fed} a block waits for the layers of the one before: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _kept_codes_stay(self) -> Self:
        if self.scheme.keeps and self.calibration.correction:
            raise ValueError(
                f"calibration.correction is {self.calibration.correction:g}, which moves weights"
                " before they are quantized, and scheme.method: keep takes them as they are: leave"
                " one of them out"
            )
        return self

    @model_validator(mode="after")
    def _gate_is_measured(self) -> Self:
        section, asked = self.benchmark, self.gates.throughput_ratio
        if asked is None:
            return self
        missing = [
            f"{field}: [{value}]"
            for field, value, there in (
                ("devices", "cpu", bool(section.devices)),
                ("variants", "bf16, w4a8", {"bf16", "w4a8"} <= set(section.variants)),
                ("batches", "1", 1 in section.batches),
            )
            if not there
        ]
        if missing:
            raise ValueError(
                f"gates.throughput_ratio is {asked:g}, and the benchmark would not measure it: add"
                f" benchmark.{missing[0]}, or leave the gate out"
            )
        return self

    @model_validator(mode="after")
    def _gates_have_data(self) -> Self:
        for gate, measured, what in (
            ("divergence", self.evaluation.perplexity, "perplexity"),
            ("top1_agreement", self.evaluation.perplexity, "perplexity"),
            ("flips", self.evaluation.suites, "suites"),
        ):
            limit = getattr(self.gates, gate)
            if limit is not None and not measured:
                raise ValueError(
                    f"gates.{gate} is {limit:g}, and the evaluation would not measure it: add"
                    f" evaluation.{what}, or leave the gate out"
                )
        return self

    @model_validator(mode="after")
    def _engine_has_something_to_say(self) -> Self:
        section = self.attest
        if section.engine is None:
            if self.gates.attested:
                raise ValueError(
                    "gates.attested is set, and no engine attests: add attest.engine, or leave the"
                    " gate out"
                )
            return self
        if section.format not in self.export:
            raise ValueError(
                f"attest.format is {section.format}, which export does not name: add it there, or"
                " choose one that it names"
            )
        if self.evaluation.perplexity is None:
            raise ValueError(
                f"attest.engine is {section.engine}, and there is no text to ask it: add"
                " evaluation.perplexity"
            )
        return self

    @property
    def digest(self) -> str:
        """Identity of the run's instructions: everything but how and where it is executed, and
        to which hub its result is pushed."""
        left_out: dict[str, Any] = {"execution": True, "variants": True, "registry": {"hub"}}
        # What is not asked for leaves the digest of a recipe that knows nothing of it.
        unasked = {gate for gate in _OPTIONAL_GATES if getattr(self.gates, gate) is None}
        if not self.benchmark.devices:  # a release is not timed
            left_out["benchmark"] = True
            unasked.add("throughput_ratio")
        if self.attest.engine is None:
            left_out["attest"] = True
        if not self.gates.attested:
            unasked.add("attested")
        if unasked:
            left_out["gates"] = unasked
        return digest(self.model_dump(mode="json", exclude=left_out))

    @property
    def registered_name(self) -> str:
        """Name in the model registry: `<model>-w4a8` unless the recipe says otherwise."""
        return self.registry.name or f"{default_name(self.model.id)}-w4a8"
