"""Log-likelihoods of given tokens from an OpenAI-compatible server with vLLM's `prompt_logprobs`.

`POST /v1/completions` with `prompt` as token ids and `prompt_logprobs: k` answers, for each token
but the first, with the log-likelihoods of that token and of the k most likely ones, by id. (`echo`
with `logprobs`, OpenAI's own, names pieces by their text: not which piece it was.)
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tenacity

from infra.errors import one_line

KEY = "DPQ_ENGINE_KEY"  # of the environment: bearer token of a server at an address
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # s; a long window on a busy processor
_ATTEMPTS, _PAUSE = 3, 1.0  # s: a connection that was cut, a server that has too much to do

Said = dict[int, float]  # log q of the token that follows and of the most likely ones, by id


class EngineError(RuntimeError):
    """An engine that says nothing of tokens, with the way out."""


@dataclass(frozen=True)
class Served:
    """A model as a server lists it. root: folder or hub id that it was loaded from, where it says.
    longest: tokens that it reads at most, where it says."""

    name: str
    root: str | None
    longest: int | None


class EngineClient:
    """A server at `http://host:port`, with or without `/v1` behind it.

    key: bearer token; of the environment's `DPQ_ENGINE_KEY` where it is None.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        key = key or os.environ.get(KEY)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def version(self) -> str | None:
        """As vLLM says it at `/version`; None: the server has no such page."""
        try:
            return str(self._asked("GET", "/version").get("version"))
        except EngineError:
            return None

    def healthy(self) -> bool:
        """Whether it takes requests by now."""
        try:
            return httpx.get(f"{self.address}/health", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def served(self, name: str | None = None) -> Served:
        """The model of that name, or the only one.

        Raises:
            EngineError: no answer; none of that name; several, and no name.
        """
        listed = [
            Served(str(m["id"]), m.get("root"), m.get("max_model_len"))
            for m in self._asked("GET", "/v1/models").get("data", [])
        ]
        found = [model for model in listed if name in (None, model.name)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(model.name for model in listed) or "nothing"
        asked = f"no model {name}" if name else "more than one model, or none"
        raise EngineError(
            f"{self.address} serves {asked}: it has {names}: name the one that is meant (--model,"
            " attest.model), or start it with the export"
        )

    def check_serves(self, folder: Path, name: str | None) -> Served:
        """The served model, if it can be that of an export's folder: named by the caller, loaded
        from this folder, or called like it.

        Raises:
            EngineError: as `served`; another model.
        """
        model = self.served(name)
        root = model.root or model.name
        same = Path(root).exists() and Path(root).resolve() == folder.resolve()
        if name or same or folder.resolve().name in (Path(root).name, model.name):
            return model
        raise EngineError(
            f"{self.address} serves {model.name}, loaded from {root}, and the export is {folder}:"
            f" start it with the export, or say --model {model.name} (attest.model) if it is that"
        )

    def said(self, model: str, tokens: Sequence[int], top: int) -> list[Said]:
        """What the model says of tokens 1 … of a sequence.

        Raises:
            EngineError: no answer, not even to the third try; one that says why not; or one without
                log-likelihoods of these tokens.
        """
        asked = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0}
        answer = self._asked("POST", "/v1/completions", {**asked, "prompt_logprobs": top})
        rows = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(tokens):
            raise EngineError(
                f"{self.address} answers without prompt_logprobs for {len(tokens)} tokens: it has"
                " to be vLLM, or a server with this extension of its"
            )
        found = [_logs(row) for row in rows[1:]]
        for token, said in zip(tokens[1:], found, strict=True):
            if token not in said or len(said) < top:
                raise EngineError(
                    f"{self.address} says nothing of token {token}, or of {len(said)} pieces where"
                    f" {top} are asked for: lower attest.top, or raise its --max-logprobs"
                )
        return found

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((httpx.TransportError, _BusyError)),
            wait=tenacity.wait_fixed(_PAUSE),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, _BusyError) as error:
            raise EngineError(f"{self.address}{path}: no answer: {one_line(error, 300)}") from error

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url = f"{self.address}{path}"
        answer = httpx.request(method, url, json=body, headers=self._headers, timeout=_TIMEOUT)
        if answer.status_code in (429, 503):
            raise _BusyError(f"{answer.status_code}: {_said_in(answer)}")
        if answer.status_code != 200:
            hint = f": set {KEY}" if answer.status_code in (401, 403) else ""
            said = _said_in(answer)
            raise EngineError(f"{url} answers {answer.status_code}{hint}: {said}")
        content = answer.json()
        if not isinstance(content, dict):
            raise EngineError(f"{url} answers with no object: it is no OpenAI-compatible server")
        return content


class _BusyError(RuntimeError):
    """Asked again later."""


def _logs(row: dict[str, Any] | None) -> Said:
    """By id. What is no number is NaN: JSON has none."""
    entries = (row or {}).items()
    values = {int(token): entry.get("logprob") for token, entry in entries}
    return {token: math.nan if value is None else float(value) for token, value in values.items()}


def _said_in(answer: httpx.Response) -> str:
    """The message of an error, as OpenAI-compatible servers send it."""
    try:
        content = answer.json()
        error = content.get("error", content)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = answer.text
    return " ".join(str(said).split())[:300] or "nothing"
