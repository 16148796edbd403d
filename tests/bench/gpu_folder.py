"""What a bare GPU machine needs to run `make bench-gpu` from this checkout: a folder to carry.

    python tests/bench/gpu_folder.py [FOLDER] [--add FILE ...]

Wheels, for Python 3.12 on x86-64 Linux, of what `dpq_core` needs and such a machine's image lacks;
`--add` copies files (a model in pieces, tokens) beside them. Prints what it weighs and the command
for the machine; a checkout and the folder together should stay below 64 MiB a call.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of constraints.txt but for gemlite, a peer, which is not installed here.
MISSING = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "compressed-tensors",
)  # fmt: skip
PEERS = ("gemlite",)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 64 << 20


def download(folder: Path, names: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *names], check=True)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def tree_bytes() -> int:
    """What a checkout of this weighs."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in files.stdout.decode().split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--add", nargs="*", type=Path, default=[])
    arguments = parser.parse_args()
    wheels = arguments.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    versions = pinned()
    download(wheels, [f"{name}=={versions[name]}" for name in MISSING])
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels)]
    subprocess.run([*build, *PEERS], check=True)
    for file in arguments.add:
        shutil.copy2(file, arguments.folder)
    carried = sum(f.stat().st_size for f in arguments.folder.rglob("*") if f.is_file())
    total = carried + tree_bytes()
    over = "" if total < LIMIT else f", over {LIMIT >> 20} MiB: carry it in two calls"
    sizes = f"{carried / 2**20:.1f} MiB, with the checkout {total / 2**20:.1f}{over}"
    print(f"{arguments.folder}: {sizes}")
    name = arguments.folder.resolve().relative_to(ROOT)
    print(
        f"there: pip install --quiet --no-index --no-deps --target /tmp/site {name}/wheels/*.whl"
        " && PYTHONPATH=/tmp/site make bench-gpu PYTHON=python3"
    )


if __name__ == "__main__":
    main()
