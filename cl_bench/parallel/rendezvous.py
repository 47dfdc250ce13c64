"""How the processes of one machine find each other, and nobody else finds them."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

STORE = "CL_BENCH_STORE"
"""Environment variable: the file in which processes that were started together meet."""


class OneMachine(RendezvousHandler):
    """Where the launcher in :mod:`cl_bench.parallel.launch` gives out ranks: in its own memory.

    Torch's own rendezvous listens on every address of the machine, and unpickles what it is sent.
    """

    @classmethod
    def get_backend(cls) -> str:
        """Its name for torch."""
        return "cl_bench"

    def next_rendezvous(self) -> RendezvousInfo:
        """One machine, which is complete. No process looks for the address: :data:`STORE` is."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """It never is."""
        return False

    def set_closed(self) -> None:
        """Nobody else is told."""

    def num_nodes_waiting(self) -> int:
        """There are no others."""
        return 0

    def get_run_id(self) -> str:
        """As launched."""
        return "cl_bench"

    def shutdown(self) -> bool:
        """Nothing is open."""
        return True


rendezvous_handler_registry.register(OneMachine.get_backend(), lambda _: OneMachine())


@contextmanager
def alone_together(folder: Path) -> Iterator[None]:
    """Inside, processes that are started find each other and their modules, and nobody else.

    They meet in a file of a folder that only this user can read, and listen on loopback alone.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    given = {
        STORE: str(folder / "store"),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": f"={loopback}",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
