"""Viewports as text: what is spelt is read again, batches write what single rows do, mistakes are counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from netllm_pl.backbone import BackboneConfig, LoRA
from netllm_pl.errors import UserError
from netllm_pl.graphs import Captured
from netllm_pl.testing import tiny_backbone
from netllm_pl.text import Characters, words_of
from netllm_pl.writing import _WRITERS
from tasks.viewport_prediction import PromptedViewport, ViewportPredictionData
from tasks.viewport_prediction.prompted import END, hopeful, parse, spelt
from tasks.viewport_prediction.synthetic import Synthetic

SAMPLES = [[-3, 10, 45], [0, -90, -180]]


def test_what_is_spelt_is_read_again() -> None:
    text = spelt(SAMPLES)
    assert text == "-3,10,45;0,-90,-180;" and [list(sample) for sample in parse(text, 2)] == SAMPLES
    characters = Characters()
    assert characters.text(characters.ids("a" + text)) == text, "what it does not know is left out"
    assert parse(text, 1) == [(-3, 10, 45)]
    assert all(hopeful(text[:k], 2) for k in range(len(text))) and not hopeful(text, 2)


@pytest.mark.parametrize(
    ("text", "valid"),
    [("1,2,3;4,5", 1), ("1,2;3,4,5;", 0), ("1,2,3;x,5,6;", 1), ("", 0), ("1,2,3; 4, 5, 6;", 2), ("1,2,3;1000,2,3;", 1)],
)
def test_answers_are_read_up_to_the_first_mistake(text: str, valid: int) -> None:
    assert len(parse(text, 2)) == valid


@pytest.mark.parametrize("text", ["1,2;", "1,2,3,", "The", "1,2,3;--", "1000", "1,2,3;\n"])
def test_answers_that_cannot_become_valid_are_ended(text: str) -> None:
    assert hopeful(text, 2) is (text == "1,2,3;\n")


def task_of(**arguments: Any) -> PromptedViewport:
    torch.manual_seed(0)
    backbone = tiny_backbone(lora=LoRA(rank=4, targets="all-linear"))
    return PromptedViewport(backbone, history=3, horizon=2, **arguments).eval()


def batch_of(size: int = 4) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(1)
    angles = torch.from_numpy(random.uniform(-40, 40, (size, 5, 3)).astype(np.float32))
    return {"history": angles[:, :3], "future": angles[:, 3:], "window": torch.arange(size)}


class Oracle(PromptedViewport):
    """Says what it is told to, whatever it reads."""

    texts: tuple[str, ...] = ()

    def _write(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        return list(self.texts)


@pytest.mark.parametrize("representation", ["absolute", "relative"])
def test_answers_become_predictions(representation: Any) -> None:
    torch.manual_seed(0)
    task = Oracle(tiny_backbone(), history=3, horizon=2, representation=representation).eval()
    task.texts = ("1,2,3;-4,5,6;", "7,8,9;,,,,", "\n\n;", "0,0,0;10,0,-20;")
    batch = batch_of()
    last = batch["history"][:, -1]
    start = last if representation == "relative" else torch.zeros_like(last)
    own = torch.zeros_like(last) if representation == "relative" else last
    found = task(batch)
    expected = [[[1, 2, 3], [-4, 5, 6]], [[7, 8, 9]] * 2, [own[2].tolist()] * 2, [[0, 0, 0], [10, 0, -20]]]
    torch.testing.assert_close(found, start[:, None] + torch.tensor(expected))
    assert task.told["invalid"].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_writing_in_a_batch_is_writing_one_by_one_without_a_cache() -> None:
    task = task_of()
    assert task.backbone is not None
    prompts = [task.tokenizer.ids(text) for text in ("1,2,3;", "-10,20,30;4,5,6;", "7,7,7;")]
    with torch.inference_mode():
        together = task._write(prompts)
        for prompt, written in zip(prompts, together, strict=True):
            text, ids = "", list(prompt)
            while len(text) < len(written):
                row = torch.tensor([ids])
                word = int(task._scores(task.backbone(task.vectors[row])[:, -1]).argmax())
                ids.append(word)
                text += task.tokenizer.text([word])
            assert text == written and not hopeful(text, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_writes_what_passes_without_one_write() -> None:
    prompts = [[1, 5, 7], [2, 5, 7, 9, 11]]
    written = []
    for graphs in (True, False):
        torch.manual_seed(0)
        task = PromptedViewport(tiny_backbone(graphs=graphs, lora=LoRA(rank=4)), history=3, horizon=2).eval().cuda()
        with torch.inference_mode():
            written.append([task._write(prompts) for _ in range(2)])
    assert written[0] == written[1] and written[0][0] == written[0][1]
    assert _WRITERS[task.backbone].step.graph is None


def test_what_cannot_be_captured_is_said_once_and_writes_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of()
    assert task.backbone is not None
    prompts = [task.tokenizer.ids(text) for text in ("1,2,3;", "-10,20,30;4,5,6;")]
    with torch.inference_mode():
        expected = task._write(prompts)
        writer = _WRITERS[task.backbone]

        def refused() -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(writer, "step", Captured(writer._step, True))
        monkeypatch.setattr(torch.cuda, "Stream", refused)
        again = [task._write(prompts) for _ in range(2)]
    assert again == [expected, expected]
    said = capsys.readouterr().err
    assert said.endswith(
        "writes without a CUDA graph, which is slower: operation not permitted when stream is capturing\n"
    )
    assert said.count("note:") == 1


def test_architectures_write_or_are_refused() -> None:
    """Keys and values lie in fixed places, whatever way an architecture counts its positions, or it says so."""
    for name in ("gpt2", "opt", "qwen2"):
        torch.manual_seed(0)
        task = PromptedViewport(tiny_backbone(name, lora=LoRA(rank=4)), history=3, horizon=2).eval()
        prompts = [task.tokenizer.ids(text) for text in ("1,2,3;", "-10,20,30;4,5,6;")]
        with torch.inference_mode():
            together = task._write(prompts)
            alone = [task._write([prompt])[0] for prompt in prompts]
        assert together == alone and all(together)


def test_what_is_taught_are_the_words_of_the_answer_alone() -> None:
    task = task_of(representation="relative").train()
    batch = batch_of(2)
    batch["history"], batch["future"] = batch["history"].round(), batch["future"].round()
    taught = task(batch)
    last = batch["history"][:, -1:]
    answers = [spelt((one - own).long().tolist()) + END for one, own in zip(batch["future"], last, strict=True)]
    assert task.tokenizer.text(taught.wanted.tolist()) == "".join(answers)
    assert taught.scores.shape == (len("".join(answers)), len(task.words))


def test_evaluation_tells_of_invalid_answers_and_time() -> None:
    data = ViewportPredictionData(
        synthetic=Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16), timed=True, step=40
    )
    frame = data.episodes(task_of())
    assert frame["invalid"].isin([0.0, 1.0]).all() and (frame["ms"] > 0).all()
    assert "invalid" not in data.episodes(data.policy("static"))


@pytest.mark.parametrize("tied", [False, True])
def test_words_of_a_folder_are_those_of_its_model(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    vocabulary = {character: number for number, character in enumerate("0123456789,;- ")}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    words = words_of(BackboneConfig(str(tmp_path)), 32, 1.0, 1.0)
    assert torch.equal(words.vectors, model.get_input_embeddings().weight)
    assert torch.equal(words.head, model.lm_head.weight) and (words.head is words.vectors) is tied
    larger = words_of(BackboneConfig(str(tmp_path)), 32, 1.0, 4.0)  # as Gemma has it: the LM head is not multiplied
    assert torch.equal(larger.vectors, 4 * words.vectors) and torch.equal(larger.head, words.head)
    assert words.tokenizer.ids("-3,10;") == [12, 3, 10, 1, 0, 11]
    assert words.tokenizer.text([12, 3, 10, 1, 0, 11]) == "-3,10;"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no tokenizer or word vectors"):
        words_of(BackboneConfig(str(tmp_path)), 32, 1.0, 1.0)


def test_an_encoder_cannot_write() -> None:
    with pytest.raises(UserError, match="t5 sees later tokens; to write text it must be a causal model"):
        PromptedViewport(tiny_backbone("t5"))
