"""Reads data out of pickle files that others published, without running anything that is in them.

A pickle is a program: it names functions and calls them. Here every name is looked up in a short list of stand-ins of
our own, which build numpy arrays from bytes and refuse the rest; numpy's own functions are not called either.
"""

import pickle
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from netllm_pl.errors import UserError

ELEMENT = "biuf"
"""Kinds of numpy's types that are read: bits, integers, floats."""


class _Sealed(type):
    """Classes that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {name} of a class")


class Record(metaclass=_Sealed):
    """Stands in for an object of a known class: only its attributes are read."""


class _Type(metaclass=_Sealed):
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False) -> None:
        self.value = np.dtype(code) if isinstance(code, str) and len(code) < 8 else np.dtype("O")
        if self.value.kind not in ELEMENT:
            raise pickle.UnpicklingError(f"an array of type {code!r}, not of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder("=" if state[1] == "|" else state[1])


class _Array(metaclass=_Sealed):
    """Stands in for numpy.ndarray: what numpy's `_reconstruct` makes, filled by its state."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _from_bytes(data, kind, shape, "F" if fortran else "C")


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array that is not made of numbers")
    if len(data) != prod(shape) * kind.value.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, kind.value).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, data: Any) -> Any:
    return _from_bytes(data, kind, ())[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for codecs.encode, by which old pickles write bytes."""
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_bytes),
        )
    },
}


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, classes: Collection[str]) -> None:
        super().__init__(stream)
        self.classes = classes

    def find_class(self, module: str, name: str) -> Any:
        """Give the stand-in of a global; nothing is ever imported."""
        if name in self.classes:
            return Record
        if (module, name) not in STAND_INS:
            raise UserError(f"refused: it asks for {module}.{name}, which is not data")
        return STAND_INS[module, name]


def read_pickle(file: Path, classes: Collection[str] = ()) -> Any:
    """Read a pickle that holds numbers, text, plain containers, numpy arrays and objects of some classes.

    Args:
        file: The pickle.
        classes: Names of classes, of whatever module, whose objects become `Record`s with the same attributes.

    Returns:
        The content. Arrays may be hidden in `_Array`s: `as_array` brings them out.

    Raises:
        UserError: It cannot be read, or asks for anything else; the message names what.
    """
    try:
        with file.open("rb") as stream:
            return _Reader(stream, classes).load()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{file} is not a pickle of plain data ({type(error).__name__}: {error})") from None


def as_array(value: Any) -> np.ndarray:
    """Bring out an array, or make one of a list of arrays or numbers."""
    if isinstance(value, list | tuple):
        return np.array([as_array(part) if isinstance(part, _Array | list | tuple) else part for part in value])
    return value.value if isinstance(value, _Array) else np.asarray(value)
