"""One way to say that something takes a while."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner with a text on standard error while the body runs; silent where there is no terminal."""
    from rich.console import Console  # imported late: most commands end before anything takes a while

    console = Console(file=sys.stderr)  # this very stream, even if the body redirects it
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
