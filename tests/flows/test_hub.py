"""Models by hub id: from a real HTTP server that speaks the hub's protocol, pinned to a commit."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
from model_families import save

from dpq_core.model.reader import SIDE_FILES

OLD, NEW = "a" * 40, "b" * 40
REVISIONS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


class Hub(BaseHTTPRequestHandler):
    """Repositories from folders: `repositories[name][commit]`. Paths as huggingface_hub 1.x asks
    for them: /api/models/<id>/revision/<revision>, …/tree/<commit>, /<id>/resolve/<commit>/<file>.
    """

    repositories: dict
    asked: list

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4], parts[5])
        else:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)

    def api(self, name, what, revision):
        folder = self.find(name, revision)
        if folder is None:
            return
        files = sorted(path.name for path in folder.iterdir())
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.json({"id": name, "sha": REVISIONS[revision], "siblings": siblings})
        else:
            sizes = {file: (folder / file).stat().st_size for file in files}
            rows = [{"type": "file", "path": f, "size": n, "oid": f} for f, n in sizes.items()]
            self.json(rows)

    def file(self, name, revision, file, body):
        folder = self.find(name, revision)
        if folder is None:
            return
        if not (folder / file).is_file():
            self.refuse("EntryNotFound")
            return
        self.asked.append(file)
        content = (folder / file).read_bytes()
        headers = {"X-Repo-Commit": REVISIONS[revision], "ETag": f'"{REVISIONS[revision]}{file}"'}
        self.send(200, content if body else b"", headers | {"Content-Length": str(len(content))})

    def find(self, name, revision):
        if name not in self.repositories:
            return self.refuse("RepoNotFound")
        if revision not in REVISIONS:
            return self.refuse("RevisionNotFound")
        return self.repositories[name][REVISIONS[revision]]

    def refuse(self, code):
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"})

    def json(self, content):
        data = json.dumps(content).encode()
        self.send(200, data, {"Content-Type": "application/json", "Content-Length": str(len(data))})

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(repositories):
    """Address of a hub with these repositories, and the files that it was asked for."""
    handler = type("OneHub", (Hub,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A model of two commits, one of pickles only, one with code and the same weights twice."""
    root = tmp_path_factory.mktemp("hub")
    models = {commit: save("llama-2", root / commit, seed=n) for n, commit in enumerate([OLD, NEW])}
    pickled, more = root / "pickled", save("llama-2", root / "more")
    pickled.mkdir()
    (pickled / "config.json").write_bytes((models[NEW] / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    (more / "modeling_own.py").write_text("raise RuntimeError('must not run')")
    (more / "pytorch_model.bin").write_bytes(b"never read")
    (more / "consolidated.safetensors").write_bytes(b"the same weights")
    return {
        "tests/model": models,
        "tests/pickled": {NEW: pickled},
        "tests/more": {NEW: more},
    }


RUN = "from flows.cli.main import main; main()"
RESOLVE = """
import json, sys
from dpq_core.model.reader import CheckpointError
from dpq_core.recipe import ModelSection
from tasks.support.model import resolve

for line in sys.stdin:
    try:
        folder, revision = resolve(ModelSection(**json.loads(line)))
        found = [revision, str(folder), sorted(path.name for path in folder.iterdir())]
    except CheckpointError as error:
        found = str(error)
    print(json.dumps(found), flush=True)
"""


def environment(home, address):
    """The hub's address and cache are read once a process, at import."""
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **hub, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def resolver(home, address):
    """`tasks.support.model.resolve` in a process of its own: commit, folder, file names; or the
    error."""
    process = subprocess.Popen(
        [sys.executable, "-c", RESOLVE],
        env=environment(home, address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def resolve(**section):
        process.stdin.write(json.dumps(section) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    with process:
        yield resolve
        process.stdin.close()


def test_revisions_are_pinned_pickles_refused_and_code_left(repositories, tmp_path):
    model = "tests/model"
    with ExitStack() as stack:
        with serving(repositories) as (address, asked):
            resolve = stack.enter_context(resolver(tmp_path, address))
            commit, newest, _ = resolve(id=model)
            assert commit == NEW
            tagged = resolve(id=model, revision="v1")
            assert tagged == resolve(id=model, revision=OLD)
            assert tagged[0] == OLD
            for folder, commit in ((newest, NEW), (tagged[1], OLD)):
                stored = repositories[model][commit] / "model.safetensors"
                assert Path(folder, "model.safetensors").read_bytes() == stored.read_bytes()
            unknown = resolve(id=model, revision="v9")
            assert "tests/model is no folder, and the hub does not give it" in unknown
            assert "tests/none is no folder" in resolve(id="tests/none")
            assert "has no safetensors on the hub" in resolve(id="tests/pickled")
            _, _, files = resolve(id="tests/more")
            assert set(files) <= {"model.safetensors", *SIDE_FILES}
            _, _, trusted = resolve(id="tests/more", trust_remote_code=True)
            assert set(trusted) - set(files) == {"modeling_own.py"}
            assert not {"pytorch_model.bin", "consolidated.safetensors"} & set(asked)
        # The server is gone: the cache gives the same commit.
        assert resolve(id=model, revision="v1") == tagged


def test_the_manifest_names_the_commit(repositories, content, services_home, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    model = {"id": "tests/model", "revision": "v1"}
    scheme = {"group_size": 32, "rounding": "nearest"}
    calibration = content["calibration"] | {"samples": 2, "sequence_length": 32}
    execution = content["execution"] | {"store": str(tmp_path / "store")}
    changes = {
        "model": model,
        "scheme": scheme,
        "calibration": calibration,
        "evaluation": {},
        "execution": execution,
    }
    recipe.write_text(json.dumps(content | changes))
    with serving(repositories) as (address, _):
        done = subprocess.run(
            [sys.executable, "-c", RUN, "quantize", str(recipe), "--json"],
            env=environment(tmp_path / "home", address),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    manifest = Path(json.loads(done.stdout)["checkpoint"], "dpq.json")
    base = json.loads(manifest.read_text())["base_model"]
    assert base["id"] == "tests/model"
    assert base["revision"] == OLD
    assert base["trust_remote_code"] is False
