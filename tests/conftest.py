"""Shared by all tests: the shipped model, and real services that the tests start themselves."""

import json
import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "recipes" / "quickstart" / "model"

# One thread: the same partition of every product whatever else the machine does.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quickstart_model():
    """Folder of the trained byte-level Llama that the repository carries."""
    return QUICKSTART


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A small text data set, one document a line."""
    from dpq_core import corpus

    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": text}) for text in corpus.documents("validation")[:12]]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def services_home(tmp_path_factory):
    """A running Prefect server, and MLflow on SQLite: every flow of the session uses them."""
    from infra.services import services

    home = tmp_path_factory.mktemp("services")
    os.environ["DPQ_HOME"] = str(home)
    with services(home) as running:
        os.environ["PREFECT_API_URL"] = running.prefect_api_url
        try:
            yield home
        finally:
            del os.environ["DPQ_HOME"]
            os.environ.pop("PREFECT_API_URL", None)
