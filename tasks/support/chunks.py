"""What is kept of a chunk of an evaluation, and under which names in the store.

    chunk-scores    log-likelihoods of a checkpoint
    last-states     a baseline's hidden states after its last block
    divergences     of a candidate's predictions from a baseline's

Each depends on the chunk, on the checkpoints' content, and on what computes; not on the suites
beside it, the workers, or the memory that they have.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dpq_core.checkpoint.native import by_its_library
from dpq_core.digests import digest
from dpq_core.evaluation.chunk_files import (
    load_chunk,
    load_chunk_divergence,
    load_chunk_scores,
    load_requests,
    load_states,
    save_chunk_divergence,
    save_chunk_scores,
    save_states,
)
from dpq_core.evaluation.divergence import Divergence, by_request, divergence
from dpq_core.evaluation.forest import Chunk
from dpq_core.evaluation.head import Tiles
from dpq_core.evaluation.scorer import ChunkScores, LastStates, scores_of
from dpq_core.serving.runtimes import VERSION as RUNTIMES_VERSION
from infra.store import ArtifactRef, Store, StoreError
from tasks.support.stages import computed_by

_SCORES, _STATES, _DIVERGENCES = "chunk-scores", "last-states", "divergences"


@dataclass(frozen=True)
class Subject:
    """A checkpoint to measure. role: baseline or candidate. digest: of its content. source: as what
    a candidate is quantized from, see `load_model`. served: by the runtime of the device."""

    role: str
    folder: Path
    digest: str
    source: bool = False
    served: bool = False

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """Its part of a key."""
        found: dict[str, str | int] = {"checkpoint": self.digest}
        if self.source and by_its_library(self.folder):
            found["source"] = True
        if self.served:
            found["served"] = RUNTIMES_VERSION
        return found


@dataclass(frozen=True)
class ChunkRef:
    """A chunk of what `metric` asks. tokens: that run through a block. compared: its predictions
    are compared with a baseline's."""

    metric: str
    requests: ArtifactRef
    number: int
    digest: str
    tokens: int
    compared: bool


@dataclass(frozen=True)
class Portion:
    """Chunks that one task has scored (`tasks.support.work.Work`). resident: the model stays in
    memory between two of them; else all go through its blocks together. memory: bytes that this
    takes."""

    title: str
    chunks: tuple[ChunkRef, ...]
    resident: bool
    memory: int
    priority: int = 0


def loader_of(chunks: Iterable[ChunkRef], store: Store) -> Callable[[ChunkRef], Chunk]:
    """A function that reads them one by one, the files they are in checked once."""
    folders = {artifact: store.open(artifact) for artifact in {each.requests for each in chunks}}
    return lambda chunk: load_chunk(folders[chunk.requests], chunk.number)


def chunk_refs(metric: str, requests: ArtifactRef, store: Store, compared: bool) -> list[ChunkRef]:
    """The chunks of a metric, in order."""
    names = load_requests(store.open(requests)).chunks
    return [
        ChunkRef(metric, requests, number, each.digest, each.tokens, compared)
        for number, each in enumerate(names)
    ]


@dataclass(frozen=True)
class Comparison:
    """What is wanted of compared chunks. A baseline's states are kept: kept. A candidate's
    divergences from those of a reference."""

    kept: bool = False
    reference: Subject | None = None


@dataclass(frozen=True)
class Kept:
    """What a store has of a subject's chunks. arithmetic: class of those that compute."""

    store: Store
    subject: Subject
    comparison: Comparison
    arithmetic: str | None

    def missing(self, chunk: ChunkRef, scores: bool = True) -> bool:
        """Whether the model has to be run for a chunk; without `scores`, for its comparison."""
        wanted = self._wanted(chunk)
        if not scores:
            del wanted[_SCORES]
        return any(self.store.find(stage, key) is None for stage, key in wanted.items())

    @contextmanager
    def alone(self, chunks: Sequence[ChunkRef]) -> Iterator[list[ChunkRef]]:
        """Those of some chunks that are missing, for as long as nobody else has them scored: of two
        runs the second waits, and finds what the first has made."""
        with ExitStack() as leases:
            for chunk in chunks:
                leases.enter_context(self.store.lease(f"chunk-{self._wanted(chunk)[_SCORES]}"))
            yield [chunk for chunk in chunks if self.missing(chunk)]

    def keep(
        self,
        ref: ChunkRef,
        chunk: Chunk,
        states: LastStates,
        tiles: Tiles,  # of the subject's head
        theirs: Tiles | None,  # of the reference's
    ) -> None:
        """Store what is wanted of a chunk, from where it ends in the last block.

        Raises:
            StoreError: the reference's states are gone.
        """

        def scored(folder: Path) -> None:
            save_chunk_scores(folder, scores_of(tiles, chunk, states))

        def compared(folder: Path) -> None:
            assert theirs is not None
            before = self._states_of_reference(ref)
            each = divergence(theirs, before.hidden, tiles, states.hidden)
            rows = states.rows(chunk)
            save_chunk_divergence(folder, Divergence(each.nats[rows], each.agree[rows]))

        make: dict[str, Callable[[Path], None]] = {
            _SCORES: scored,
            _STATES: partial(save_states, states=states),
            _DIVERGENCES: compared,
        }
        for stage, key in self._wanted(ref).items():
            self.store.get_or_make(stage, key, make[stage])

    def scores(self, chunks: list[ChunkRef]) -> Iterator[ChunkScores]:
        """Raises StoreError: a chunk has not been scored."""
        for chunk in chunks:
            yield load_chunk_scores(self._found(_SCORES, chunk))

    def divergence(self, chunks: list[ChunkRef]) -> Divergence:
        """Of all predictions, in the order of the requests. Raises StoreError as above."""
        load = loader_of(chunks, self.store)
        return by_request(
            (load(chunk).requests, load_chunk_divergence(self._found(_DIVERGENCES, chunk)))
            for chunk in chunks
        )

    def _states_of_reference(self, chunk: ChunkRef) -> LastStates:
        reference = self.comparison.reference
        assert reference is not None
        kept = Kept(self.store, reference, Comparison(kept=True), self.arithmetic)
        return load_states(kept._found(_STATES, chunk))

    def _found(self, stage: str, chunk: ChunkRef) -> Path:
        artifact = self.store.find(stage, self._wanted(chunk)[stage])
        if artifact is None:
            raise StoreError(
                f"{self.store.root}: {stage} of chunk {chunk.number} of {chunk.metric} are gone:"
                " run again: they are made anew"
            )
        return self.store.open(artifact)

    def _wanted(self, chunk: ChunkRef) -> dict[str, str]:
        """Keys by stage."""
        about: dict[str, Any] = {**self.subject.identity, "chunk": chunk.digest}
        wanted = {_SCORES: about}
        if chunk.compared and self.comparison.kept:
            wanted[_STATES] = about
        if chunk.compared and self.comparison.reference:
            wanted[_DIVERGENCES] = about | {"reference": self.comparison.reference.identity}
        return {
            stage: digest({**computed_by(stage, self.arithmetic), **each})
            for stage, each in wanted.items()
        }
