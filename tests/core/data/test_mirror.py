"""Mirrors: a small one that the tests write, the hub's part played by folders, the shared one."""

import gzip
import json
import os
from pathlib import Path

import fsspec
import pytest
from lm_eval.tasks import TaskManager

from dpq_core.data import mirror, mirrored_suites
from dpq_core.data.mirror import MirrorError, check, fetch, fingerprint, make
from dpq_core.data.mirrored_suites import MIRRORED
from dpq_core.evaluation.suites import definitions
from dpq_core.evaluation.suites.definitions import (
    SuiteError,
    SuiteSources,
    check_suites,
    loaded_suites,
)

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def piqa(number, label=0):
    return {"goal": f"goal {number}", "sol1": "this", "sol2": "that", "label": label}


def mmlu(subject, number):
    choices = ["one", "two", "three", "four"]
    question = f"{subject} {number}?"
    return {"question": question, "subject": subject, "choices": choices, "answer": number % 4}


def write(folder, name, rows, packed=True):
    path = folder / f"{name}.jsonl{'.gz' if packed else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mirror"
    write(folder, "piqa/validation", [piqa(n) for n in range(6)])
    write(folder, "boolq/validation", [{"passage": "p", "question": "q", "label": 1}], packed=False)
    return folder


def with_all_subjects(folder):
    stems = [path.stem[5:] for path in sorted((mirror._shipped() / "mmlu/default").glob("mmlu_*"))]
    assert len(stems) == 57
    write(folder, "mmlu/test", [mmlu(subject, n) for subject in stems for n in range(3)])
    write(folder, "mmlu/dev", [mmlu(subject, n) for subject in stems for n in range(10, 15)])
    return folder


def loaded(folder, names, num_fewshot=None):
    return loaded_suites(names, SuiteSources(mirror=folder), num_fewshot)


def documents(suite):
    return [doc for task in suite.tasks.values() for doc in task.eval_docs]


@pytest.fixture(autouse=True)
def no_search_of_the_harness(monkeypatch):
    """A mirrored suite is found without reading the harness's 14,000 definitions."""

    def search():
        raise AssertionError("searched")

    monkeypatch.setattr(definitions, "_packaged_index", search)


def test_suites_read_the_mirror(folder):
    with loaded(folder, ["piqa", "boolq"]) as suites:
        assert documents(suites["piqa"]) == [piqa(n) for n in range(6)]
        assert [doc["passage"] for doc in documents(suites["boolq"])] == ["p"]
        assert (suites["piqa"].kind, suites["boolq"].kind) == ("acc_norm", "acc")


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("mmlu", 57), ("mmlu_stem", 19), ("mmlu_anatomy", 1), ("mmlu_humanities", 13)],
)
def test_mmlu_is_split_by_subject(folder, name, tasks):
    with loaded(with_all_subjects(folder), [name], {name: 5}) as suites:
        suite = suites[name]
        assert len(suite.tasks) == tasks
        assert len(documents(suite)) == 3 * tasks
        for task_name, task in suite.tasks.items():
            subject = task_name.removeprefix("mmlu_")
            assert {doc["subject"] for doc in task.eval_docs} == {subject}
            task.build_all_requests(limit=1)
            prompt = task.instances[0].args[0]
            assert [f"{subject} {n}?" in prompt for n in (10, 11, 12, 13, 14)] == [True] * 5


def test_a_mirrored_suite_asks_what_the_harness_asks_of_the_same_file(folder, tmp_path):
    """Against `dataset_path: json`, which is how a reader of the harness's manual would do it."""
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    file = folder / "piqa/validation.jsonl.gz"
    (by_hand / "piqa.yaml").write_text(
        f"include: {mirror._shipped() / 'piqa/piqa.yaml'}\ntask: piqa\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {file}, validation: {file}}}}}\n"
    )
    task = TaskManager(include_path=by_hand, include_defaults=False).load(["piqa"])["tasks"]["piqa"]
    with loaded(folder, ["piqa"]) as suites:
        asked = []
        for each in (task, suites["piqa"].tasks["piqa"]):
            each.build_all_requests()
            asked.append([request.args for request in each.instances])
    assert asked[0] == asked[1]
    assert len(asked[0]) == 12


def test_changed_data_change_the_digest_whatever_the_file_s_time(folder):
    path, digests = folder / "piqa/validation.jsonl.gz", set()
    for label in (0, 1):
        write(folder, "piqa/validation", [piqa(n, label) for n in range(6)])
        os.utime(path, (1e9, 1e9))
        with loaded(folder, ["piqa"]) as suites:
            digests.add(suites["piqa"].digest)
    assert len(digests) == 2


def test_examples_that_are_not_there_are_told(folder):
    with pytest.raises(SuiteError, match="'piqa': num_fewshot is 2, and its data hold 0 examples"):
        loaded(folder, ["piqa"], {"piqa": 2}).__enter__()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-12])


def drop_field(path):
    row = piqa(1)
    del row["sol2"]
    write(path.parents[1], "piqa/validation", [piqa(0), row])


def garble(path):
    path.write_bytes(gzip.compress(b'{"goal": 1}'[:-2] + b"\n"))


def no_object(path):
    path.write_bytes(gzip.compress(b"[1]\n"))


def unpacked(path):
    path.write_bytes(b"no gzip at all")


def no_label(path):
    write(path.parents[1], "piqa/validation", [piqa(0), piqa(1, None)])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            Path.unlink,
            r"piqa/validation\.jsonl\.gz: missing, and suite 'piqa' needs it.*mirror make",
        ),
        (truncate, r"validation\.jsonl\.gz, after line \d+: damaged"),
        (drop_field, r"validation\.jsonl\.gz, line 2: no field 'sol2'"),
        (garble, r"validation\.jsonl\.gz, line 1: not a JSON object"),
        (no_object, r"validation\.jsonl\.gz, line 1: not a JSON object"),
        (unpacked, r"validation\.jsonl\.gz, after line 0: damaged"),
        (no_label, r"validation\.jsonl\.gz, line 2: no field 'label'"),
    ],
)
def test_what_is_damaged_is_told_before_any_work(folder, damage, expected):
    damage(folder / "piqa/validation.jsonl.gz")
    with pytest.raises(MirrorError, match=expected) as told:
        check_suites(["piqa"], SuiteSources(mirror=folder))
    assert "\n" not in str(told.value)
    (row,) = [row for row in check(folder) if row.suite == "piqa" and row.needed]
    assert row.wrong
    assert not row.fine


def test_an_empty_file_is_told(folder):
    write(folder, "piqa/validation", [])
    with pytest.raises(MirrorError, match=r"validation\.jsonl\.gz: no documents"):
        check_suites(["piqa"], SuiteSources(mirror=folder))


def test_subjects_that_are_missing_or_unknown_are_told(folder):
    rows = read(with_all_subjects(folder) / "mmlu/test.jsonl.gz")
    write(folder, "mmlu/test", [*rows, mmlu("astrology", 1)])
    with pytest.raises(MirrorError, match="test: 'astrology' is no subject"):
        check_suites(["mmlu"], SuiteSources(mirror=folder))
    write(folder, "mmlu/test", [row for row in rows if row["subject"] != "anatomy"])
    for name in ("mmlu", "mmlu_stem", "mmlu_anatomy"):
        with pytest.raises(MirrorError, match=r"test\.jsonl\.gz: no documents of .* 'anatomy'"):
            check_suites([name], SuiteSources(mirror=folder))
    with loaded(folder, ["mmlu_virology"]) as suites:
        assert len(documents(suites["mmlu_virology"])) == 3


def test_check_counts_and_names(folder):
    rows = {(row.suite, row.split): row for row in check(folder)}
    assert len(rows) == sum(len(suite.splits) for suite in MIRRORED.values())
    found = rows["piqa", "validation"]
    assert (found.documents, found.official, found.fine) == (6, 1838, False)
    assert found.status == "not the official count"
    assert rows["piqa", "train"].fine  # examples only
    assert not rows["mmlu", "test"].fine
    packed = write(folder, "boolq/validation", [{"passage": "p", "question": "q", "label": 1}])
    (folder / "boolq/validation.jsonl").unlink()
    again = {(row.suite, row.split): row for row in check(folder)}["boolq", "validation"]
    assert again.digest == rows["boolq", "validation"].digest  # however it is packed
    assert packed.exists()
    with pytest.raises(MirrorError, match="does not exist"):
        check(folder / "absent")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders that `load_dataset` reads in the hub's place."""
    source = tmp_path / "hub" / "piqa"
    write(source, "validation", [piqa(n, n % 2) for n in range(5)], packed=False)
    write(source, "train", [piqa(n) for n in range(3)], packed=False)
    row = mirrored_suites._row(
        MIRRORED["piqa"].definition,
        "piqa",
        (str(source), None),
        {"validation": 5, "train": 3},
        "goal sol1 sol2 label",
    )
    gone = mirrored_suites._row(
        "boolq", "boolq", (str(tmp_path / "gone"), None), {"validation": 1}, "label"
    )
    monkeypatch.setitem(mirrored_suites.MIRRORED, "piqa", row)
    monkeypatch.setitem(mirrored_suites.MIRRORED, "boolq", gone)
    return source


def test_what_was_made_is_complete_and_the_same_bytes_again(hub, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    rows = {(row.suite, row.split): row for row in make(first, ["piqa", "boolq"])}
    assert rows["piqa", "validation"].status == rows["piqa", "train"].status == "official"
    assert rows["boolq", "validation"].wrong.startswith("not fetched: ")
    list(make(second, ["piqa"]))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(file) for file in files] == ["piqa/train.jsonl.gz", "piqa/validation.jsonl.gz"]
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    with loaded(first, ["piqa"], {"piqa": 1}) as suites:
        assert documents(suites["piqa"]) == [piqa(n, n % 2) for n in range(5)]
    with pytest.raises(MirrorError, match="'mnli' cannot be mirrored: choose from"):
        list(make(first, ["mnli"]))


def test_a_remote_mirror_is_copied_and_known_by_its_files(folder, tmp_path):
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/bucket/data", recursive=True)
    url = "memory://bucket/data"
    before = fingerprint(url, ["piqa"])
    assert fingerprint(url, ["piqa"]) == before != fingerprint(url, ["piqa", "boolq"])
    copy = tmp_path / "copy"
    fetch(url, copy, ["piqa"])
    assert [path.name for path in copy.rglob("*.gz")] == ["validation.jsonl.gz"]
    with loaded(copy, ["piqa"]) as suites:
        assert len(documents(suites["piqa"])) == 6
    remote.pipe("/bucket/data/piqa/validation.jsonl.gz", b"other")
    assert fingerprint(url, ["piqa"]) != before
    with pytest.raises(MirrorError, match=r"nowhere://x: .*AWS_ENDPOINT_URL"):
        fetch("nowhere://x", copy, ["piqa"])
    for act in (fingerprint, lambda url, names: fetch(url, copy, names)):
        with pytest.raises(
            MirrorError, match="other: no such bucket or folder, or no files in piq"
        ):
            act("memory://bucket/other", ["piqa"])
        act("memory://bucket/other", ["python_docs", "mmlu_pro"])  # need nothing of it


def test_a_remote_mirror_whose_name_is_a_pattern_is_that_one(folder, tmp_path):
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/bucket/mirror[1]", recursive=True)
    fetch("memory://bucket/mirror[1]", tmp_path / "copy", ["piqa"])
    assert (tmp_path / "copy" / "piqa" / "validation.jsonl.gz").is_file()


def test_what_is_interrupted_leaves_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror.gzip.GzipFile, "write", lambda *_: 1 / 0)
    (row, _) = make(tmp_path / "made", ["piqa"])
    assert row.wrong == "not fetched: division by zero"
    assert not [path for path in (tmp_path / "made").rglob("*") if path.is_file()]


@needs_shared
def test_five_examples_of_mmlu_are_those_of_the_file(tmp_path):
    for split in ("test", "dev"):
        rows = read(SHARED / f"mmlu/{split}.jsonl.gz")
        write(tmp_path, split, [r for r in rows if r["subject"] == "anatomy"], packed=False)
    (tmp_path / "mmlu_anatomy.yaml").write_text(
        f"include: {mirror._shipped() / 'mmlu/default/mmlu_anatomy.yaml'}\ntask: mmlu_anatomy\n"
        f"dataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: "
        f"{{test: {tmp_path / 'test.jsonl'}, dev: {tmp_path / 'dev.jsonl'}}}}}\nnum_fewshot: 5\n"
    )
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    task = manager.load(["mmlu_anatomy"])["tasks"]["mmlu_anatomy"]
    with loaded(SHARED, ["mmlu_anatomy"], {"mmlu_anatomy": 5}) as suites:
        asked = []
        for each in (task, suites["mmlu_anatomy"].tasks["mmlu_anatomy"]):
            each.build_all_requests()
            asked.append([request.args for request in each.instances])
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4 * 135


@needs_shared
def test_the_shared_mirror_is_complete():
    rows = check(SHARED)
    assert all(row.fine for row in rows)
    assert {row.suite for row in rows if row.status == "official"} == set(MIRRORED)
