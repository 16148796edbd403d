"""The suites' data without a hub: a folder, or a bucket, of JSON Lines.

    <folder>/<split>.jsonl.gz    (or .jsonl) a document a line, fields as on the Hugging Face hub

A mirrored suite is the harness's own definition (`include:`) that reads its documents from there.
They are read anew at every run: `datasets` would know a local file by its name and mtime only.
"""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpq_core.data.mirrored_suites import MIRRORED, SUBJECTS
from dpq_core.digests import digest
from dpq_core.errors import InputError

_ENDINGS = (".jsonl.gz", ".jsonl")
_MISSING = "missing"


class MirrorError(InputError):
    """A mirror that lacks what is asked of it, with one line that says what and the way out."""


@dataclass(frozen=True)
class MirroredSplit:
    """What a mirror has of a split. digest: SHA-256 of its documents, however they are packed."""

    suite: str
    split: str
    official: int
    documents: int | None = None
    digest: str | None = None
    wrong: str | None = None  # missing, or why it cannot be read

    @property
    def needed(self) -> bool:
        """Whether scoring needs it; other splits only give few-shot examples."""
        return self.split == MIRRORED[self.suite].scored

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong: the official documents, or no few-shot examples."""
        return self.status == "official" or (self.wrong == _MISSING and not self.needed)

    @property
    def status(self) -> str:
        if self.wrong:
            return self.wrong
        return "official" if self.documents == self.official else "not the official count"


def check(mirror: Path) -> list[MirroredSplit]:
    """Every split of every suite in the table.

    Raises:
        MirrorError: no such folder.
    """
    _check_folder(mirror)
    return [
        _check_split(mirror, suite, split)
        for suite, row in MIRRORED.items()
        for split in row.splits
    ]


def make(mirror: Path, suites: Sequence[str] = tuple(MIRRORED)) -> Iterator[MirroredSplit]:
    """Fetch suites from the hub, a split at a time; what cannot be fetched says why. A file is
    whole or not there, and the same documents give the same bytes.

    Raises:
        MirrorError: a name that is not in the table.
    """
    unknown = sorted(set(suites) - set(MIRRORED))
    if unknown:
        raise MirrorError(f"{unknown[0]!r} cannot be mirrored: choose from {', '.join(MIRRORED)}")
    mirror.mkdir(parents=True, exist_ok=True)
    for suite in suites:
        for split, official in MIRRORED[suite].splits.items():
            try:
                _fetch_split(mirror, suite, split)
            except Exception as error:  # of datasets, huggingface_hub, the network, the disk
                said = next(iter(str(error).strip().splitlines()), type(error).__name__)
                yield MirroredSplit(suite, split, official, wrong=f"not fetched: {said}")
                continue
            yield _check_split(mirror, suite, split)


def is_remote(mirror: str) -> bool:
    """Whether a mirror is no folder but a bucket or the like: `s3://…`."""
    return "://" in mirror


def fingerprint(url: str, names: Sequence[str]) -> str:
    """Identity of the files of a remote mirror that `fetch` would copy; changes when they do.

    Raises:
        MirrorError: the address cannot be reached, or has none of the files.
    """
    with _reaching(url):
        filesystem, files = _remote_files(url, names)
        # Not fsspec's `ukey`: over HTTP that is the address alone.
        return digest({path: str(filesystem.info(remote)) for path, remote in files.items()})


def fetch(url: str, destination: Path, names: Sequence[str]) -> None:
    """Copy what `names` need of a remote mirror (any address of fsspec) to a folder.

    Raises:
        MirrorError: the address cannot be reached, or has none of the files.
    """
    with _reaching(url):
        filesystem, files = _remote_files(url, names)
        for path, remote in files.items():
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(remote, str(destination / path))


def write_definitions(mirror: Path, names: Sequence[str], destination: Path) -> list[Path]:
    """Write the definitions of those of `names` that the table has, with their documents, to an
    empty folder; returns the folders that the harness has to look in, in order.

    Raises:
        MirrorError: a suite's data are missing or damaged.
    """
    _check_folder(mirror)
    folders = [destination]
    for suite in _needed(names):
        if suite == "mmlu":
            folders.insert(0, _shipped() / SUBJECTS)  # the groups
            _write_subjects(mirror, names, destination)
        else:
            definition = _shipped() / MIRRORED[suite].definition
            _write(destination, suite, definition, _splits(mirror, suite))
    return folders


def dataset(folder: str, **_: Any) -> "_Splits":
    """For lm-evaluation-harness' `custom_dataset`: what `write_definitions` wrote, by split."""
    return _Splits(
        {
            path.stem: _dataset([json.loads(line) for line in path.read_text("utf-8").splitlines()])
            for path in sorted(Path(folder).glob("*.jsonl"))
        }
    )


class _Splits(dict[str, Any]):
    """A split that the mirror lacks is empty: the harness asks for the examples' split also where
    it wants no examples."""

    def __missing__(self, split: str) -> Any:
        return _dataset([])


def _dataset(documents: list[dict[str, Any]]) -> Any:
    import datasets  # seconds

    return datasets.Dataset.from_list(documents)


def _fetch_split(mirror: Path, suite: str, split: str) -> None:
    import datasets

    row = MIRRORED[suite]
    path, name = row.hub
    documents = datasets.load_dataset(path, name, split=split)
    final = mirror / row.folder / f"{split}{_ENDINGS[0]}"
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            for document in documents:
                file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def _remote_files(url: str, names: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The file system, and path in the mirror → remote path of all files that `names` need."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    folders = {MIRRORED[suite].folder for suite in _needed(names)}
    escaped = glob.escape(root.rstrip("/"))
    found: dict[str, str] = {}
    for folder in sorted(folders):
        for remote in sorted(filesystem.glob(f"{escaped}/{folder}/*")):
            if remote.endswith(_ENDINGS):
                found[f"{folder}/{remote.rpartition('/')[2]}"] = remote
    if folders and not found:  # S3 lists a bucket that does not exist as an empty one
        wanted = ", ".join(sorted(folders))
        raise FileNotFoundError(f"no such bucket or folder, or no files in {wanted}")
    return filesystem, found


def _needed(names: Sequence[str]) -> list[str]:
    """The table's suites that `names` need: mmlu also for its groups and its subjects."""
    of_mmlu = _groups() | _subjects().keys()
    return [
        suite
        for suite in MIRRORED
        if suite in names or (suite == "mmlu" and not of_mmlu.isdisjoint(names))
    ]


def _subjects() -> dict[str, Path]:
    """The harness's definition of each of MMLU's 57 subjects, by name (mmlu_anatomy)."""
    return {path.stem: path for path in sorted((_shipped() / SUBJECTS).glob("mmlu_*.yaml"))}


def _groups() -> set[str]:
    """mmlu, mmlu_stem, …"""
    return {path.stem[1:] for path in (_shipped() / SUBJECTS).glob("_mmlu*.yaml")}


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of fsspec, botocore, aiohttp
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MirrorError(
            f"evaluation.data_mirror {url}: {said}: check the address, the credentials and the"
            " endpoint (AWS_ENDPOINT_URL)"
        ) from error


def _shipped() -> Path:
    import lm_eval.tasks  # seconds

    return Path(lm_eval.tasks.__file__).parent


def _check_folder(mirror: Path) -> None:
    if not mirror.is_dir():
        raise MirrorError(f"evaluation.data_mirror: folder {mirror} does not exist")


def _file(mirror: Path, suite: str, split: str) -> Path | None:
    names = [mirror / MIRRORED[suite].folder / f"{split}{ending}" for ending in _ENDINGS]
    return next((path for path in names if path.is_file()), None)


def _check_split(mirror: Path, suite: str, split: str) -> MirroredSplit:
    official = MIRRORED[suite].splits[split]
    path = _file(mirror, suite, split)
    if path is None:
        return MirroredSplit(suite, split, official, wrong=_MISSING)
    sha, count = hashlib.sha256(), 0
    try:
        for document in _documents(path, MIRRORED[suite].fields):
            sha.update(json.dumps(document, sort_keys=True).encode() + b"\n")
            count += 1
    except MirrorError as error:
        return MirroredSplit(suite, split, official, wrong=str(error))
    return MirroredSplit(suite, split, official, count, sha.hexdigest())


def _splits(mirror: Path, suite: str) -> dict[str, list[dict[str, Any]]]:
    """The documents of all splits that the mirror has, the one that is scored among them."""
    row = MIRRORED[suite]
    if _file(mirror, suite, row.scored) is None:
        raise MirrorError(
            f"{mirror / row.folder / row.scored}{_ENDINGS[0]}: missing, and suite {suite!r} needs"
            " it: make it (`dpq mirror make`), or take the suite out of evaluation.suites"
        )
    files = {split: _file(mirror, suite, split) for split in row.splits}
    found = {split: list(_documents(path, row.fields)) for split, path in files.items() if path}
    if not found[row.scored]:
        raise MirrorError(f"{files[row.scored]}: no documents, and suite {suite!r} needs them")
    return found


def _documents(path: Path, fields: frozenset[str]) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, 1):
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise MirrorError(f"{path}, line {number}: not a JSON object")
                lacking = sorted(field for field in fields if document.get(field) is None)
                if lacking:
                    raise MirrorError(f"{path}, line {number}: no field {lacking[0]!r}")
                yield document
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise MirrorError(f"{path}, after line {number}: damaged: {error}") from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {number}"
        raise MirrorError(
            f"{where}: not a JSON object: {error.msg}, column {error.colno}"
        ) from error


def _write_subjects(mirror: Path, names: Sequence[str], destination: Path) -> None:
    """The definitions of MMLU's subjects: all where a group is wanted, which would find the
    harness's own, of the hub, otherwise."""
    definitions = {
        str(yaml.safe_load(path.read_text("utf-8"))["dataset_name"]): path
        for path in _subjects().values()
    }
    splits = _splits(mirror, "mmlu")
    documents: dict[str, dict[str, list[dict[str, Any]]]] = {s: {} for s in definitions}
    for split, rows in splits.items():
        for row in rows:
            subject = str(row["subject"])
            if subject not in documents:
                where = mirror / MIRRORED["mmlu"].folder
                raise MirrorError(f"{where}: {split}: {subject!r} is no subject of the harness's")
            documents[subject].setdefault(split, []).append(row)
    grouped = not _groups().isdisjoint(names)
    for subject, definition in definitions.items():
        if not grouped and definition.stem not in names:
            continue
        if MIRRORED["mmlu"].scored not in documents[subject]:
            path = _file(mirror, "mmlu", MIRRORED["mmlu"].scored)
            raise MirrorError(f"{path}: no documents of the subject {subject!r}")
        _write(destination, definition.stem, definition, documents[subject])


def _write(
    destination: Path, name: str, definition: Path, splits: dict[str, list[dict[str, Any]]]
) -> None:
    folder = destination / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        text = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{split}.jsonl").write_text(text, "utf-8")
    (destination / f"{name}.yaml").write_text(
        f"include: {json.dumps(str(definition))}\n"
        f"task: {name}\n"
        f"dataset_kwargs: {{folder: {json.dumps(str(folder))}}}\n"
        f"custom_dataset: !function {__name__}.dataset\n",
        "utf-8",
    )
