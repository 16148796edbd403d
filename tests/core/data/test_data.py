import gzip
import json
import os
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from dpq_core.data import python_corpus
from dpq_core.data.data_files import literal
from dpq_core.data.texts import (
    DataError,
    calibration_windows,
    load_texts,
    opening_token,
    set_aside,
    token_windows,
)
from dpq_core.errors import InputError
from dpq_core.recipe import TextDataset

SHARED = Path(__file__).parents[3].parent / "shared"
WIKITEXT = SHARED / "data/wikitext2_raw_test/test.jsonl.gz"
WIKI_LLAMA = SHARED / "models/wiki-llama-12m"
QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart/model"
BYTES = ByT5Tokenizer(extra_ids=0)


class OpeningTokenizer:
    """A byte tokenizer that opens every text with a token and closes none (Llama, GPT-2)."""

    def __init__(self, bos, eos):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text, verbose=True):
        texts = [text] if isinstance(text, str) else text
        ids = [[self.bos_token_id, *(3 + byte for byte in t.encode())] for t in texts]
        return type("Encoding", (), {"input_ids": ids[0] if isinstance(text, str) else ids})


def write_rows(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def files(path, **fields):
    return TextDataset(path="json", data_files=str(path), **fields)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_of_a_file_keep_their_order_and_blank_lines(tmp_path, name):
    rows = ["", " = Title = \n", "", " Text . \n", "ü"]
    path = write_rows(tmp_path / name, [{"text": row} for row in rows])
    assert load_texts(files(path)) == rows


def test_text_and_parquet_files_and_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n")
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert load_texts(TextDataset(path="text", data_files=names)) == ["one", "two", "three"]
    path = str(tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"page": ["four"]}).to_parquet(path)
    wanted = TextDataset(path="parquet", data_files=path, text_column="page")
    assert load_texts(wanted) == ["four"]


def test_python_docs_is_the_corpus():
    wanted = TextDataset(path="python_docs", split="validation")
    assert load_texts(wanted) == python_corpus.documents("validation")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.txt.gz"])
def test_a_changed_file_is_seen_even_when_its_time_is_not_changed(tmp_path, name):
    path = tmp_path / name
    builder = "json" if "jsonl" in name else "text"
    opener = gzip.open if path.suffix == ".gz" else open
    for text in ("one", "two"):
        with opener(path, "wt") as file:
            file.write(json.dumps({"text": text}) if builder == "json" else text)
        os.utime(path, (1e9, 1e9))
        assert load_texts(TextDataset(path=builder, data_files=str(path))) == [text]


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        ({"data_files": "/no/such.jsonl"}, [], "/no/such.jsonl"),
        ({"split": "test"}, [{"text": "a"}], "test"),
        ({"text_column": "body"}, [{"text": "a", "url": "b"}], "the columns are text, url"),
        ({}, [{"text": 3}], "row 0: int, not a string"),
        ({}, [{"text": "a"}, {"text": None}], "row 1: NoneType, not a string"),
        ({}, [{"text": ""}, {"text": " \n"}], "no text"),
        ({"path": "python_docs", "split": "test"}, [], "choose one of train, validation"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, fields, rows, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        load_texts(TextDataset(**{"path": "json", "data_files": path, **fields}))
    assert "\n" not in str(caught.value)


def test_broken_json_names_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        load_texts(files(path))


def test_an_unreachable_hub_points_to_a_mirror(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="point data_files to a local or S3 mirror"):
        load_texts(TextDataset(path="some/data"))


def test_reading_prints_nothing(tmp_path, capfd):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    load_texts(files(path))
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled()  # for good: two threads would undo each other


def test_token_windows_join_with_blank_lines_and_drop_the_tail():
    windows = token_windows(["abc", "", "defg"], BYTES, 4)  # abc\n\n\n\ndefg</s>: 12 tokens
    ids = BYTES("abc\n\n\n\ndefg").input_ids
    assert windows.dtype == torch.int64
    assert windows.tolist() == [ids[:4], ids[4:8], ids[8:12]]
    assert token_windows(["abcdefg"], BYTES, 5).tolist() == [ids_of("abcde")]


def ids_of(text):
    return BYTES(text, add_special_tokens=False).input_ids


def test_too_little_text_names_the_tokens_there_are():
    with pytest.raises(DataError, match="hold 4 tokens, and one window needs 8"):
        token_windows(["abc"], BYTES, 8)
    with pytest.raises(DataError, match="hold 4 tokens, and one window needs 8"):
        calibration_windows(["abc"], BYTES, 2, 8)
    with pytest.raises(DataError, match="hold 0 tokens"):
        calibration_windows(["", " "], BYTES, 2, 8)


def test_one_end_of_text_between_documents_whoever_writes_it():
    a, b = ids_of("ab"), ids_of("cd")
    closing = calibration_windows(["ab", "", "cd"], BYTES, 9, 6)  # closes every text itself
    assert closing.tolist() == [[*a, 1, *b, 1]]
    opening = calibration_windows(["ab", "cd"], OpeningTokenizer(2, 1), 9, 7)
    assert opening.tolist() == [[2, *a, 1, 2, *b]]
    both_in_one = calibration_windows(["ab", "cd"], OpeningTokenizer(0, 0), 9, 6)
    assert both_in_one.tolist() == [[0, *a, 0, *b]]
    without = calibration_windows(["ab", "cd"], OpeningTokenizer(2, None), 9, 6)
    assert without.tolist() == [[2, *a, 2, *b]]


@pytest.mark.parametrize(
    ("tokenizer", "auto", "always"),
    [(OpeningTokenizer(2, 1), 2, 2), (AutoTokenizer.from_pretrained(QUICKSTART), None, None)],
)
def test_which_token_opens_a_window(tokenizer, auto, always):
    assert opening_token(tokenizer, "auto") == auto
    assert opening_token(tokenizer, "never") is None
    if always is None:
        with pytest.raises(DataError, match="no begin-of-text token"):
            opening_token(tokenizer, "always")
    else:
        assert opening_token(tokenizer, "always") == always


def test_windows_that_are_opened_are_as_long_and_repeat_no_text():
    tokenizer, text = OpeningTokenizer(2, None), ids_of("abcdefghij")
    assert token_windows(["abcdefghij"], tokenizer, 4).tolist()[0] == [2, *text[:3]]
    opened = token_windows(["abcdefghij"], tokenizer, 4, opening=2)
    assert opened.tolist() == [[2, *text[n : n + 3]] for n in (0, 3, 6)]
    documents = calibration_windows(["abc", "defgh"], tokenizer, 9, 4, opening=2)
    a, b = ids_of("abc"), ids_of("defgh")  # in the stream 2 a b c 2 d e f g h
    assert documents.tolist() == [[2, *a], [2, a[2], 2, b[0]], [2, *b[1:4]]]


def test_calibration_windows_lie_evenly_over_all_documents():
    texts = [chr(ord("a") + i) * 7 for i in range(20)]  # 8 tokens a document, with </s>
    every = calibration_windows(texts, BYTES, 100, 8)
    assert len(every) == 20
    taken = calibration_windows(texts, BYTES, 5, 8)
    assert torch.equal(taken, every[::4])
    assert torch.equal(taken, calibration_windows(texts, BYTES, 5, 8))


@pytest.mark.parametrize(
    ("there", "samples", "unseen", "taken", "others"),
    [
        (40, 5, 2, [0, 8, 16, 24, 32], [1, 20]),  # the samples are what they are without
        (40, 36, 4, 36, 4),
        (40, 40, 4, 36, 4),  # taken out of the samples
        (40, 38, 4, 34, 4),  # two others are left, which are too few
        (40, 99, 9, 35, 5),  # an eighth at most
        (7, 4, 2, [0, 1, 3, 5], []),
        (16, 4, 0, [0, 4, 8, 12], []),
    ],
)
def test_windows_that_no_hessian_sees(there, samples, unseen, taken, others):
    seen, aside = set_aside(torch.arange(there), samples, unseen)
    for found, expected in ((seen, taken), (aside, others)):
        assert (len(found) if isinstance(expected, int) else found.tolist()) == expected
        assert found.tolist() == sorted(set(found.tolist()))
    assert not torch.isin(aside, seen).any()


def test_a_long_text_gives_no_length_warning(caplog, capfd):
    tokenizer = ByT5Tokenizer(extra_ids=0, model_max_length=16)
    token_windows(["word " * 50], tokenizer, 16)
    calibration_windows(["word " * 50], tokenizer, 2, 16)
    assert "longer than" not in caplog.text + capfd.readouterr().err


@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs ../shared/data")
def test_wikitext2_is_cut_as_the_papers_do():
    texts = load_texts(files(WIKITEXT))
    assert len(texts) == 4358
    tokenizer = AutoTokenizer.from_pretrained(WIKI_LLAMA)
    assert token_windows(texts, tokenizer, 512).shape == (345480 // 512, 512)


@pytest.mark.parametrize("name", ["a[1].jsonl", "a?.jsonl", "a*.jsonl", "a#b%20{c}'d.jsonl"])
def test_a_file_that_exists_is_that_file(tmp_path, name):
    write_rows(tmp_path / "a1.jsonl", [{"text": "another"}])
    path = write_rows(tmp_path / name, [{"text": "this one"}])
    assert load_texts(files(path)) == ["this one"]
    assert "another" in load_texts(files(tmp_path / "a?.json*"))  # which does not exist: a pattern


def test_an_object_that_exists_is_that_object():
    memory = fsspec.filesystem("memory")
    for name in ("a1.jsonl", "a[1].jsonl"):
        memory.pipe(f"/texts/{name}", json.dumps({"text": name}).encode())
    assert literal("memory://texts/a[1].jsonl") == "memory://texts/a[[]1].jsonl"
    assert literal("memory://texts/b[1].jsonl") == "memory://texts/b[1].jsonl"
    assert literal("https://host/a?b") == "https://host/a?b"


def test_a_name_that_datasets_reads_as_addresses_is_refused(tmp_path):
    path = write_rows(tmp_path / "a::b.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=r"a::b.jsonl: a name with :: cannot be read"):
        load_texts(files(path))


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    (tmp_path / "texts[1]").mkdir()
    with pytest.raises(InputError, match=r"texts\[1\]: a folder with"):
        load_texts(TextDataset(path=str(tmp_path / "texts[1]")))


@pytest.mark.parametrize(
    ("builder", "name", "content"),
    [
        ("json", "none.jsonl", b""),
        ("json", "none.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("json", "blank.jsonl", b"\n \n"),
        ("json", "list.json", b"[]"),
        ("text", "none.txt", b""),
        ("csv", "none.csv", b""),
        ("parquet", "none.parquet", b""),
    ],
)
def test_an_empty_file_is_called_so(tmp_path, builder, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_texts(TextDataset(path=builder, data_files=str(tmp_path / name)))
    assert str(caught.value) == f"{tmp_path / name}: the file holds no rows"


def test_a_builder_without_files_does_not_take_those_that_lie_about(tmp_path, monkeypatch):
    write_rows(tmp_path / "mine.jsonl", [{"text": "private"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="json: reads files: name them in data_files"):
        load_texts(TextDataset(path="json"))
