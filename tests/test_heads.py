"""Heads: answers are valid by construction, and gradients stay finite. Shapes: B, T, N as in netllm_pl/heads.py."""

import pytest
import torch
from torch import Tensor

from netllm_pl.heads import ChoiceHead, PointerHead, RegressionHead

B, T, H = 3, 4, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def allowed_mask(*shape: int) -> Tensor:
    """Random, with at least one allowed and one forbidden choice a row."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0], mask[..., 1] = True, False
    return mask


@pytest.mark.parametrize("width", [None, 8])
def test_regression_starts_at_zero_and_learns(width: int | None) -> None:
    head, hidden = RegressionHead(H, 3, width), torch.randn(B, T, H)
    assert torch.equal(head(hidden), torch.zeros(B, T, 3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):  # at first only the last layer has a gradient
        optimizer.zero_grad()
        (head(hidden) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters()) and head(hidden).mean() > 0


def test_regression_gives_zero_where_there_is_nothing() -> None:
    head, hidden = RegressionHead(H, 2), torch.randn(B, T, H)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    mask = allowed_mask(B, T)
    values = head(hidden, mask)
    assert torch.equal(values[~mask], torch.zeros_like(values[~mask]))
    assert torch.equal(values[mask], head(hidden)[mask])


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("head", ["choice", "pointer"])
def test_a_forbidden_choice_has_no_probability(head: str, scale: float) -> None:
    hidden, candidates = scale * torch.randn(B, T, H), torch.randn(B, 6, H)
    hidden.requires_grad_()
    allowed = allowed_mask(B, T, 6)
    model = ChoiceHead(H, 6) if head == "choice" else PointerHead(H)
    logits = model(hidden, allowed) if isinstance(model, ChoiceHead) else model(hidden, candidates, allowed)
    probabilities = logits.softmax(-1)
    assert torch.equal(probabilities[~allowed], torch.zeros_like(probabilities[~allowed]))
    assert allowed.gather(-1, logits.argmax(-1, keepdim=True)).all()
    draws = torch.distributions.Categorical(logits=logits).sample((200,))
    assert allowed.expand(200, -1, -1, -1).gather(-1, draws[..., None]).all()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(B * T, dtype=torch.int64)).backward()
    gradients = [hidden.grad, *(p.grad for p in model.parameters())]
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.count_nonzero() for g in gradients)


def test_one_allowed_choice_is_certain_and_gives_finite_gradients() -> None:
    head, hidden = ChoiceHead(H, 5), torch.randn(B, T, H)
    allowed = torch.zeros(B, T, 5, dtype=torch.bool)
    allowed[..., 2] = True
    logits = head(hidden, allowed)
    torch.testing.assert_close(logits.softmax(-1)[..., 2], torch.ones(B, T))
    logits.log_softmax(-1)[..., 2].sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_masks_leave_allowed_logits_as_they_are() -> None:
    head, hidden, allowed = ChoiceHead(H, 5), torch.randn(B, T, H), allowed_mask(B, T, 5)
    assert torch.equal(head(hidden, allowed)[allowed], head(hidden)[allowed])


def test_a_pointer_follows_its_candidates() -> None:
    head, hidden, candidates = PointerHead(H), torch.randn(B, T, H), torch.randn(B, 7, H)
    allowed, order = allowed_mask(B, 7), torch.randperm(7)
    scores = head(hidden, candidates, allowed)
    torch.testing.assert_close(head(hidden, candidates[:, order], allowed[:, order]), scores[..., order])


def test_a_pointer_takes_any_number_of_candidates() -> None:
    head, hidden, candidates = PointerHead(H), torch.randn(B, T, H), torch.randn(B, 40, H)
    many = head(hidden, candidates)
    for count in (1, 2, 40):
        torch.testing.assert_close(head(hidden, candidates[:, :count]), many[..., :count])


def test_a_pointer_takes_masks_for_all_positions_or_for_each() -> None:
    head, hidden, candidates = PointerHead(H), torch.randn(B, T, H), torch.randn(B, 6, H)
    shared = allowed_mask(B, 6)
    assert torch.equal(head(hidden, candidates, shared), head(hidden, candidates, shared[:, None].expand(-1, T, -1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_scores_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    head, hidden, allowed = ChoiceHead(H, 5).to(dtype), torch.randn(B, T, H, dtype=dtype), allowed_mask(B, T, 5)
    logits = head(hidden, allowed)
    assert logits.isfinite().all() and torch.equal(logits.softmax(-1)[~allowed], torch.zeros(int((~allowed).sum())))
