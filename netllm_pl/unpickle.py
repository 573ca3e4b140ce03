"""Reads data out of pickle files that others published, without running anything that is in them.

A pickle is a program: it names functions and calls them. Here every name is looked up in a short list of stand-ins of
our own, which build numpy arrays from bytes and refuse the rest; numpy's own functions are not called either. Nor can a
pickle take much more memory than its file: what it builds is weighed before anyone walks through it.
"""

import io
import pickle
import reprlib
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from netllm_pl.errors import UserError

ELEMENT = "biuf"
"""Kinds of numpy's types that are read: bits, integers, floats."""
OBJECT = "O"
"""Kind of arrays that hold other plain data, such as the one dictionary that `numpy.save` was given."""
DIMENSIONS = 32
"""Of an array, at most."""
DEPTH = 32
"""Containers within containers, at most: Python's own functions end the process where there are a million."""
SPARE, PER_BYTE = 2**22, 8
"""Numbers that a pickle may hold, and more for each byte of its file: what stands in it once can be named often."""


class Record:
    """Stands in for an object of a known class: only its attributes are read."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError("an object whose attributes have no names")
        self.__dict__.update(state)


class _Type:
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any = None, align: Any = False, copy: Any = False) -> None:
        self.value = np.dtype(code) if isinstance(code, str) and len(code) < 8 else np.dtype("O")
        if self.value.kind not in ELEMENT:
            raise pickle.UnpicklingError(f"an array of type {reprlib.repr(code)}, not of numbers")

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


class _Array:
    """Stands in for numpy.ndarray: what numpy's `_reconstruct` makes, filled by its state."""

    value: np.ndarray[Any, Any] = None  # type: ignore[assignment]  # a pickle may forget it, and is refused then

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(kind, _Type) and kind.value.kind == OBJECT:
            self.value = _from_list(data, shape)
        else:
            self.value = _from_bytes(data, kind, shape, "F" if fortran else "C")


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
    if not isinstance(kind, _Type) or kind.value.kind == OBJECT or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array that is not made of numbers")
    sizes = shape if isinstance(shape, tuple) and len(shape) <= DIMENSIONS else (-1,)
    possible = all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes)
    if not possible or len(data) != prod(sizes) * kind.value.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {reprlib.repr(shape)} in {len(data)} bytes")
    return np.frombuffer(data, kind.value).reshape(shape, order="F" if order == "F" else "C")


def _from_list(data: Any, shape: Any) -> np.ndarray:
    """An array of one plain object, as `numpy.save` makes of a dictionary."""
    if shape != () or not isinstance(data, list) or len(data) != 1:
        raise pickle.UnpicklingError(f"an array of objects of shape {reprlib.repr(shape)}; expected one object")
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


def _empty() -> bytes:
    """Stands in for bytes, by which old pickles write none."""
    return b""


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty,
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

LEFT_OUT = {
    code[0]
    for code in (
        pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX,
        pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    )
}  # fmt: skip
"""What plain data does not need: persistent objects, extensions, sets, buffers outside the file."""

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""What reads the header of an ``.npy`` file, by version; numpy parses it as a literal."""


def _stand_in(module: str, name: str, known: Mapping[tuple[str, str], Any]) -> Any:
    """The stand-in of a global; nothing is ever imported."""
    if (module, name) not in known:
        raise UserError(f"refused: it asks for {module}.{name}, which is not data")
    return known[module, name]


class _Reader(pickle._Unpickler):
    """Reads plain data with Python's own reader in Python.

    That keeps a dictionary of what a pickle numbers; the one in C makes a table of as many gigabytes as a broken file
    says.

    Args:
        content: The whole file; a stream would make room for as much as is asked of it.
        known: Stand-ins by module and name.
        classes: Names of classes that become `Record`s.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code not in LEFT_OUT
    }

    def __init__(
        self, content: bytes, known: Mapping[tuple[str, str], Any] | None = None, classes: Collection[str] = ()
    ) -> None:
        super().__init__(io.BytesIO(content))
        self.size, self.known, self.classes = len(content), STAND_INS if known is None else known, classes

    def find_class(self, module: str, name: str) -> Any:
        return Record if name in self.classes else _stand_in(module, name, self.known)

    def load(self) -> Any:
        found = super().load()
        weight, _ = _weigh(found, {})
        if weight > SPARE + PER_BYTE * self.size:
            raise pickle.UnpicklingError(
                f"{self.size} bytes that repeat their parts until they are {weight:.3g} numbers"
            )
        return found

    def load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(size, self.size))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray

    def load_state(self) -> None:
        """Fill objects of ours; functions and classes are not changed."""
        state = self.stack.pop()
        if type(self.stack[-1]) not in (Record, _Array, _Type, _Object):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-1]).__name__}")
        type(self.stack[-1]).__setstate__(self.stack[-1], state)

    dispatch[pickle.BUILD[0]] = load_state

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    dispatch[pickle.DICT[0]] = load_dict

    def load_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    dispatch[pickle.SETITEM[0]] = load_item

    def load_items(self) -> None:
        self._fill(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_items

    def _fill(self, items: list[Any]) -> None:
        """Put keys and values into a dictionary; keys are single numbers or texts, as only they are surely hashed."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("keys and values outside of a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes | int | float | np.generic | None):
                raise pickle.UnpicklingError(f"a dictionary with a key that is a {type(key).__name__}")
            target[key] = value


def _weigh(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Count the numbers in what was read, as often as they are named, and the containers within each other.

    Raises:
        UnpicklingError: It is too deep or holds itself, or it holds a number or an array that is none.
    """
    if isinstance(value, _Array):
        if not isinstance(value.value, np.ndarray):
            raise pickle.UnpicklingError("an array without content")
        value = [value.value[()]] if value.value.dtype.kind == OBJECT else value.value
    if isinstance(value, int) and abs(value) >= 2**64:
        raise pickle.UnpicklingError("a number of more than 64 bits")
    if isinstance(value, np.ndarray):
        return 1 + value.size, 0
    if isinstance(value, str | bytes | bytearray):
        return 1 + len(value) // 8, 0
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | Record):
        parts = [*(value.__dict__.values() if isinstance(value, Record) else value)]
    else:
        return 1, 0
    if id(value) not in known:
        within = [_weigh(part, known, depth + 1) for part in parts] if depth < DEPTH else [(0, DEPTH)]
        height = 1 + max((high for _, high in within), default=-1)
        if height > DEPTH:
            raise pickle.UnpicklingError(f"more than {DEPTH} containers within each other, or one that holds itself")
        known[id(value)] = 1 + sum(weight for weight, _ in within), height
    return known[id(value)]


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
        return _Reader(stream.read(), classes=classes).load()


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
        return npy_from(stream)


def npy_from(stream: BinaryIO) -> Any:
    """Read the content of an ``.npy`` file, as `read_npy`; what is wrong with it raises nearly anything."""
    header = HEADERS[np.lib.format.read_magic(stream)]
    shape, fortran, dtype = header(stream)
    content = stream.read()
    if dtype.kind == OBJECT:
        found = _Reader(content, STAND_INS | {("numpy", "dtype"): _Object}).load()
        return found.value[()] if isinstance(found, _Array) else _refuse_lone(found)
    kind = _Type(dtype.str)
    kind.value = dtype
    return _from_bytes(content, kind, shape, "F" if fortran else "C")


def _refuse_lone(found: Any) -> Any:
    raise pickle.UnpicklingError(f"a {type(found).__name__} in place of an array")


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
