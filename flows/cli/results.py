"""stdout has what a command was asked for, and nothing else.

Libraries print there as well, from whatever thread, and processes that a command starts. So while
it works, stdout is stderr: set by its main thread, once, and put back when the work is done. (A
thread that did so for itself would put back what another has set.)
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO


@contextmanager
def printing_to_stderr() -> Iterator[TextIO]:
    """While the block runs, all that is printed goes to stderr: by Python, and where stdout is the
    process's own by libraries in C and child processes too. Yields what stdout was."""
    before = results = sys.stdout
    own = sys.__stdout__
    with ExitStack() as stack:
        if own is not None and before is own and sys.stderr is not None:
            results = stack.enter_context(os.fdopen(os.dup(1), "w", encoding=own.encoding))
            own.flush()
            os.dup2(2, 1)
            stack.callback(os.dup2, results.fileno(), 1)
            stack.callback(own.flush)
        sys.stdout = sys.stderr
        try:
            yield results
        finally:
            sys.stdout = before
