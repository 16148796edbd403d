"""Ask an engine what it thinks of tokens, hold it against our own arithmetic, and state it."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpq_core.attestation.agreement import Agreement, Said, agreement, exceeded
from dpq_core.attestation.envelope import private_key, signed
from dpq_core.attestation.statement import (
    ENVELOPE,
    FILE,
    StatementError,
    statement,
    subject_of_folder,
    summary,
)
from dpq_core.checkpoint.exports import MANIFEST, read_export
from dpq_core.digests import write_json
from dpq_core.evaluation.subject import subject_of
from dpq_core.machine.device import whole_machine
from dpq_core.model.context import context_of
from dpq_core.model.reader import read_json
from dpq_core.model.streaming import load_config
from dpq_core.recipe import AttestSection, Recipe
from infra import settings
from infra.engine.client import EngineClient
from infra.engine.process import KINDS, about, kernels_in, started
from infra.store import Store
from tasks.support import tokenized_data
from tasks.support.environment import versions
from tasks.support.model import load_tokenizer
from tasks.support.progress import stepper

_PROBE = 16  # tokens, by which an engine shows that it can be asked at all
_LEAST = 2  # tokens of a window: one that is read, one that is predicted


@dataclass(frozen=True)
class Attestation:
    """A statement about a folder, in which it lies."""

    folder: Path
    statement: dict[str, Any]

    @property
    def predicate(self) -> dict[str, Any]:
        found: dict[str, Any] = self.statement["predicate"]
        return found

    @property
    def wrong(self) -> str | None:
        """Why the engine is refused."""
        return "; ".join(self.predicate["reasons"]) or None

    @property
    def line(self) -> str:
        return summary(self.predicate)


@dataclass(frozen=True)
class _Engine:
    """What was asked, and what is known of it. kernels: known once it has answered."""

    client: EngineClient
    model: str
    about: dict[str, Any]
    log: Path | None = None


def check_engine(section: AttestSection) -> None:
    """Whether the engine that is asked for is there at all, and the key to sign by: before work.

    Raises:
        EngineError: no environment or no answer. StatementError: no such key.
    """
    if section.engine is None:
        return
    if key := settings.signing_key():
        private_key(key)
    if section.engine in KINDS:
        about(section.engine)
    else:
        EngineClient(section.engine).served(section.model)


def attested(
    recipe: Recipe,
    folder: Path,
    reference: Path | None,
    device: torch.device | str,
    last: dict[str, Any] | None = None,
) -> Attestation:
    """Attest an export's folder by the engine that the recipe names; the statement is left there.

    reference: the checkpoint whose arithmetic is right; the export itself where it is None.
    last: predicate of the statement before, whose tokens have to be the same.

    Raises:
        EngineError: it serves another model, or says nothing. CheckpointError: a damaged export.
        StatementError: the last statement is of other tokens, or the key is none.
    """
    section = recipe.attest
    check_engine(section)
    subject = subject_of_folder(folder)
    windows = _windows(recipe, folder)
    tokens = {
        "windows": len(windows),
        "length": windows.shape[1],
        "sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
    if last and last["tokens"] != tokens:
        raise StatementError(
            f"the last statement is of {_named(last['tokens'])}, and the recipe gives"
            f" {_named(tokens)}: attest with the same recipe, or anew without --again"
        )
    with _engine(section, folder) as engine:
        said = _said(engine, windows, section.top)
        about_engine = _told(engine, section)
    with whole_machine():
        ours = subject_of(
            reference or folder, device, trust_remote_code=recipe.model.trust_remote_code
        )
        found = agreement(ours, windows, said, section.top)
    predicate = {
        **_verdict(found, section),
        "engine": about_engine,
        "reference": {"arithmetic": _arithmetic(folder, reference), "packages": _packages()},
        "tokens": tokens,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.digest,
        "last": {k: last[k] for k in ("made", "verdict", "figures")} if last else None,
    }
    result = Attestation(folder, statement(subject, predicate))
    _write(result)
    return result


@contextmanager
def _engine(section: AttestSection, folder: Path) -> Iterator[_Engine]:
    name = section.engine
    assert name is not None
    if name not in KINDS:
        client = EngineClient(name)
        model = client.check_serves(folder, section.model)
        yield _Engine(client, model.name, {"name": "server", "address": client.address})
        return
    found = about(name)
    log = settings.home() / "logs" / f"engine-{name}.log"
    starting = stepper(f"start {name}", 1)
    wanted = _variables(folder)
    seen = {key: os.environ.get(key, value) for key, value in wanted.items()}
    with started(name, folder, log, section.arguments, wanted) as engine:
        starting()
        about_it = {"name": name, **found, "variables": seen}
        yield _Engine(engine.client, engine.model, about_it, log)


def _variables(folder: Path) -> dict[str, str]:
    """Those that an engine needs to compute what an export was judged by."""
    path = folder / MANIFEST
    found: dict[str, str] = read_json(path).get("vllm_environment", {}) if path.is_file() else {}
    return found


def _said(engine: _Engine, windows: Tensor, top: int) -> list[list[Said]]:
    """Of each window. A few tokens first: what is wrong shows before the long ones."""
    rows = windows.tolist()
    engine.client.said(engine.model, rows[0][:_PROBE], top)
    step, found = stepper("ask the engine", len(rows)), list[list[Said]]()
    for row in rows:
        found.append(list(engine.client.said(engine.model, row, top)))
        step()
    return found


def _told(engine: _Engine, section: AttestSection) -> dict[str, Any]:
    """What the statement says of an engine; None: it did not say."""
    return {
        "name": engine.about["name"],
        "version": engine.client.version(),
        "address": engine.about.get("address"),
        "python": engine.about.get("python"),
        "packages": engine.about.get("packages", {}),
        "device": engine.about.get("device"),
        "driver": engine.about.get("driver"),
        "kernels": kernels_in(engine.log) if engine.log else [],
        "variables": engine.about.get("variables", {}),
        "arguments": list(section.arguments),
    }


def _windows(recipe: Recipe, folder: Path) -> Tensor:
    """Some of the windows that perplexity is of, evenly spaced, [windows, length] int64. An engine
    has to predict one more token than it reads."""
    section, perplexity = recipe.attest, recipe.evaluation.perplexity
    if perplexity is None:
        raise StatementError(
            "attest: the recipe names no text: add evaluation.perplexity, whose windows are asked"
        )
    store, trusted = Store(recipe.execution.store), recipe.model.trust_remote_code
    tokenizer = load_tokenizer(folder, trusted)
    found = tokenized_data.load(
        tokenized_data.store_perplexity(perplexity, tokenizer, store), store
    )
    context = context_of(load_config(folder, trusted).get_text_config())
    length = min(section.tokens, found.shape[1], (context or section.tokens + 1) - 1)
    places = torch.linspace(0, len(found) - 1, min(section.windows, len(found))).long()
    return found[places, : max(length, _LEAST)].contiguous()


def _verdict(found: Agreement, section: AttestSection) -> dict[str, Any]:
    reasons = exceeded(found, section.limits)
    return {
        "verdict": "refused" if reasons else "passed",
        "reasons": reasons,
        "figures": found.as_dict(),
        "limits": section.limits.model_dump(),
    }


def _arithmetic(folder: Path, reference: Path | None) -> str:
    """Whose arithmetic is right, in words."""
    if reference is not None and reference.resolve() != folder.resolve():
        return f"of {reference.name}, as dpq computes it"
    if (folder / MANIFEST).is_file():
        return f"of the export, as its reader computes it ({read_export(folder)['reader']})"
    return "of the checkpoint, as dpq computes it"


def _packages() -> dict[str, str]:
    chosen = ("dpq_core", "torch", "transformers", "compressed-tensors")
    found = versions()
    return {"dpq": version("dpq"), **{name: found[name] for name in chosen}}


def _write(result: Attestation) -> None:
    envelope = result.folder / ENVELOPE
    write_json(result.folder / FILE, result.statement)
    if key := settings.signing_key():
        write_json(envelope, signed(result.statement, private_key(key)))
    else:
        envelope.unlink(missing_ok=True)  # of another statement


def _named(tokens: dict[str, Any]) -> str:
    return (
        f"{tokens['windows']} windows of {tokens['length']} tokens ({str(tokens['sha256'])[:12]})"
    )
