"""The version of cl_bench."""

VERSION = "0.1.0"
