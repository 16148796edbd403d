"""What an environment has to serve with, as a line of JSON. Runs there: imports nothing of ours.

python about.py PACKAGE …     versions of the packages, the Python, devices and their driver
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cards() -> list[str]:
    """Name and driver of each NVIDIA card."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    cards = [card.rpartition(",") for card in _cards()]
    about = {
        "python": platform.python_version(),
        "packages": {p: v for p in sys.argv[1:] if (v := _version(p)) is not None},
        "device": cards[0][0].strip() if cards else _processor(),
        "driver": cards[0][2].strip() if cards else f"{platform.system()} {platform.release()}",
    }
    print(json.dumps(about))


if __name__ == "__main__":
    main()
