"""Whether the services that the environment names answer: asked once, for seconds, before any work.

Their own clients try for minutes, and name neither the variable nor what is wrong with its value.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

import httpx

from infra.errors import one_line

_CONNECTION = 5.0  # s, for a connection
_ANSWER = 30.0  # s: a busy server is there, and takes its time
_PATIENCE = 5.0  # s, for a server that is being started again
_PAUSE = 0.5  # s
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_Answer = TypeVar("_Answer")


class ProbeError(RuntimeError):
    """An address of the environment at which the service is not, with the way out."""


def check_prefect(url: str) -> None:
    """Whether Prefect's API answers at `url`, and takes our requests.

    Raises:
        ProbeError: it does not.
    """
    # Imported late: MLflow's half is for commands that do without Prefect, which takes seconds.
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    where = f"PREFECT_API_URL is {_shown(url)}"
    try:
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            client = get_client(httpx_settings={"timeout": _limits()}, sync_client=True)
            health = _patiently(lambda: client.request("GET", "/health"))
            if health.text.strip() == "true":
                client.request("GET", "/admin/version")  # wants the password; health does not
                return
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ProbeError(
                f"{where}, which refuses us ({status}): set PREFECT_API_AUTH_STRING (user:password)"
                " or PREFECT_API_KEY"
            ) from error
        if status >= 500:
            raise ProbeError(f"{where}, which answers {status}: look at the server") from error
        if "prefect.cloud" in url:  # has no such pages
            return
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ProbeError(
            f"{where}, and nothing answers there ({one_line(error)}): start the server, mend the"
            " address, or unset it: dpq then starts a server of its own"
        ) from error
    hint = "" if url.rstrip("/").endswith("/api") else f": set {_shown(url).rstrip('/')}/api"
    raise ProbeError(
        f"{where}, and what answers there is not Prefect's API, which ends in /api{hint}"
    )


def check_mlflow(uri: str) -> None:
    """Whether a tracking server or database can be there, before MLflow's client tries for minutes.

    Raises:
        ProbeError: it cannot.
    """
    parsed = urlparse(uri)
    scheme = parsed.scheme.partition("+")[0]
    try:
        if scheme in ("http", "https"):
            answer = _patiently(lambda: _asked(f"{uri.rstrip('/')}/health"))
            if answer.status_code >= 500:
                raise OSError(f"it says {answer.status_code}")
        elif scheme == "sqlite":
            _check_folder(Path(uri.partition(":///")[2].partition("?")[0]).parent)
        elif scheme in _PORTS and parsed.hostname:
            place = (parsed.hostname, parsed.port or _PORTS[scheme])
            _patiently(lambda: socket.create_connection(place, _CONNECTION)).close()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ProbeError(not_mlflow(uri, f"nothing answers there ({one_line(error)})")) from error


def not_mlflow(uri: str, reason: str) -> str:
    """What is said of a tracking address that does not serve."""
    return (
        f"MLFLOW_TRACKING_URI is {_shown(uri)}, and {reason}: start MLflow, mend the address, or"
        " unset it: dpq then keeps runs in its own database"
    )


def _asked(url: str) -> httpx.Response:
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true"
    authority = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
    return httpx.get(url, timeout=_limits(), verify=False if insecure else authority or True)


def _limits() -> httpx.Timeout:
    return httpx.Timeout(_ANSWER, connect=_CONNECTION)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: no folder to write in")


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """The answer, also of a server that takes no connection at first."""
    began = time.monotonic()
    while True:
        try:
            return ask()
        except (httpx.TransportError, OSError):
            if time.monotonic() - began > _PATIENCE:
                raise
            time.sleep(_PAUSE)


def _shown(address: str) -> str:
    """Without a user and a password."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
