"""The one exception whose message is written for the person at the keyboard."""


class UsageError(ValueError):
    """Something the user can put right: the message names the value and the remedy.

    The command line prints it alone, without a traceback; from Python it is a ``ValueError``.
    """
