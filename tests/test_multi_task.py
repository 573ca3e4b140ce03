"""Several tasks in one `fit`: each learns as it would alone, and comes out as a checkpoint of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import yaml
from test_cli import SMALL
from transformers import AutoConfig, AutoModel

from callbacks.resume import ExactResume, SaveOften
from netllm_pl.backbone import placed
from netllm_pl.checkpoint import AtomicCheckpointIO, load_task, plain, read_checkpoint
from netllm_pl.cli import main
from netllm_pl.errors import UserError
from netllm_pl.late_weights import is_missing, put_off
from netllm_pl.multi_task import MultiTask, MultiTaskData
from netllm_pl.shared import held_bytes, load_tasks
from netllm_pl.task import NetTask, OptimizerConfig
from netllm_pl.testing import tiny_backbone
from netllm_pl.toy import CandidateTask
from tasks.throughput_prediction import ThroughputPrediction

ROOT = Path(__file__).parent.parent
BACKBONE = tiny_backbone()
OPTIMIZER = OptimizerConfig(lr=1e-2, schedule="constant")
STEPS = 3
"""One epoch of the task with fewer batches; behind it the other order of its next epoch would begin if it was alone."""
TASKS: dict[str, Any] = {
    "rates": {
        "model": {"class_path": "ThroughputPrediction", "init_args": {"backbone": {"name": "not there"}}},
        "data": {"class_path": "ThroughputPredictionData", "init_args": {"batch_size": 8, "eval_batch_size": 64}},
    },
    "choices": {
        "model": {"class_path": "netllm_pl.toy.CandidateTask", "init_args": {"context": 2}},
        "data": {
            "class_path": "CandidateData",
            "init_args": {
                "batch_size": 4,
                "experience": {"policies": "best", "episodes": 6, "eval_episodes": 2, "values": "true"},
            },
        },
    },
}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """What is recorded stays in this test."""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, tree in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return [str(tmp_path / f"{name}.yaml") for name in TASKS]


def backbone(dropout: float = 0.0) -> Any:
    return tiny_backbone(lora=type(BACKBONE.lora)(rank=4, dropout=dropout))


def made(files: list[str], **changes: Any) -> tuple[MultiTask, MultiTaskData]:
    pl.seed_everything(0, verbose=False)
    return MultiTask(**{"backbone": backbone(), "tasks": files, "optimizer": OPTIMIZER, **changes}), MultiTaskData(
        files
    )


def trainer(folder: Path, steps: int = STEPS, **more: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"callbacks": [ExactResume()], "limit_val_batches": 1, "val_check_interval": STEPS}
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing="callbacks" in more,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()], default_root_dir=folder, **(settings | more),
    )  # fmt: skip


def learned(task: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


def test_tasks_with_an_adapter_each_learn_as_they_would_alone(files: list[str], tmp_path: Path) -> None:
    model, data = made(files)
    start = [learned(model.part(name)) for name in TASKS]
    trainer(tmp_path).fit(model, datamodule=data)
    assert held_bytes([model]) < sum(held_bytes([model.part(name)]) for name in TASKS)
    for (name, _), before in zip(TASKS.items(), start, strict=True):
        whole, own = made(files)
        alone: Any = whole.part(name)
        alone.optimizer_config = OPTIMIZER
        trainer(tmp_path).fit(alone, datamodule=own.parts[name])
        for place, weight in learned(alone).items():
            torch.testing.assert_close(learned(model.part(name))[place], weight, atol=1e-6, rtol=1e-5)
            assert not torch.equal(before[place], weight)


@pytest.mark.parametrize("stored", [True, False])
def test_tasks_share_weights_that_come_late_too(stored: bool, files: list[str], tmp_path: Path) -> None:
    settings = replace(backbone(), draw_on="anywhere")
    if stored:
        AutoModel.from_config(AutoConfig.for_model("llama", **settings.config)).save_pretrained(tmp_path / "llm")
        settings = replace(settings, name=str(tmp_path / "llm"), pretrained=True, config=None)
    with put_off():  # as `fit` builds it
        model, _ = made(files, backbone=settings)
    assert any(map(is_missing, model.parameters()))
    placed(model, "cpu")
    parts = [model.part(name) for name in TASKS]
    trained = sum(weight.numel() for part in parts for weight in learned(part).values())
    frozen = sum(weight.numel() for weight in parts[0].parameters() if not weight.requires_grad)
    assert sum(weight.numel() for weight in model.parameters()) == trained + frozen
    at_once, _ = made(files, backbone=settings)
    for (name, weight), same in zip(model.named_parameters(), at_once.parameters(), strict=True):
        assert weight.requires_grad or torch.equal(weight, same), name


def test_each_task_comes_out_as_a_checkpoint_of_its_own(files: list[str], tmp_path: Path) -> None:
    model, data = made(files)
    fitting = trainer(tmp_path)
    fitting.fit(model, datamodule=data)
    fitting.save_checkpoint(tmp_path / "best.ckpt")
    assert set(fitting.callback_metrics) >= {"val/loss", "val/rates/loss", "val/rates/mae_mbps", "val/choices/regret"}
    losses = [fitting.callback_metrics[f"val/{name}/loss"] for name in TASKS]
    assert fitting.callback_metrics["val/loss"] == pytest.approx(float(sum(losses)) / 2)
    written = model.divide(tmp_path / "best.ckpt", data, tmp_path)
    assert written == {name: tmp_path / f"{name}.ckpt" for name in TASKS}
    kinds: list[type[NetTask]] = [ThroughputPrediction, CandidateTask]
    for (name, file), kind, task in zip(written.items(), kinds, load_tasks(list(written.values())), strict=True):
        assert type(task) is kind and task.backbone is not None and task.backbone.config == backbone()
        stored = read_checkpoint(file)["netllm_pl"]
        assert stored["data"]["class_path"] == TASKS[name]["data"]["class_path"]
        assert stored["init_args"]["backbone"] == plain(backbone()) and "tasks" not in stored["init_args"]
        batch = next(iter(data.parts[name].test_dataloader()))
        with torch.no_grad():
            mine, theirs = (each.eval()(batch) for each in (task, model.part(name)))
        for one, two in zip(*((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (mine, theirs)), strict=True):
            assert torch.equal(one, two)


def test_processes_evaluate_as_many_batches_as_one_does(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each task: a number that the trainer was told is that of all processes together."""
    model, data = made(files)
    data.trainer = pl.Trainer(accelerator="cpu", limit_val_batches=2, logger=False, enable_checkpointing=False)
    data.trainer.strategy.connect(model)
    data.setup("fit")
    expected = [[index for batch in loader.sampler for index in batch] for loader in data.val_dataloader()]
    assert [len(loader) for loader in data.val_dataloader()] == [2, 1]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares: list[list[list[int]]] = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append([[index for batch in loader.sampler for index in batch] for loader in data.val_dataloader()])
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == expected


def test_one_adapter_for_all_learns_from_all(files: list[str], tmp_path: Path) -> None:
    model, data = made(files, shared_adapter=True)
    one, two = (model.part(name).backbone for name in TASKS)
    assert one is two
    fitting = trainer(tmp_path)
    fitting.fit(model, datamodule=data)
    fitting.save_checkpoint(tmp_path / "best.ckpt")
    stored = read_checkpoint(tmp_path / "best.ckpt")["state_dict"]
    assert {name.split(".")[1] for name in stored if "lora_" in name} == {"rates"}
    assert all("lora_" in name for name in stored if ".backbone." in name)
    written = model.divide(tmp_path / "best.ckpt", data, tmp_path)
    adapters = [
        {name: p for name, p in load_task(file).named_parameters() if "lora_" in name} for file in written.values()
    ]
    assert all(torch.equal(adapters[1][name], weight) for name, weight in adapters[0].items())
    apart, data = made(files)
    trainer(tmp_path).fit(apart, datamodule=data)
    alone = dict(apart.part("rates").named_parameters())
    assert any(not torch.allclose(alone[name], weight, atol=1e-4) for name, weight in adapters[0].items())


def test_a_run_goes_on_as_if_it_had_not_been_interrupted(files: list[str], tmp_path: Path) -> None:
    whole, data = made(files, backbone=backbone(dropout=0.2))
    saving = SaveOften(dirpath=tmp_path, filename="last", every_n_train_steps=4)
    trainer(tmp_path, 6, callbacks=[ExactResume(), saving]).fit(whole, datamodule=data)
    model, data = made(files, backbone=backbone(dropout=0.2))
    pl.seed_everything(7, verbose=False)
    trainer(tmp_path, 6).fit(model, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, weight in learned(whole).items():
        assert torch.equal(learned(model)[name], weight), name


def test_the_shipped_config_trains_and_its_checkpoints_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # the files of the tasks are named from there
    config = ["--config", "configs/multi_task.yaml", "--config", "configs/overlays/smoke.yaml"]
    config += [*SMALL["MultiTaskData"], "--model.init_args.backbone", "configs/llm/tiny_random.yaml"]
    run = tmp_path / "run"
    main(["fit", *config, "--run_dir", str(run)])
    assert "val/job_scheduling/loss" in capsys.readouterr().err
    for name, metric in (("viewport_prediction", "mae_deg"), ("adaptive_bitrate", "qoe"), ("job_scheduling", "jct_s")):
        summary = pd.read_csv(run / name / "summary.csv").set_index(["policy", "metric"])["mean"]
        assert summary[str(run / f"{name}.ckpt"), metric] > 0
    logged = pd.read_csv(run / "metrics.csv")
    assert {"train/adaptive_bitrate/loss", "val/viewport_prediction/mae_deg", "val/loss"} <= set(logged.columns)
    main(["test", *config, "--run_dir", str(tmp_path / "test"), "--ckpt_path", str(run / "best.ckpt")])
    assert "test/adaptive_bitrate/regret" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", *config, "--run_dir", str(tmp_path / "test"), "--ckpt_path", str(run / "best.ckpt")])
    assert "take a task's own config" in capsys.readouterr().err


def test_mistakes_are_named(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "gru.yaml").write_text(yaml.safe_dump({"model": {"class_path": "ViewportGRU"}, "data": {}}))
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "broken.yaml").write_text("a: [")
    cases = [
        ([], "tasks are none"),
        ([files[0], files[0]], "each once"),
        ([str(tmp_path / "none.yaml")], r"none\.yaml cannot be read"),
        ([str(tmp_path / "broken.yaml")], r"broken\.yaml cannot be read"),
        ([str(tmp_path / "list.yaml")], r"list\.yaml has no model\.class_path"),
        ([str(tmp_path / "gru.yaml")], "ViewportGRU has no backbone"),
    ]
    for tasks, text in cases:
        with pytest.raises(UserError, match=text) as error:
            MultiTask(backbone(), tasks)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="changes names rate; the tasks are rates, choices"):
        MultiTaskData(files, changes={"rate": {}})
    model, _ = made(files)
    for other in (MultiTaskData(files[::-1]), MultiTaskData(files).parts["rates"]):
        with pytest.raises(UserError, match=r"set data\.tasks to the same files"):
            trainer(tmp_path).fit(model, datamodule=other)
    with pytest.raises(UserError, match=r"own config and the checkpoint .* rates, choices\.ckpt"):
        MultiTaskData(files).policy("bba")


def test_changes_reach_into_the_model_of_a_task(files: list[str]) -> None:
    model, _ = made(files, changes={"choices": {"context": 2}})
    choices: Any = model.part("choices")
    assert choices.context == 2
    with pytest.raises(UserError, match=r"model\.changes names rate; the tasks are rates, choices"):
        made(files, changes={"rate": {}})


def test_changes_reach_into_the_data_of_a_task(files: list[str]) -> None:
    changes = {"choices": {"experience": {"episodes": 9}, "window": 3}}
    data = MultiTaskData(files, changes=changes, batch_size=2)
    choices: Any = data.parts["choices"]
    assert choices.window == 3 and choices.experience.episodes == 9 and choices.experience.values == "true"
    assert [part.batch_size for part in data.parts.values()] == [2, 2]
    assert [part.eval_batch_size for part in data.parts.values()] == [64, 256]
