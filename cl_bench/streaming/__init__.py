"""Streams that are met once: every sample is answered first, and learned then."""

from cl_bench.streaming.engine import StreamingEngine
from cl_bench.streaming.settings import Streaming, check_streaming

__all__ = ["Streaming", "StreamingEngine", "check_streaming"]
