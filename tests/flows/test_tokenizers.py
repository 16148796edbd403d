"""A tokenizer that cannot be loaded: why, in words that lead to what is to be done."""

import json

import pytest

from dpq_core.model.reader import CheckpointError
from tasks.support.model import load_tokenizer

SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.fixture
def said(quickstart_model, tmp_path):
    """What is said of a checkpoint with these files in place of a tokenizer's."""
    (tmp_path / "config.json").write_text((quickstart_model / "config.json").read_text())

    def of(**files):
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}: no usable tokenizer: ")
        assert "\n" not in message
        return message

    return of


def configured(**content):
    return json.dumps(content).encode()


@pytest.mark.parametrize("name", ["tokenizer__model", "spiece__model"])
def test_sentencepiece_is_not_called_tiktoken(said, monkeypatch, name):
    monkeypatch.setattr("tasks.support.model.find_spec", lambda _: None)
    message = said(
        **{name: SENTENCEPIECE}, tokenizer_config__json=configured(tokenizer_class="T5Tokenizer")
    )
    assert f"{name.replace('__', '.')} is SentencePiece's, and the package sentencepiece" in message
    assert "tokenizer.json" in message
    assert "tiktoken" not in message


def test_a_class_that_wants_a_package(said):
    message = said(tokenizer_config__json=configured(tokenizer_class="XLMTokenizer"))
    assert "a package is missing (You need to install sacremoses" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer__json", b"{}"),
        ("tokenizer_config__json", b"[]"),
        ("tokenizer_config__json", configured(tokenizer_class=3)),
    ],
)
def test_files_of_another_shape(said, name, content):
    assert "its files are not as transformers reads them (" in said(**{name: content})


def test_no_tokenizer_and_a_broken_one(said):
    assert said()
    assert "Expecting property name" in said(tokenizer__json=b"{")
