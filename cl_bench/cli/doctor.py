"""``python -m cl_bench doctor``: what of this machine a run will find, and what it will miss."""

import argparse
import netrc
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from cl_bench.cli.threads import NUMBERS, chosen, usable_cores
from cl_bench.data.cache import cache_directory
from cl_bench.errors import printable
from cl_bench.hub import hub_reachable
from cl_bench.version import VERSION

AMISS = 1
"""Exit status where no run can work."""

FEW_BYTES = 2 * 10**9
"""Free disk below which a sweep soon ends."""

STYLES = {"good": "green", "note": "yellow", "bad": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        about: versions, devices, threads, disk, hub or wandb.
        said: what was found, and the remedy where there is one.
        state: ``bad`` stops runs, a ``note`` is good to know.
    """

    about: str
    said: str
    state: Literal["good", "note", "bad"] = "good"


def main(words: Sequence[str]) -> int:
    """Print what was found; 1 where no run can work, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m cl_bench doctor",
        description="Versions, devices, threads, disk, the Hugging Face hub and Weights & Biases.",
    )
    parser.add_argument("--offline", action="store_true", help="ask nobody on the network")
    given = parser.parse_args(list(words))
    console, stops = Console(), False
    for finding in examined(given.offline):
        stops = stops or finding.state == "bad"
        text = Text.assemble(
            (finding.about.ljust(9), "bold"), (printable(finding.said), STYLES[finding.state])
        )
        console.print(text, soft_wrap=True)
    if stops:
        console.print("\na red line has to be put right before a run works", style="bold red")
    return AMISS if stops else 0


def examined(offline: bool) -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    yield from versions()
    yield from devices()
    yield from threads()
    yield from disk()
    yield from hub(offline)
    yield from wandb()


def versions() -> Iterator[Finding]:
    """Python, cl_bench and what it needs; each extra as a whole."""
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Finding("versions", f"cl_bench {VERSION}, {python}")
    extras: dict[str, list[str]] = defaultdict(list)
    good = []
    for line in distribution("cl_bench").requires or ():
        wanted = Requirement(line)
        if wanted.marker is None:
            found = _installed(wanted)
            if found is None:
                remedy = f"pip install '{wanted.name}{wanted.specifier}'"
                yield Finding("versions", f"{_lack(wanted)}: {remedy}", "bad")
            else:
                good.append(f"{wanted.name} {found}")
            continue
        for extra in distribution("cl_bench").metadata.get_all("Provides-Extra") or ():
            if wanted.marker.evaluate({"extra": extra}):
                missing = [] if _installed(wanted) else [_lack(wanted)]
                extras[extra] += missing
    yield Finding("versions", ", ".join(dict.fromkeys(good)))
    whole = [extra for extra, missing in extras.items() if not missing]
    if whole:
        yield Finding("versions", f"extras that are whole: {', '.join(whole)}")
    for extra, missing in extras.items():
        if missing:
            remedy = f"for its part: pip install 'cl_bench[{extra}]'"
            yield Finding("versions", f"extra {extra}: {', '.join(missing)}; {remedy}", "note")


def _installed(wanted: Requirement) -> str | None:
    """The version that is there, if it will do."""
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return None
    return found if wanted.specifier.contains(found, prereleases=True) else None


def _lack(wanted: Requirement) -> str:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is not installed"
    return f"{wanted.name} {found} is not {wanted.specifier}"


def devices() -> Iterator[Finding]:
    """What torch computes on."""
    yield Finding("devices", f"CPU with {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding("devices", f"GPU {i}: {name}, {_gb(free)} of {_gb(total)} free")
    if torch.backends.mps.is_available():
        yield Finding("devices", "Apple's GPU (MPS)")
    if not torch.cuda.is_available() and torch.version.cuda:
        yield Finding(
            "devices", f"no GPU, though torch is built for CUDA {torch.version.cuda}", "note"
        )


def threads() -> Iterator[Finding]:
    """How many threads a run takes, and who said so."""
    said = [f"{name}={os.environ[name]}" for name in NUMBERS if name in os.environ]
    number = chosen("auto") or torch.get_num_threads()
    yield Finding(
        "threads",
        f"{usable_cores()} cores may be used, a run takes {number} threads"
        + (f" ({', '.join(said)})" if said else ""),
    )


def disk() -> Iterator[Finding]:
    """Where runs and made data go, and the room there."""
    for what, folder in (("runs go to", Path("runs")), ("made data to", cache_directory())):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            remedy = "run_dir=..." if folder == Path("runs") else "CL_BENCH_CACHE=<folder>"
            state: Literal["note", "bad"] = "bad" if folder == Path("runs") else "note"
            yield Finding("disk", f"{what} {folder}: cannot write there, use {remedy}", state)
        else:
            yield Finding(
                "disk",
                f"{what} {folder}: {_gb(free)} free",
                "good" if free > FEW_BYTES else "note",
            )


def hub(offline: bool) -> Iterator[Finding]:
    """Whether data and models can be fetched."""
    from huggingface_hub import constants

    home = f"cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"switched off by HF_HUB_OFFLINE; {home}", "note")
    elif offline:
        yield Finding("hub", f"not asked; {home}", "note")
    elif hub_reachable():
        yield Finding("hub", f"{constants.ENDPOINT} answers; {home}")
    else:
        remedy = "data in folders works, stream.data_dir=..."
        yield Finding("hub", f"{constants.ENDPOINT} does not answer; {remedy}; {home}", "note")


def wandb() -> Iterator[Finding]:
    """Whether runs can be shown at Weights & Biases."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        yield Finding("wandb", f"WANDB_MODE={mode}", "note")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    known = "WANDB_API_KEY" in os.environ or _in_netrc(host)
    yield Finding(
        "wandb",
        f"{host} has a key here: logger.mode=online works"
        if known
        else f"no key for {host}: runs are written offline; wandb login, then logger.mode=online",
        "good" if known else "note",
    )


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _gb(size: int) -> str:
    return f"{size / 1e9:.0f} GB"
