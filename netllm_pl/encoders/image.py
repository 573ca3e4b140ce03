"""Pictures as tokens: a frozen vision transformer, whose features are computed once a picture, and a small reader.

Shapes: B batch, P pictures, h x w pixels, N patches, F size of a patch feature, K extra numbers per patch, M tokens.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from netllm_pl.backbone import fingerprint_of
from netllm_pl.encoders.tokens import TokenNorm, Tokens
from netllm_pl.errors import UserError
from netllm_pl.paths import atomic, cache_dir
from netllm_pl.progress import progress

CHUNK = 64
"""Pictures that the vision transformer reads at once."""
SHARPNESS = 4.0
"""Factor on the scores of the attention pooling: heads differ, and so learn, from the start."""


@dataclass(frozen=True)
class VisionConfig:
    """Which vision transformer to take.

    Attributes:
        name: Hugging Face hub id, local folder, or an architecture (``vit``, ``dinov2``) for random weights.
        pretrained: False draws random weights; frozen random features still tell where something is.
        config: Entries that replace those of the architecture's configuration, for random weights.
        size: (height, width) that pictures are scaled to, in pixels, multiples of the patch size; null keeps theirs.
        cache: Keep features on disk, so that a second run does not compute them.
        seed: Seed of random weights.
    """

    name: str = "vit"
    pretrained: bool = False
    config: dict[str, Any] | None = None
    size: tuple[int, int] | None = None
    cache: bool = True
    seed: int = 0


class FrozenVision(nn.Module):
    """A frozen vision transformer with a feature table keyed by picture, in memory and on disk.

    Args:
        config: Which model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model, mean, std = _load(config)
        self.model.requires_grad_(False).eval()
        self.fingerprint = fingerprint_of(self.model)
        self.patch = int(self.model.config.patch_size)
        self.features = int(self.model.config.hidden_size)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._table = torch.empty(0)  # no buffer: it grows, and processes need not agree on it
        self._rows: dict[int, int] = {}
        self._saved = 0
        self._read_disk = False
        self._size = self.config.size or (0, 0)

    def train(self, mode: bool = True) -> "FrozenVision":
        """Stay in evaluation mode: frozen means frozen."""
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that many pixels."""
        height, width = self.config.size or (height, width)
        if height % self.patch or width % self.patch:
            raise UserError(
                f"vision {self.config.name}: a picture of {height} x {width} pixels is no multiple of the patch size "
                f"{self.patch}; set vision.size"
            )
        return height // self.patch, width // self.patch

    @torch.no_grad()
    def compute(self, pictures: Tensor) -> Tensor:
        """Compute patch features (N, patches, F) float16 of pictures (N, h, w, 3) uint8, without any cache."""
        rows, columns = self.grid(pictures.shape[1], pictures.shape[2])
        pixels = pictures.permute(0, 3, 1, 2).float() / 255
        if self.config.size is not None:
            pixels = F.interpolate(pixels, self.config.size, mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - self.mean) / self.std
        trained = self.model.config.image_size
        trained = tuple(trained) if isinstance(trained, list | tuple) else (trained, trained)
        # DINOv2 fits its position embedding to any size unasked; others do when told, and only from square ones.
        other = self.model.config.model_type != "dinov2" and trained != tuple(pixels.shape[-2:])
        if other and trained[0] != trained[1]:
            size = f"{trained[0]} x {trained[1]}"
            raise UserError(f"vision {self.config.name} reads pictures of {size} pixels only; set vision.size")
        extra = {"interpolate_pos_encoding": True} if other else {}
        hidden: Tensor = self.model(pixel_values=pixels, **extra).last_hidden_state
        return hidden[:, -rows * columns :].half()  # class and register tokens come first

    def forward(self, pictures: Tensor, ids: Tensor | None = None) -> Tensor:
        """Give features, from the table where it has them.

        Args:
            pictures: (B, P, h, w, 3) uint8.
            ids: (B, P) int64 content hashes; None computes every picture.

        Returns:
            (B, P, N, F) float32.
        """
        if ids is None:
            fresh: Tensor = self.compute(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).float()
            return fresh
        self._size = self.config.size or (pictures.shape[2], pictures.shape[3])
        self._load_disk()
        flat = ids.flatten().tolist()
        missing = {key: place for place, key in enumerate(flat) if key not in self._rows}
        if missing:
            self._compute_missing(pictures.flatten(0, 1), missing)
        rows = torch.tensor([self._rows[key] for key in flat], device=pictures.device)
        self._table = self._table.to(pictures.device)
        features: Tensor = self._table[rows].unflatten(0, pictures.shape[:2]).float()
        return features

    def _compute_missing(self, pictures: Tensor, missing: dict[int, int]) -> None:
        """Compute features of the pictures at the places of a batch, and keep them under their ids."""
        ids, places = list(missing), list(missing.values())
        with progress("picture features", len(ids)) as advance:
            for start in range(0, len(ids), CHUNK):
                some = slice(start, start + CHUNK)
                self._append(ids[some], self.compute(pictures[places[some]]))
                advance(len(ids[some]))

    def flush(self) -> None:
        """Write features that are not on disk yet; each call adds one file, so processes do not disturb each other."""
        keys = list(self._rows)[self._saved :]
        if not self.config.cache or not keys:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        features = self._table[self._saved : len(self._rows)].cpu().contiguous()
        with atomic(self._folder / f"{uuid.uuid4().hex}.safetensors") as partial:
            save_file({"ids": torch.tensor(keys), "features": features}, partial)
        self._saved = len(self._rows)

    @property
    def _folder(self) -> Path:
        height, width = self._size
        return cache_dir() / "features" / f"{self.fingerprint}-{height}x{width}"

    def _append(self, keys: list[int], features: Tensor) -> None:
        used, need = len(self._rows), len(self._rows) + len(keys)
        if used and self._table.shape[1:] != features.shape[1:]:
            raise UserError("pictures of different sizes in one run: set vision.size")
        if need > self._table.shape[0]:  # doubling keeps the cost of growing linear
            grown = features.new_empty((max(need, 2 * used), *features.shape[1:]))
            grown[:used] = self._table[:used] if used else grown[:0]
            self._table = grown
        self._table[used:need] = features
        self._rows.update({key: used + place for place, key in enumerate(keys)})

    def _load_disk(self) -> None:
        if self._read_disk or not self.config.cache:
            return
        self._read_disk = True
        for file in sorted(self._folder.glob("*.safetensors")):
            try:
                stored = load_file(file)
            except Exception:  # whatever is wrong with a cache file, the features can be computed again
                file.unlink(missing_ok=True)
                continue
            fresh = [(place, key) for place, key in enumerate(stored["ids"].tolist()) if key not in self._rows]
            if fresh:
                places, keys = zip(*fresh, strict=True)
                self._append(list(keys), stored["features"][list(places)].to(self.mean.device))
        self._saved = len(self._rows)


class ImageEncoder(nn.Module):
    """Reads the patch features of pictures into a few tokens by attention pooling (Ilse et al., arXiv:1802.04712).

    Each of several heads scores all patches with a small network and averages its own slice of their values. Scores
    from a network find a small bright object within a few hundred steps; dot products with learned queries needed
    several times as many in our trials.

    Args:
        config: Which vision transformer.
        d_model: Size of a token vector.
        tokens: Tokens per picture (M).
        extra: Further numbers per patch (K), such as its direction as seen by the viewer.
        width: Size of the reader, a multiple of the heads.
        heads: Heads of the pooling.
        scale: Root mean square of the tokens at the start (`Backbone.token_scale`).
    """

    def __init__(
        self,
        config: VisionConfig,
        d_model: int,
        tokens: int = 4,
        extra: int = 0,
        width: int = 128,
        heads: int = 16,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.vision = FrozenVision(config)
        self.norm = nn.LayerNorm(self.vision.features)
        size = self.vision.features + extra
        self.value = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, width))
        self.score = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, heads))
        self.out = nn.Linear(width, tokens * d_model)
        self.out_norm = TokenNorm(d_model, scale)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that many pixels."""
        return self.vision.grid(height, width)

    def forward(
        self, pictures: Tensor, ids: Tensor | None = None, extra: Tensor | None = None, mask: Tensor | None = None
    ) -> Tokens:
        """Encode pictures.

        Args:
            pictures: (B, P, h, w, 3) uint8.
            ids: (B, P) int64 content hashes, the keys of the feature cache.
            extra: (B, P, N, K) float, appended to the patch features.
            mask: (B, P) bool, True where there is a picture.

        Returns:
            (B, P * M, d_model) tokens.
        """
        features = self.norm(self.vision(pictures, ids))
        features = features if extra is None else torch.cat([features, extra], dim=-1)
        weights = (SHARPNESS * self.score(features)).softmax(dim=2)
        values = self.value(features).unflatten(-1, (self.heads, -1))
        read = torch.einsum("bpnk,bpnkd->bpkd", weights, values).flatten(2)
        tokens = self.out_norm(self.out(read).unflatten(-1, (self.tokens, -1))).flatten(1, 2)
        return Tokens(tokens, None if mask is None else mask.repeat_interleave(self.tokens, dim=1))


def _load(config: VisionConfig) -> tuple[Any, list[float], list[float]]:
    half = [0.5, 0.5, 0.5]
    try:
        if config.pretrained:
            processor = AutoImageProcessor.from_pretrained(config.name, trust_remote_code=False)
            model = AutoModel.from_pretrained(config.name, trust_remote_code=False)
            return getattr(model, "vision_model", model), list(processor.image_mean), list(processor.image_std)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return AutoModel.from_config(AutoConfig.for_model(config.name, **(config.config or {}))), half, half
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise UserError(f"vision '{config.name}' cannot be loaded: {first} Give a folder, a hub id, or vit.") from error
