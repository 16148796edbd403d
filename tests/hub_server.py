"""A model hub over HTTP for tests: what huggingface_hub asks when it pushes, and cut connections.

Large files are LFS objects, kept by their SHA-256 whether a commit names them or not, as the hub
keeps them; a commit names all files of a branch.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse

import yaml

TOKEN = "hf_of_these_tests"


class HubState:
    """repositories: name → private, and its branches' files. cut: the object
    whose upload is ended after some bytes, and refused from then on."""

    def __init__(self):
        self.repositories, self.objects, self.commits = {}, {}, []
        self.received = []  # SHA-256 of each whole object, in turn
        self.role = "write"
        self.cut = None  # SHA-256
        self.refuse_commits = False
        self.attempts = []  # SHA-256 of each upload that began, in turn


class _Handler(BaseHTTPRequestHandler):
    state: HubState

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        state, oid = self.state, self.path.rpartition("/")[2]
        size = int(self.headers["Content-Length"])
        state.attempts.append(oid)
        if oid == state.cut and state.attempts.count(oid) > 1:
            self.rfile.read(size)
            self.say(403, {"error": "no more of it"})  # which nobody tries again
            return
        if oid == state.cut:
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        assert hashlib.sha256(body).hexdigest() == oid
        state.objects[oid] = body
        state.received.append(oid)
        self.say(200, {})

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urlparse(self.path).path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.say(401, {"error": "Invalid username or password."})
        elif path[:2] == ["api", "whoami-v2"]:
            token = {"accessToken": {"role": self.state.role}}
            self.say(200, {"name": "tester", "auth": token})
        elif path[:2] == ["api", "validate-yaml"]:
            self.validate(json.loads(body)["content"])
        elif path == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif path[-4:] == ["info", "lfs", "objects", "batch"]:
            self.batch(json.loads(body)["objects"])
        elif path[:2] == ["api", "models"]:
            self.model("/".join(path[2:4]), path[4:], body)
        else:
            self.say(404, {"error": f"no such path: {self.path}"})

    def validate(self, content):
        front = yaml.safe_load(content.split("---\n")[1])
        base = front.get("base_model", "a/b")
        wrong = base.count("/") != 1 or base.startswith("/")
        errors = [{"message": "base_model is no id"}] if wrong else []
        self.say(400 if wrong else 200, {"errors": errors, "warnings": []})

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.state.repositories
        if not there:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            branches = {"main": {".gitattributes": b""}}
            self.state.repositories[name] = {"private": private, "branches": branches}
        self.say(409 if there else 200, {"url": f"{self.address}/{name}"})

    def batch(self, objects):
        self.say(200, {"transfer": "basic", "objects": [self.action(each) for each in objects]})

    def action(self, asked):
        if asked["oid"] in self.state.objects:
            return asked
        upload = {"href": f"{self.address}/lfs/{asked['oid']}"}
        return {**asked, "actions": {"upload": upload}}

    def model(self, name, rest, body):
        repository = self.state.repositories.get(name)
        if repository is None:
            self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        branches, what = repository["branches"], rest[0] if rest else "info"
        branch = unquote(rest[1]) if len(rest) > 1 else "main"
        if what == "branch":
            there = branch in branches
            branches.setdefault(branch, dict(branches["main"]))
            self.say(409 if there else 200, {})
        elif what == "preupload":
            self.say(200, {"files": [self.mode(f) for f in json.loads(body)["files"]]})
        elif what == "commit":
            self.commit(name, branches, branch, body)
        elif what == "tree":
            files = branches[branch]
            rows = [{"type": "file", "path": f, "size": len(files[f]), "oid": f} for f in files]
            self.say(200, rows)
        else:  # info, revision
            found = {"id": name, "private": repository["private"], "sha": "c" * 40}
            files = [{"rfilename": file} for file in branches[branch]]
            self.say(200, {**found, "siblings": files})

    @staticmethod
    def mode(file):
        large = file["path"].endswith(".safetensors")
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def commit(self, name, branches, branch, body):
        if self.state.refuse_commits:
            self.say(403, {"error": "no commits today"})
            return
        rows = [json.loads(line) for line in body.splitlines()]
        files = dict(branches[branch])
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        branches[branch] = files
        oid = f"{len(self.state.commits):040x}"
        self.state.commits.append((name, branch, rows[0]["value"]["summary"]))
        url = f"{self.address}/{name}/commit/{oid}"
        self.say(200, {"commitUrl": url, "commitOid": oid})

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def say(self, status, content, headers=None):
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def hub_server():
    """Its address, and its state."""
    state = HubState()
    handler = type("OneHub", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", state
        server.shutdown()
