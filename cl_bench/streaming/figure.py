"""The windowed accuracy of a stream, as a picture."""

import io
from pathlib import Path

from cl_bench.metrics.prequential import Prequential, windowed
from cl_bench.tracking import write_atomically

NAME = "prequential.png"
POINTS = 2000
"""Of the curve, at most."""


def write_prequential_figure(directory: Path, prequential: Prequential) -> Path:
    """Draw ``prequential.png`` into a run's directory; returns its path.

    Raises:
        UsageError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = windowed(prequential.bits, prequential.window)
    step = max(1, len(curve) // POINTS)
    figure = Figure(figsize=(7, 3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(0, len(curve), step), curve[::step].tolist(), linewidth=1)
    for drift in prequential.drifts:
        axes.axvline(drift, color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xlabel("samples answered")
    axes.set_ylabel(f"accuracy of the last {prequential.window}")
    axes.set_ylim(0, 1)
    picture = io.BytesIO()
    figure.savefig(picture)
    write_atomically(directory / NAME, picture.getvalue())
    return directory / NAME
