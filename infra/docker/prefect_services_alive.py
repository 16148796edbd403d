"""Fails unless Prefect's background services on this host gave a sign of life: they are a worker of
the docket `prefect` (Prefect 3.8's name for it), and say so in Redis every few seconds."""

import asyncio
import os
import socket

from docket import Docket


async def alive() -> bool:
    """Whether a worker of that docket runs on this host."""
    async with Docket("prefect", os.environ["PREFECT_SERVER_DOCKET_URL"]) as docket:
        return any(w.name.startswith(f"{socket.gethostname()}#") for w in await docket.workers())


if not asyncio.run(alive()):
    raise SystemExit("no sign of life")
