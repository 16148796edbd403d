"""The errors that a user can mend."""

from importlib.util import find_spec


class InputError(ValueError):
    """Something is wrong with what was given, not with the program.

    The message is one line: what it is, where, and the way out. Each kind of input has its own
    subclass.
    """


class CheckpointError(InputError):
    """A checkpoint that cannot be used, with one line that says which file or tensor and why."""


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
