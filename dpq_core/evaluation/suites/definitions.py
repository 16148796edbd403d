"""Suites of lm-evaluation-harness: found by name, loaded with their documents, named by content.

Definitions are looked for in the recipe's own folder, then in its mirror, then in ours, then in the
harness's. A group (mmlu) is one suite, scored over all documents of its tasks, which is the
harness's mean by size.

A suite's digest covers what is asked and how it is scored: every document, the few-shot examples,
the prompts, the harness's version. Where the documents come from is no part of it, and whatever
changes them changes it, so that no stored answer outlives its question.
"""

import difflib
import functools
import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dpq_core.data import mirror
from dpq_core.digests import digest, file_digest
from dpq_core.errors import InputError, one_line
from dpq_core.evaluation.suites import python_docs

_SHIPPED = Path(python_docs.__file__).parent
SEED = 1234  # of the choice of few-shot examples: the harness's own default
# Which of the harness's metrics is ours, in order of preference, by the kind of suite.
_NORMED_FIRST = {"acc_norm": "acc_norm", "acc": "acc"}
_PLAIN_FIRST = {"acc": "acc", "acc_norm": "acc_norm"}
_ROLLING = {"word_perplexity": "perplexity_word"}
_SCORED = {"multiple_choice", "loglikelihood"}  # kinds whose answers are right or wrong
_ELSEWHERE = {  # of a task's configuration: where its documents are, not what they are
    "custom_dataset",
    "dataset_kwargs",
    "dataset_name",
    "dataset_path",
    "metadata",
}


class SuiteError(InputError):
    """A suite that cannot be run, with one line that says which and the way out."""


@dataclass(frozen=True)
class SuiteSources:
    """Where definitions and documents come from besides our folder and the harness's.

    definitions: folder of the recipe's own YAML. mirror: folder, see `dpq_core.data.mirror`.
    """

    definitions: Path | None = None
    mirror: Path | None = None


@dataclass(frozen=True)
class Suite:
    """A suite with its documents. tasks: the harness's, by name. metric: the harness's name;
    ours is `kind`."""

    name: str
    tasks: dict[str, Any]
    metric: str
    kind: str
    digest: str


def check_suites(names: Sequence[str], sources: SuiteSources) -> None:
    """Look every name up, without loading data. About 10 s when one is in none of our folders.

    Raises:
        SuiteError: a name that is unknown or no single score, or a folder that cannot be read.
    """
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        _index(names, sources, Path(folder))


@contextmanager
def loaded_suites(
    names: Sequence[str],
    sources: SuiteSources,
    num_fewshot: Mapping[str, int] | None = None,
    prefer_norm: bool = True,
) -> Iterator[dict[str, Suite]]:
    """Suites by name, with their documents, which may be gone when the block ends.

    Raises:
        SuiteError: a name that is unknown, a suite whose data cannot be read, that has no score we
            know, or that is zero-shot by definition when examples are asked for.
        MirrorError: data that the mirror lacks or that are damaged.
    """
    quiet()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        manager, from_files = _index(names, sources, folder)
        suites = {}
        for name in dict.fromkeys(names):
            with _loading, _data_read_afresh(stack) if name in from_files else ExitStack():
                tasks = _load(manager, name)
            metric, kind = _metric(name, tasks, prefer_norm)
            _set_fewshot(name, tasks, (num_fewshot or {}).get(name, 0))
            identity = _digest(tasks, metric, sources.definitions)
            suites[name] = Suite(name, tasks, metric, kind, identity)
        yield suites


def _index(names: Sequence[str], sources: SuiteSources, folder: Path) -> tuple[Any, set[str]]:
    """A TaskManager that knows all `names`, and which of them read the recipe's own definitions.

    `folder` is where the definitions of mirrored suites are written to."""
    from lm_eval.tasks import TaskManager  # seconds

    folders = [_SHIPPED]  # the last wins
    if sources.mirror is not None:
        folders += mirror.write_definitions(sources.mirror, names, folder)
    if sources.definitions is not None:
        _check_folder(sources.definitions)
        folders.append(sources.definitions)
    manager = TaskManager(include_path=folders, include_defaults=False)
    index = manager.task_index  # a property, but the very dictionary that names are looked up in
    local = set(index)
    if not all(local.issuperset(_members(index, name)) for name in names):
        for name, entry in _packaged_index().items():
            # A label of ours adds to the harness's: mmlu keeps all subjects when one is redefined.
            index.setdefault(name, entry).tags.update(entry.tags)
    for name in names:
        _check_entry(index, name)
    return manager, {name for name in names if not local.isdisjoint(_members(index, name))}


@functools.cache
def _packaged_index() -> Mapping[str, Any]:
    """The suites that the harness ships: 14,000 YAML files, read once a process."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


def _check_folder(folder: Path) -> None:
    """The harness skips files that it cannot parse: the hub's suite of that name would run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise SuiteError(f"suites_path {folder}: no such folder")
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of yaml, and missing or circular includes
            reason = one_line(error)
            raise SuiteError(f"{path}: not a suite definition: {reason}") from error


def _members(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """A suite's name and those of all suites, groups and labels that it refers to."""
    yield name
    if name not in index:
        return
    entry = index[name]
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    members = [*(listed if isinstance(listed, list) else [])]
    members += sorted(entry.tags) if entry.kind.name == "TAG" else []
    for member in members:
        known = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(member, str) or known in index or len(member) == 1:
            yield from _members(index, known)  # else: defined where it stands


def _check_entry(index: Mapping[str, Any], name: str) -> None:
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise SuiteError(f"suite {name!r} is unknown{hint}")
    entry = index[name]
    if entry.kind.name == "TAG":
        members = ", ".join(sorted(entry.tags)[:5])
        raise SuiteError(f"{name!r} is a label of several suites: name them ({members}, …)")
    if entry.kind.name == "GROUP":
        # The mean by size is the only aggregate that is a mean over documents.
        aggregates = entry.cfg.get("aggregate_metric_list") or []
        by_size = [a.get("weight_by_size", True) for a in aggregates]
        if not by_size or not all(by_size):
            raise SuiteError(
                f"group {name!r} has no mean over its documents: name its suites instead"
            )


_NO_ROWS = "corresponds to no data"  # says `datasets` of a split
_OF_THE_DEFINITION = (LookupError, TypeError, AttributeError, NameError, TemplateError)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The suite's tasks by name, with their data: one, or those of a group."""
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
    except InputError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, jinja, yaml, the suite's own code
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, StopIteration | IndexError) or _NO_ROWS in reason:
            raise SuiteError(
                f"suite {name!r}: its data hold no documents: look at the files and the split that"
                " its definition names, and at what its process_docs leaves of them"
            ) from error
        if isinstance(error, _OF_THE_DEFINITION):
            raise SuiteError(
                f"suite {name!r}: its definition does not fit its data"
                f" ({type(error).__name__}: {reason})"
            ) from error
        raise SuiteError(
            f"suite {name!r}: its data cannot be read: {reason.rstrip('.')}: where the hub is out"
            " of reach, let evaluation.data_mirror name a folder or s3:// of the data (`dpq mirror"
            " make` builds one), or put a definition of the same name into suites_path"
        ) from error
    return tasks


def _metric(name: str, tasks: Mapping[str, Any], prefer_norm: bool) -> tuple[str, str]:
    """The harness's metric that all tasks define, and its name here."""
    defined = set.intersection(*(set(task.higher_is_better()) for task in tasks.values()))
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    known: dict[str, str] = {}
    if kinds <= _SCORED:
        known = _NORMED_FIRST if prefer_norm else _PLAIN_FIRST
    elif kinds == {"loglikelihood_rolling"}:
        known = _ROLLING
    for metric, kind in known.items():
        if metric in defined:
            return metric, kind
    raise SuiteError(
        f"suite {name!r} has neither accuracy nor word perplexity: it is"
        f" {', '.join(sorted(kinds))} with the metrics {', '.join(sorted(defined)) or 'none'}"
    )


def _set_fewshot(name: str, tasks: Mapping[str, Any], num_fewshot: int) -> None:
    for task in tasks.values():
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise SuiteError(f"suite {name!r} is zero-shot by definition: num_fewshot must be 0")
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=SEED)
        if num_fewshot and len(task.fewshot_docs()) < num_fewshot:
            raise SuiteError(
                f"suite {name!r}: num_fewshot is {num_fewshot}, and its data hold"
                f" {len(task.fewshot_docs())} examples: add the split that they are taken from, or"
                " take the suite out of evaluation.num_fewshot"
            )


def _digest(tasks: Mapping[str, Any], metric: str, definitions: Path | None) -> str:
    code = sorted(definitions.rglob("*.py")) if definitions else []
    return digest(
        {
            "harness": version("lm-eval"),
            "metric": metric,
            "code": {path.name: file_digest(path) for path in code},
            "tasks": {name: _task_identity(task) for name, task in tasks.items()},
        }
    )


def _task_identity(task: Any) -> dict[str, Any]:
    config = {k: v for k, v in task.dump_config().items() if k not in _ELSEWHERE}
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else []
    return {
        "config": json.loads(json.dumps(config, default=str)),
        "documents": _documents_digest(task.eval_docs),
        "examples": _documents_digest(examples),
    }


def _documents_digest(documents: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for document in documents:
        sha.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return sha.hexdigest()


def quiet() -> None:
    """The harness warns of what is meant here, and draws bars of its own: not in this process any
    more. Nothing is put back, for another thread may be at work by then. What it prints to stdout
    now and then is for commands to keep apart (`flows.cli.results`)."""
    from lm_eval.api import task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task.tqdm = _no_bar


def _no_bar(documents: Iterable[Any], **_: Any) -> Iterable[Any]:
    return documents


_loading = threading.Lock()  # one at a time: where data sets are kept is one for the process


@contextmanager
def _data_read_afresh(until: ExitStack) -> Iterator[None]:
    """Data sets loaded inside go to a folder of their own, kept until `until` closes.

    `datasets` knows a local file by its name and mtime only, see `dpq_core.data.texts`.
    """
    import datasets

    folder = until.enter_context(tempfile.TemporaryDirectory())
    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual
