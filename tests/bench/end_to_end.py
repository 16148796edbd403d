"""`dpq bench --shape` without services: for a machine that has no Prefect and no MLflow.

    python tests/bench/end_to_end.py [--shape NAME] [--device KIND] [--preset NAME]
                                     [--set batches=1,8 prompt_tokens=512 …] [--json FILE]

Prints the section for the log; fields are those of a recipe's section `benchmark`.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from dpq_core.benchmark.formats_timed import SHAPES, Shape
from dpq_core.benchmark.throughput import measure
from dpq_core.machine.device import whole_machine
from dpq_core.recipe import BenchmarkSection
from dpq_core.recipe.scheme import PRESETS, Scheme
from tasks.support.speeds import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-160m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="scheme; default: a recipe's default")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args()
    fields = dict(each.split("=", 1) for each in arguments.set)
    asked = BenchmarkSection(**{name: _value(name, text) for name, text in fields.items()})
    scheme = Scheme(**PRESETS[arguments.preset]) if arguments.preset else Scheme()
    device = torch.device(arguments.device)
    with whole_machine():
        found = measure(Shape.named(arguments.shape, scheme), asked, device, _report)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = replace(found, hardware=name)
    print(markdown(arguments.shape, [found]))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=2))


def _value(name: str, text: str) -> object:
    return yaml.safe_load(f"[{text}]" if name in ("batches", "variants") else text)


def _report(done: int, total: int) -> None:
    print(f"{done} of {total}", flush=True)


if __name__ == "__main__":
    main()
