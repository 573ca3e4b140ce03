"""Finds the tasks: every package below `tasks`, imported so that its classes can be named in a config."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from typing import TypeVar

from netllm_pl.errors import UserError, unknown

T = TypeVar("T")


@cache
def discover() -> tuple[str, ...]:
    """Import every `tasks.*` package and return their names.

    Raises:
        UserError: if another package called `tasks` shadows the one beside netllm_pl.
    """
    tasks = importlib.import_module("tasks")
    beside = Path(__file__).resolve().parent.parent / "tasks"
    found = [Path(place).resolve() for place in tasks.__path__]
    if found != [beside]:
        raise UserError(f"the package 'tasks' at {found[0]} shadows {beside}; run elsewhere or rename that package")
    names = [f"tasks.{module.name}" for module in pkgutil.iter_modules(tasks.__path__)]
    for name in names:
        importlib.import_module(name)
    return tuple(names)


def concrete_subclasses(base: type[T]) -> dict[str, type[T]]:
    """Map short names to all public concrete subclasses of a base class."""
    discover()
    found: dict[str, type[T]] = {}
    stack = list(base.__subclasses__())
    while stack:
        cls = stack.pop()
        stack.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found[cls.__name__] = cls
    return found


def find_class(base: type[T], name: str, kind: str) -> type[T]:
    """Return the subclass of that short name."""
    classes = concrete_subclasses(base)
    if name not in classes:
        raise unknown(kind, name, classes)
    return classes[name]
