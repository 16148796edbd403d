"""Folders at `s3://…`: copied whole, resumed where they were left, and checked.

Credentials and endpoint are those of the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …).
An object exists whole or not at all; what we upload carries its SHA-256 as metadata, and what we
download is compared with it. Transfers go on through errors of the service or of the network for
two minutes without a byte.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import tenacity

_BLOCK_BYTES = 32 << 20  # of a download, what an interruption loses
_PATIENCE_S = 120
_Result = TypeVar("_Result")


class RemoteError(RuntimeError):
    """An address that cannot be read or written, or content that is not what was put there."""


def is_remote(address: str | Path) -> bool:
    """Whether an address is no local path."""
    return str(address).startswith("s3://")


def listing(url: str) -> dict[str, str]:
    """Name below `url` → identity of the object there, which changes with its content.

    Raises:
        RemoteError: nothing there, no permission, or no answer.
    """
    filesystem, root = _filesystem(), _path(url)
    filesystem.invalidate_cache()
    objects = _patiently(root, filesystem.find, root, detail=True)
    if not objects:
        raise RemoteError(f"{url}: nothing is there")
    return {
        path.removeprefix(f"{root}/"): f"{about['size']} {about['ETag']}"
        for path, about in objects.items()
    }


def download(url: str, names: Iterable[str], folder: Path) -> None:
    """Copy objects below `url` to a folder. What an earlier call finished is not read again, and
    the file that it was at is continued: give each content (`listing`) a folder of its own.

    Raises:
        RemoteError: as above; an object that changed, or is not what was uploaded; a name that is
            none of a file in the folder, before anything is written.
    """
    filesystem = _filesystem()
    targets = {name: _inside(folder, name, url) for name in names}
    for name, target in targets.items():
        address = f"{_path(url)}/{name}"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        _continue(filesystem, address, partial)
        expected = _patiently(address, _sha256, filesystem, address)
        if expected is not None and _digest(partial) != expected:
            partial.unlink()
            raise RemoteError(f"s3://{address}: content differs from its SHA-256, {expected}")
        partial.rename(target)


def _inside(folder: Path, name: str, url: str) -> Path:
    """The file of a key: any text is a key, and `..` in one is no folder's parent."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise RemoteError(
            f"{url}: the key {name!r} is no file's name in a folder, and nothing is copied: rename"
            " it, or copy what you need to an address of its own"
        )
    return folder / name


def upload(folder: Path, url: str, names: Iterable[str]) -> None:
    """Copy files of a folder to objects below `url`, in the order of `names`; those that are there
    already with the same content are left.

    Raises:
        RemoteError: no permission, or no answer.
    """
    filesystem = _filesystem()
    for name in names:
        path, address = folder / name, f"{_path(url)}/{name}"
        digest = _digest(path)
        if _patiently(address, _sha256, filesystem, address) != digest:
            about = {"sha256": digest}
            _patiently(address, filesystem.put_file, str(path), address, Metadata=about)


def check_writable(url: str) -> None:
    """Leave an empty object `.dpq` below `url`, where there is none.

    Raises:
        RemoteError: no such bucket, no permission, or no answer.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / ".dpq").touch()
        upload(Path(folder), url, [".dpq"])


def _continue(filesystem: Any, address: str, partial: Path) -> None:
    """Read what `partial` lacks of an object, a block at a time."""
    about = _patiently(address, _about, filesystem, address)
    with partial.open("ab") as file:
        if file.tell() > about["size"]:
            file.truncate(0)
        while file.tell() < about["size"]:
            end = min(file.tell() + _BLOCK_BYTES, about["size"])
            file.write(_patiently(address, _block, filesystem, address, file.tell(), end))
    if _patiently(address, _about, filesystem, address)["ETag"] != about["ETag"]:
        partial.unlink()
        raise RemoteError(f"s3://{address}: changed while it was read; run again")


def _block(filesystem: Any, address: str, start: int, end: int) -> bytes:
    block: bytes = filesystem.cat_file(address, start=start, end=end)
    if len(block) != end - start:
        raise OSError(f"{len(block)} bytes of {end - start}")
    return block


def _about(filesystem: Any, address: str) -> dict[str, Any]:
    about: dict[str, Any] = filesystem.info(address, refresh=True)
    return about


def _sha256(filesystem: Any, address: str) -> str | None:
    """What an object says of its content; None where it says nothing, or is not there."""
    try:
        found: str | None = filesystem.metadata(address, refresh=True).get("sha256")
    except FileNotFoundError:
        return None
    return found


def _patiently(
    address: str, function: Callable[..., _Result], *arguments: Any, **options: Any
) -> _Result:
    """What a function of the file system returns; called again after errors that may pass.

    Raises:
        RemoteError: they did not pass, or cannot.
    """
    from botocore.exceptions import NoCredentialsError

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(_PATIENCE_S),
        wait=tenacity.wait_exponential_jitter(initial=0.2, max=10),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        return retrying(function, *arguments, **options)
    except FileNotFoundError as error:
        raise RemoteError(f"s3://{address}: not found") from error
    except (PermissionError, NoCredentialsError) as error:
        raise RemoteError(
            f"s3://{address}: no permission ({error}): give credentials as AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except Exception as error:
        if not _may_pass(error):
            raise
        raise RemoteError(f"s3://{address}: no answer for {_PATIENCE_S} s: {error}") from error


def _may_pass(error: BaseException) -> bool:
    import aiohttp
    from botocore.exceptions import BotoCoreError, NoCredentialsError

    final = (FileNotFoundError, PermissionError, NoCredentialsError)
    passing = (OSError, BotoCoreError, aiohttp.ClientError)
    return isinstance(error, passing) and not isinstance(error, final)


def _filesystem() -> Any:
    import s3fs  # a second, with botocore

    return s3fs.S3FileSystem()


def _path(url: str) -> str:
    """Bucket and key, as s3fs takes them."""
    return url.removeprefix("s3://").rstrip("/")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
