"""A recipe says everything about a run. Pydantic from YAML; its schema is the dashboard's form.

Relative folders and files that exist beside the recipe are taken from there; anything else (a hub
id, `s3://…`) is left as it is written.

A recipe is shown to everybody: in the dashboard, MLflow, logs, manifests and reports. So an address
in it carries no credentials, which belong in the environment.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpq_core.digests import digest
from dpq_core.paths import exists
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.registered_names import ExperimentName, RegisteredName, default_name
from dpq_core.recipe.scheme import Scheme
from dpq_core.recipe.text import RecipeError as RecipeError
from dpq_core.recipe.text import parse_setting, read_yaml

# Rows of `dpq_core.checkpoint.exports.EXPORTS`, which is slow to import.
ExportName = Literal["compressed-tensors", "gptq", "inc", "fp8_to_int"]

DeviceKind = Literal["cpu", "cuda", "hpu"]
VariantName = Literal[
    "bf16", "fp8", "w4a16", "w4a8"
]  # rows of `dpq_core.benchmark.formats_timed.VARIANTS`, too

_Kind = TypeVar("_Kind", bound=BaseModel)
_OURS = "Value error, "  # what pydantic puts before a message of our own


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class TextDataset(_Section):
    """Arguments of `datasets.load_dataset`, and the column to read.

    `path: python_docs` is the corpus of `dpq_core.data.python_corpus` (splits train, validation).
    """

    path: str = Field(description="a hub id, a builder (json, text, parquet) or python_docs")
    name: str | None = Field(None, description="configuration of a hub data set")
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"
    revision: str | None = None


class ModelSection(_Section):
    id: str = Field(min_length=1, description="hub id or folder of a safetensors checkpoint")
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub id; the manifest names the commit"
    )
    trust_remote_code: bool = Field(
        False, description="run the checkpoint's own Python code; the manifest says so"
    )


# Whether windows begin with the begin-of-text token; see `dpq_core.data.texts.opening_token`.
Bos = Literal["auto", "always", "never"]
_BOS = "each window begins with the begin-of-text token; auto: where the model was trained so"


class CalibrationSection(_Section):
    dataset: TextDataset
    image_column: str | None = Field(
        None, description="of images that go with the texts: calibrates a vision tower too"
    )
    samples: int = Field(128, ge=1, description="windows of sequence_length tokens")
    sequence_length: int = Field(2048, ge=2, description="tokens a window")
    bos: Bos = Field("auto", description=_BOS)
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


class PerplexitySection(_Section):
    dataset: TextDataset
    sequence_length: int = Field(2048, ge=2, description="tokens a window")
    bos: Bos = Field("auto", description=_BOS + "; never: the papers' cut")
    batch_size: int = Field(4, ge=1, description="windows a forward pass")


class EvaluationSection(_Section):
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
    batch_size: int = Field(
        16, ge=1, description="requests a forward pass; halved where memory does not suffice"
    )
    limit: int | None = Field(None, ge=1, description="first documents of each suite, for looking")
    workers: int = Field(1, ge=1, description="suites scored at a time, each with its own model")
    retries: int = Field(1, ge=0, description="of a suite that fails other than by bad input")
    timeout: float | None = Field(None, gt=0, description="seconds a suite may take")

    @model_validator(mode="after")
    def _examples_are_of_suites(self) -> Self:
        unknown = sorted(set(self.num_fewshot) - set(self.suites))
        if unknown:
            raise ValueError(f"num_fewshot names {unknown[0]}, which is not among the suites")
        return self


class BenchmarkSection(_Section):
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


class GatesSection(_Section):
    perplexity_increase: float = Field(0.05, gt=0, description="candidate must stay below")
    accuracy_drop: float = Field(0.5, gt=0, description="points; candidate must stay below")
    mode: Literal["absolute", "relative"] = Field(
        "absolute", description="relative: both limits are percentages of the baseline's value"
    )
    confidence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="judge the worse end of this interval (0.95, say), not the difference itself",
    )
    throughput_ratio: float | None = Field(
        None,
        gt=0,
        description="tokens/s of W4A8 over BF16, decoding one sequence; must be reached on every"
        " device of benchmark.devices",
    )
    allow_limited: bool = Field(False, description="judge a run whose documents were limited")
    approval: Literal["none", "required"] = Field(
        "none", description="required: a person decides on a release that passed its gates"
    )
    approval_timeout: int = Field(
        86400, ge=1, description="seconds without an answer, after which it is rejected"
    )


class RepairSection(_Section):
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


class RegistrySection(_Section):
    name: RegisteredName | None = Field(
        None, description="registered model; by default from the model's id"
    )
    any_base_model: bool = Field(
        False, description="take the alias from a champion that was made of another model"
    )
    experiment: ExperimentName = "dpq"
    destination: str | None = Field(
        None, pattern="^s3://[^/]+", description="s3://… where promoted releases are copied to"
    )


class ExecutionSection(_Section):
    runner: Literal["threads", "processes", "dask"] = Field(
        "threads", description="what quantizes layers: dask may be on other machines"
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="tasks at a time on this machine, at most; none: two on a CPU, one a device",
    )
    shards: int | None = Field(
        None,
        ge=1,
        description="tasks that share the calibration samples; any number: the same bytes; none:"
        " one a worker of a CPU where a block takes seconds, else one",
    )
    blocks_per_task: int | None = Field(
        None,
        ge=1,
        description="blocks that a calibration task passes before it stores hidden states: more is"
        " less traffic, and more to repeat after a crash; none: by their size",
    )
    dask_address: str | None = Field(
        None,
        description="scheduler of a Dask cluster, tcp://host:port, whose workers see the same"
        " folders; none: `workers` processes on this machine",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="what a layer's task takes of a Dask worker that declares it: {GPU: 1}",
    )
    threads_per_worker: int = Field(1, ge=1, description="of torch, for calibration and layers")
    store: str = Field(".dpq/store", description="folder of content-addressed artifacts")
    scratch: str | None = Field(
        None,
        description="folder for statistics and hidden states instead of the store: a fast disk that"
        " all workers have, those of one machine",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, hpu")
    devices: Literal["auto"] | Annotated[int, Field(ge=1)] | list[str] = Field(
        "auto",
        description="accelerators that workers take, one each: all of them, [cuda:0, cuda:1] or"
        " so many; by name on every machine of a cluster",
    )

    @model_validator(mode="after")
    def _dask_alone(self) -> Self:
        for name in ("dask_address", "resources"):
            if getattr(self, name) and self.runner != "dask":
                raise ValueError(f"{name} needs runner: dask, and runner is {self.runner}")
        return self

    @model_validator(mode="after")
    def _blocks_are_not_shared(self) -> Self:
        if (self.shards or 1) > 1 and (self.blocks_per_task or 1) > 1:
            raise ValueError(
                f"shards is {self.shards} and blocks_per_task {self.blocks_per_task}: tasks share"
                " one block at a time: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _devices_are_several(self) -> Self:
        if isinstance(self.devices, list):
            twice = [name for name in self.devices if self.devices.count(name) > 1]
            if twice or not self.devices:
                why = f"names {twice[0]} twice" if twice else "is an empty list"
                raise ValueError(f"devices {why}: name each device that a worker takes once")
            if self.device != "auto":
                raise ValueError(
                    f"device is {self.device}, and devices names others: leave one of them out"
                )
        return self


class Recipe(_Section):
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
    registry: RegistrySection = RegistrySection()
    execution: ExecutionSection = ExecutionSection()
    variants: dict[str, dict[str, Any]] | None = Field(
        None, description="rows of `dpq compare`: scheme fields to override, by name"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, content: Any) -> Any:
        for where, text in _texts(content):
            if _CREDENTIALS.search(text):
                raise ValueError(_credentials_in(where))
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
                said = str(error.errors()[0]["msg"]).removeprefix(_OURS)
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

    @property
    def digest(self) -> str:
        """Identity of the run's instructions: everything but how and where it is executed."""
        left_out: dict[str, Any] = {"execution": True, "variants": True}
        if not self.benchmark.devices:  # a release is not timed: as in recipes without the section
            left_out |= {"benchmark": True, "gates": {"throughput_ratio"}}
        return digest(self.model_dump(mode="json", exclude=left_out))

    @property
    def registered_name(self) -> str:
        """Name in the model registry: `<model>-w4a8` unless the recipe says otherwise."""
        return self.registry.name or f"{default_name(self.model.id)}-w4a8"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides (`dpq_core.recipe.text`).

    Raises:
        RecipeError: missing file, bad YAML, unknown field, or a value outside its limits.
    """
    return parse_recipe(read_recipe(path, overrides), str(path))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A recipe's content with its overrides, not yet validated.

    Raises:
        RecipeError: missing file, bad YAML, or an override that is none.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {found}")
    resolved: dict[str, Any] = _resolve_paths(content, path.parent)
    for override in overrides or []:
        _apply(resolved, override)
    return resolved


def parse_recipe(content: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe's content; `source` names it in errors."""
    return validated(Recipe, content, source)


def validated(kind: type[_Kind], content: dict[str, Any], source: str) -> _Kind:
    """Content as a recipe of some kind.

    Raises:
        RecipeError: the first field that is wrong, and why.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        shown = first["input"]
        value = f" (got {shown!r})" if not isinstance(shown, dict) else ""
        message = first["msg"].removeprefix(_OURS)
        said = ": ".join(part for part in (source, where, message) if part)
        raise RecipeError(f"{said}{value}{more}") from error


# `//user:password@host`, where a password may hold slashes and a port is none; signed addresses.
_CREDENTIALS = re.compile(
    r"://[^/\s]*@"
    r"|://[^\s@/:]+:(?!\d+(?:/|$))[^\s@]*@"
    r"|[?&](?:x-amz-(?:signature|security-token)|sig|signature|(?:access_)?token|api_?key)=",
    re.IGNORECASE,
)


def _credentials_in(where: str) -> str:
    """What is said of them: not what they are."""
    return (
        f"{where}: an address with a password or token in it would be stored with every run: leave"
        " it out, and give credentials by the environment (AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY, HF_TOKEN)"
    )


def _texts(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a recipe's content, and where it stands."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, where)
    elif isinstance(node, str):
        yield where, node


def _apply(content: dict[str, Any], override: str) -> None:
    if _CREDENTIALS.search(override):
        raise RecipeError(f"override {_credentials_in(override.partition('=')[0])}")
    (*parents, last), value = parse_setting(override)
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {parent} is a value, not a section")
    section[last] = _resolve_paths({last: value}, Path.cwd())[last]


_PATH_FIELDS = {"id", "data_files", "data_dir", "folder", "suites_path", "data_mirror"}


def _resolve_paths(node: Any, folder: Path, field: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _resolve_paths(value, folder, key) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(value, folder, field) for value in node]
    if field in _PATH_FIELDS and isinstance(node, str) and node and exists(folder / node):
        return str((folder / node).resolve())
    return node
