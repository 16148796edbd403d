"""Credentials in a recipe, which are refused: they belong in the environment.

A recipe is shown to everybody: in the dashboard, MLflow, logs, manifests and reports.
"""

import re
from collections.abc import Iterator
from typing import Any

# `//user:password@host`, where a password may hold slashes and a port is none; signed addresses.
CREDENTIALS = re.compile(
    r"://[^/\s]*@"
    r"|://[^\s@/:]+:(?!\d+(?:/|$))[^\s@]*@"
    r"|[?&](?:x-amz-(?:signature|security-token)|sig|signature|(?:access_)?token|api_?key)=",
    re.IGNORECASE,
)


def credentials_in(where: str) -> str:
    """What is said of them: not what they are."""
    return (
        f"{where}: an address with a password or token in it would be stored with every run: leave"
        " it out, and give credentials by the environment (AWS_ACCESS_KEY_ID and"
        " AWS_SECRET_ACCESS_KEY, HF_TOKEN)"
    )


def texts(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a recipe's content, and where it stands."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from texts(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from texts(value, where)
    elif isinstance(node, str):
        yield where, node
