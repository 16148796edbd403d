"""The house as a picture: packages by floor, and an arrow where one imports another, drawn from the
imports. What follows from other arrows is left out."""

import tomllib
from itertools import chain
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
TOP = ("flows", "tasks", "infra", "dpq_core")


def floors():
    """Of dpq_core, from the contract in pyproject.toml: the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = (
        contract["layers"]
        for contract in contracts["contracts"]
        if contract.get("containers") == ["dpq_core"]
    )
    return [[room.strip() for room in floor.split("|")] for floor in layers]


def rooms():
    """Names of what is drawn: the three upper top-level packages, and the packages of dpq_core."""
    return [*TOP[:3], *(f"dpq_core.{room}" for room in chain(*floors()[:-2]))]


def arrows():
    """Pairs of rooms, the first of which imports the second, without what follows from others."""
    graph = grimp.build_graph(*TOP)
    names = rooms()

    def room_of(module):
        return next((n for n in names if module == n or module.startswith(f"{n}.")), None)

    found = {name: set() for name in names}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = room_of(module), room_of(imported)
            if one and other and one != other:
                found[one].add(other)
    return [
        (one, other)
        for one, others in found.items()
        for other in sorted(others)
        if not any(_reaches(found, between, other) for between in others - {other})
    ]


def _reaches(found, start, end):
    return start == end or any(_reaches(found, each, end) for each in found[start])


def picture():
    """Mermaid, which GitHub and other viewers of Markdown draw."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {name}" for name in TOP[:3]]
    for number, floor in enumerate(floors()[:-2]):
        lines.append(f'    subgraph floor{number}[" "]')
        lines += [f"        {room}" for room in floor]
        lines.append("    end")
    lines += [f"    {_short(one)} --> {_short(other)}" for one, other in arrows()]
    return "\n".join([*lines, "```"])


def _short(name):
    return name.removeprefix("dpq_core.")
