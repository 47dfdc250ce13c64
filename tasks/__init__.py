"""Every stream of cl_bench: one Python file and one ``conf/stream/*.yaml`` each.

The folder is imported as ``cl_bench.tasks``, through the link beside the other packages.
"""

if __name__ != "cl_bench.tasks":
    raise ImportError(f"{__path__[0]} is imported as cl_bench.tasks")
