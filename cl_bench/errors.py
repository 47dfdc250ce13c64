"""The one exception whose message is written for the person at the keyboard."""

import unicodedata


class UsageError(ValueError):
    """Something the user can put right: the message names the value and the remedy.

    The command line prints it alone, without a traceback; from Python it is a ``ValueError``.
    """


UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that do something, or pretend to be nothing."""


def printable(text: object) -> str:
    """A text with what a terminal would obey made visible: escapes, and what turns lines around.

    Names in a run's files may be anybody's; newlines and tabs stay.
    """
    text = str(text)
    if text.isprintable():  # almost all: nothing of these categories is in it
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in UNSHOWN else ascii(c)[1:-1] for c in text
    )
