"""Reading files before they are needed.

safetensors maps a file, and so each page of it would be read when somebody first looks at it: at load time, one tensor
after another, while neither the interpreter nor the processor's other cores do anything.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Thread


def read_ahead(files: Iterable[Path]) -> Thread:
    """Have the system read these files into its cache, in this order, while the caller goes on. Only a hint: nothing
    fails where it cannot be followed. Returns the thread that reads, for whoever wants to wait."""
    thread = Thread(target=_read, args=(list(files),), daemon=True)
    thread.start()
    return thread


def _read(files: list[Path]) -> None:
    if sys.platform != "linux":
        return
    # sendfile to nowhere reads a whole file without copying it and without the interpreter's lock, which a thread that
    # asked for one piece after another would wait for each time. WILLNEED reads but one piece of what it is asked for.
    try:
        with Path(os.devnull).open("wb") as nowhere:
            for file in files:
                with file.open("rb") as handle:
                    while os.sendfile(nowhere.fileno(), handle.fileno(), None, 2**30):
                        pass
    except OSError:
        return
