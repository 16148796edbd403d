"""What a suite asks and what a model makes of it, on disk.

chunks.safetensors    <number>.ids, <number>.positions, … of each chunk, int64
requests.json         count, truncated; digest and tokens of each chunk

scores.safetensors    of one chunk: requests, sums, greedy, computed
states.safetensors    of one chunk: places, hidden, computed
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpq_core.evaluation.divergence import Divergence
from dpq_core.evaluation.forest import Chunk
from dpq_core.evaluation.scorer import ChunkScores, LastStates

_CHUNKS, _ABOUT = "chunks.safetensors", "requests.json"
_SCORES, _STATES = "scores.safetensors", "states.safetensors"
_DIVERGENCE = "divergence.safetensors"


@dataclass(frozen=True)
class ChunkName:
    """digest: of its content. tokens: that run through a block."""

    digest: str
    tokens: int


@dataclass(frozen=True)
class Requests:
    """count: of requests. truncated: those cut to the model's window. chunks: in order."""

    count: int
    truncated: int
    chunks: list[ChunkName]


def save_requests(folder: Path, chunks: Iterable[Chunk], count: int, truncated: int = 0) -> None:
    """Write them into an empty folder."""
    tensors, names = {}, list[ChunkName]()
    for number, chunk in enumerate(chunks):
        for field in fields(chunk):
            tensors[f"{number}.{field.name}"] = getattr(chunk, field.name)
        names.append(ChunkName(chunk.digest, len(chunk)))
    save_file(tensors, folder / _CHUNKS)
    about = Requests(count, truncated, names)
    (folder / _ABOUT).write_text(json.dumps(asdict(about)))


def load_requests(folder: Path) -> Requests:
    """All but the chunks themselves."""
    about = json.loads((folder / _ABOUT).read_text())
    return Requests(**about | {"chunks": [ChunkName(**each) for each in about["chunks"]]})


def load_chunk(folder: Path, number: int) -> Chunk:
    """One of them."""
    with safe_open(folder / _CHUNKS, "pt") as file:
        return Chunk(*(file.get_tensor(f"{number}.{field.name}") for field in fields(Chunk)))


def save_chunk_scores(folder: Path, scores: ChunkScores) -> None:
    """What one chunk scored, into an empty folder."""
    _save(scores, folder / _SCORES)


def load_chunk_scores(folder: Path) -> ChunkScores:
    """Inverse of `save_chunk_scores`."""
    found = load_file(folder / _SCORES)
    return ChunkScores(**found | {"computed": int(found["computed"])})


def save_states(folder: Path, states: LastStates) -> None:
    """Where one chunk ends in the last block, into an empty folder."""
    _save(states, folder / _STATES)


def load_states(folder: Path) -> LastStates:
    """Inverse of `save_states`."""
    found = load_file(folder / _STATES)
    return LastStates(**found | {"computed": int(found["computed"])})


def save_chunk_divergence(folder: Path, found: Divergence) -> None:
    """How far one chunk's predictions are from a baseline's, into an empty folder."""
    save_file(vars(found), folder / _DIVERGENCE)


def load_chunk_divergence(folder: Path) -> Divergence:
    """Inverse of `save_chunk_divergence`."""
    return Divergence(**load_file(folder / _DIVERGENCE))


def _save(record: ChunkScores | LastStates, path: Path) -> None:
    content = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = content | {"computed": torch.tensor(record.computed)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
