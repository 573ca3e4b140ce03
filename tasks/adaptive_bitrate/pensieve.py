"""The actor of Pensieve (Mao et al., SIGCOMM 2017) as Genet trains it, and the policy that runs it.

Shapes: N sessions, 6 rows of state, S columns (newest last), L levels, A actions.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from netllm_pl.errors import UserError
from netllm_pl.weights import Weights, array_of, fill, read_weights
from tasks.adaptive_bitrate.simulator import Ints, Observations, Video

LENGTH = 6
RELATIVE = 3  # down, stay, up
# The published convolutions slide 4 taps over a "time" of one step, with the six samples as channels; "same" padding
# puts one zero before and two behind, so that the second tap alone meets data.
LIVE_TAP = 1
# Our name of a layer in `_Trunk` -> the published one.
PUBLISHED = {
    "level": "FullyConnected",
    "buffer": "FullyConnected_1",
    "throughput": "Conv1D",
    "delay": "Conv1D_1",
    "sizes": "Conv1D_2",
    "left": "FullyConnected_2",
    "merge": "FullyConnected_3",
    "out": "FullyConnected_4",
}


def pensieve_state(observations: Observations, video: Video, length: int = LENGTH) -> npt.NDArray[np.float32]:
    """Observations in the published layout and units.

    Rows: last bitrate over the top one; buffer in 10 s; throughput in MB/s; download time in 10 s; sizes of the next
    chunk in MB (first L columns); share of chunks left. The actor reads only the newest bitrate, buffer and chunks
    left, so older columns of these rows stay zero.

    Returns:
        (N, 6, max(length, L)).

    Raises:
        UserError: The sessions have another number of levels.
    """
    levels, seen = len(video.ladder_kbps), observations["next_bytes"].shape[1]
    if seen != levels:
        raise UserError(f"Pensieve was made for {levels} levels, the video that is played has {seen}; train one for it")
    state = np.zeros((len(observations["level"]), 6, max(length, levels)), dtype=np.float32)
    state[:, 0, -1] = video.ladder_kbps[observations["level"]] / video.ladder_kbps.max()
    state[:, 1, -1] = observations["buffer_s"] / 10.0
    samples = min(length, observations["throughput"].shape[1])
    state[:, 2, -samples:] = observations["throughput"][:, -samples:]
    state[:, 3, -samples:] = observations["delay_s"][:, -samples:] / 10.0
    state[:, 4, :levels] = observations["next_bytes"] / 1e6
    left = observations["chunks_left"]
    state[:, 5, -1] = left / (left + observations["chunk"])
    return state


class _Trunk(nn.Module):
    """Six inputs, each through its own dense layer, joined by two more."""

    def __init__(self, levels: int, length: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.levels, self.length = levels, length
        self.level, self.buffer, self.left = (nn.Linear(1, hidden) for _ in range(3))
        self.throughput, self.delay = nn.Linear(length, hidden), nn.Linear(length, hidden)
        self.sizes = nn.Linear(levels, hidden)
        self.merge = nn.Linear(6 * hidden, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, state: Tensor) -> Tensor:
        parts = [
            self.level(state[:, 0, -1:]),
            self.buffer(state[:, 1, -1:]),
            self.throughput(state[:, 2, -self.length :]),
            self.delay(state[:, 3, -self.length :]),
            self.sizes(state[:, 4, : self.levels]),
            self.left(state[:, 5, -1:]),
        ]
        answer: Tensor = self.out(torch.relu(self.merge(torch.relu(torch.cat(parts, dim=1)))))
        return answer


class PensieveActor(nn.Module):
    """Pensieve's network; what its convolutions compute is written as the dense layers they amount to.

    Args:
        levels: Levels of the ladder (L).
        length: Samples of throughput and download time that are read.
        hidden: Width of each layer.
        relative: Whether the actions are down, stay and up, as published, or the L levels.
        critic: Whether to hold a value network of the same structure.
    """

    def __init__(
        self, levels: int = 6, length: int = LENGTH, hidden: int = 128, relative: bool = True, critic: bool = False
    ) -> None:
        super().__init__()
        self.levels, self.length, self.relative = levels, length, relative
        self.actor = _Trunk(levels, length, hidden, RELATIVE if relative else levels)
        self.critic = _Trunk(levels, length, hidden, 1) if critic else None

    def forward(self, state: Tensor) -> Tensor:
        """Logits (N, A) of states (N, 6, S) as `pensieve_state` gives them."""
        logits: Tensor = self.actor(state)
        return logits

    def value(self, state: Tensor) -> Tensor:
        """Expected returns (N,) of states (N, 6, S).

        Raises:
            ValueError: The network was made without a critic.
        """
        if self.critic is None:
            raise ValueError("this PensieveActor has no critic; make it with critic=True")
        value: Tensor = self.critic(state)
        return value[:, 0]

    def level_of(self, actions: Ints, last: Ints) -> Ints:
        """Levels (N,) that actions (N,) mean after the last levels (N,)."""
        return np.clip(last + actions - 1, 0, self.levels - 1) if self.relative else actions


class Pensieve:
    """Runs an actor.

    Args:
        actor: The network.
        video: What is streamed.
        sample: Draw actions by the published rule (the first whose cumulative probability is above one of 1/1000,
            ..., 999/1000), not the likeliest.
        seed: Of the draws.

    Raises:
        UserError: The actor is for another number of levels.
    """

    def __init__(self, actor: PensieveActor, video: Video, sample: bool = False, seed: int = 0) -> None:
        if actor.levels != len(video.ladder_kbps):
            raise UserError(
                f"this Pensieve actor has {actor.levels} levels, video '{video.name}' has {len(video.ladder_kbps)}; "
                "choose another video, or train an actor for it"
            )
        self.actor, self.video, self.sample = actor, video, sample
        self.seed = seed
        self.reseed(0)

    def reseed(self, number: int) -> None:
        """Draw what belongs to one of many batches of sessions."""
        self.random = np.random.default_rng([self.seed, number])

    def reset(self, n: int) -> None:
        """Nothing to forget."""

    @torch.no_grad()
    def act(self, observations: Observations) -> Ints:
        """Choose levels (N,)."""
        state = torch.from_numpy(pensieve_state(observations, self.video, self.actor.length))
        chances = self.actor(state.to(next(self.actor.parameters()))).softmax(dim=1).cpu().numpy()
        if self.sample:
            drawn = self.random.integers(1, 1000, size=(len(chances), 1)) / 1000.0
            actions = (np.cumsum(chances, axis=1) > drawn).argmax(axis=1)
        else:
            actions = chances.argmax(axis=1)
        return self.actor.level_of(actions, observations["level"])


def load_pensieve(path: Path) -> PensieveActor:
    """Read published weights, actor and critic.

    Args:
        path: A NumPy archive whose arrays have the TensorFlow variables' names, with dots for slashes.

    Raises:
        UserError: There is no such file, it is no archive of plain arrays, or an array is missing or has another shape.
    """
    weights, model = read_weights(path), PensieveActor(critic=True)
    fill(model, {name: _published(weights, name, path) for name in model.state_dict()}, path)
    return model


def _published(weights: Weights, name: str, path: Path) -> npt.NDArray[Any]:
    """The array behind one of our parameters, such as ``actor.delay.weight``: dense layers are stored (in, out)."""
    part, layer, kind = name.split(".")
    array = array_of(weights, f"{part}.{PUBLISHED[layer]}.{'W' if kind == 'weight' else 'b'}", path, "Pensieve")
    if array.ndim == 4 and len(array) > LIVE_TAP:
        array = array[LIVE_TAP, 0]
    return array.T
