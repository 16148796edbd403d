"""docker-compose.yml as data, for those who run its services without Docker (`infra.team`).

Variables are put in as the Compose specification says (`${X:-default}`, `${X:?message}`, `$$`); of
everything else only what our file uses is understood.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

COMPOSE_FILE = Path(__file__).parents[1] / "docker-compose.yml"
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\})")
_PORT = re.compile(r"\$\{(\w+_PORT):-(\d+)\}")


class ComposeError(RuntimeError):
    """A variable that has no value, with what to do."""


@dataclass(frozen=True)
class Service:
    """What of a service matters to a process. once: it runs to its end before others start."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    working_dir: str | None
    volumes: tuple[tuple[str, str], ...]  # name of a volume or ./path, and where it is mounted
    health: tuple[str, ...]
    once: bool
    stop_signal: str


def read(variables: Mapping[str, str], path: Path = COMPOSE_FILE) -> dict[str, Any]:
    """The file with its variables put in.

    Raises:
        ComposeError: one that has no default is not set.
    """
    content: dict[str, Any] = _filled(yaml.safe_load(path.read_text("utf-8")), variables)
    return content


def services(content: Mapping[str, Any], profiles: tuple[str, ...] = ()) -> Iterator[Service]:
    """The services of no profile and of those named, each after what it depends on."""
    all_of_them: dict[str, dict[str, Any]] = content["services"]
    wanted = {
        name: about
        for name, about in all_of_them.items()
        if not about.get("profiles") or set(profiles) & set(about["profiles"])
    }
    order = TopologicalSorter({name: wanted[name].get("depends_on", {}) for name in wanted})
    for name in order.static_order():
        yield _service(name, wanted[name])


def ports(path: Path = COMPOSE_FILE) -> dict[str, int]:
    """Variables that hold a port → its default."""
    return {name: int(port) for name, port in _PORT.findall(path.read_text("utf-8"))}


def volumes(path: Path = COMPOSE_FILE) -> list[str]:
    """Names of the volumes."""
    return list(yaml.safe_load(path.read_text("utf-8"))["volumes"])


def _service(name: str, about: Mapping[str, Any]) -> Service:
    volumes = [volume.split(":") for volume in about.get("volumes", [])]
    return Service(
        name,
        tuple(map(str, about["command"])),
        {key: str(value) for key, value in about.get("environment", {}).items()},
        about.get("working_dir"),
        tuple((volume[0], volume[1]) for volume in volumes),
        tuple(about.get("healthcheck", {}).get("test", ())),
        about["restart"].startswith("on-failure"),
        about.get("stop_signal", "SIGTERM"),
    )


def _filled(node: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, variables) for value in node]
    if not isinstance(node, str):
        return node
    return _VARIABLE.sub(lambda found: _value(found, variables), node)


def _value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    value = variables.get(found["name"], "")
    if value or found["kind"] is None:
        return value
    if found["kind"] == ":?":
        raise ComposeError(f"{found['name']} is empty: {found['rest']} (.env.example has them all)")
    return found["rest"]
