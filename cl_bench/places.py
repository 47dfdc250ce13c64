"""Where configurations lie, and what they offer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore


def conf_directory() -> Path:
    """Where our configs are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(directories: Sequence[Path], group: str) -> dict[str, Path]:
    """Names that a group offers and the file behind each; the first folder that has one wins."""
    found: dict[str, Path] = {}
    for directory in directories:
        for name, path in _options(directory / group):
            found.setdefault(name, path)
    return found


def _options(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.yaml"):
        name = path.relative_to(folder).with_suffix("")
        # A folder beside a config of its name holds parts of that config; _base is part of many.
        if not path.name.startswith("_") and not any(
            (folder / f"{parent}.yaml").is_file() for parent in name.parents
        ):
            yield name.as_posix(), path


def offer_probes(directories: Sequence[Path]) -> None:
    """Tell Hydra what ``probe: every`` is: what lies in ``probe`` of the folders, by its name.

    A defaults list names files one by one, and nothing of ours does: a probe is there for being
    in the folder.

    Args:
        directories: folders with configs.
    """
    names = sorted(options(directories, "probe"))
    node = {"defaults": [{f"/probe@{name.replace('/', '_')}": name} for name in names]}
    ConfigStore.instance().store("every", node, group="probe", provider="cl_bench")


offer_probes([conf_directory()])
