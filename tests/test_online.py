"""Adapting a language model by playing: what is learned from is what was played, and it learns."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from netllm_pl.backbone import LoRA
from netllm_pl.errors import UserError
from netllm_pl.frozen import merged_of
from netllm_pl.testing import tiny_backbone
from tasks.adaptive_bitrate import AdaptiveBitrateData, OnlineBitrate
from tasks.adaptive_bitrate.simulator import Rules
from tasks.adaptive_bitrate.synthetic import SyntheticTraces


def data_of() -> AdaptiveBitrateData:
    traces = SyntheticTraces(traces=3, duration_s=60)
    return AdaptiveBitrateData(synthetic=traces, experience=None, rules=Rules(chunks=7), batch_size=2)


def task_of(**arguments: Any) -> OnlineBitrate:
    torch.manual_seed(0)
    task = OnlineBitrate(tiny_backbone(), context=3, **{"group": 4, **arguments}).eval()
    task._trainer = SimpleNamespace(datamodule=data_of(), global_step=5, estimated_stepping_batches=10)  # type: ignore[assignment]
    return task


def test_drawn_actions_have_the_probabilities_that_are_learned_from() -> None:
    task = task_of()
    with torch.no_grad():
        for weight in task.head.parameters():  # type: ignore[union-attr]  # else all actions are about as likely
            weight.mul_(8)
        played = task._play([1] * 150)
        steps = task._steps(played)
        chances, entropies = task._chances(steps)
    assert chances.shape == entropies.shape == steps["mask"].shape == (600, 6)
    expected = torch.softmax(task(steps), -1)[:, 0].mean(0).detach().numpy()  # all sessions begin alike
    counts = np.bincount(played.actions[0], minlength=6) / 600
    assert expected.max() - expected.min() > 0.1
    np.testing.assert_allclose(counts, expected, atol=0.07)
    logs = torch.log_softmax(task(steps), -1)
    taken = torch.from_numpy(played.actions.T.copy())[..., None]
    torch.testing.assert_close(chances, logs.gather(-1, taken)[..., 0].detach())


def test_only_differences_within_a_group_count() -> None:
    steps = task_of()._steps(task_of()._play([1, 2, 3]))
    gains = steps["gain"].T.unflatten(1, (3, 4))
    torch.testing.assert_close(gains.mean(2), torch.zeros(6, 3), atol=1e-5, rtol=0)
    assert gains.std() == pytest.approx(1.0, abs=0.01)


def test_it_learns_what_pays() -> None:
    """Of two first levels the one that the reward favours becomes likelier."""
    task = task_of(entropy=(1e-6, 1e-6))
    steps = task._steps(task._play([1] * 20))
    steps["gain"] = torch.where(steps["action"] == 2, 1.0, -1.0)
    steps["chance"] = task._chances(steps)[0].detach()
    before = float(task(steps).softmax(-1)[..., 2].mean())
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        task._surrogate(steps, torch.arange(80), 0.0).backward()
        optimizer.step()
    assert float(task(steps).softmax(-1)[..., 2].mean()) > before + 0.05


def test_targets_of_values_are_the_reward_and_the_best_value_of_the_next_step() -> None:
    task = task_of(method="dqn", discount=0.9, explore=(1.0, 1.0))
    played = task._play([1, 2])
    with torch.no_grad():
        steps = task._steps(played)
        targets, values = task._targets(steps).numpy(), task(steps).numpy()
    rewards = np.maximum(played.rewards.T, -20.0)
    assert (rewards < -1e-3).any(), "no session stalled"
    np.testing.assert_allclose(targets[:, -1], rewards[:, -1], rtol=1e-4, atol=1e-5)
    expected = rewards[:, :-1] + 0.9 * values[:, 1:].max(-1)
    np.testing.assert_allclose(targets[:, :-1], expected, rtol=1e-4, atol=1e-5)


def test_exploring_falls_and_the_rest_is_greedy() -> None:
    """With few random actions nearly all are the best ones of the scores, as in use."""
    task = task_of(method="dqn", explore=(0.5, 0.02))
    share = []
    for done in (0, 100):
        task._trainer = SimpleNamespace(datamodule=data_of(), global_step=done, estimated_stepping_batches=100)  # type: ignore[assignment]
        played = task._play([1] * 50)
        with torch.no_grad():
            best = task(task._steps(played)).argmax(-1).numpy().T
        share.append(float((played.actions == best).mean()))
    assert share[0] == pytest.approx(0.5 + 0.5 / 6, abs=0.05) and share[1] == pytest.approx(0.98 + 0.02 / 6, abs=0.01)


def test_values_learn_what_pays_from_what_is_remembered() -> None:
    task = task_of(method="dqn", discount=0.1, explore=(1.0, 1.0), remembered=2)
    for number in range(3):
        steps = task._steps(task._play([number + 1] * 20))
        steps["paid"] = torch.where(steps["action"] == 2, 1.0, -1.0) + number * 1e-3
        some = task._remember(steps)
    assert len(task.memory) == 2 and len(some["action"]) == 80
    assert {round(value % 1, 3) for value in some["paid"].unique().tolist()} == {0.001, 0.002}, "the oldest is gone"
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(30):
        with torch.no_grad():
            some["target"] = task._targets(some)
        optimizer.zero_grad()
        task._error(some, torch.arange(80)).backward()
        optimizer.step()
    assert (task(some).argmax(-1) == 2).float().mean() > 0.9
    again, kept = task_of(method="dqn", remembered=2), {"state_dict": task.state_dict()}
    task.on_save_checkpoint(kept)
    again.on_load_checkpoint(kept)
    for mine, theirs in zip(again.memory, task.memory, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"remembered is 0 \(at least 1\), explore \(0.5, 0.02\)"):
        OnlineBitrate(tiny_backbone(), method="dqn", remembered=0)
    with pytest.raises(UserError, match="group is 1; it must be at least 2"):
        OnlineBitrate(tiny_backbone(), group=1)
    with pytest.raises(UserError, match=r"set data\.experience to null"):
        task_of().train().sessions({"level": torch.zeros(1)})


class Fused(OnlineBitrate):
    """Learns with the optimiser that a GPU has."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, fused=True)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}


def test_playing_goes_on_with_what_a_fused_optimiser_has_learned() -> None:
    task = Fused(tiny_backbone(lora=LoRA(rank=4)), context=3, group=2, epochs=1, minibatches=2)
    assert task.backbone is not None
    before = [weight.clone() for weight in merged_of(task.backbone).weights.values()]
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(task, data_of())
    after = merged_of(task.backbone).weights.values()
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
