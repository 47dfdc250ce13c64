"""Every stream of cl_bench: one Python file and one ``conf/stream/*.yaml`` each."""
