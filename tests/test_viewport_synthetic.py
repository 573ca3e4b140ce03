"""The generator of viewport traces and pictures."""

import numpy as np
import pytest
from test_viewport_data import SMALL, same

from netllm_pl.errors import UserError
from tasks.viewport_prediction.baselines import Ridge, Static, circular_error, future_relative, unwrap_relative, wrap
from tasks.viewport_prediction.scenes import MIN_GAP, make_scenes, pixel_directions, render
from tasks.viewport_prediction.synthetic import Synthetic, generate, synthetic_splits
from tasks.viewport_prediction.viewers import DISTRACTED, REACTION
from tasks.viewport_prediction.windows import gather, make_windows


def test_generator_is_deterministic_and_shaped() -> None:
    traces, pictures, seconds = generate(SMALL)
    again, pictures_again, _ = generate(SMALL)
    assert same(traces, again)
    assert np.array_equal(pictures, pictures_again)
    assert pictures.shape == (4, 100, 16, 32, 3)
    assert pictures.dtype == np.uint8
    assert seconds == pytest.approx(0.2)
    assert (len(traces), traces.lengths.tolist()) == (16, [100] * 16)
    assert not np.array_equal(generate(Synthetic(**(vars(SMALL) | {"seed": 1})))[0].angles, traces.angles)
    sparse, frames, seconds = generate(Synthetic(**(vars(SMALL) | {"picture_every": 5})))
    assert same(sparse, traces)
    assert np.array_equal(frames, pictures[:, ::5])
    assert seconds == pytest.approx(1.0)


def test_generated_motion_is_humanly_possible() -> None:
    traces, _, _ = generate(Synthetic(seed=7))
    roll, pitch, yaw = traces.angles.T
    inside = np.ones(len(yaw) - 1, dtype=bool)
    inside[traces.starts[1:-1] - 1] = False
    speed = np.abs(wrap(np.diff(yaw)))[inside] * 5.0
    assert speed.max() < 230.0
    assert 3.0 < speed.mean() < 40.0
    assert np.abs(yaw).max() <= 180.0
    assert (np.abs(yaw) > 170.0).any()
    assert np.percentile(np.abs(pitch), 95) < 30.0
    assert np.abs(roll).mean() < 10.0
    turn = wrap(np.diff(yaw))[inside]
    assert np.corrcoef(turn, roll[:-1][inside])[0, 1] < -0.2


def test_viewers_have_time_to_react() -> None:
    assert REACTION[1] + DISTRACTED[1] < MIN_GAP
    scenes = make_scenes(np.random.default_rng(0), 6, 4, np.arange(300) / 5.0, gap=5.0)
    assert np.allclose(np.linalg.norm(scenes.directions, axis=-1), 1.0)
    for event, lit in zip(scenes.event, scenes.lit, strict=True):
        change = np.flatnonzero(np.diff(event))
        assert (np.diff(event)[change] == 1).all()
        assert (lit[change] != lit[change + 1]).all()
        assert (np.diff(change) >= MIN_GAP * 5 - 1).all()


def light(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the lit object in single pictures (..., h, w, 3): yaw and pitch in degrees."""
    pixels = pixel_directions(*pictures.shape[-3:-1])
    weight = np.clip(pictures.min(axis=-1).astype(float) - 185.0, 0.0, None) * np.hypot(pixels[..., 0], pixels[..., 1])
    x, y, z = np.moveaxis(np.tensordot(weight, pixels, axes=2), -1, 0)
    return np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y)))


def test_one_picture_shows_where_the_lit_object_is() -> None:
    rng = np.random.default_rng(3)
    scenes = make_scenes(rng, 6, 4, np.arange(100) / 5.0, gap=5.0)
    yaw, pitch = light(render(rng, scenes, 32, 64, every=1))
    x, y, z = np.moveaxis(np.take_along_axis(scenes.directions, scenes.lit[..., None, None], axis=2)[:, :, 0], -1, 0)
    assert circular_error(yaw, np.degrees(np.arctan2(y, x))).max() < 6.0
    assert circular_error(pitch, np.degrees(np.arcsin(z))).max() < 6.0


@pytest.mark.parametrize("seed", [0, 11])
def test_the_current_picture_tells_what_history_does_not(seed: int) -> None:
    config = Synthetic(seed=seed, videos=20, users=12)
    traces, pictures, _ = generate(config)
    splits, parts = synthetic_splits(config), {}
    yaw, pitch = light(pictures)
    for name in ("train", "test"):
        windows = make_windows(traces, **splits[name], history=10, horizon=20, step=5, trim_head=30, trim_tail=60)
        past, future = gather(traces, windows, np.arange(len(windows)), 10, 20)
        now = traces.video[windows.trace].astype(int) - 1, windows.t - 1
        cue = np.stack([wrap(yaw[now] - past[:, -1, 2]), pitch[now] - past[:, -1, 1]], axis=1)
        motion = unwrap_relative(past)[:, :-1].reshape(len(past), -1)
        parts[name] = past, future, np.concatenate([motion, cue, np.ones((len(past), 1))], axis=1)
    past, future, features = parts["train"]
    weights = np.linalg.lstsq(features, future_relative(past, future).reshape(len(past), -1), rcond=None)[0]
    ridge = Ridge().fit(past, future)
    past, future, features = parts["test"]
    seen = circular_error(past[:, -1:] + (features @ weights).reshape(-1, 20, 3), future).mean()
    static = circular_error(Static().predict(past, 20), future).mean()
    blind = circular_error(ridge.predict(past, 20), future).mean()
    assert 5.0 < static < 17.0
    assert seen < 0.85 * min(static, blind)


@pytest.mark.parametrize(
    "bad",
    [{"videos": 2}, {"objects": 1}, {"picture_every": 0}, {"noise": -1.0}, {"ignore": 1.5}, {"gap": float("nan")}],
)
def test_bad_generator_settings(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"synthetic\.{next(iter(bad))}"):
        Synthetic(**bad)
