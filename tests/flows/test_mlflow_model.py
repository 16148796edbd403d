"""The champion as MLflow's tools take it: loaded, served, and asked for text."""

import ast
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from conftest import PATIENCE, run_flow
from mlflow.exceptions import MlflowException
from transformers import AutoTokenizer

import dpq_core
from dpq_core.checkpoint import load_quantized
from dpq_core.serving import pyfunc
from flows.release.release import release
from infra.outgoing import files_to_send
from infra.registry import Registry
from infra.registry.flavor import CODE, MODEL
from infra.registry.tracking import tracking_store

PROMPT = "def main("
_OTHERS = {"dpq_core", "mlflow", "pandas", "triton"}  # ours, there already, a GPU's


@pytest.fixture(scope="module")
def address(content, services_home):
    """Of the champion's registry, with the champion's folder and name there."""
    from dpq_core.recipe import parse_recipe

    recipe = parse_recipe({**content, "registry": {"name": "served-tests"}})
    promoted = run_flow(release, recipe)
    assert promoted.verdict.verdict == "promoted"
    return tracking_store(services_home)[0], Path(promoted.checkpoint), Registry.uri("served-tests")


def greedy(folder, prompt, tokens):
    """What the definition's linears answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = load_quantized(folder).generate(asked, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, asked.shape[1] :], skip_special_tokens=True)


def test_mlflow_serves_the_champion(address, tmp_path):
    tracking, folder, uri = address
    to_send = {*files_to_send(folder)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", uri, "--env-manager", "local", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = ""
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        answered = until_it_answers(server, f"http://127.0.0.1:{port}", tmp_path / "log")
        assert answered({"inputs": [PROMPT], "params": {"max_new_tokens": 12}}) == (
            200,
            [greedy(folder, PROMPT, 12)],
        )
        code, said = answered({"inputs": [PROMPT], "params": {"max_new_tokens": 0}})
        assert code == 400
        assert "max_new_tokens is 0" in said["message"]
        assert {*files_to_send(folder)} == to_send
    finally:
        for each in [*psutil.Process(server.pid).children(recursive=True), server]:
            each.kill()
        server.wait()


def until_it_answers(server, url, log):
    """A function that posts a request, once the server takes any."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/ping", timeout=30).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)

    def answered(request):
        answer = httpx.post(f"{url}/invocations", json=request, timeout=PATIENCE)
        said = answer.json()
        return answer.status_code, said.get("predictions", said)

    return answered


def test_prompts_are_answered_one_by_one_and_wrong_ones_by_name(address):
    import pandas

    generator = pyfunc._load_pyfunc(str(address[1]))
    asked = pandas.DataFrame([PROMPT, "import "])
    expected = [greedy(address[1], each, 6) for each in (PROMPT, "import ")]
    assert generator.predict(asked, {"max_new_tokens": 6}) == expected
    torch.manual_seed(0)
    assert generator.predict(asked, {"max_new_tokens": 6, "temperature": 5.0}) != expected
    with pytest.raises(MlflowException, match="temperature -1"):
        generator.predict(asked, {"temperature": -1.0})
    generator._tokenizer = partial(generator._tokenizer, add_special_tokens=False)
    with pytest.raises(MlflowException, match="an empty prompt"):
        generator.predict(pandas.DataFrame([""]))


def test_the_folder_says_what_loading_it_needs(address):
    folder = address[1]
    model, pinned = folder / MODEL, (folder / "requirements.txt").read_text().split()
    assert f'"name": "max_new_tokens", "default": {pyfunc.PARAMETERS["max_new_tokens"]}' in (
        model.read_text()
    )
    assert {each.partition("==")[0] for each in pinned} == {"mlflow", *imported_by_loading()}
    sent, source = files_to_send(folder), Path(dpq_core.__file__).parent
    for name, path in files_to_send(source).items():
        assert sent[f"{CODE}/dpq_core/{name}"].read_bytes() == path.read_bytes()


def imported_by_loading():
    """The distributions of what the modules import that are there after loading."""
    script = (
        f"import json, sys, {pyfunc.__name__}\n"
        "from dpq_core.serving.runtimes import RUNTIMES\n"
        "for row in RUNTIMES.values(): __import__(row.module)\n"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items()"
        " if n.partition('.')[0] == 'dpq_core']))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    owners, names = packages_distributions(), set()
    for path in json.loads(found.stdout):
        for node in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(node, ast.Import):
                names |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    third = names - set(sys.stdlib_module_names) - _OTHERS
    return {owners[each][0].lower().replace("_", "-") for each in third}
