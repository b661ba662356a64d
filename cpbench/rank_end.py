"""How the process of a rank ends: at once, whatever its peers do. What a rank does until then is decided in worker.py and elsewhere."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def to_the_end(failed: Callable[[BaseException], object] | None = None) -> Iterator[None]:
    """What is done inside is all that this process does. It exits with 0, or with 1 after `failed` has been told why."""
    try:
        yield
    except BaseException as error:
        if failed:
            failed(error)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # peers may hang in a collective, and so would leaving the process group
    sys.stderr.flush()
    os._exit(0)  # tearing the interpreter down takes a second per rank and frees nothing that the end of the process does not
