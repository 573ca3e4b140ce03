"""Words of a language model, for those who want to prompt it: its tokenizer, word vectors and LM head.

Tasks do without them; they are here to be compared with. Shapes: V words, d_model size of a token vector.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from netllm_pl.backbone import BackboneConfig
from netllm_pl.errors import UserError
from netllm_pl.fetch import tokenizer_of
from netllm_pl.loading import NAMED, source_of

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
CHARACTERS = "\n ,;-0123456789"


class Tokenizer(Protocol):
    """What turns text into words of a language model."""

    def ids(self, text: str) -> list[int]:
        """Words of a text, none added."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Text of words."""
        ...


class Characters:
    """One word a character, for language models with random weights; what it does not know is left out."""

    def ids(self, text: str) -> list[int]:
        """Words of a text."""
        return [CHARACTERS.index(character) for character in text if character in CHARACTERS]

    def text(self, ids: Sequence[int]) -> str:
        """Text of words."""
        return "".join(CHARACTERS[number] for number in ids)


class Pretrained:
    """The tokenizer that a language model was trained with.

    Args:
        tokenizer: One of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Words of a text, none added."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Text of words."""
        return str(self._tokenizer.decode(list(ids)))


@dataclass(frozen=True)
class Words:
    """What a language model reads and writes.

    Attributes:
        tokenizer: Text to words and back.
        vectors: (V, d_model) of words that it reads.
        head: (V, d_hidden) of words that it writes; those that it reads, if they are the same.
    """

    tokenizer: Tokenizer
    vectors: Tensor
    head: Tensor


def words_of(config: BackboneConfig, d_model: int, scale: float, word_scale: float) -> Words:
    """Return the words of a backbone; of one with random weights, random ones of single characters.

    Args:
        config: The backbone.
        d_model: Size of its token vectors.
        scale: Root mean square of a value of random word vectors.
        word_scale: What the model multiplies the stored ones by.

    Raises:
        UserError: They are not there.
    """
    if not config.pretrained:
        generator = torch.Generator().manual_seed(config.seed)
        vectors = torch.randn(len(CHARACTERS), d_model, generator=generator) * scale
        return Words(Characters(), vectors, vectors)
    from transformers import AutoTokenizer

    source = source_of(config)
    place = str(tokenizer_of(config.name)) if config.name in NAMED else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        found = _tensors(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"backbone {config.name}: no tokenizer or word vectors: {reason}") from error
    known = next((tensor for name, tensor in found.items() if name.endswith(EMBEDDINGS)), None)
    if known is None:
        raise UserError(
            f"backbone {config.name}: its weights hold no word vectors that are known ({EMBEDDINGS[0]}, ...)"
        )
    head = next((tensor for name, tensor in found.items() if name.endswith(HEADS)), known)
    return Words(Pretrained(tokenizer), known if word_scale == 1 else known * word_scale, head)


def _tensors(source: str) -> dict[str, Tensor]:
    """Read word vectors and LM head from the safetensors of a folder or hub id."""
    from transformers.utils.hub import cached_file

    wanted = (*EMBEDDINGS, *HEADS)
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    places = {"": "model.safetensors"} if index is None else json.loads(Path(index).read_text())["weight_map"]
    files = {file for name, file in places.items() if index is None or name.endswith(wanted)}
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        with safe_open(cached_file(source, file), "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name.endswith(wanted)}  # noqa: SIM118
    return found
