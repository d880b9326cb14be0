"""Rollouts that wait for their training: shared out anew by sample, saved and read as plain tensors."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from megatron_sip.checkpoint.progress import Progress, from_state, pending_state, to_state
from megatron_sip.checkpoint.restricted import load_pickled
from megatron_sip.rollout.engine import Rollouts
from megatron_sip.rollout.pending import PendingBatch, joined


def batch(*samples: int) -> PendingBatch:
    """Two rollouts of three tokens of each sample, of which the tokens tell; the second is short."""
    tokens = torch.tensor([[[s, s, s], [s, s + 1, 0]] for s in samples], dtype=torch.int64).reshape(-1, 2, 3)
    return PendingBatch(tuple(samples), Rollouts(tokens, torch.tensor([[3, 2]] * len(samples))))


def test_a_rank_takes_its_share_of_what_other_ranks_have_saved() -> None:
    """Saved by two ranks, read by one, by four, and by one that holds all of it already."""
    whole = joined([batch(8, 9), batch(10, 11)])
    assert whole.samples == (8, 9, 10, 11)
    for samples in [(8, 9, 10, 11), (9,), (10, 11)]:
        rollouts = whole.of(samples)
        assert rollouts.tokens[:, 0, 0].tolist() == list(samples)
        assert [rollouts.row(place, 1) for place in range(len(samples))] == [(s, s + 1) for s in samples]
    again = joined([whole, batch(9)])
    assert again.samples == whole.samples
    assert torch.equal(again.rollouts.tokens, whole.rollouts.tokens)


def test_only_a_batch_that_is_there_as_a_whole_is_taken() -> None:
    whole = batch(8, 9, 10, 11)
    assert whole.holds([10, 11])
    assert not whole.holds([10, 11, 12])
    with pytest.raises(KeyError):
        whole.of([12])
    with pytest.raises(ValueError, match="2 prefixes for the samples"):
        PendingBatch((8, 9, 10), batch(8, 9).rollouts)
    with pytest.raises(ValueError, match="for the samples"):
        PendingBatch((8, 8), batch(8, 9).rollouts)


def saved(progress: Progress) -> dict[str, Any]:
    """What a checkpoint's common state gives back, through the reader that runs nothing."""
    file = io.BytesIO()
    torch.save(to_state(progress) | (pending_state(progress.pending) if progress.pending else {}), file)
    file.seek(0)
    state: dict[str, Any] = load_pickled(file, "common.pt")
    return state


def test_a_checkpoint_gives_them_back_token_by_token() -> None:
    pending = from_state(saved(Progress(2, 8, {}, pending=batch(8, 9)))).pending
    assert pending is not None
    assert pending.samples == (8, 9)
    assert pending.rollouts.tokens.dtype == torch.int64
    assert torch.equal(pending.rollouts.tokens, batch(8, 9).rollouts.tokens)
    assert torch.equal(pending.rollouts.lengths, batch(8, 9).rollouts.lengths)


def test_a_checkpoint_without_them_is_one_all_the_same() -> None:
    assert from_state(saved(Progress(2, 8, {}))) == Progress(2, 8, {})


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": torch.zeros(2, 6)},
        {"tokens": torch.full((2, 2, 3), -1)},
        {"lengths": torch.tensor([[3, 4], [3, 2]])},
        {"lengths": torch.tensor([[3, -1], [3, 2]])},
        {"lengths": torch.tensor([3, 2])},
        {"samples": torch.tensor([8, 9, 10])},
        {"samples": torch.tensor([8, 8])},
        {"tokens": "text"},
    ],
)
def test_what_is_damaged_is_refused(damage: dict[str, Any]) -> None:
    state = saved(Progress(2, 8, {}, pending=batch(8, 9)))
    state["pending"] |= damage
    with pytest.raises((ValueError, AttributeError)):
        from_state(state)
