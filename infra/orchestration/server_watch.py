"""Look after a shared server: `python -m infra.orchestration.server_watch HOME PID SECONDS`.

A process beside each server, because nobody else is left to do it. It ends with the server.
"""

import sys
from pathlib import Path

from infra.orchestration.shared_server import watch

if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
