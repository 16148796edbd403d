"""Measure a checkpoint: what is asked of it, in chunks of tokens, and the scores that chunks add up
to.

Everything is tokenised before anything is scored, for baseline and candidate alike. Scores are
stored under the digest of (checkpoint, what is asked): baselines are scored once and shared by all
candidates, a second run scores nothing, and a run that was killed goes on with the chunks that it
had not finished (`tasks.score`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.data import mirror
from dpq_core.data.texts import opening_token
from dpq_core.digests import digest
from dpq_core.evaluation.chunk_files import load_requests, save_requests
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.requests import Encoder, asked_of_windows
from dpq_core.evaluation.results import Answer, perplexity_scores, suite_scores
from dpq_core.evaluation.scorer import answers
from dpq_core.evaluation.scores import AFTER_BOS, PERPLEXITY, Scores, load_scores, save_scores
from dpq_core.evaluation.suites.definitions import (
    Suite,
    SuiteError,
    SuiteSources,
    check_suites,
    loaded_suites,
)
from dpq_core.evaluation.text_divergence import (
    DIVERGENCE,
    FILE,
    save_divergence,
    text_divergence,
)
from dpq_core.recipe import EvaluationSection, Recipe
from dpq_core.verdict.pairing import Evaluation, Failure
from infra.store import ArtifactRef, Store
from tasks.support import tokenized_data
from tasks.support.chunks import ChunkRef, Comparison, Kept, Subject, chunk_refs
from tasks.support.model import load_tokenizer
from tasks.support.progress import stepper
from tasks.support.stages import computed_by

_FILE = "scores.parquet"

Measured = Mapping[str, ArtifactRef | Failure]  # by suite, or perplexity_token, or divergence


@dataclass(frozen=True)
class EvaluationData:
    """What is asked. perplexity: stored windows. suites: the digest of each. requests: the chunks
    of each metric. mirror: a folder. opened: the windows begin with the begin-of-text token.
    arithmetic: class of the workers'."""

    perplexity: ArtifactRef | None
    suites: dict[str, str]
    mirror: Path | None
    opened: bool = False
    requests: dict[str, ArtifactRef] = field(default_factory=dict)
    arithmetic: str | None = None


def prepare(
    section: EvaluationSection,
    tokenizer: Any,
    config: Any,
    store: Store,
    arithmetic: str | None = None,
) -> EvaluationData:
    """Read and tokenise all that the evaluation will ask for, so that what is wrong with it shows
    now. config: of the model, whose window it has to fit. arithmetic: class of the workers'.

    Raises:
        ContextError, DataError, MirrorError, SuiteError: one line that says what and where.
    """
    data = EvaluationData(
        perplexity=tokenized_data.store_perplexity(section.perplexity, tokenizer, store)
        if section.perplexity
        else None,
        suites={},
        mirror=_local_mirror(section, store),
        opened=section.perplexity is not None
        and opening_token(tokenizer, section.perplexity.bos) is not None,
        arithmetic=arithmetic,
    )
    if data.perplexity:
        data.requests[PERPLEXITY] = _windows_asked(data.perplexity, store)
    if not section.suites:
        return data
    check_suites(section.suites, _sources(section, data))  # all names, before any data
    with loaded_suites(section.suites, _sources(section, data), **_asking(section)) as suites:
        encoder = Encoder(tokenizer, config)
        step = stepper("tokenise suites", len(suites))
        for name, suite in suites.items():
            data.suites[name] = suite.digest
            data.requests[name] = _suite_asked(suite, section.limit, encoder, store)
            step()
    return data


def chunks_asked(
    data: EvaluationData, metric: str, comparison: Comparison, store: Store
) -> list[ChunkRef]:
    """The chunks of a metric; perplexity's are those that are compared."""
    compared = metric == PERPLEXITY and comparison != Comparison()
    return chunk_refs(metric, data.requests[metric], store, compared)


def compared_tokens(data: EvaluationData, store: Store) -> int:
    """Tokens of the perplexity text, whose last hidden states are kept of a 16-bit model."""
    return sum(each.tokens for each in load_requests(store.open(data.requests[PERPLEXITY])).chunks)


def find_scores(
    recipe: Recipe, subject: Subject, data: EvaluationData, metric: str
) -> ArtifactRef | None:
    """The scores of a metric, if they are known already."""
    return Store(recipe.execution.store).find("scores", _key(recipe, subject, data, metric))


def kept_of(recipe: Recipe, subject: Subject, data: EvaluationData, comparison: Comparison) -> Kept:
    """What the store has of a subject's chunks."""
    return Kept(Store(recipe.execution.store), subject, comparison, data.arithmetic)


@task(name="perplexity", task_run_name="perplexity of {subject.role}", cache_policy=NO_CACHE)
def measure_perplexity(recipe: Recipe, subject: Subject, data: EvaluationData) -> ArtifactRef:
    """`perplexity_token` of a checkpoint on stored windows, from what their chunks scored."""
    assert data.perplexity is not None
    windows = tokenized_data.load(data.perplexity, Store(recipe.execution.store))
    metric = AFTER_BOS if data.opened else PERPLEXITY

    def scores(found: list[Answer], _: int) -> Scores:
        return perplexity_scores(windows, found, metric)

    return _scored(recipe, subject, data, PERPLEXITY, scores)


@task(name="suite", task_run_name="{suite} of {subject.role}", cache_policy=NO_CACHE)
def measure_suite(
    recipe: Recipe, subject: Subject, data: EvaluationData, suite: str
) -> ArtifactRef:
    """A checkpoint's scores on one suite, an entry for every document, from what its chunks scored.

    Raises:
        SuiteError: the documents are no longer those that the run started with.
    """
    section = recipe.evaluation

    def scores(found: list[Answer], truncated: int) -> Scores:
        with loaded_suites([suite], _sources(section, data), **_asking(section)) as suites:
            if suites[suite].digest != data.suites[suite]:
                raise SuiteError(f"suite {suite!r}: its data changed while the run went on")
            return suite_scores(suites[suite], found, truncated, section.limit)

    return _scored(recipe, subject, data, suite, scores)


@task(name="divergence", task_run_name="divergence of {subject.role}", cache_policy=NO_CACHE)
def measure_divergence(
    recipe: Recipe, subject: Subject, data: EvaluationData, reference: Subject
) -> ArtifactRef:
    """How far a candidate's predictions on the perplexity windows are from the reference's, token
    by token, and the worst spots of the text."""
    store, comparison = Store(recipe.execution.store), Comparison(reference=reference)
    about = {
        **computed_by("divergence", data.arithmetic),
        **subject.identity,
        "reference": reference.identity,
        "requests": data.requests[PERPLEXITY].sha256,
    }

    def make(folder: Path) -> None:
        asked = chunks_asked(data, PERPLEXITY, comparison, store)
        kept = kept_of(recipe, subject, data, comparison)
        assert data.perplexity is not None
        windows = tokenized_data.load(data.perplexity, store)
        tokenizer = load_tokenizer(subject.folder, recipe.model.trust_remote_code)
        save_divergence(text_divergence(kept.divergence(asked), windows, tokenizer), folder / FILE)

    return store.get_or_make("divergence", digest(about), make)[0]


def load_evaluation(measured: Measured, store: Store) -> Evaluation:
    """The scores themselves; not the divergence that may lie beside them
    (`tasks.support.divergences`)."""
    return {
        name: found if isinstance(found, Failure) else load_scores(store.open(found) / _FILE)
        for name, found in measured.items()
        if name != DIVERGENCE
    }


def _scored(
    recipe: Recipe,
    subject: Subject,
    data: EvaluationData,
    metric: str,
    scores: Callable[[list[Answer], int], Scores],
) -> ArtifactRef:
    """Scores from the store, or from what chunks scored."""
    store = Store(recipe.execution.store)

    def make(folder: Path) -> None:
        asked = load_requests(store.open(data.requests[metric]))
        kept = kept_of(recipe, subject, data, Comparison())
        found = kept.scores(chunks_asked(data, metric, Comparison(), store))
        save_scores(scores(answers(found, asked.count), asked.truncated), folder / _FILE)

    return store.get_or_make("scores", _key(recipe, subject, data, metric), make)[0]


def _key(recipe: Recipe, subject: Subject, data: EvaluationData, metric: str) -> str:
    about: dict[str, Any] = {**subject.identity, "requests": data.requests[metric].sha256}
    if metric == PERPLEXITY:
        named = {"metric": AFTER_BOS} if data.opened else {}
        return digest({**computed_by("perplexity", data.arithmetic), **about, **named})
    about |= {"suite": data.suites[metric], "limit": recipe.evaluation.limit}
    return digest({**computed_by("suite", data.arithmetic), **about})


def _windows_asked(windows: ArtifactRef, store: Store) -> ArtifactRef:
    """The chunks of perplexity's windows."""

    def make(folder: Path) -> None:
        tokens = tokenized_data.load(windows, store)
        save_requests(folder, chunks_of(asked_of_windows(tokens)), len(tokens))

    key = digest({**computed_by("requests"), "windows": windows.sha256})
    return store.get_or_make("requests", key, make)[0]


def _suite_asked(suite: Suite, limit: int | None, encoder: Encoder, store: Store) -> ArtifactRef:
    """The chunks of a suite."""

    def make(folder: Path) -> None:
        asked = encoder.requests_of(suite, limit)
        save_requests(folder, chunks_of(asked.asked), asked.count, asked.truncated)

    about = {"suite": suite.digest, "limit": limit, **encoder.identity}
    key = digest({**computed_by("requests"), **about})
    return store.get_or_make("requests", key, make)[0]


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
