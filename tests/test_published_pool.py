"""Pools that NetLLM's program pickled: read as our observations, and nothing in them is executed."""

import contextlib
import pickle
import pickletools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netllm_pl.collect import convert
from netllm_pl.data import NetDataModule
from netllm_pl.errors import UserError
from netllm_pl.experience import Windows, read_pool
from netllm_pl.rollout import rollout
from netllm_pl.unpickle import read_pickle
from tasks.adaptive_bitrate.published_pool import read_published
from tasks.adaptive_bitrate.simulator import Simulator, Traces, Video
from tasks.adaptive_bitrate.videos import PUBLISHED_LADDER

pytestmark = pytest.mark.usefixtures("own_cache")


class ExperiencePool:
    """The four lists of the published pools."""

    def __init__(self) -> None:
        self.states: list[Any] = []
        self.actions: list[Any] = []
        self.rewards: list[Any] = []
        self.dones: list[Any] = []


def simulator(history: int = 10) -> Simulator:
    rng = np.random.default_rng(0)
    time = np.arange(100) * 5.0
    sizes = (np.asarray(PUBLISHED_LADDER) * 500 * rng.uniform(0.7, 1.4, (49, 1))).astype(np.int64)
    traces = Traces(
        np.array(["a", "b"]), np.array(["a", "b"]), np.array([0, 100, 200]), np.tile(time, 2),
        rng.uniform(0.3, 4, 200), np.array([1, 7]),
    )  # fmt: skip
    return Simulator(traces, Video("v", np.asarray(PUBLISHED_LADDER), sizes), history=history)


class Varied:
    """Goes up and down the ladder."""

    def reset(self, n: int) -> None:
        self.t = 0

    def act(self, observations: dict[str, Any]) -> Any:
        self.t += 1
        return (self.t * np.arange(1, 1 + len(observations["level"]))) % 6


def published(run: Any) -> ExperiencePool:
    """Write a rollout as the published program keeps it: 6 x 6 states in its units, newest last."""
    pool = ExperiencePool()
    seen = run.observations
    for n in range(run.actions.shape[1]):
        for t in range(len(run.actions)):
            state = np.zeros((6, 6), np.float32)
            state[0, -1] = PUBLISHED_LADDER[seen["level"][t, n]] / 4300
            state[1, -1] = seen["buffer_s"][t, n] / 10
            state[2] = seen["throughput"][t, n, -6:]
            state[3] = seen["delay_s"][t, n, -6:] / 10
            state[4] = seen["next_bytes"][t, n] / 1e6
            state[5, -1] = seen["chunks_left"][t, n] / 48.0
            pool.states.append(state)
            pool.actions.append(int(run.actions[t, n]))
            pool.rewards.append(run.rewards[t, n])  # a numpy scalar, as published
            pool.dones.append(bool(t == len(run.actions) - 1))
    return pool


def save(pool: Any, file: Path, protocol: int = 4) -> Path:
    file.write_bytes(pickle.dumps(pool, protocol))
    return file


@pytest.fixture(scope="module")
def played() -> Any:
    env = simulator()
    return rollout(env, Varied(), [0, 1], record=True)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_published_pool_gives_the_observations_of_the_simulator(tmp_path: Path, played: Any, protocol: int) -> None:
    file = save(published(played), tmp_path / "exp_pool.pkl", protocol)
    read = list(read_published(file, history=10))
    assert [run.actions.shape for run in read] == [(47, 1), (47, 1)]
    for n, run in enumerate(read):
        assert set(run.observations) == set(played.observations)
        assert (run.actions[:, 0] == played.actions[:, n]).all() and (run.rewards[:, 0] == played.rewards[:, n]).all()
        for name, values in run.observations.items():
            expected = played.observations[name][:, n]
            if values.dtype.kind == "i":
                assert (values[:, 0] == expected).all(), name
            else:
                np.testing.assert_allclose(values[:, 0], expected, rtol=1e-6, err_msg=name)


def test_a_converted_pool_is_read_like_a_collected_one(tmp_path: Path, played: Any) -> None:
    class Published(NetDataModule):
        dataset = episodes = None  # type: ignore[assignment]  # not used

        def convert(self, file: Path) -> Any:
            return read_published(file)

    file = save(published(played), tmp_path / "exp_pool.pkl")
    convert(Published(), file, tmp_path / "pool", "genet")
    pool = read_pool(tmp_path / "pool", "Published")
    assert pool.returns == pytest.approx(played.returns) and set(pool.episodes["policy"]) == {"genet"}
    assert pool.manifest["made_by"]["converted_from"] == file.name
    windows = Windows(pool, 10, 10)
    assert windows[list(range(len(windows)))]["throughput"].shape == (10, 10, 10)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, call: Callable[..., Any], *words: Any) -> None:
        self.call, self.words = call, words

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.words


def forged(text: bytes) -> Callable[[Path], bytes]:
    return lambda touched: text.replace(b"TOUCHED", str(touched).encode())


def hidden(touched: Path) -> bytes:
    pool = ExperiencePool()
    pool.states = [[np.zeros((6, 6)), Evil(Path.touch, touched)]]
    return pickle.dumps(pool)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda touched: pickle.dumps(Evil(eval, f"open({str(touched)!r}, 'w')")), "builtins.eval"),
        (lambda touched: pickle.dumps(Evil(exec, "1")), "builtins.exec"),
        (lambda touched: pickle.dumps(Evil(getattr, "text", "upper")), "builtins.getattr"),
        (lambda touched: pickle.dumps(Evil(np.load, str(touched))), "numpy.load"),
        (lambda touched: pickle.dumps(Evil(np.dtype, "O")), "an array of type 'O'"),
        (lambda touched: pickle.dumps(np.array([Evil(eval, "1")], object)), "type 'O8'|builtins.eval"),
        (hidden, "refused: it asks for"),
        (forged(b"cos\nsystem\n(S'touch TOUCHED'\ntR."), "os.system"),
        (forged(b"(S'touch TOUCHED'\nios\nsystem\n."), "os.system"),
        (forged(b"cplm_special.data.exp_pool\nos.system\n(S'touch TOUCHED'\ntR."), "exp_pool.os.system"),
        (forged(b"cx\nExperiencePool\n}(V__setstate__\nc_codecs\nencode\nub."), "not a pickle of plain data"),
        (forged(b"cx\nExperiencePool\nN}(V__setstate__\nc_codecs\nencode\nu\x86b."), "it changes a type"),
        (lambda touched: b"\x80\x04", "not a pickle of plain data"),
        (lambda touched: b"PK\x03\x04 zip", "not a pickle of plain data"),
        (lambda touched: pickle.dumps(ExperiencePool())[:-5], "not a pickle of plain data"),
    ],
)  # fmt: skip
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, content: Callable[[Path], bytes], message: str) -> None:
    touched = tmp_path / "touched"
    file = tmp_path / "bad.pkl"
    file.write_bytes(content(touched))
    with pytest.raises(UserError, match=message) as caught:
        list(read_published(file))
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) <= 2
    assert not touched.exists()


def test_an_array_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps(np.arange(6.0).reshape(2, 3), protocol=4)
    assert any(op.name == "BININT1" and arg == 3 for op, arg, _ in pickletools.genops(content))
    file = tmp_path / "bad.pkl"
    file.write_bytes(content.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"))
    with pytest.raises(UserError, match=r"shape \(2, 4\) in 48 bytes"):
        read_pickle(file)


@pytest.mark.parametrize("code", [b"Nr\x00\x00\x00\x01.", b"\x96\x00\x00\x00\x10\x00\x00\x00\x00."])
def test_a_broken_pickle_does_not_take_the_memory_that_it_names(code: bytes, tmp_path: Path) -> None:
    """The first puts None at place 16,777,216 of a table, the second makes a bytearray of 256 MB."""
    file = tmp_path / "bad.pkl"
    file.write_bytes(b"\x80\x05" + code)
    tracemalloc.start()
    with contextlib.suppress(UserError):  # the first is None
        assert read_pickle(file) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def worse(change: Callable[[ExperiencePool], Any]) -> Callable[[ExperiencePool], ExperiencePool]:
    def apply(pool: ExperiencePool) -> ExperiencePool:
        change(pool)
        return pool

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool: [1, 2], "holds no ExperiencePool with lists states, actions, rewards, dones"),
        (lambda pool: ExperiencePool(), "holds no ExperiencePool"),
        (worse(lambda pool: pool.actions.pop()), r"are \(94, 6, 6\), \(93,\)"),
        (worse(lambda pool: pool.states.__setitem__(5, np.zeros((6, 5)))), "not arrays of numbers"),
        (worse(lambda pool: pool.actions.__setitem__(5, 6)), "step 5: an action that is no level from 0 to 5"),
        (worse(lambda pool: pool.actions.__setitem__(5, 1.5)), "not arrays of numbers"),
        (worse(lambda pool: pool.rewards.__setitem__(7, float("nan"))), "step 7: numbers that are not finite"),
        (worse(lambda pool: pool.states[9].__setitem__((0, 5), 0.5)), "step 9: a last bitrate that is not on"),
        (worse(lambda pool: pool.states[9].__setitem__((5, 5), 0.5001)), "step 9: a part of a chunk left"),
        (worse(lambda pool: pool.states[9].__setitem__((2, 2), 9.0)), "step 9: a history that does not continue"),
        (worse(lambda pool: pool.dones.__setitem__(-1, False)), "the last episode does not end"),
    ],
)
def test_a_published_pool_that_is_wrong_is_refused(
    tmp_path: Path, played: Any, change: Callable[[ExperiencePool], Any], message: str
) -> None:
    file = save(change(published(played)), tmp_path / "exp_pool.pkl")
    with pytest.raises(UserError, match=message):
        list(read_published(file))


def test_a_pool_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pkl does not exist"):
        list(read_published(tmp_path / "nowhere.pkl"))
