"""Releases whose processes and services are killed at random moments, and what has to hold.

    python tests/chaos/chaos.py [--releases 10] [--kills 50] [--runner processes|dask|threads]
                                [--team] [--seed 0]

Each release starts from an empty store, in a home of its own, and is run again whenever a kill
ended it. Victims are the flow process, its worker processes and the Prefect server; with
`--team`, where Prefect is on PostgreSQL and model and release are on S3, both of these too. A kill
comes when a random number of artifacts is whole, and up to three seconds later. In the end:

- the checkpoint has the bytes of an undisturbed one;
- no artifact that was whole at a kill was made again;
- everything in the store is whole, and nothing half-written is left;
- the champion, whenever it was looked at, was a checkpoint that verifies;
- no worker outlives its flow.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dpq_core.checkpoint.exports import verify
from dpq_core.checkpoint.native import files_of
from infra import remote
from infra.registry import Registry
from infra.registry.tracking import tracking_store
from infra.store import Store

PATIENCE = 900  # s, for a run to end
_LATER = 3.0  # s at most, from a number of artifacts to a kill
_SET = ("PREFECT_", "MLFLOW_", "DPQ_")
_PROGRAM = "from flows.cli.main import main; main()"

Victims = dict[str, list[Callable[[], None]]]  # by kind, what kills one
Run = subprocess.Popen[str]


@dataclass
class Chaos:
    """A recipe that is released in a folder. environment: of its process. services: what can be
    killed beside the processes of a run."""

    recipe: Path
    folder: Path
    random: random.Random
    environment: dict[str, str] = field(default_factory=dict)
    services: Victims = field(default_factory=dict)
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    whole: dict[Path, int] = field(default_factory=dict)  # artifacts seen: when they were made

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def release(self, moments: list[int]) -> dict[str, bytes]:
        """The checkpoint's files, of as many runs as it takes; moments: numbers of artifacts that
        are whole at the kills."""
        moments = sorted(moments, reverse=True)
        while True:
            with self._running() as run:
                while moments and self._kill_one(run, moments[-1]):
                    moments.pop()
                    self.check()
                output, errors = run.communicate(timeout=PATIENCE)
            self.check()
            said = [line for line in errors.splitlines() if line.startswith("error: ")]
            print(f"  run {self.runs} ended with {run.returncode} {said}", flush=True)
            if run.returncode == 0:
                return contents(Path(json.loads(output)["checkpoint"]))
            assert self.kills.total(), errors
            assert run.returncode in (1, -signal.SIGKILL), errors

    def check(self) -> None:
        """What has to hold at any moment."""
        now = self.artifacts()
        again = [str(path) for path in now if self.whole.get(path, now[path]) != now[path]]
        assert not again, f"made again: {again}"
        self.whole |= now
        for folder in self._champion():
            verify(folder)

    def check_store(self) -> None:
        """What has to hold in the end: every artifact is whole, and nothing is half-written."""
        store = Store(self.store)
        wrong = {str(each): store.problems(each) for each in store.folders()}
        assert not any(wrong.values()), wrong
        for waste in ("tmp", "leases", "runs"):
            assert not [*(self.store / waste).glob("*")], waste

    def artifacts(self) -> dict[Path, int]:
        """All that are whole, and when they were made."""
        found = {}
        for path in self.store.glob("*/*/.artifact.json"):
            with suppress(FileNotFoundError):  # not needed any more
                found[path] = path.stat().st_mtime_ns
        return found

    @contextmanager
    def _running(self) -> Iterator[Run]:
        command = ["release", str(self.recipe), "--json", "--set", f"execution.store={self.store}"]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_SET)}
        ours = {"DPQ_HOME": str(self.home), "OMP_NUM_THREADS": "1", **self.environment}
        run = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=inherited | ours,
            text=True,
        )
        self.runs += 1
        try:
            yield run
        finally:
            run.kill()

    def _kill_one(self, run: Run, artifacts: int) -> bool:
        """Whether the run lived until then, and something was there to kill."""
        while len(self.artifacts()) < artifacts:
            if run.poll() is not None:
                return False
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, _LATER))
        workers = _workers(run)
        victims = {kind: each for kind, each in self._victims(run, workers).items() if each}
        if run.poll() is not None:
            return False
        kind = self.random.choice(sorted(victims))
        with suppress(psutil.NoSuchProcess):
            self.random.choice(victims[kind])()
            self.kills[kind] += 1
            print(f"  {kind} killed at {len(self.artifacts())} artifacts", flush=True)
        if kind == "flow":
            assert not psutil.wait_procs(workers, timeout=PATIENCE)[1], "workers of a dead run"
        return True

    def _victims(self, run: Run, workers: list[psutil.Process]) -> Victims:
        found: Victims = {"flow": [run.kill], "worker": [each.kill for each in workers]}
        found |= self.services
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            server = json.loads((self.home / "prefect" / "server.json").read_text())
            found["server"] = [psutil.Process(server["pid"]).kill]
        return found

    def _champion(self) -> Iterator[Path]:
        """Folder of the checkpoint that the champion's version names, if there is one."""
        if not (self.home / "mlflow" / "ready").is_file():
            return
        registry = Registry(tracking_store(self.home)[0])
        name = json.loads(self.recipe.read_text())["registry"]["name"]
        if (version := registry.champion(name)) is None:
            return
        source = registry._client.get_model_version(name, str(version)).source
        if remote.is_remote(source):
            with tempfile.TemporaryDirectory() as copy:
                remote.download(source, remote.listing(source), Path(copy))
                yield Path(copy)
        else:
            yield Path(source.removeprefix("file://"))


def _workers(run: Run) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.pid).children(recursive=True)
        return [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    return []


def contents(folder: Path) -> dict[str, bytes]:
    """Of a checkpoint, without what a release, or MLflow, puts beside it."""
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def survive(
    recipe: Path,
    folder: Path,
    releases: int,
    kills: int,
    seed: int,
    environment: dict[str, str] | None = None,
    services: Victims | None = None,
) -> Counter[str]:
    """Release once undisturbed, then at least `releases` times, until at least so many kills came
    about. The kills, by kind."""
    rng, killed, number = random.Random(seed), Counter[str](), 0
    environment, services = environment or {}, services or {}
    calm = Chaos(recipe, folder / "calm", rng, environment)
    expected = calm.release([])
    calm.check_store()
    most, runs, artifacts = len(calm.whole), 0, 0
    while number < releases or killed.total() < kills:
        number += 1
        chaos = Chaos(recipe, folder / f"release-{number}", rng, environment, services)
        moments = [rng.randint(0, most) for _ in range(-(-kills // releases))]
        found = chaos.release(moments)
        assert found == expected, f"other bytes: {[k for k in expected if found[k] != expected[k]]}"
        chaos.check_store()
        killed, runs = killed + chaos.kills, runs + chaos.runs
        artifacts += len(chaos.whole)
        print(f"release {number}: {chaos.runs} runs, killed {dict(chaos.kills)}", flush=True)
    print(
        f"{killed.total()} kills in {number} releases of {runs} runs: {dict(killed)};"
        f" {artifacts} artifacts, none made twice",
        flush=True,
    )
    return killed


def write_recipe(path: Path, model: str, **sections: object) -> Path:
    """A release of a model on little data: calibration and evaluation are shared by two tasks."""
    from dpq_core.data import python_corpus

    text = path.parent / "text.jsonl"
    documents = python_corpus.documents("validation")[:4]
    text.write_text("".join(json.dumps({"text": each[:1000]}) + "\n" for each in documents))
    dataset = {"path": "json", "data_files": str(text)}
    content = {
        "model": {"id": model},
        "scheme": {"max_passes": 1, "group_size": 32},
        "calibration": {
            "dataset": dataset,
            "samples": 32,
            "sequence_length": 32,
            "batch_size": 8,
            "required_tokens_per_input": 0,
        },
        # Some chunks, so that workers are killed between two of them.
        "evaluation": {
            "perplexity": {"dataset": dataset, "sequence_length": 128},
            "suites": ["python_docs"],
            "limit": 400,
        },
        "gates": {"perplexity_increase": 1000, "accuracy_drop": 99, "allow_limited": True},
        "registry": {"name": "chaos"},
        **sections,
    }
    path.write_text(json.dumps(content))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--releases", type=int, default=10)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", default="processes", choices=["threads", "processes", "dask"])
    parser.add_argument("--team", action="store_true", help="Prefect on PostgreSQL; an S3 endpoint")
    arguments = parser.parse_args()
    counts = (arguments.releases, arguments.kills, arguments.seed)
    model = Path(__file__).parents[2] / "recipes" / "quickstart" / "model"
    execution = {"device": "cpu", "runner": arguments.runner, "shards": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.team:
            recipe = write_recipe(folder / "recipe.json", str(model), execution=execution)
            survive(recipe, folder, *counts)
            return
        from team import team

        with team(model) as (environment, services, sections):
            recipe = write_recipe(folder / "recipe.json", execution=execution, **sections)
            survive(recipe, folder, *counts, environment, services)


if __name__ == "__main__":
    main()
