"""Reads data out of pickle files that others published, without running anything that is in them.

A pickle is a program: it names functions and calls them. Here every name is looked up in a short list of stand-ins of
our own, which build numpy arrays from bytes and refuse the rest; numpy's own functions are not called either.
"""

import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from struct import unpack
from typing import Any, BinaryIO, ClassVar

import numpy as np

from netllm_pl.errors import UserError

ELEMENT = "biuf"
"""Kinds of numpy's types that are read: bits, integers, floats."""
OBJECT = "O"
"""Kind of arrays that hold other plain data, such as the one dictionary that `numpy.save` was given."""


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


class _Object(_Type):
    """Stands in for numpy.dtype where one object is expected."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False) -> None:
        if code in ("O", "O8"):
            self.value = np.dtype("O")
        else:
            super().__init__(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.value.kind != OBJECT:
            super().__setstate__(state)


class _Array(metaclass=_Sealed):
    """Stands in for numpy.ndarray: what numpy's `_reconstruct` makes, filled by its state."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(kind, _Type) and kind.value.kind == OBJECT:
            self.value = _from_list(data, shape)
        else:
            self.value = _from_bytes(data, kind, shape, "F" if fortran else "C")


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
    if not isinstance(kind, _Type) or kind.value.kind == OBJECT or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array that is not made of numbers")
    if len(data) != prod(shape) * kind.value.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, kind.value).reshape(shape, order="F" if order == "F" else "C")


def _from_list(data: Any, shape: Any) -> np.ndarray:
    """An array of one plain object, as `numpy.save` makes of a dictionary."""
    if shape != () or not isinstance(data, list) or len(data) != 1:
        raise pickle.UnpicklingError(f"an array of objects of shape {shape}; expected one object")
    value = np.empty((), dtype=object)
    value[()] = data[0]
    return value


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, data: Any) -> Any:
    return _from_bytes(data, kind, ())[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for codecs.encode, by which old pickles write bytes."""
    return text.encode("latin1")


StandIns = Mapping[tuple[str, str], Any]

STAND_INS: StandIns = {
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

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""What reads the header of an ``.npy`` file, by version; numpy parses it as a literal."""


def _stand_in(module: str, name: str, known: StandIns) -> Any:
    """The stand-in of a global; nothing is ever imported."""
    if (module, name) not in known:
        raise UserError(f"refused: it asks for {module}.{name}, which is not data")
    return known[module, name]


class _Whole:
    """A file of which nobody asks for more than there is: what asks would make room for it first."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.readline = stream, stream.readline
        self.size = os.fstat(stream.fileno()).st_size

    def read(self, size: int) -> bytes:
        if size > self.size:
            raise EOFError("it ends in the middle of its data")
        return self.stream.read(size)


def _read_bytearray(reader: Any) -> None:
    """Put a bytearray on the stack, as Python's own does; that makes room for it before it reads."""
    (size,) = unpack("<Q", reader.read(8))
    reader.append(bytearray(reader.read(size)))


class _Reader(pickle._Unpickler):
    """Reads plain data.

    It is Python's own reader in Python, which keeps a dictionary of what a pickle numbers; that in C, twice as fast,
    makes a table of as many gigabytes as a broken file says.
    """

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _read_bytearray}

    def __init__(self, stream: BinaryIO, classes: Collection[str] = (), known: StandIns = STAND_INS) -> None:
        super().__init__(_Whole(stream))
        self.classes, self.known = classes, known

    def find_class(self, module: str, name: str) -> Any:
        return Record if name in self.classes else _stand_in(module, name, self.known)


OF_AN_OBJECT: StandIns = {**STAND_INS, ("numpy", "dtype"): _Object}
"""Stand-ins where an array may be one object."""


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
    with _opened(file, "a pickle of plain data") as stream:
        return _Reader(stream, classes).load()


def read_npy(file: Path) -> Any:
    """Read what `numpy.save` wrote, be it an array of numbers or one object of plain data, which it pickles.

    Args:
        file: The ``.npy`` file.

    Returns:
        The array, or the object. Arrays in an object may be hidden: `as_array` brings them out.

    Raises:
        UserError: It cannot be read, or holds anything else; the message names what.
    """
    with _opened(file, "an .npy file of plain data") as stream:
        header = HEADERS[np.lib.format.read_magic(stream)]
        shape, fortran, dtype = header(stream)
        if dtype.kind == OBJECT:
            return _Reader(stream, known=OF_AN_OBJECT).load().value[()]
        kind = _Type(dtype.str)
        kind.value = dtype
        return _from_bytes(stream.read(), kind, shape, "F" if fortran else "C")


@contextmanager
def _opened(file: Path, expected: str) -> Iterator[BinaryIO]:
    """A stream of a file; whatever goes wrong while it is read becomes an error that names the file."""
    try:
        with file.open("rb") as stream:
            yield stream
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except Exception as error:  # a broken pickle raises nearly anything
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"{file} is not {expected} ({type(error).__name__}: {reason})") from None


def as_array(value: Any) -> np.ndarray:
    """Bring out an array, or make one of a list of arrays or numbers."""
    if isinstance(value, list | tuple):
        return np.array([as_array(part) if isinstance(part, _Array | list | tuple) else part for part in value])
    return value.value if isinstance(value, _Array) else np.asarray(value)
