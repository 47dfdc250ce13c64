"""Rows whose inputs are a frozen network's features stand apart, and say what it knew before."""

from studies import make_run

from cl_bench.report.study import read_study

LAST = [0.5, 0.6, 0.9]
BACKBONE = {"layer": "models.Lite: last", "trained_on": "imagenet-1k"}


def test_rows_on_features_say_what_of_the_stream_the_network_knew(tmp_path):
    known = {"overlap": {"classes": 63, "of": 100}, **BACKBONE}
    unknown = {"overlap": "unknown", **BACKBONE}
    for name, backbone, side in (
        ("raw", None, None),
        ("small", known, 64),
        ("large", known, 128),
        ("text", unknown, None),
    ):
        settings = {"backbone": {"side": side, "device": name}} if side else {}
        data = {"facts": {"backbone": backbone} if backbone else {}}
        make_run(tmp_path / name, "ncm", 0, LAST, settings=settings, data=data)
    titles = [block.title for block in read_study([tmp_path]).blocks]
    lite = "on features of Lite (63 of 100 classes in imagenet-1k)"
    assert sorted(titles) == sorted(
        [
            "digits",
            f"digits side=128 {lite}",
            f"digits side=64 {lite}",
            "digits on features of Lite (trained on imagenet-1k)",
        ]
    )
