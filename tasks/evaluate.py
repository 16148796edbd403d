"""Measure a checkpoint: perplexity, and each suite, one task each.

Scores are stored under the digest of (checkpoint, what is asked): baselines are scored once and
shared by all candidates, a second run scores nothing, and a run that was killed goes on with the
suites that it had not finished.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from dpq_core.checkpoint.native import by_its_library, load_model
from dpq_core.data import mirror
from dpq_core.data.texts import opening_token
from dpq_core.digests import digest
from dpq_core.errors import InputError
from dpq_core.evaluation.harness import Progress, evaluate_suite
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.evaluation.scores import AFTER_BOS, PERPLEXITY, Scores, load_scores, save_scores
from dpq_core.evaluation.suites.definitions import (
    SuiteError,
    SuiteSources,
    check_suites,
    loaded_suites,
)
from dpq_core.evaluation.text_divergence import DIVERGENCE
from dpq_core.machine.device import halving_batches, whole_machine
from dpq_core.recipe import EvaluationSection, Recipe
from dpq_core.verdict.pairing import Evaluation, Failure
from infra.store import ArtifactRef, Store, StoreError
from tasks.support import tokenized_data
from tasks.support.model import load_tokenizer
from tasks.support.progress import progress_of
from tasks.support.stages import computed_by
from tasks.support.worker import this_worker

_FILE = "scores.parquet"

Measured = Mapping[str, ArtifactRef | Failure]  # by suite, or perplexity_token, or divergence


@dataclass(frozen=True)
class Subject:
    """A checkpoint to measure. role: baseline or candidate. digest: of its content. source: as what
    a candidate is quantized from, see `load_model`."""

    role: str
    folder: Path
    digest: str
    source: bool = False


@dataclass(frozen=True)
class EvaluationData:
    """What is asked. perplexity: stored windows. suites: the digest of each. mirror: a folder.
    opened: the windows begin with the begin-of-text token."""

    perplexity: ArtifactRef | None
    suites: dict[str, str]
    mirror: Path | None
    opened: bool = False


def prepare(section: EvaluationSection, tokenizer: Any, store: Store) -> EvaluationData:
    """Read all data that the evaluation will ask for, so that what is wrong with them shows now.

    Raises:
        DataError, MirrorError, SuiteError: one line that says what and where.
    """
    data = EvaluationData(
        perplexity=tokenized_data.store_perplexity(section.perplexity, tokenizer, store)
        if section.perplexity
        else None,
        suites={},
        mirror=_local_mirror(section, store),
        opened=section.perplexity is not None
        and opening_token(tokenizer, section.perplexity.bos) is not None,
    )
    if not section.suites:
        return data
    check_suites(section.suites, _sources(section, data))  # all names, before any data
    with loaded_suites(section.suites, _sources(section, data), **_asking(section)) as suites:
        data.suites.update({name: suite.digest for name, suite in suites.items()})
    return data


@task(name="perplexity", task_run_name="perplexity of {subject.role}", cache_policy=NO_CACHE)
def measure_perplexity(recipe: Recipe, subject: Subject, data: EvaluationData) -> ArtifactRef:
    """`perplexity_token` of a checkpoint on stored windows."""
    section, artifact = recipe.evaluation.perplexity, data.perplexity
    assert section is not None
    assert artifact is not None
    store = Store(recipe.execution.store)
    about = {
        **computed_by("perplexity", this_worker(recipe.execution).arithmetic),
        "windows": artifact.sha256,
        "batch_size": section.batch_size,
        **({"metric": AFTER_BOS} if data.opened else {}),
    }
    metric = AFTER_BOS if data.opened else PERPLEXITY

    def score(model: Any) -> Scores:
        tokens = tokenized_data.load(artifact, store)
        report = _until(recipe.evaluation.timeout, progress_of(f"{PERPLEXITY} of {subject.role}"))
        return halving_batches(
            lambda batch_size: perplexity_token(model, tokens, batch_size, report, metric),
            section.batch_size,
        )

    return _scored(recipe, subject, about, score)


@task(name="suite", task_run_name="{suite} of {subject.role}", cache_policy=NO_CACHE)
def measure_suite(
    recipe: Recipe, subject: Subject, data: EvaluationData, suite: str
) -> ArtifactRef:
    """A checkpoint's scores on one suite, an entry for every document.

    Raises:
        SuiteError: the documents are no longer those that the run started with.
    """
    section = recipe.evaluation
    about = {
        **computed_by("suite", this_worker(recipe.execution).arithmetic),
        "suite": data.suites[suite],
        "batch_size": section.batch_size,
        "limit": section.limit,
    }

    def score(model: Any) -> Scores:
        tokenizer = load_tokenizer(subject.folder, recipe.model.trust_remote_code)
        report = _until(section.timeout, progress_of(f"{suite} of {subject.role}"))
        with loaded_suites([suite], _sources(section, data), **_asking(section)) as suites:
            if suites[suite].digest != data.suites[suite]:
                raise SuiteError(f"suite {suite!r}: its data changed while the run went on")
            return halving_batches(
                lambda batch_size: evaluate_suite(
                    model,
                    tokenizer,
                    suites[suite],
                    batch_size=batch_size,
                    limit=section.limit,
                    on_progress=report,
                ),
                section.batch_size,
            )

    return _scored(recipe, subject, about, score)


def measurements(
    recipe: Recipe, data: EvaluationData
) -> dict[str, tuple[Task[..., Any], list[Any]]]:
    """The tasks of an evaluation and their arguments after (recipe, subject), by metric or suite,
    with the retries that the recipe asks for."""
    section = recipe.evaluation
    options: dict[str, Any] = {
        "retries": section.retries,
        "retry_condition_fn": _may_pass_next_time,
    }
    tasks: dict[str, tuple[Task[..., Any], list[Any]]] = {}
    if data.perplexity:
        tasks[PERPLEXITY] = (measure_perplexity.with_options(**options), [data])
    for suite in section.suites:
        tasks[suite] = (measure_suite.with_options(**options), [data, suite])
    return tasks


def load_evaluation(measured: Measured, store: Store) -> Evaluation:
    """The scores themselves; not the divergence that may lie beside them
    (`tasks.support.divergences`)."""
    return {
        name: found if isinstance(found, Failure) else load_scores(store.open(found) / _FILE)
        for name, found in measured.items()
        if name != DIVERGENCE
    }


def _scored(
    recipe: Recipe, subject: Subject, about: dict[str, Any], score: Callable[[Any], Scores]
) -> ArtifactRef:
    """Scores from the store, or from the model."""
    worker = this_worker(recipe.execution)
    as_source = subject.source and by_its_library(subject.folder)
    key = digest({**about, "checkpoint": subject.digest} | ({"source": True} if as_source else {}))

    def make(folder: Path) -> None:
        with whole_machine(parts=recipe.evaluation.workers):
            trusted = recipe.model.trust_remote_code
            scores = score(load_model(subject.folder, worker.device, trusted, subject.source))
        save_scores(scores, folder / _FILE)

    return Store(recipe.execution.store).get_or_make("scores", key, make)[0]


def _may_pass_next_time(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Whether a retry can help: not where the input is what is wrong, or time or space was not
    enough."""
    return not isinstance(
        state.result(raise_on_failure=False), InputError | TimeoutError | StoreError
    )


def _until(timeout: float | None, report: Progress) -> Progress:
    """`report`, which raises TimeoutError once `timeout` seconds have passed.

    Not Prefect's `timeout_seconds`: in a thread it raises wherever the code happens to be, and what
    a library had set for the whole process a moment ago (accelerate, datasets) stays set.
    """
    start = time.monotonic()

    def checked(done: int, total: int) -> None:
        report(done, total)
        passed = time.monotonic() - start
        if timeout is not None and passed > timeout and done < total:
            raise TimeoutError(
                f"{done} of {total} sequences were scored in {passed:.0f} s, and"
                f" evaluation.timeout is {timeout:g} s: raise it, or evaluation.batch_size"
            )

    return checked


def _local_mirror(section: EvaluationSection, store: Store) -> Path | None:
    url = section.data_mirror
    if url is None or not section.suites:
        return None
    if not mirror.is_remote(url):
        return Path(url)
    key = digest({"files": mirror.fingerprint(url, section.suites)})
    artifact, _ = store.get_or_make(
        "mirror", key, lambda folder: mirror.fetch(url, folder, section.suites)
    )
    return store.open(artifact)


def _sources(section: EvaluationSection, data: EvaluationData) -> SuiteSources:
    definitions = Path(section.suites_path) if section.suites_path else None
    return SuiteSources(definitions, data.mirror)


def _asking(section: EvaluationSection) -> dict[str, Any]:
    return {"num_fewshot": section.num_fewshot, "prefer_norm": section.prefer_norm}
