"""Decisions among candidates that differ in number: training, cache and recomputation agree, padding is not seen.

Shapes: N episodes, T steps, K candidates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from netllm_pl.acting import chosen_of
from netllm_pl.data import Batch
from netllm_pl.decision import LanguageModelPolicy
from netllm_pl.errors import UserError
from netllm_pl.experience import PoolWriter, Together, Windows, read_pool
from netllm_pl.heads import IMPOSSIBLE
from netllm_pl.ragged import select
from netllm_pl.recording import Experience
from netllm_pl.rollout import Array, Observations, Rollout, rollout
from netllm_pl.step_tokens import Part, StepTokens, TokenSet, fill, join_tokens, lay_out, tight, visible
from netllm_pl.testing import check_environment, check_policy, check_task, tiny_backbone
from netllm_pl.toy import BestCandidate, CandidateData, Candidates, CandidateScores, CandidateTask, hidden_values

MOST, SEEDS = 7, range(5)
ALL: dict[str, Any] = {"returns": True, "actions": True}
ENV = Candidates(MOST, steps=(18, 23))


def make(architecture: str = "llama", attention: Any = None, **settings: Any) -> CandidateTask:
    """A task with random weights; LoRA's are no longer zero, as after training."""
    torch.manual_seed(0)
    task = CandidateTask(tiny_backbone(architecture, attention=attention), **settings)
    for name, weight in task.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return task.eval()


class Watched(LanguageModelPolicy):
    """Keeps the scores of candidates and gears (N, K, 3), and how much the cache holds."""

    def reset(self, n: int) -> None:
        super().reset(n)
        self.scores: list[Tensor] = []
        self.held: list[int] = []

    def act(self, observations: Observations) -> Array:
        actions = super().act(observations)
        self.held.append(self.cache.get_seq_length())
        return actions

    def _choose(self, scores: CandidateScores, batch: Batch) -> Tensor:
        self.scores.append(joined(scores))
        return super()._choose(scores, batch)


def joined(scores: CandidateScores) -> Tensor:
    """Scores of all parts (B, W, K, 3), 0 where there is no candidate."""
    real = (scores.candidates > IMPOSSIBLE / 2).unsqueeze(-1)
    parts = torch.cat([scores.candidates.unsqueeze(-1), scores.gears], dim=-1).where(real, 0.0)
    return torch.nn.functional.pad(parts, (0, 0, 0, MOST - parts.shape[2]))


def play(task: CandidateTask, streaming: bool = True, seeds: Sequence[int] = SEEDS) -> tuple[Tensor, Rollout, Watched]:
    policy = Watched(task, streaming)
    played = rollout(ENV, policy, seeds, record=True)
    return torch.cat(policy.scores, dim=1), played, policy


def windows(folder: Path, *played: Rollout, window: int = 23) -> Windows:
    """Recorded episodes as training sees them."""
    with PoolWriter(folder, "CandidateData") as writer:
        for number, episodes in enumerate(played):
            writer.add(episodes, f"policy {number}")
    return Windows(read_pool(folder), window)


@pytest.fixture(autouse=True)
def _own(own_cache: Path) -> None:
    """Pools are opened in a cache of the test's own."""


def played_by_best() -> Rollout:
    return rollout(Candidates(MOST, values=True), BestCandidate(), range(20), record=True)


@torch.no_grad()
def scores_of(task: CandidateTask, batch: Batch) -> Tensor:
    return joined(task(batch))


def close(one: Tensor, two: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


# Streaming, recomputation and training give the same answers ----------------------------------------------------------


@pytest.mark.parametrize("context", [1, 5, 20])
@pytest.mark.parametrize(
    ("architecture", "extra", "both_ways"),
    [("llama", {}, False), ("llama", ALL, True), ("gpt2", ALL, False), ("gpt2", {"actions": True}, True)],
)
def test_streaming_recomputation_and_training_agree(
    architecture: str, extra: dict[str, Any], both_ways: bool, context: int, tmp_path: Path
) -> None:
    """The cache holds no more than the steps of the context; at a context of 1 there is none."""
    task = make(architecture, context=context, both_ways=both_ways, **extra)
    scores, played, policy = play(task)
    again, replayed, _ = play(task, streaming=False)
    assert played.actions.shape == (*played.alive.shape, 2)
    assert np.array_equal(played.actions, replayed.actions)
    close(scores, again)
    data = windows(tmp_path / "pool", played)
    batch = data[list(range(len(data)))]
    length = batch["mask"].shape[1]
    received = np.concatenate([np.zeros_like(played.rewards[:1]), played.rewards[:-1]]).cumsum(0)
    batch["return_to_go"] = torch.as_tensor(task.target_return - received).T.float()
    assert scores.shape[1] == length and batch["mask"].sum(1).unique().numel() > 1, "episodes of different lengths"
    real = batch["mask"]
    close(scores_of(task, batch)[real], scores[real])
    assert scores[real].std(0).min() > 1e-3, "decisions depend on nothing"
    if context == 1:
        assert max(policy.held) == 0
    else:
        assert 0 < max(policy.held) <= context * (MOST + 1 + 2 * bool(extra))


def test_attention_implementations_agree() -> None:
    for context in (1, 4):
        first, second = (play(make(attention=name, context=context, **ALL))[0] for name in ("sdpa", "eager"))
        close(first, second)


def test_a_context_of_one_runs_each_step_alone() -> None:
    """Nothing but the step's own tokens is run, those of several episodes side by side in few rows."""
    task = make(**ALL)
    assert task.backbone is not None
    shapes: list[Any] = []
    hook = task.backbone.register_forward_pre_hook(
        lambda _, args, named: shapes.append(args[0].shape), with_kwargs=True
    )
    play(task)
    assert max(shape[1] for shape in shapes) <= 32 and max(shape[0] for shape in shapes) == 2
    hook.remove()
    batch = task.observe(ENV.reset(SEEDS), 3) | {"return_to_go": torch.zeros(5, 1)}
    prompt = task.encode(batch)
    assert prompt.places is not None and prompt.places.shape[0] == 5 and prompt.positions is not None
    deciding = prompt.positions.flatten()[prompt.places[:, -1]]
    assert deciding.unique().tolist() == [2], "places do not depend on the step, nor on how many tokens"


def test_sequences_fill_rows() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 7, 32):
        for count in (1, 5, 300):
            lengths = rng.integers(1, size + 1, count).tolist()
            rows, starts = fill(lengths, size)
            used = np.zeros((max(rows) + 1, size), int)
            for row, start, length in zip(rows, starts, lengths, strict=True):
                assert start + length <= size
                used[row, start : start + length] += 1
            assert used.max() == 1 and used.any(1).all(), "no two share a place, no row is empty"
            assert len(used) <= 11 / 9 * sum(lengths) / size + 2, "as few rows as best fit promises"


def test_rows_on_a_cpu_are_no_longer_than_they_must_be() -> None:
    assert tight([7], 32) == 7 and tight([5, 4, 3], 32) == 12
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(1, 20, generator.integers(1, 40)).tolist()
        size, rows = tight(lengths, 32), max(fill(lengths, 32)[0]) + 1
        assert max(lengths) <= size <= 32 and max(fill(lengths, size)[0]) + 1 == rows
        assert size * rows >= sum(lengths)


# What a decision depends on -------------------------------------------------------------------------------------------


class Padded(CandidateTask):
    """Pads candidates with anything, of no meaning."""

    more = 0

    def state(self, batch: Batch) -> StepTokens:
        state = super().state(batch)
        assert state.mask is not None and state.places is not None
        extra = torch.full_like(state.values[:, :, :1], 50.0).expand(-1, -1, self.more, -1)
        rubbish = torch.cat([state.values[:, :, :-1].where(state.mask[:, :, :-1, None], -9.0), extra], dim=2)
        values = torch.cat([rubbish, state.values[:, :, -1:]], dim=2)
        mask = torch.cat([state.mask[:, :, :-1], torch.zeros_like(extra[..., 0], dtype=torch.bool)], dim=2)
        places = torch.cat([torch.zeros(mask.shape[2], dtype=torch.long), state.places[-1:]])
        return StepTokens(values, torch.cat([mask, state.mask[:, :, -1:]], dim=2), places, state.both_ways)

    def decide(self, hidden: Tensor, batch: Batch) -> CandidateScores:
        keep = hidden.shape[2] - 1 - self.more
        return super().decide(torch.cat([hidden[:, :, :keep], hidden[:, :, -1:]], dim=2), batch)


@pytest.mark.parametrize(
    ("architecture", "context", "both_ways"), [("llama", 1, False), ("llama", 5, True), ("gpt2", 5, False)]
)
def test_padding_changes_nothing(architecture: str, context: int, both_ways: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Padded(tiny_backbone(architecture), context=context, both_ways=both_ways, **ALL).eval()
    data = windows(tmp_path / "pool", played_by_best(), window=8)
    batch = data[list(range(len(data)))]
    real = batch["mask"]
    expected = scores_of(task, batch)
    alone = [scores_of(task, select(batch, slice(row, row + 1))) for row in range(len(real))]
    close(expected[real], torch.cat(alone)[real])
    scores, played, _ = play(task)
    task.more = 5
    close(expected[real], scores_of(task, batch)[real])
    again, replayed, _ = play(task)
    close(scores, again)
    assert np.array_equal(played.actions, replayed.actions)


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_order_of_candidates_matters_only_to_a_causal_task(both_ways: bool) -> None:
    task = make(both_ways=both_ways)
    observations = ENV.reset([0])
    order = np.arange(len(observations["features"][0]))[::-1].copy()
    turned = dict(observations)
    turned["features"] = observations["features"].copy()
    turned["features"][0] = observations["features"][0][order]
    first, second = (joined(task(task.observe(seen, 0)))[0, 0, : len(order)] for seen in (observations, turned))
    assert len(order) > 1
    assert torch.allclose(first[order.tolist()], second, atol=1e-5) == both_ways


def test_sets_share_a_place_even_where_they_are_empty() -> None:
    tokens = torch.ones(2, 1, 2, 4)
    rows, lengths = torch.arange(12.0).view(3, 4), torch.tensor([[3], [0]])
    state = join_tokens([tokens, TokenSet(rows, lengths), tokens[:, :, :1]])
    assert state.places is not None and state.mask is not None
    assert state.places.tolist() == [0, 1, 2, 2, 2, 3] and state.width == 4
    assert state.mask.tolist() == [[[True] * 6], [[True, True, False, False, False, True]]]
    assert torch.equal(state.values[0, 0, 2:5], rows) and (state.values[1, 0, 2:5] == 0).all()
    empty = join_tokens([tokens, TokenSet(rows[:0], 0 * lengths), tokens[:, :, :1]])
    assert empty.places is not None and empty.places.tolist() == [0, 1, 3]


def test_the_entry_of_the_chosen_candidate() -> None:
    values = torch.randn(2, 3, 4, 5)
    number = torch.randint(4, (2, 3))
    expected = [[values[b, w, number[b, w]] for w in range(3)] for b in range(2)]
    assert torch.equal(chosen_of(values, number), torch.stack([torch.stack(row) for row in expected]))


# Experience -----------------------------------------------------------------------------------------------------------


def test_the_environment_keeps_its_contract() -> None:
    check_environment(
        Candidates(values=True), range(6), lambda seen: np.array([[len(f) - 1, 1] for f in seen["left"][:, None]])
    )


@pytest.mark.parametrize("portion", [1, 30, 10**6])
def test_ragged_experience_comes_back(portion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observations, values and actions with a shape; behind the end of an episode nothing is read."""
    monkeypatch.setattr("netllm_pl.pool_format.PORTION", portion)
    played = played_by_best()
    for column in (played.observations["features"], played.info["values"]):
        column[~played.alive] = None
    assert played.actions.shape[2] == 2
    data = windows(tmp_path / "pool", played, played_by_best(), window=3)
    both = Together([data, Windows(data.pool, 3, 1)])
    for batch in (data[list(range(len(data)))], both[[0, len(data), 1, len(data) + 3]]):
        assert batch["action"].shape == (*batch["mask"].shape, 2)
        counts = batch["features_length"]
        assert torch.equal(counts, batch["values_length"]) and (counts[~batch["mask"]] == 0).all()
        assert len(batch["features"]) == counts.sum() == len(batch["numbers"])
        values = torch.from_numpy(hidden_values(batch["features"].numpy()))
        torch.testing.assert_close(values, batch["values"])
        best = batch["action"][..., 0][batch["mask"]]
        of_step = values.split(counts[batch["mask"]].tolist())
        assert [int(part.argmax()) for part in of_step] == best.tolist()
    whole = data[list(range(len(data)))]
    assert int(whole["mask"].sum()) >= 2 * int(played.alive.sum())


def test_episodes_one_after_another(tmp_path: Path) -> None:
    """As policies whose state passes on are played: padded behind the ends."""

    class Sequential(BestCandidate):
        sequential = True

    played = rollout(Candidates(values=True), Sequential(), range(6), record=True)
    together = rollout(Candidates(values=True), BestCandidate(), range(6), record=True)
    first, second = (windows(tmp_path / name, r, window=8) for name, r in (("a", played), ("b", together)))
    one, two = first[list(range(6))], second[list(range(6))]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ragged_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    played = rollout(Candidates(), BestCandidate(), range(6), record=True)
    broken = played.observations["features"][2, 4].copy()
    broken[-1, 0] = np.nan
    played.observations["features"][2, 4] = broken
    with pytest.raises(UserError, match="'features' is not finite in episode 4 of this rollout of policy 0"):
        windows(tmp_path / "pool", played)


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"context": 1}, {"context": 3, "both_ways": True, "objective": "imitation", **ALL}]
)
def test_it_learns_to_choose(settings: dict[str, Any]) -> None:
    """From recorded experience with random actions; chance is worth -1.3 a step."""
    torch.manual_seed(0)
    task, data = CandidateTask(tiny_backbone(), **settings), CandidateData()
    before = data.episodes(task)["reward"].mean()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = task.loss(task(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = data.episodes(task)["reward"].mean()
    assert before < -0.8 and after > -0.3


@pytest.mark.parametrize(
    "settings", [{}, {"context": 3, "both_ways": True, "sample": True, "objective": "imitation", **ALL}]
)
def test_the_task_keeps_its_contract(settings: dict[str, Any]) -> None:
    experience = Experience(policies="best", episodes=6, eval_episodes=2, explore=0.5, values="true")
    data = CandidateData(experience, batch_size=4)
    check_task(CandidateTask, data, **settings)
    check_policy(data, "best")


def test_drawn_actions_exist() -> None:
    task = make(context=3, sample=True, **ALL)
    played = play(task)[1]
    counts = np.vectorize(len)(played.observations["features"])
    number, gear = played.actions[..., 0], played.actions[..., 1]
    assert (number < counts)[played.alive].all() and set(gear[played.alive].tolist()) == {0, 1}
    assert np.array_equal(played.actions, play(task)[1].actions)


def test_predictions_are_the_actions(tmp_path: Path) -> None:
    """What has no common shape is not written."""
    data, task = windows(tmp_path / "pool", played_by_best(), window=4), make()
    predicted = [task.predict_step(data[[row]], 0) for row in range(3)]
    assert torch.cat(predicted).shape == (3, 4, 2)


def test_who_sees_whom() -> None:
    """Two steps of a token, a set of two places, and one that decides; the second step has one of the two."""
    rows, lengths = torch.zeros(3, 4), torch.tensor([[2, 1]])
    one = torch.zeros(1, 2, 1, 4)
    positions = torch.zeros(1, 2, 4, dtype=torch.long)
    for both_ways, first in ((False, ["1000", "1100", "1110", "1111"]), (True, ["1111"] * 4)):
        state = join_tokens([one, TokenSet(rows, lengths), one], both_ways)
        ranks = torch.full((4,), 3) if both_ways else torch.arange(4)
        line = lay_out([Part(state.values, state.mask, ranks, positions)])
        own = ["1000", "1100", "1110", "1101"] if not both_ways else ["1101", "1101", "1111", "1101"]
        for context, before in ((1, "0000"), (2, "1111")):
            seen = ["".join(str(int(sees)) for sees in row) for row in visible(line, line, context)[0, 0]]
            assert seen == [row + "0000" for row in first] + [before + row for row in own]
