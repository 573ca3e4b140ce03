"""Finds tasks and callbacks: what lies below `tasks` and `callbacks`, imported so that configs can name its classes."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from netllm_pl.errors import UserError, unknown

T = TypeVar("T")


@cache
def discover() -> tuple[str, ...]:
    """Import everything below `tasks` and `callbacks` and return its names.

    Raises:
        UserError: if another package of that name shadows the one beside netllm_pl.
    """
    importlib.import_module("netllm_pl.multi_task")  # knows no task, but is one that a config can name
    return (*_import_all(importlib.import_module("tasks")), *_import_all(importlib.import_module("callbacks")))


def _import_all(parent: ModuleType) -> list[str]:
    package = parent.__name__
    beside = Path(__file__).resolve().parent.parent / package
    found = [Path(place).resolve() for place in parent.__path__]
    if found != [beside]:
        raise UserError(f"the package '{package}' at {found[0]} shadows {beside}; run elsewhere or rename that package")
    names = [f"{package}.{module.name}" for module in pkgutil.iter_modules(parent.__path__)]
    for name in names:
        importlib.import_module(name)
    return names


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
