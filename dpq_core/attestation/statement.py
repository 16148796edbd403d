"""What was found of an engine, as an in-toto Statement (v1) about the files that it served.

    subject        every file of the model that a digest covers, by SHA-256
    predicateType  `urn:dpq:engine-attestation:1`
    predicate      verdict and reasons; engine (name, version, packages, kernels, device, driver,
                   its command's arguments, variables that the export asks for); reference (whose
                   arithmetic is right); tokens; figures; limits; when it was made; what the last
                   one said

The model card is no subject: it tells of the statement.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpq_core.checkpoint import exports, native
from dpq_core.checkpoint.exports.card import CARD
from dpq_core.digests import file_digest
from dpq_core.errors import InputError
from dpq_core.model.reader import read_json

FILE = "attestation.json"
ENVELOPE = "attestation.dsse.json"  # the same, signed
TYPE = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:dpq:engine-attestation:1"

# What an engine's upgrade may move; all else of two statements is the same or says when.
_MOVING = ("verdict", "engine", "reference", "figures", "limits")


class StatementError(InputError):
    """A statement that is missing, of something else, or unsigned where a signature counts."""


def subject_of_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that are attested, by name: what its manifest lists and that itself, or
    every file of a model that has none. An export is compared with its manifest.

    Raises:
        CheckpointError: a damaged export, or a manifest that nobody knows.
    """
    if (folder / exports.MANIFEST).is_file():
        exports.verify(folder)
        names = [*exports.read_export(folder)["files"], exports.MANIFEST]
    elif (folder / native.MANIFEST).is_file():
        names = native.files_of(folder)
    else:
        left_out = (CARD, FILE, ENVELOPE)
        names = [p.name for p in folder.iterdir() if p.is_file() and p.name not in left_out]
    return {name: file_digest(folder / name) for name in sorted(names) if name[0] != "."}


def statement(subject: Mapping[str, str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """A Statement about files, by SHA-256."""
    return {
        "_type": TYPE,
        "subject": [{"name": n, "digest": {"sha256": sha}} for n, sha in subject.items()],
        "predicateType": PREDICATE,
        "predicate": dict(predicate),
    }


def read_statement(path: Path) -> dict[str, Any]:
    """Raises StatementError: there is none, or it is no statement of this version."""
    if not path.is_file():
        raise StatementError(f"{path}: no statement: run dpq attest without --again first")
    found = read_json(path)
    if found.get("_type") != TYPE or found.get("predicateType") != PREDICATE:
        raise StatementError(
            f"{path}: {found.get('predicateType')} is no statement of this release's kind"
            f" ({PREDICATE}): run dpq attest without --again"
        )
    return found


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of two predicates is not the same: path → before, after. None: it was not there."""
    old, new = (dict(_flat({k: p.get(k) for k in _MOVING})) for p in (before, after))
    return {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}


def summary(predicate: Mapping[str, Any]) -> str:
    """A statement in a line, for cards and reports."""
    engine, figures = predicate["engine"], predicate["figures"]
    named = f"{engine['name']} {engine['version'] or 'of unknown version'}"
    kernels = f" ({'; '.join(engine['kernels'])})" if engine["kernels"] else ""
    return (
        f"{predicate['verdict']}: {named} on {engine['device'] or 'an unknown device'}{kernels},"
        f" {figures['predictions']} tokens: log-likelihoods differ by"
        f" {_shown(figures['mean_difference'])} nats in the mean and"
        f" {_shown(figures['max_difference'])} at most, divergence at least"
        f" {_shown(figures['divergence'])} nats a token, same most likely token in"
        f" {_shown(figures['top1_agreement'])} of them"
    )


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3g}"


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
