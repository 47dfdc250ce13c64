"""Clients that learn together without sharing data, and the server that only sees sums."""

from cl_bench.federation.client import client_fit, client_statistics
from cl_bench.federation.engine import FederatedEngine
from cl_bench.federation.partition import Partition, check_shares, partition
from cl_bench.federation.reducer import MaskedReducer, PlainReducer, Reducer
from cl_bench.federation.server import server_end_task, server_step
from cl_bench.federation.settings import Federation, check_federation
from cl_bench.federation.upload import Upload

__all__ = [
    "FederatedEngine",
    "Federation",
    "MaskedReducer",
    "Partition",
    "PlainReducer",
    "Reducer",
    "Upload",
    "check_federation",
    "check_shares",
    "client_fit",
    "client_statistics",
    "partition",
    "server_end_task",
    "server_step",
]
