"""Processes that train one model together: who they are, what each holds, how they start."""
