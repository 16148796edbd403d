"""One TLS context for all of Prefect's clients of a process.

Prefect makes a client for every task, and each client reads the certificates of all authorities
anew: 0.05 s, for a server on http too.
"""

import ssl
from functools import cache
from types import SimpleNamespace
from typing import Any

from prefect.client import orchestration


def share_tls_context() -> None:
    """From now on, clients of the same certificate file share a context. Twice is fine."""
    clients: Any = orchestration
    if not isinstance(clients.ssl, SimpleNamespace):
        shared = {**vars(ssl), "create_default_context": cache(ssl.create_default_context)}
        clients.ssl = SimpleNamespace(**shared)
