"""Names of data files: one that exists is that file, whatever else `datasets` can read into it.

`datasets` takes every name for a pattern (`*`, `?`, `[…]`) and for a chain of addresses (`::`).
"""

import glob
import gzip
import zlib
from typing import Any

from dpq_core.errors import InputError
from dpq_core.paths import exists, is_file, is_folder

_CHAIN = "::"
_READ_AT_MOST = 4096  # bytes, to see whether a file has any content


class FileNameError(InputError):
    """A file or folder that `datasets` cannot be asked for."""


def literal(name: str) -> str:
    """What `datasets` takes for exactly this file or folder, where there is one; else the pattern
    or address as it is.

    Raises:
        FileNameError: a file whose name `datasets` takes for several addresses.
    """
    if exists(name):
        if _CHAIN in name:
            raise FileNameError(f"{name}: a name with {_CHAIN} cannot be read: rename the file")
        return glob.escape(name)
    return glob.escape(name) if glob.has_magic(name) and _is_remote_file(name) else name


def check_folder(path: str) -> None:
    """Check a folder that stands for a data set.

    Raises:
        FileNameError: its name is a pattern too, for which `datasets` takes it.
    """
    if is_folder(path) and (glob.has_magic(path) or _CHAIN in path):
        raise FileNameError(
            f"{path}: a folder with *, ?, [ or {_CHAIN} in its name cannot be read as a data set:"
            " rename it, or name its files in data_files"
        )


def holds_nothing(name: str) -> bool:
    """Whether a file of this machine, gzipped or not, has no content, or none but an empty list."""
    if not is_file(name):
        return False
    opened: Any = gzip.open if name.endswith(".gz") else open
    try:
        with opened(name, "rb") as file:
            return bytes(file.read(_READ_AT_MOST)).strip() in (b"", b"[]")
    except (OSError, EOFError, zlib.error):  # damaged: another error
        return False


def _is_remote_file(name: str) -> bool:
    scheme, separator, _ = name.partition("://")
    if not separator or scheme in ("http", "https"):  # where `?` begins a query
        return False
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        return bool(filesystem.exists(path))
    except Exception:  # of any file system: `datasets` will say it
        return False
