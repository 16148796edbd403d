"""transformers behind vLLM's `prompt_logprobs`: the loader of a checkpoint as an engine.

    python transformers_server.py FOLDER --port PORT --name NAME

Runs in an environment of its own, and imports nothing of ours. `ENGINE_KEY` of the environment is
the bearer token that it asks for, where it is set. One request at a time.
"""

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers


class Model:
    """A checkpoint as its own library loads it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self._lock = folder, name, Lock()
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = loaded.to(device).eval()
        self.vocabulary = int(self._model.get_input_embeddings().num_embeddings)

    @torch.inference_mode()
    def said(self, tokens: list[int], top: int) -> list[dict[str, dict[str, Any]] | None]:
        """Of each token but the first: its log-likelihood, and those of the `top` most likely."""
        with self._lock:
            ids = torch.tensor([tokens], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
            logs = logits.float().log_softmax(-1).cpu()
        rows: list[dict[str, dict[str, Any]] | None] = [None]
        for token, row in zip(tokens[1:], logs, strict=True):
            values, pieces = row.topk(min(top, len(row)))
            pairs = zip(pieces.tolist(), values.tolist(), strict=True)
            said = {str(p): {"logprob": v, "rank": n} for n, (p, v) in enumerate(pairs, 1)}
            rank = int((row > row[token]).sum()) + 1
            said.setdefault(str(token), {"logprob": float(row[token]), "rank": rank})
            rows.append(said)
        return rows


class Handler(BaseHTTPRequestHandler):
    """What the client of an engine asks."""

    model: Model
    key: str | None = None

    def do_GET(self) -> None:
        if self.path == "/health":
            self.say(200, {})
        elif self.path == "/version":
            self.say(200, {"version": transformers.__version__})
        elif not self.allowed():
            self.say(401, {"error": {"message": "Unauthorized"}})
        elif self.path == "/v1/models":
            served = {"id": self.model.name, "root": str(self.model.folder)}
            self.say(200, {"data": [served]})
        else:
            self.say(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if not self.allowed():
            self.say(401, {"error": {"message": "Unauthorized"}})
        elif self.path != "/v1/completions" or body.get("model") != self.model.name:
            said = f"The model `{body.get('model')}` does not exist."
            self.say(404, {"error": {"message": said}})
        elif max(body["prompt"]) >= self.model.vocabulary:
            said = f"Token id {max(body['prompt'])} is out of vocabulary"
            self.say(400, {"error": {"message": said}})
        else:
            rows = self.model.said(body["prompt"], body["prompt_logprobs"])
            self.say(200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": rows}]})

    def allowed(self) -> bool:
        return not self.key or self.headers.get("Authorization") == f"Bearer {self.key}"

    def say(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    model, key = Model(asked.folder, asked.name), os.environ.get("ENGINE_KEY")
    handler = type("OneModel", (Handler,), {"model": model, "key": key})
    with ThreadingHTTPServer(("127.0.0.1", asked.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
