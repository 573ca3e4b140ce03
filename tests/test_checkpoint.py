"""Checkpoints: what learns and nothing else, read without executing anything, refused with a reason."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from netllm_pl.backbone import BackboneConfig, LoRA
from netllm_pl.checkpoint import KEY, AtomicCheckpointIO, check_identity, load_task, plain, read_checkpoint
from netllm_pl.encoders import VisionConfig
from netllm_pl.errors import UserError
from netllm_pl.export import export
from netllm_pl.task import NetTask, OptimizerConfig
from netllm_pl.testing import tiny_backbone
from tasks.viewport_prediction import ViewportGRU, ViewportPrediction, ViewportPredictionData
from tasks.viewport_prediction.synthetic import Synthetic

VISION = VisionConfig(
    config={
        "image_size": [8, 16],
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
)
WORDS = 20_000
"""A vocabulary that makes the frozen part much larger than what learns."""


@pytest.fixture(scope="module")
def data() -> ViewportPredictionData:
    synthetic = Synthetic(videos=3, users=4, seconds=30, picture_height=8, picture_width=16)
    return ViewportPredictionData(synthetic=synthetic, batch_size=4)


def task(**changes: Any) -> ViewportPrediction:
    backbone = tiny_backbone(config={"intermediate_size": 4096})
    return ViewportPrediction(**{"backbone": backbone, "vision": VISION, "width": 16, "picture_tokens": 2, **changes})


def fitted(model: NetTask, data: ViewportPredictionData, file: Path) -> Path:
    """Train one step and save."""
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()], default_root_dir=file.parent,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(file)
    return file


@pytest.fixture(scope="module")
def saved(data: ViewportPredictionData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETLLM_CACHE", str(folder / "cache"))
        return fitted(task(optimizer=OptimizerConfig(lr=1e-2)), data, folder / "best.ckpt")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))


def edited(saved: Path, folder: Path, **entries: Any) -> Path:
    """A copy of a checkpoint with other entries."""
    torch.save({**torch.load(saved, weights_only=True), **entries}, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def test_a_checkpoint_holds_what_learns_only(saved: Path) -> None:
    model, stored = task(), torch.load(saved, weights_only=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(stored["state_dict"]) == trainable
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    learned = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert frozen > 2**21
    # Weights and two moments of AdamW, and a little for names and settings.
    assert saved.stat().st_size < 3 * learned + 2**17 < frozen
    states = stored["optimizer_states"][0]["state"].values()
    assert sum(state["exp_avg"].numel() * 4 for state in states) == learned


def test_the_whole_configuration_is_stored_as_plain_values(saved: Path) -> None:
    stored = read_checkpoint(saved)[KEY]
    assert stored["task"] == "ViewportPrediction" and set(stored["frozen"]) == {"backbone", "image.vision"}
    settings = stored["init_args"]
    assert settings["backbone"]["lora"]["rank"] == 4 and settings["backbone"]["config"]["intermediate_size"] == 4096
    assert settings["optimizer"]["lr"] == 1e-2 and settings["horizon"] == 20 and settings["vision"]["seed"] == 0
    assert stored["data"]["class_path"] == "ViewportPredictionData"
    assert stored["data"]["init_args"]["synthetic"]["videos"] == 3


def test_plain_leaves_only_what_yaml_can_hold() -> None:
    settings = {"a": LoRA(), "b": (1, 2.5, None), "c": Path("x"), 4: True, "_hidden": object()}
    lora = {"rank": 32, "alpha": None, "dropout": 0.05, "targets": None}
    assert plain(settings) == {"a": lora, "b": [1, 2.5, None], "c": "x", "4": True}


def test_a_task_comes_back_with_its_settings(saved: Path, data: ViewportPredictionData) -> None:
    loaded, batch = load_task(saved), data.dataset("test")[[0, 1, 2]]
    assert isinstance(loaded, ViewportPrediction) and not loaded.training
    assert loaded.optimizer_config.lr == 1e-2 and loaded.optimizer_config.betas == (0.9, 0.999)
    twin = task()
    before = twin.eval()(batch)
    twin.load_state_dict(torch.load(saved, weights_only=True)["state_dict"], strict=False)
    with torch.no_grad():
        assert torch.equal(loaded(batch), twin.eval()(batch)) and not torch.equal(loaded(batch), before)


def test_a_baseline_comes_back_from_python_too(data: ViewportPredictionData, tmp_path: Path) -> None:
    """Its base class has arguments that its own constructor does not take."""
    file = fitted(ViewportGRU(width=8, optimizer=OptimizerConfig(lr=1e-2)), data, tmp_path / "gru.ckpt")
    loaded = load_task(file)
    assert isinstance(loaded, ViewportGRU) and loaded.gru.hidden_size == 8 and loaded.backbone is None


def test_lightnings_own_loading_fails_loudly(saved: Path) -> None:
    """`load_task` is the way: Lightning hands the stored dictionaries to the constructor as they are."""
    with pytest.raises(AttributeError):
        ViewportPrediction.load_from_checkpoint(saved, weights_only=True)
    given = {"backbone": task().backbone.config, "vision": VISION, "optimizer": None}  # type: ignore[union-attr]
    loaded = ViewportPrediction.load_from_checkpoint(saved, weights_only=True, **given)
    stored = torch.load(saved, weights_only=True)["state_dict"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": tiny_backbone(seed=1, config={"intermediate_size": 4096})}, "another backbone.*fingerprint"),
        ({"backbone": tiny_backbone(layers=1, config={"intermediate_size": 4096})}, r"another backbone.*layers None"),
        ({"vision": replace(VISION, seed=1)}, r"another vision.*vit, layers None.*Set model\.vision"),
        ({"backbone": tiny_backbone(config={"intermediate_size": 4096}, lora=LoRA(rank=8))}, "shape"),
        ({"backbone": tiny_backbone(config={"intermediate_size": 4096}, lora=None)}, "missing or unknown, such as"),
        ({"vision": None}, "missing or unknown, such as"),
        ({"horizon": 10}, r"queries has shape \(20, 32\), the model needs \(10, 32\)"),
    ],
    ids=["seed", "layers", "vision", "rank", "no_lora", "no_vision", "horizon"],
)
def test_a_checkpoint_of_something_else_is_refused(changes: dict[str, Any], text: str, saved: Path) -> None:
    with pytest.raises(UserError, match=text) as error:
        check_identity(task(**changes), read_checkpoint(saved))
    assert len(str(error.value).splitlines()) <= 2


def test_a_checkpoint_of_another_task_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="of task ViewportPrediction, not ViewportGRU"):
        check_identity(ViewportGRU(), read_checkpoint(saved))


def test_resuming_on_another_backbone_is_refused(saved: Path, data: ViewportPredictionData) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    other = task(backbone=tiny_backbone(seed=1, config={"intermediate_size": 4096}))
    with pytest.raises(UserError, match="another backbone"):
        trainer.fit(other, datamodule=data, ckpt_path=saved, weights_only=True)


def test_a_checkpoint_that_lost_a_weight_is_refused(saved: Path, tmp_path: Path) -> None:
    weights = dict(torch.load(saved, weights_only=True)["state_dict"])
    lora = next(name for name in weights if "lora_A" in name)
    del weights[lora]
    with pytest.raises(UserError, match=f"edited.ckpt.*1 missing or unknown, such as {lora}"):
        load_task(edited(saved, tmp_path, state_dict=weights))


def test_a_checkpoint_of_an_unknown_task_names_the_known_ones(saved: Path, tmp_path: Path) -> None:
    stored = {**read_checkpoint(saved)[KEY], "task": "ViewportPredictor"}
    with pytest.raises(UserError, match=r"unknown task 'ViewportPredictor'.*Did you mean 'ViewportPrediction'"):
        load_task(edited(saved, tmp_path, **{KEY: stored}))


def test_broken_files_are_refused(saved: Path, tmp_path: Path) -> None:
    cut, foreign, missing = tmp_path / "cut.ckpt", tmp_path / "foreign.ckpt", tmp_path / "missing.ckpt"
    cut.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    torch.save({"state_dict": {}}, foreign)
    texts = {cut: "cut.ckpt cannot be read", foreign: "foreign.ckpt was not written by netllm_pl", missing: "not exist"}
    for file, text in texts.items():
        with pytest.raises(UserError, match=text):
            load_task(file)
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        load_task(tmp_path)


class _Bomb:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)


def test_code_in_a_checkpoint_is_not_executed(saved: Path, tmp_path: Path) -> None:
    bomb = _Bomb(str(tmp_path / "exploded"))
    plain_pickle = tmp_path / "pickle.ckpt"
    plain_pickle.write_bytes(pickle.dumps({KEY: bomb}))
    for file in (plain_pickle, edited(saved, tmp_path, extra=bomb)):
        with pytest.raises(UserError, match="cannot be read"):
            load_task(file)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(plain_pickle.read_bytes())
    assert (tmp_path / "exploded").exists()  # it would have been


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, io = tmp_path / "deep" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, file)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"step": 2, "weights": torch.ones(1000), "what": lambda: None}, file)

    def full(checkpoint: Any, stream: Any) -> None:
        stream.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        io.save_checkpoint({"step": 3}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [item.name for item in file.parent.iterdir()] == ["last.ckpt"]


def test_an_export_is_a_peft_folder_and_safetensors(saved: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    out = export(saved, tmp_path / "out")
    assert {item.name for item in out.iterdir()} == {"adapter", "encoder_head.safetensors", "config.yaml"}
    rest = load_file(out / "encoder_head.safetensors")
    assert any(name.startswith("head.") for name in rest) and not any(name.startswith("backbone") for name in rest)
    loaded = load_task(out)
    backbone: Any = task(backbone=replace(loaded.backbone.config, lora=None)).backbone  # type: ignore[union-attr]
    tokens = torch.randn(1, 5, backbone.d_model)
    adapted = PeftModel.from_pretrained(backbone.model, str(out / "adapter")).eval()
    with torch.no_grad():
        expected = loaded.backbone(tokens)  # type: ignore[misc]
        torch.testing.assert_close(adapted(inputs_embeds=tokens).last_hidden_state, expected)


def test_an_export_never_mixes_with_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        export(saved, tmp_path / "out")


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, targets="all-linear")])
def test_exports_come_back_with_and_without_adapters(
    lora: LoRA | None, data: ViewportPredictionData, tmp_path: Path
) -> None:
    config: BackboneConfig = tiny_backbone(lora=lora, full=lora is None)
    file = fitted(task(backbone=config, vision=None), data, tmp_path / "task.ckpt")
    batch = data.dataset("test")[[0, 1]]
    with torch.no_grad():
        assert torch.equal(load_task(export(file, tmp_path / "out"))(batch), load_task(file)(batch))
    assert (tmp_path / "out" / "adapter").exists() == (lora is not None)


RELEASED = sorted(Path(__file__).with_name("released").glob("*/*.ckpt"))
"""Of four steps of a small ``fit``; beside each, what it answered to what. The largest one is without its optimiser."""


@pytest.mark.parametrize("file", RELEASED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_checkpoints_of_released_versions_predict_what_they_did(file: Path) -> None:
    assert read_checkpoint(file)[KEY]["version"] == file.parent.name and file.stat().st_size < 200_000
    told = json.loads(file.with_suffix(".json").read_text())
    batch = {name: torch.tensor(of["values"], dtype=getattr(torch, of["dtype"])) for name, of in told["batch"].items()}
    with torch.inference_mode():
        answer: Any = load_task(file)(batch)
    parts = [answer] if isinstance(answer, torch.Tensor) else [part for part in answer if part is not None]
    assert [part.flatten().tolist() for part in parts] == [
        pytest.approx(values, abs=1e-3) for values in told["outputs"]
    ]


def test_there_are_checkpoints_of_a_released_version_with_and_without_a_language_model() -> None:
    kinds = {load_task(file).backbone is None for file in RELEASED}
    assert kinds == {True, False} and len(RELEASED) >= 3
