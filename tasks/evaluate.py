"""Measure a checkpoint: perplexity, and each suite, one task each.

Results are stored under the digest of (checkpoint, evaluation): baselines are scored once and
shared by all candidates, and a second run scores nothing.
"""

import dataclasses
import json
import platform
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from transformers import AutoTokenizer

from dpq_core.accuracy import SuiteResult, evaluate_suites
from dpq_core.checkpoint import load_model
from dpq_core.device import resolve_device, whole_machine
from dpq_core.digests import code_digest, digest, file_digest
from dpq_core.linear import alone_in_process
from dpq_core.perplexity import Perplexity, perplexity_token
from dpq_core.recipe import EvaluationSection, Recipe
from infra.store import ArtifactRef, Store
from tasks.progress import progress_of, stepper
from tasks.windows import load as load_windows


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint to measure. role: baseline or candidate. digest: of its content."""

    role: str
    folder: Path
    digest: str


@task(name="perplexity", task_run_name="perplexity of {subject.role}", cache_policy=NO_CACHE)
def measure_perplexity(recipe: Recipe, subject: Subject, windows: ArtifactRef) -> Perplexity:
    """`perplexity_token` of a checkpoint on stored windows."""
    section = recipe.evaluation.perplexity
    assert section is not None
    store = Store(recipe.execution.store)
    device = resolve_device(recipe.execution.device)
    key = digest(
        {
            "code": [code_digest("dpq_core.perplexity"), code_digest("dpq_core.checkpoint")],
            "checkpoint": subject.digest,
            "windows": windows.sha256,
            "batch_size": section.batch_size,
            "device": device.type,
        }
    )

    def make(folder: Path) -> None:
        tokens = load_windows(windows, store)
        step = stepper(f"perplexity of {subject.role}", -(-len(tokens) // section.batch_size))
        with whole_machine(), alone_in_process():
            model = load_model(subject.folder, device)
            result = perplexity_token(model, tokens, section.batch_size, lambda _: step())
        (folder / "perplexity.json").write_text(json.dumps(dataclasses.asdict(result)))

    artifact, _ = store.get_or_make("perplexity", key, make)
    return Perplexity(**json.loads((store.open(artifact) / "perplexity.json").read_text()))


@task(name="suite", task_run_name="{suite} of {subject.role}", cache_policy=NO_CACHE)
def measure_suite(recipe: Recipe, subject: Subject, suite: str) -> SuiteResult:
    """Accuracy of a checkpoint on one suite, with the answer to every document."""
    section = recipe.evaluation
    store = Store(recipe.execution.store)
    device = resolve_device(recipe.execution.device)
    key = digest(
        {
            "code": [code_digest("dpq_core.accuracy"), code_digest("dpq_core.checkpoint")],
            "checkpoint": subject.digest,
            "suite": suite,
            "settings": section.model_dump(
                mode="json", include={"num_fewshot", "batch_size", "limit"}
            ),
            "data": _suite_data(section),
            "device": device.type,
        }
    )

    def make(folder: Path) -> None:
        with whole_machine(), alone_in_process():
            model = load_model(subject.folder, device)
            tokenizer = AutoTokenizer.from_pretrained(subject.folder)
            result = evaluate_suites(
                model,
                tokenizer,
                [suite],
                suites_path=suites_folder(section),
                num_fewshot=section.num_fewshot,
                batch_size=section.batch_size,
                limit=section.limit,
                on_progress=progress_of(f"{suite} of {subject.role}"),
            )[suite]
        (folder / "suite.json").write_text(json.dumps(dataclasses.asdict(result)))

    artifact, _ = store.get_or_make("suites", key, make)
    return SuiteResult(**json.loads((store.open(artifact) / "suite.json").read_text()))


def suites_folder(section: EvaluationSection) -> Path | None:
    """Folder of the recipe's own suite definitions."""
    return Path(section.suites_path) if section.suites_path else None


def _suite_data(section: EvaluationSection) -> dict[str, str]:
    """What the suites' documents depend on, as far as it lies on this machine: the Python that
    `python_docs` is made of, and the files beside the recipe's own definitions."""
    folder = suites_folder(section)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder else []
    return {"python": platform.python_version(), **{f.name: file_digest(f) for f in files}}
