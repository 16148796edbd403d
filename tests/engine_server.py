"""An OpenAI-compatible server over HTTP for tests: vLLM's `prompt_logprobs`, computed by
transformers from a folder, and what befalls servers."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import torch
from transformers import AutoModelForCausalLM


class EngineState:
    """cuts: completions whose connection is ended in the middle of the answer. busy: those that are
    answered with 503. asked: lengths of the prompts that came, in turn. key: bearer token."""

    def __init__(self, folder, name, root):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.name, self.root = name, root
        self.version, self.key = "1.0", None
        self.cuts = self.busy = 0
        self.extension = True
        self.asked = []

    @torch.no_grad()
    def rows(self, prompt, top):
        logits = self.model(torch.tensor([prompt])).logits[0].double()
        logs = torch.log_softmax(logits, -1)
        found = [None]
        for token, row in zip(prompt[1:], logs[:-1], strict=True):
            ranked = row.argsort(descending=True).tolist()
            chosen = {token, *ranked[:top]}
            found.append(
                {
                    str(piece): {
                        "logprob": row[piece].item(),
                        "rank": ranked.index(piece) + 1,
                        "decoded_token": "?",
                    }
                    for piece in chosen
                }
            )
        return found


class _Handler(BaseHTTPRequestHandler):
    state: EngineState

    def do_GET(self):
        if self.path == "/version":
            self.say(200, {"version": self.state.version})
        elif self.path == "/v1/models" and self.allowed():
            one = {"id": self.state.name, "root": self.state.root, "max_model_len": 2048}
            self.say(200, {"object": "list", "data": [one]})

    def do_POST(self):
        state, body = self.state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        state.asked.append(len(body["prompt"]))
        if state.busy:
            state.busy -= 1
            self.say(503, {"error": {"message": "too many requests"}})
            return
        if max(body["prompt"]) >= state.model.config.vocab_size:
            self.say(400, {"error": {"message": "Token id is out of vocabulary", "code": 400}})
            return
        choice = {"index": 0, "text": "x", "finish_reason": "length"}
        if state.extension:
            choice["prompt_logprobs"] = state.rows(body["prompt"], body["prompt_logprobs"])
        self.say(200, {"object": "text_completion", "choices": [choice]}, cut=state.cuts > 0)

    def allowed(self):
        given = self.headers.get("Authorization")
        if self.state.key and given != f"Bearer {self.state.key}":
            self.say(401, {"error": "Unauthorized"})
            return False
        return True

    def say(self, status, content, cut=False):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cut:
            self.state.cuts -= 1
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def engine_server(folder, name=None, root=None):
    """Its address, and its state; it serves `folder` as if it had loaded `root`."""
    state = EngineState(folder, name or folder.name, str(root or folder))
    handler = type("OneEngine", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", state
        server.shutdown()
