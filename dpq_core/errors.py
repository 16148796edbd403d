"""The errors that a user can mend, and what they are told in."""

from collections.abc import Sequence
from importlib.util import find_spec


class InputError(ValueError):
    """Something is wrong with what was given, not with the program.

    The message is one line: what it is, where, and the way out. Each kind of input has its own
    subclass.
    """


class CheckpointError(InputError):
    """A checkpoint that cannot be used, with one line that says which file or tensor and why."""


class DataError(InputError):
    """Texts that cannot be read or are too short, with one line that says which and why."""


class MissingExtraError(InputError):
    """A feature whose packages are not installed."""


def check_extra(feature: str, extra: str, *packages: str) -> None:
    """Whether the packages of a feature that is an extra of `pyproject.toml` are installed.

    Raises:
        MissingExtraError: naming the package and the extra.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(
                f"{feature}: the package {package} is not installed: it comes with"
                f" pip install -c constraints.txt -e '.[{extra}]'"
            )


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c, d and 7 more`"""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, or its first line where it says more; its type where it says
    nothing. Without the full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def one_line(error: BaseException, most: int | None = None) -> str:
    """All that an error says, in one line of at most so many characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]
