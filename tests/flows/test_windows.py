"""Windows begin as the model is run, and whoever reads a result sees how."""

import json

import pytest
from model_families import IDS, SPECIAL, tokenizer

from dpq_core.recipe import CalibrationSection, EvaluationSection
from infra.store import Store
from tasks.evaluate import prepare
from tasks.support import tokenized_data
from tasks.support.model import load_tokenizer

BOS = IDS[SPECIAL[0]]


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a tokenizer that opens no text, of a model of some type."""

    def made(model_type):
        folder = tmp_path / model_type
        own = tokenizer()
        own.bos_token = SPECIAL[0]
        own.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return folder

    return made


@pytest.mark.parametrize(
    ("model_type", "bos", "opened"),
    [
        ("gemma3_text", "auto", True),
        ("gemma3_text", "never", False),
        ("llama", "auto", False),
        ("llama", "always", True),
    ],
)
def test_calibration_and_perplexity_begin_alike(tmp_path, folder_of, model_type, bos, opened):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "some words of a text, " * 20}))
    dataset = {"path": "json", "data_files": str(text)}
    store, folder = Store(str(tmp_path / "store")), folder_of(model_type)
    loaded = load_tokenizer(folder)
    asked = {"dataset": dataset, "sequence_length": 16, "bos": bos}
    artifact = tokenized_data.store_calibration(
        CalibrationSection(**asked, samples=4), loaded, folder, store
    )
    data = prepare(EvaluationSection(perplexity=asked), loaded, None, store)
    assert data.opened == opened
    assert tokenized_data.opening_of(artifact, store) == (BOS if opened else None)
    for each in (artifact, data.perplexity):
        found = tokenized_data.load(each, store)
        assert found.shape[1] == 16
        assert bool((found[:, 0] == BOS).all()) == opened
