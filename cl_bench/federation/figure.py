"""Who holds which classes, as a picture."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cl_bench.federation.settings import Federation
from cl_bench.tracking import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "partition.png"

PANELS = 6
"""Tasks that are drawn at most."""


def partition_figure(counts: Mapping[int, Tensor], federation: Federation) -> "Figure":
    """A heatmap of samples by client and class for each of the first tasks.

    Args:
        counts: int (population, classes) by task.
        federation: for the title.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(counts)[:PANELS]
    highest = max(int(counts[t].max()) for t in shown)
    with matplotlib.rc_context({"font.size": 9.0, "axes.titlesize": 9.5}):
        figure = Figure(figsize=(1.2 + 1.7 * len(shown), 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, t in zip(panels, shown, strict=True):
            image = axes.imshow(
                counts[t].numpy(),
                cmap="viridis",
                vmin=0,
                vmax=highest,
                aspect="auto",
                origin="upper",
            )
            axes.set_title(f"task {t + 1}")
            axes.set_xlabel("class")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("client")
        bar = figure.colorbar(image, ax=list(panels), pad=0.02, aspect=30)
        bar.set_label("training samples")
        kind = {
            "iid": "equal random parts",
            "shards": f"{federation.shards_per_client} shards a client",
            "dirichlet": f"Dirichlet({federation.alpha:g})",
        }[federation.partition]
        more = f", first {len(shown)} of {len(counts)} tasks" if len(counts) > PANELS else ""
        figure.suptitle(f"{federation.clients} clients, {kind}{more}", fontsize=11)
    return figure


def write_partition_figure(
    directory: Path, counts: Mapping[int, Tensor], federation: Federation
) -> Path:
    """Draw ``partition.png`` into a run's directory; returns its path.

    Raises:
        UsageError: the picture cannot be written.
    """
    picture = io.BytesIO()
    partition_figure(counts, federation).savefig(picture)
    write_atomically(directory / NAME, picture.getvalue())
    return directory / NAME
