"""Published weights of small networks: NumPy archives of plain arrays, checked before they are used."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from netllm_pl.errors import UserError
from netllm_pl.parquet import first_line
from netllm_pl.unpickle import npy_from

Weights = dict[str, npt.NDArray[Any]]

LARGEST = 2**28
"""Bytes of one array; of larger ones a small file could hold more than memory."""


def read_weights(path: Path) -> Weights:
    """Read all arrays of an ``.npz`` file; nothing is unpickled.

    Raises:
        UserError: There is no such file, it is no archive of plain arrays, or an array holds no floats.
    """
    try:
        arrays: Weights = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > LARGEST:
                    raise ValueError(f"{member.filename} has {member.file_size} bytes")
                content = npy_from(io.BytesIO(archive.read(member)))
                if not isinstance(content, np.ndarray):
                    raise ValueError(f"{member.filename} is no array")
                arrays[member.filename.removesuffix(".npy")] = content
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; weights_dir must hold the published weights as .npz files") from None
    except Exception as error:  # a broken archive raises nearly anything
        raise UserError(f"{path}: not an archive of plain NumPy arrays ({first_line(error)})") from None
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise UserError(f"{path}: array '{name}' holds {array.dtype}, expected floating-point numbers")
    return arrays


def array_of(weights: Weights, name: str, path: Path, whose: str) -> npt.NDArray[Any]:
    """Give an array by its published name.

    Args:
        weights: What `read_weights` gave.
        name: The array.
        path: The file, for the message.
        whose: The network, for the message.

    Raises:
        UserError: It is not there.
    """
    if name not in weights:
        raise UserError(f"{path}: no array '{name}'; expected the published {whose} weights")
    return weights[name]


def fill(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """Give a network its weights.

    Args:
        model: The network.
        arrays: All of its parameters by name.
        path: The file they came from, for the message.

    Raises:
        UserError: An array has another shape, or numbers that are not finite.
    """
    state = {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for name, array in arrays.items()}
    for name, wanted in model.state_dict().items():
        if state[name].shape != wanted.shape or not state[name].isfinite().all():
            raise UserError(f"{path}: {name} is {tuple(state[name].shape)}, expected finite {tuple(wanted.shape)}")
    model.load_state_dict(state)
