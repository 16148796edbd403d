"""Shared by all tests: the shipped model, and a little text."""

import json
import os
from pathlib import Path

import pytest
import s3fs

# OpenMP's threads wait for one another in a busy loop: beside other work two of them take 20 times
# as long as one. Asleep they do not. Read when torch is imported, here and in child processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "recipes" / "quickstart" / "model"

# One thread: the same partition of every product whatever else the machine does.
torch.set_num_threads(1)

# pytest-xdist's workers, and what they start, have a core each.
if worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


# Releases first: one that is left for the end keeps a worker busy while the other has nothing left.
# Flows together: their services end at the first test of another folder, and would be started
# again. What is short comes last.
ORDER = ("chaos", "flows", "", "core")


def pytest_collection_modifyitems(items):
    def place(item):
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
        return ORDER.index(folder if folder in ORDER else "")

    items.sort(key=place)


@pytest.fixture(scope="session")
def quickstart_model():
    """Folder of the trained byte-level Llama that the repository carries."""
    return QUICKSTART


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small text data set, one document a line: 8,000 bytes, since most of a release's time
    here goes into reading them."""
    from dpq_core.data import python_corpus

    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [text[:700] for text in python_corpus.documents("validation")[:12]]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def s3_endpoint():
    from s3_server import FaultyS3

    server = FaultyS3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    """An S3 endpoint over HTTP, that the environment names; nothing befalls it yet."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # of a test that had no credentials
    s3_endpoint.faults.clear()
    yield s3_endpoint
    s3fs.S3FileSystem.clear_instance_cache()
