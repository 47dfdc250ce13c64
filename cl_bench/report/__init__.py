"""Tables, figures and pages, made from the directories of runs alone."""

from cl_bench.report.alignment import (
    connectivity_figure,
    curve_figure,
    landscape_figure,
    write_probe_figures,
)
from cl_bench.report.plots import accuracy_matrix_figure, forgetting_figure, write_figures
from cl_bench.report.tables import matrix_table, print_run, summary_table

__all__ = [
    "accuracy_matrix_figure",
    "connectivity_figure",
    "curve_figure",
    "forgetting_figure",
    "landscape_figure",
    "matrix_table",
    "print_run",
    "summary_table",
    "write_figures",
    "write_probe_figures",
]
