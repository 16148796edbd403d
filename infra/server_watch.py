"""Stop a shared server whose users all died: `python -m infra.server_watch HOME PID SECONDS`.

A process beside each server, because nobody else is left to do it. It ends with the server.
"""

import sys
from pathlib import Path

from infra.shared_server import stop_when_forsaken

if __name__ == "__main__":
    stop_when_forsaken(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
