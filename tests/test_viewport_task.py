"""Viewport models: what they start as, their symmetries, what they must not see, and how they are judged.

Shapes: B batch, T history, H horizon; angles are (roll, pitch, yaw) in degrees.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netllm_pl.encoders import VisionConfig
from netllm_pl.errors import UserError
from netllm_pl.testing import check_task, tiny_backbone
from tasks.viewport_prediction import ViewportGRU, ViewportPrediction, ViewportPredictionData, ViewportTRACK
from tasks.viewport_prediction.model import CircularError, ViewportModel, wrap
from tasks.viewport_prediction.synthetic import Synthetic
from tasks.viewport_prediction.windows import Disturbance

ViT = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = VisionConfig(config={"image_size": [8, 16], **ViT}, cache=False)
ONE_COLUMN = VisionConfig(config={"image_size": [8, 16], **ViT, "patch_size": 1}, cache=False)
LEARNED = (ViewportGRU, ViewportTRACK)
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def data() -> ViewportPredictionData:
    synthetic = Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16)
    return ViewportPredictionData(synthetic=synthetic, batch_size=5, eval_batch_size=5)


@pytest.fixture
def batch(data: ViewportPredictionData) -> Batch:
    train = data.dataset("train")
    return train[list(range(0, len(train), len(train) // 5))]


def started(kind: type[ViewportModel] = ViewportPrediction, **settings: Any) -> ViewportModel:
    """A model as it is before training, in evaluation mode."""
    if kind is ViewportPrediction:
        settings = {"backbone": tiny_backbone(), "width": 16, **settings}
    return kind(**settings).eval()


def stirred(kind: type[ViewportModel] = ViewportPrediction, **settings: Any) -> ViewportModel:
    """The same, with random weights in place of the zeros that heads and adapters start with."""
    model = started(kind, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def turned(batch: Batch, degrees: float, columns: int = 0) -> Batch:
    """The world turned: yaw shifted, pictures rolled by columns of pixels."""
    shift = torch.tensor([0.0, 0.0, degrees])
    angles = {name: wrap(batch[name] + shift) for name in ("history", "future")}
    pictures = batch["pictures"].roll(columns, dims=3)
    return {**batch, **angles, "pictures": pictures, "picture_ids": batch["picture_ids"] + 1 + columns}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-2) -> None:
    """Check that angles are equal on the circle."""
    assert wrap(a - b).abs().max() < tolerance


@pytest.mark.parametrize("settings", [{}, {"vision": VISION}, {"decoding": "autoregressive"}])
def test_the_relative_model_starts_as_static(settings: dict[str, Any], batch: Batch) -> None:
    expected = batch["history"][:, -1:].expand(-1, 20, -1)
    with torch.no_grad():
        close(started(**settings)(batch), expected, 1e-4)
        assert wrap(stirred(**settings)(batch) - expected).abs().max() > 1


CASES: list[Any] = [
    (ViewportPrediction, {}),
    (ViewportPrediction, {"decoding": "autoregressive"}),
    (ViewportGRU, {}),
    (ViewportTRACK, {}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("degrees", [10.0, 180.0, -123.0])
def test_a_turned_world_gives_a_turned_prediction(
    kind: type[ViewportModel], settings: dict[str, Any], degrees: float, batch: Batch
) -> None:
    batch = {name: value for name, value in batch.items() if "picture" not in name}
    model, shift = stirred(kind, **settings), torch.tensor([0.0, 0.0, degrees])
    world = {**batch, "history": wrap(batch["history"] + shift)}
    with torch.no_grad():
        close(model(world), model(batch) + shift)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_turned_picture_gives_a_turned_prediction(columns: int, batch: Batch) -> None:
    """By whole patches, and without the position embedding, which alone knows where a picture begins."""
    model: Any = stirred(vision=VISION)
    nn.init.zeros_(model.image.vision.model.embeddings.position_embeddings)
    shift = torch.tensor([0.0, 0.0, columns * 4 * 360 / 16])
    with torch.no_grad():
        turned_prediction = model(turned(batch, float(shift[2]), columns * 4))
        close(turned_prediction, model(batch) + shift)
        assert wrap(model(turned(batch, float(shift[2]))) - model(batch) - shift).abs().max() > 0.05


@pytest.mark.parametrize(("kind", "settings"), [*CASES, (ViewportPrediction, {"representation": "absolute"})])
def test_jumps_at_180_do_not_matter(kind: type[ViewportModel], settings: dict[str, Any], batch: Batch) -> None:
    model = stirred(kind, **settings)
    turns = torch.zeros_like(batch["history"])
    turns[:, ::3, 2] = 360.0
    with torch.no_grad():
        close(model({**batch, "history": batch["history"] + turns}), model(batch))


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_histories_and_horizons_of_other_lengths(
    kind: type[ViewportModel], settings: dict[str, Any], batch: Batch
) -> None:
    model, history = stirred(kind, **settings), batch["history"]
    longer = torch.cat([torch.full_like(history, 7.0), history], dim=1)
    padded = torch.cat([history[:, 4:5].expand(-1, 4, -1), history[:, 4:]], dim=1)
    with torch.no_grad():
        prediction = model(batch)
        close(model({**batch, "history": longer}), prediction, 1e-3)
        close(model({**batch, "history": history[:, 4:]}), model({**batch, "history": padded}), 1e-3)
        extended = model.predict(batch, 30)
        assert torch.equal(extended[:, :20], prediction) and torch.equal(model.predict(batch, 6), prediction[:, :6])
        assert torch.equal(extended[:, 20:], prediction[:, -1:].expand(-1, 10, -1))


def reflected(batch: Batch) -> Batch:
    """The mirror image of the world, pictures and all."""
    image = dict(batch)
    image["history"] = wrap(batch["history"] * torch.tensor([-1.0, 1.0, -1.0]))
    if "pictures" in batch:
        image["pictures"] = batch["pictures"].flip(3)  # (B, P, rows, columns, colours)
        image["picture_ids"] = batch["picture_ids"] + 10_000
    return image


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_averaged_with_its_mirror_image_a_prediction_knows_no_left_and_right(
    kind: type[ViewportModel], settings: dict[str, Any], batch: Batch
) -> None:
    batch = {name: value for name, value in batch.items() if "picture" not in name}
    model = stirred(kind, **settings, mirror_average=True)
    flip = torch.tensor([-1.0, 1.0, -1.0])
    with torch.no_grad():
        plain, averaged = model.extrapolate(batch), model(batch)
        assert wrap(averaged - plain).abs().max() > 0.05
        close(averaged, plain + wrap(model.extrapolate(reflected(batch)) * flip - plain) / 2)
        close(model(reflected(batch)), averaged * flip)
        model.train()
        nn.Module.apply(model, lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
        if getattr(model, "decoding", "parallel") == "parallel":
            close(model(batch), plain)  # training sees each window once


def test_the_mirror_image_of_a_window_has_its_picture_mirrored(batch: Batch) -> None:
    """Without the position embedding and with patches of one column, only the directions know left from right."""
    model: Any = stirred(vision=ONE_COLUMN, mirror_average=True)
    nn.init.zeros_(model.image.vision.model.embeddings.position_embeddings)
    flip = torch.tensor([-1.0, 1.0, -1.0])
    with torch.no_grad():
        close(model(reflected(batch)), model(batch) * flip)
        frozen_picture = {**reflected(batch), "pictures": batch["pictures"], "picture_ids": batch["picture_ids"]}
        assert wrap(model(frozen_picture) - model(batch) * flip).abs().max() > 0.05


def test_two_views_cost_one_pass(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = started(vision=VISION, mirror_average=True), []
    original = model.extrapolate
    monkeypatch.setattr(model, "extrapolate", lambda both: sizes.append(len(both["history"])) or original(both))
    with torch.no_grad():
        assert model(batch).shape[0] == 5
    assert sizes == [10]


def no_future(batch: Batch) -> Batch:
    return {**batch, "future": torch.full_like(batch["future"], float("nan"))}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*CASES, (ViewportPrediction, {"vision": VISION}), (ViewportPrediction, {"representation": "absolute"})],
)
def test_predictions_do_not_read_the_future(kind: type[ViewportModel], settings: dict[str, Any], batch: Batch) -> None:
    model = stirred(kind, **settings)
    with torch.no_grad():
        assert torch.equal(model(no_future(batch)), model(batch))
        if kind in LEARNED:
            assert model.train()(no_future(batch)).isfinite().all()


AUTOREGRESSIVE: list[dict[str, Any]] = [{}, {"representation": "absolute"}, {"vision": VISION}]


@pytest.mark.parametrize("settings", AUTOREGRESSIVE)
def test_teacher_forcing_on_its_own_predictions_repeats_them(settings: dict[str, Any], batch: Batch) -> None:
    """The cached steps equal one plain pass over the history and all that was fed back."""
    model: Any = stirred(decoding="autoregressive", **settings)
    with torch.no_grad():
        predicted = model(batch)
        again = model._teacher_forced({**batch, "future": wrap(predicted)})
    close(again, predicted, 2e-2)


@pytest.mark.parametrize("settings", AUTOREGRESSIVE)
@pytest.mark.parametrize("place", [0, 7, 18])
def test_teacher_forcing_does_not_see_what_it_predicts(settings: dict[str, Any], place: int, batch: Batch) -> None:
    model: Any = stirred(decoding="autoregressive", **settings)
    future = batch["future"].clone()
    future[:, place] += 20.0
    with torch.no_grad():
        before, after = model._teacher_forced(batch), model._teacher_forced({**batch, "future": future})
    close(after[:, : place + 1], before[:, : place + 1], 1e-3)
    assert (after[:, place + 1] - before[:, place + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [ViewportPrediction, ViewportGRU])
def test_augmentation_moves_past_and_future_together(kind: type[ViewportModel], batch: Batch) -> None:
    def static_error(given: Batch) -> Tensor:
        return wrap(given["history"][:, -1:] - given["future"]).abs()

    torch.manual_seed(1)
    one = started(kind, rotate=180.0, mirror=True, stretch=0.0).augment(batch)
    assert (one["history"] - batch["history"]).abs().max() > 10 and one["history"][..., 2].abs().max() <= 180
    torch.testing.assert_close(static_error(one), static_error(batch), atol=1e-3, rtol=0)
    assert torch.allclose(one["history"][..., 1], batch["history"][..., 1], atol=1e-3)  # pitch stays
    scaled = started(kind, rotate=0.0, mirror=False, stretch=0.5).augment(batch)
    small = (static_error(batch) > 1) & (static_error(batch) < 80)
    ratio = torch.where(small, static_error(scaled) / static_error(batch), torch.nan).flatten(1)
    assert (ratio.nan_to_num(1.0).sub(1).abs() <= 0.51).all() and ratio.nanmean(1).sub(1).abs().max() > 0.05
    torch.testing.assert_close(ratio.nan_to_num(0.0).amax(1), -(-ratio).nan_to_num(-9.0).amax(1), atol=5e-3, rtol=0)
    same = started(kind, rotate=0.0, mirror=False).augment(batch)
    torch.testing.assert_close(same["history"], wrap(batch["history"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [ViewportPrediction, ViewportGRU])
def test_half_of_the_histories_are_disturbed_in_training(kind: type[ViewportModel]) -> None:
    history = torch.cumsum(torch.randn(4000, 10, 3), dim=1)
    batch = {"history": history, "future": history[:, -1:].expand(-1, 20, -1).contiguous()}
    still = {"rotate": 0.0, "mirror": False}
    torch.manual_seed(4)
    noisy = started(kind, **still, disturb=Disturbance(missing=0.0)).augment(batch)
    torch.testing.assert_close(noisy["future"], batch["future"], atol=1e-3, rtol=0)
    spread = (noisy["history"] - history).flatten(1).std(1)
    assert float((spread > 0.01).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(spread[spread > 0.01].mean()) == pytest.approx(2.5, rel=0.05) and spread.max() < 8.0
    holed = started(kind, **still, disturb=Disturbance(0.0, 0.6)).augment(batch)["history"]
    lost = ((holed - history).abs() > 1e-3).any(-1)
    assert float(lost.any(1).float().mean()) == pytest.approx(0.5 * 0.87, abs=0.04)  # some lose nothing
    assert float(lost.float().mean()) == pytest.approx(0.15, abs=0.02) and not lost.all()
    gaps = lost[:, 1:]
    torch.testing.assert_close(holed[:, 1:][gaps], holed[:, :-1][gaps])
    with pytest.raises(UserError, match=r"disturb: noise_deg is 5.0 .*, missing 1.0"):
        Disturbance(missing=1.0)


@pytest.mark.parametrize("kind", [ViewportPrediction, ViewportGRU])
def test_half_of_the_windows_run_backwards_in_training(kind: type[ViewportModel]) -> None:
    path = torch.cumsum(torch.randn(400, 30, 3), dim=1)
    batch = {"history": path[:, :10], "future": path[:, 10:]}
    torch.manual_seed(5)
    model = started(kind, rotate=0.0, mirror=False, reverse=True)
    augmented = model.augment(batch)
    moved = torch.cat([augmented["history"], augmented["future"]], dim=1)
    forwards, backwards = ((moved - one).abs().amax((1, 2)) < 1e-3 for one in (path, path.flip(1)))
    assert (forwards ^ backwards).all() and 150 < int(backwards.sum()) < 250
    with_pictures = batch | {"pictures": torch.zeros(400, 1, 2, 2, 3, dtype=torch.uint8)}
    torch.testing.assert_close(model.augment(with_pictures)["history"], batch["history"], atol=1e-3, rtol=0)


def test_augmented_pictures_keep_their_place(batch: Batch) -> None:
    """Turning a window is the same as turning the world: the picture's patches lie where they lay for the viewer."""
    model: Any = stirred(vision=VISION, mirror=False)
    torch.manual_seed(2)
    augmented = model.augment(batch)
    with torch.no_grad():
        close(model(augmented) - augmented["history"][:, -1:], model(batch) - batch["history"][:, -1:])


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_a_model_with_pictures_keeps_the_contract(decoding: str, data: ViewportPredictionData) -> None:
    check_task(ViewportPrediction, data, vision=VISION, decoding=decoding)


def test_a_model_with_pictures_refuses_data_without(batch: Batch) -> None:
    blind = {name: value for name, value in batch.items() if "picture" not in name}
    with pytest.raises(UserError, match="reads pictures but the data has none"):
        started(vision=VISION)(blind)


def test_the_metric_is_the_error_on_the_circle() -> None:
    prediction, truth = torch.rand(4, 6, 3) * 720 - 360, torch.rand(4, 6, 3) * 360 - 180
    errors = np.zeros((4, 6, 3))
    for place in np.ndindex(errors.shape):
        p, t = float(prediction[place]), float(truth[place])
        errors[place] = min(abs(p - t + 360 * turn) for turn in range(-3, 4))
    expected: dict[Callable[[], CircularError], float] = {
        CircularError: errors.mean(),
        lambda: CircularError(2): errors[..., 2].mean(),
        lambda: CircularError(squared=True): np.sqrt(np.square(errors).mean()),
    }
    for make, value in expected.items():
        metric = make()
        for part in (slice(0, 3), slice(3, 4)):  # batches of different sizes
            metric.update(prediction[part], truth[part])
        assert metric.compute().item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", [ViewportPrediction, *LEARNED])
def test_test_and_evaluate_report_the_same_numbers(kind: type[ViewportModel], data: ViewportPredictionData) -> None:
    model = stirred(kind)
    metrics: Any = model.split_metrics["test_metrics"]
    with torch.no_grad():
        for part in data.test_dataloader():
            model.update_metrics(metrics, model(part), part)
    logged, frame = metrics.compute(), data.episodes(model)
    for metric in data.metrics:
        value = np.sqrt(frame[metric.column].mean()) if metric.root else frame[metric.column].mean()
        assert logged[f"test/{metric.name}"].item() == pytest.approx(value, rel=1e-4)
