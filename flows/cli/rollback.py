"""`dpq rollback`: the champion before, champion again."""

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlparse

import typer

from dpq_core.recipe import ExecutionSection
from dpq_core.recipe.registered_names import checked_name
from flows.cli.errors import errors, print_json
from flows.cli.options import AsJson
from infra.settings import home

if TYPE_CHECKING:
    from infra.store import Store

_DEFAULT = Path(ExecutionSection().store)


def rollback(
    name: Annotated[str, typer.Argument(help="registered model", metavar="NAME")],
    why: Annotated[str, typer.Option("--why", help="kept with the version")] = "no reason given",
    store: Annotated[
        Path, typer.Option("--store", help="of the releases, where the registry is a server")
    ] = _DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Make the champion before the present one champion again; repeated, the one before that."""
    with errors(as_json):
        from infra.registry import Registry
        from infra.registry.tracking import tracking_store
        from infra.store import Store

        checked_name(name)
        opened, registry = Store(store), Registry(tracking_store(home())[0])
        who = f"by {_user()} on {socket.gethostname()}: {why}"
        with _no_promotion(), registry.exclusive(name, opened):
            done = registry.roll_back(name, who, lambda source: _check(source, opened))
        if as_json:
            print_json(asdict(done))
        else:
            print(f"{name}: version {done.champion} is champion, {done.taken_back} was taken back")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # unknown to this machine: a container's
        return f"user {os.getuid()}"


@contextmanager
def _no_promotion() -> Iterator[None]:
    """Prefect's limit, as a promotion takes it, where a server is up; where none is, nobody
    promotes by one."""
    import httpx
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

    from infra.orchestration.services import connected
    from infra.orchestration.shared_server import ServiceError
    from infra.registry import RegistryError
    from tasks.register import promoting

    with ExitStack() as stack:
        with suppress(ServiceError):
            url = stack.enter_context(connected(home()))
            try:
                stack.enter_context(promoting())
            except (ConcurrencySlotAcquisitionError, httpx.TransportError) as error:
                raise RegistryError(
                    f"{url} does not say whether a promotion is under way, and nothing was changed:"
                    " let it answer, or unset PREFECT_API_URL where nobody promotes by that server"
                ) from error
        yield


def _check(source: str, store: "Store") -> None:
    """Read all files of a version before it becomes champion, where they are on this machine."""
    from infra.registry import RegistryError
    from infra.store import artifact_around

    if urlparse(source).scheme not in ("file", ""):
        return
    folder = artifact_around(Path(unquote(urlparse(source).path)))
    if wrong := store.problems(folder):
        raise RegistryError(f"the version to return to is damaged, nothing was changed: {wrong[0]}")
