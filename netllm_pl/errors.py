"""The one exception for mistakes of the user: the command line prints it without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A file, key or value that the user gave is wrong; the message names it and the cure in one or two lines."""


def unknown(kind: str, name: str, known: Iterable[str], cure: str = "") -> UserError:
    """Build the error for a name that is not among the known ones.

    Args:
        kind: What the name stands for, such as ``policy``.
        name: What the user gave.
        known: The names that would have worked.
        cure: A last sentence, such as how to add one.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    listed = ", ".join(names) or "none"
    return UserError(f"unknown {kind} '{name}'.{guess} Known: {listed}.{' ' + cure if cure else ''}")
