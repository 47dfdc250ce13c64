"""Which process this is, and that none outlives the one that started it."""

import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

ORPHAN_SECONDS = 0.2
"""How often a process looks whether the one that started it is still there."""


def ourselves() -> dict[str, Any]:
    """The current process, as :func:`alive` takes it."""
    return {"process": os.getpid(), "host": socket.gethostname()}


def alive(event: Mapping[str, Any]) -> bool:
    """Whether the process that an event names is there; one on another host counts as such."""
    if event["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(event["process"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def end_with_parent(starter: Mapping[str, Any] | None = None) -> None:
    """End this process soon after the one that started it: nobody else would see its result.

    A launcher that is killed cannot tell its workers, and a worker that goes on would hold the
    directory of its job against the next sweep.

    Args:
        starter: the process that began it all, as :func:`ourselves` names it;
            it may be gone by now.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and (starter is None or alive(starter)):
            time.sleep(ORPHAN_SECONDS)
        os._exit(143)

    if not any(t.name == "end-with-parent" for t in threading.enumerate()):
        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
