"""Encoders: shapes, scale, masks, and picture features that are computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from netllm_pl.encoders import ImageEncoder, ScalarEncoder, SeriesEncoder, Tokens, VisionConfig, join
from netllm_pl.encoders.image import FrozenVision
from netllm_pl.errors import UserError

D = 24
VIT = {
    "image_size": [16, 32],
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def vision(**changes: Any) -> VisionConfig:
    return VisionConfig(**{"name": "vit", "config": VIT, **changes})


def pictures(count: int = 4, height: int = 16, width: int = 32, per: int = 2) -> tuple[Tensor, Tensor]:
    """(B, per, h, w, 3) random pictures and (B, per) numbers that name them."""
    generator = torch.Generator().manual_seed(5)
    shown = torch.randint(0, 256, (count, per, height, width, 3), dtype=torch.uint8, generator=generator)
    return shown, torch.arange(count * per).view(count, per) * 7 - 20


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_tokens_start_at_the_scale_of_word_vectors(scale: float) -> None:
    values, (shown, ids) = torch.randn(3, 6, 5) * 10, pictures()
    for tokens in (
        ScalarEncoder(5, D, scale=scale)(values),
        SeriesEncoder(5, D, scale=scale)(values),
        ImageEncoder(vision(), D, scale=scale)(shown, ids),
    ):
        assert tokens.values.square().mean().sqrt().item() == pytest.approx(scale, rel=0.05)
        assert tokens.mask is None


def test_scalars_become_one_token_each() -> None:
    encoder, values = ScalarEncoder(5, D), torch.randn(3, 4, 5)
    mask = torch.tensor([[True, True, False, True]] * 3)
    tokens = encoder(values, mask)
    assert tokens.values.shape == (3, 4, D) and tokens.mask is mask
    torch.testing.assert_close(encoder(values[:, 2:3]).values, tokens.values[:, 2:3])


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (3, 3)])
def test_a_series_gives_one_token_a_stride(kernel: int, stride: int) -> None:
    encoder, values = SeriesEncoder(2, D, kernel=kernel, stride=stride), torch.randn(3, 12, 2)
    tokens = encoder(values).values
    assert tokens.shape == (3, 12 // stride, D)
    reach = 2 * (kernel // 2)  # two convolutions before the last
    changed = values.clone()
    changed[:, 6] += 1
    near = (tokens != encoder(changed).values).any(-1).any(0).nonzero().flatten().tolist()
    assert near == sorted({place // stride for place in range(6 - reach, 7 + reach)})


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("garbage", [3.0, 1e30, float("nan")])
def test_padded_samples_do_not_matter(stride: int, garbage: float) -> None:
    encoder, values = SeriesEncoder(2, D, stride=stride), torch.randn(3, 12, 2)
    mask = torch.arange(12).expand(3, -1) < torch.tensor([[12], [8], [5]])
    dirty = torch.where(mask[..., None], values, torch.tensor(garbage))
    clean, got = encoder(values * mask[..., None], mask), encoder(dirty, mask)
    assert clean.mask is not None and got.mask is not None
    assert got.mask.sum(1).tolist() == [12 // stride, 8 // stride, -(-5 // stride)]
    torch.testing.assert_close(got.values[got.mask], clean.values[clean.mask])
    alone = encoder(values[1:2, :8])
    torch.testing.assert_close(got.values[1:2, : 8 // stride], alone.values)


def test_joined_tokens_keep_their_masks() -> None:
    first, second = Tokens(torch.randn(2, 3, D)), Tokens(torch.randn(2, 1, D), torch.tensor([[True], [False]]))
    both = join([first, second])
    assert torch.equal(both.values, torch.cat([first.values, second.values], dim=1))
    assert both.mask is not None and both.mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert join([first, first]).mask is None


def test_pictures_become_tokens() -> None:
    encoder = ImageEncoder(vision(), D, tokens=3, extra=2)
    shown, ids = pictures()
    mask = torch.tensor([[True, False]] * 4)
    tokens = encoder(shown, ids, torch.randn(4, 2, 8, 2), mask)
    assert encoder.grid(16, 32) == (2, 4) and tokens.values.shape == (4, 6, D)
    assert tokens.mask is not None and tokens.mask[0].tolist() == [True] * 3 + [False] * 3
    assert not any(p.requires_grad for p in encoder.vision.parameters())
    (tokens.values * torch.randn_like(tokens.values)).sum().backward()
    assert all(p.grad is None for p in encoder.vision.parameters())
    assert all(p.grad is not None for name, p in encoder.named_parameters() if not name.startswith("vision."))


def test_the_vision_model_stays_in_evaluation_mode() -> None:
    encoder = ImageEncoder(vision(config={**VIT, "hidden_dropout_prob": 0.5}), D).train()
    assert encoder.training and not encoder.vision.training
    shown, _ = pictures()
    assert torch.equal(encoder.vision(shown), encoder.vision(shown))


class Counting(FrozenVision):
    """Counts the pictures that are really computed."""

    computed = 0

    def compute(self, pictures: Tensor) -> Tensor:
        self.computed += pictures.shape[0]
        return super().compute(pictures)


def test_features_are_computed_once_across_instances() -> None:
    shown, ids = pictures()
    first = Counting(vision())
    features = first(shown, ids)
    assert first.computed == 8
    assert torch.equal(first(shown.flip(0), ids.flip(0)), features.flip(0)) and first.computed == 8
    first.flush()
    second = Counting(vision())
    assert torch.equal(second(shown, ids), features) and second.computed == 0
    torch.testing.assert_close(features, second(shown), atol=2e-3, rtol=1e-3)  # float16
    assert second.computed == 8  # without ids there is nothing to look up


def test_a_picture_that_is_shown_twice_is_computed_once() -> None:
    shown, _ = pictures(1, per=1)
    model = Counting(vision())
    both = model(shown.expand(3, 2, -1, -1, -1), torch.full((3, 2), 4))
    assert model.computed == 1 and torch.equal(both, both[:1, :1].expand_as(both))


def test_each_flush_adds_only_what_is_new(cache: Path) -> None:
    shown, ids = pictures()
    model = Counting(vision())
    for part in (slice(0, 1), slice(0, 1), slice(0, 3)):
        model(shown[part], ids[part])
        model.flush()
    stored = [load_file(file)["ids"].tolist() for file in cache.rglob("*.safetensors")]
    assert (
        sorted(map(len, stored)) == [2, 4]
        and sorted(key for keys in stored for key in keys) == ids[:3].flatten().tolist()
    )
    later = Counting(vision())
    later(shown, ids)
    assert later.computed == 2


def test_a_broken_cache_file_is_computed_again(cache: Path) -> None:
    shown, ids = pictures()
    first = FrozenVision(vision())
    expected = first(shown, ids)
    first.flush()
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    second = Counting(vision())
    assert torch.equal(second(shown, ids), expected) and second.computed == 8
    second.flush()
    third = Counting(vision())
    assert torch.equal(third(shown, ids), expected) and third.computed == 0


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"config": {**VIT, "hidden_size": 32}}, {"size": (8, 8)}], ids=["seed", "shape", "size"]
)
def test_other_weights_or_sizes_have_other_features(changes: dict[str, Any]) -> None:
    shown, ids = pictures()
    square = {"config": {**VIT, "image_size": 16}}  # its position embedding can be scaled to any size
    first = FrozenVision(vision(**square))
    first(shown, ids)
    first.flush()
    other = Counting(vision(**{**square, **changes}))
    other(shown, ids)
    assert other.computed == 8


def test_pictures_of_another_size_do_not_meet_stored_features() -> None:
    any_size = vision(name="dinov2", config={**VIT, "image_size": 16})
    small, large = FrozenVision(any_size), Counting(any_size)
    small(*pictures())
    small.flush()
    assert large(*pictures(height=32, width=64)).shape == (4, 2, 32, 16) and large.computed == 8


def test_two_sizes_in_one_run_are_refused() -> None:
    model = FrozenVision(vision(name="dinov2", config={**VIT, "image_size": 16}))
    model(*pictures())
    shown, ids = pictures(height=32, width=64)
    with pytest.raises(UserError, match="different sizes"):
        model(shown, ids + 1000)


def test_no_cache_leaves_no_file(cache: Path) -> None:
    model = Counting(vision(cache=False))
    model(*pictures())
    model(*pictures())
    model.flush()
    assert model.computed == 8 and not list(cache.rglob("*"))


@pytest.mark.parametrize(("height", "width"), [(16, 30), (20, 32)])
def test_a_picture_must_hold_whole_patches(height: int, width: int) -> None:
    shown, ids = pictures(height=height, width=width)
    with pytest.raises(UserError, match=rf"{height} x {width} pixels.*patch size 8; set vision.size"):
        ImageEncoder(vision(), D)(shown, ids)
    assert ImageEncoder(vision(size=(16, 32)), D)(shown, ids).values.shape == (4, 8, D)


def test_a_position_embedding_that_cannot_be_scaled_is_named() -> None:
    shown, ids = pictures(height=32, width=64)
    with pytest.raises(UserError, match=r"16 x 32 pixels only; set vision\.size"):
        FrozenVision(vision())(shown, ids)


def test_an_unknown_vision_model_is_named() -> None:
    with pytest.raises(UserError, match="vision 'nobody/nothing' cannot be loaded"):
        FrozenVision(VisionConfig("nobody/nothing", pretrained=True))


def test_a_vision_model_loads_from_a_folder(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    drawn = FrozenVision(vision())
    drawn.model.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 32}).save_pretrained(tmp_path / "vit")
    loaded = FrozenVision(VisionConfig(str(tmp_path / "vit"), pretrained=True))
    assert loaded.fingerprint == drawn.fingerprint
    shown, _ = pictures()
    torch.testing.assert_close(loaded(shown), drawn(shown))
