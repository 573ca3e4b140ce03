"""Published weights of small networks: NumPy archives of plain arrays, checked before they are used."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from netllm_pl.errors import UserError

Weights = dict[str, npt.NDArray[Any]]


def read_weights(path: Path) -> Weights:
    """Read all arrays of an ``.npz`` file; nothing is unpickled.

    Raises:
        UserError: There is no such file, it is no archive of plain arrays, or an array holds no floats.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; weights_dir must hold the published weights as .npz files") from None
    except (OSError, ValueError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not an archive of plain NumPy arrays ({error})") from None
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
