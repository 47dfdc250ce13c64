"""``features=only``: a stream's features, computed and kept for the runs that will ask for them."""

from collections.abc import Sequence

from cl_bench.cli.build import build_backbone, build_stream
from cl_bench.cli.compose import composed
from cl_bench.contracts import Strategy, UsageError
from cl_bench.features import FeatureStream

WORD = "features=only"


def extract(arguments: Sequence[str]) -> None:
    """Compute what ``+backbone=`` makes of ``+stream=``; go on with what a killed call began.

    Args:
        arguments: the command line, :data:`WORD` among it.

    Raises:
        UsageError: no stream or no backbone is named, or one of them cannot be made.
    """
    words = [a for a in arguments if a.partition("=")[0] != "features"]
    for word in arguments:
        if word.partition("=")[0] == "features" and word != WORD:
            raise UsageError(f"{word}: use {WORD}, which computes features and learns nothing")
    cfg, _ = composed(words)
    for group, example in (("stream", "split_cifar100"), ("backbone", "efficientnet_lite0")):
        if group not in cfg:
            raise UsageError(f"{WORD}: no {group} is named; add one, +{group}={example}")
    stream = build_stream(cfg.stream, Strategy())
    made = FeatureStream(stream, build_backbone(cfg.backbone))
    print(f"features of {made.name}: {made.input_shape[0]} a sample; {made.fingerprint}")
