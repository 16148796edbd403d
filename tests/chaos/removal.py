"""Removal beside reading, in one store: processes that find, make, read and remove the same
artifacts, as runs of one model do with its hidden states, and are killed at random moments.

    python tests/chaos/removal.py [--kills 100] [--processes 3] [--seed 0]

No process ends by itself before it is told to; and in the end

- whatever is in the store is whole, and nothing half-written or half-removed is left;
- every key can be made.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from infra.store import Store, StoreError

STAGE = "hidden"
KEYS = [f"{number:064x}" for number in range(3)]
STOP = "stop"
PATIENCE = 300  # s, for a process to end, on a machine as busy as it likes
_LATER = 0.1  # s at most between two kills
_FILES, _BYTES = 4, 20_000
_PROGRAM = "import sys; from removal import work; work(sys.argv[1], int(sys.argv[2]))"


def content(key: str, number: int) -> bytes:
    """Of a file of a key's artifact."""
    return random.Random(f"{key} {number}").randbytes(_BYTES)


def make(key: str, folder: Path) -> None:
    for number in range(_FILES):
        (folder / str(number)).write_bytes(content(key, number))


def work(root: str, seed: int) -> None:
    """Until told to stop; prints how often it did what."""
    rng, done, store = random.Random(seed), Counter[str](), Store(root)
    expected = {key: [content(key, number) for number in range(_FILES)] for key in KEYS}
    print("ready", flush=True)
    with store.in_use():
        while not Path(root, STOP).exists():
            key = rng.choice(KEYS)
            if rng.random() < 0.5:
                found, new = store.get_or_make(
                    STAGE, key, lambda folder, key=key: make(key, folder)
                )
                done["made" if new else "found"] += 1
            else:
                found = store.find(STAGE, key)
                done["found" if found else "not there"] += 1
            if found and rng.random() < 0.3:
                store.remove(found)
                done["removed"] += 1
            elif found:
                try:
                    folder = store.open(found)
                    read = [(folder / str(number)).read_bytes() for number in range(_FILES)]
                except FileNotFoundError:  # after it was checked
                    done["lost"] += 1
                except StoreError as error:
                    if "artifact is missing" not in str(error):
                        raise
                    done["lost"] += 1
                else:
                    assert read == expected[key], f"{key}: other bytes"
                    done["read"] += 1
    print(json.dumps(done), flush=True)


def started(root: Path, seed: int) -> subprocess.Popen[str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(root), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    return process


def removal_beside_reading(root: Path, kills: int, processes: int, seed: int) -> Counter[str]:
    """What the processes did that were left at the end."""
    rng, seeds = random.Random(seed), iter(range(seed, sys.maxsize))
    running = [started(root, next(seeds)) for _ in range(processes)]
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(0, _LATER))
            victim = running.pop(rng.randrange(processes))
            assert victim.poll() is None, victim.communicate()[1]
            victim.kill()
            victim.communicate()
            running.append(started(root, next(seeds)))
        (root / STOP).touch()
        done = Counter[str]()
        for process in running:
            said, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
            done.update(json.loads(said))
    finally:
        for process in running:
            process.kill()
    _check(Store(root))
    return done


def _check(store: Store) -> None:
    store.clean()
    wrong = {str(each): store.problems(each) for each in store.folders()}
    assert not any(wrong.values()), wrong
    for key in KEYS:
        made, _ = store.get_or_make(STAGE, key, lambda folder, key=key: make(key, folder))
        store.open(made)
    for waste in ("tmp", "leases", "runs"):
        assert not [*(store.root / waste).glob("*")], waste


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        done = removal_beside_reading(
            Path(name) / "store", asked.kills, asked.processes, asked.seed
        )
    print(f"{asked.kills} kills; the last {asked.processes} processes: {dict(done)}")


if __name__ == "__main__":
    main()
