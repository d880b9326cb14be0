"""The normalisation rule: the same gradient at every data parallel and micro-batch size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sip.config.groups import Config, PreferenceConfig, TrainingConfig
from megatron_sip.loss.reduce import GlobalCounts, LossWeights, local_counts, mean_metrics, objective_terms
from megatron_sip.loss.segments import ReferenceLogps, SegmentLogps, segment_sums
from megatron_sip.metrics.aggregate import pool_metrics
from megatron_sip.preference.collate import collate, ntp_batch
from megatron_sip.preference.layout import ScoredTokens, scored_tokens
from megatron_sip.types import Candidate, CandidateKind, Cut, NoPair, NoPairReason, Pair, PreferenceBatch

VOCAB, BETA = 13, 0.1
DPO = LossWeights(dpo=1.0, nll=0.0, ntp=0.0, primary="pairs")
MIXED = LossWeights(dpo=1.0, nll=0.3, ntp=0.2, primary="pairs")
NLL = LossWeights(dpo=0.0, nll=1.0, ntp=0.0, primary="chosen_tokens")
NLL_MIXED = LossWeights(dpo=0.0, nll=1.0, ntp=0.5, primary="chosen_tokens")
NTP = LossWeights(dpo=0.0, nll=0.0, ntp=1.0, primary="prefix_tokens")

Item = tuple[Cut, Pair | NoPair]


class Toy(torch.nn.Module):
    """Next-token log-probabilities from the token at the source position and where it stands: no attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64))

    def token_logps(self, batch: PreferenceBatch, scored: ScoredTokens) -> torch.Tensor:
        logits = self.weight[batch.tokens[scored.row, scored.source]]
        return torch.log_softmax(logits, dim=-1).gather(1, scored.target[:, None])[:, 0]

    def segments(self, batch: PreferenceBatch) -> SegmentLogps:
        scored = scored_tokens(batch, with_prefix=True)
        return segment_sums(self.token_logps(batch, scored), scored, batch.rows)


def eight_items(with_rejected: bool = True) -> list[Item]:
    """Eight cuts of different lengths; 0, 1 and 3 have no pair, so at DP2 one rank has one pair, the other four."""
    rng = np.random.default_rng(3)

    def ids(length: int) -> np.ndarray:
        return rng.integers(1, VOCAB, length)

    items: list[Item] = []
    for index in range(8):
        cut = Cut(index, index, 0, ids(3 + index), ids(4))
        chosen = Candidate(CandidateKind.ORIGINAL, tuple(ids(2 + index % 4).tolist()), "")
        rejected = Candidate(CandidateKind.ROLLOUT, tuple(ids(5 - index % 3).tolist()), "", 0)
        pair = Pair(chosen, rejected if with_rejected else None)
        items.append((cut, NoPair(NoPairReason.TIE) if index in (0, 1, 3) else pair))
    return items


def to_batch(items: list[Item], weights: LossWeights) -> PreferenceBatch:
    return ntp_batch([cut for cut, _ in items]) if weights.primary == "prefix_tokens" else collate(items)


def simulate(
    items: list[Item], weights: LossWeights, dp: int, micro: int, length_normalization: bool = False
) -> tuple[torch.Tensor, float, dict[str, float]]:
    """What megatron-core does: gradients of all micro-batches and ranks summed, divided once by the summed counts."""
    policy, frozen = Toy(1), Toy(2)
    share = len(items) // dp
    batches = [to_batch(items[rank * share : (rank + 1) * share], weights) for rank in range(dp)]
    counts = GlobalCounts.from_tensor(torch.stack([local_counts(batch) for batch in batches]).sum(dim=0))
    gradient, loss, count, metrics, names = torch.zeros(VOCAB, VOCAB, dtype=torch.float64), 0.0, 0, 0.0, ()
    for batch in batches:
        for start in range(0, batch.rows, micro):
            rows = batch.take(range(start, start + micro))
            with torch.no_grad():
                of_reference = frozen.segments(rows)
            reference = ReferenceLogps(of_reference.chosen, of_reference.rejected)
            terms = objective_terms(policy.segments(rows), reference, rows, weights, counts, BETA, length_normalization)
            policy.zero_grad()
            terms.loss.backward()
            gradient += policy.weight.grad
            loss, count = loss + terms.loss.item(), count + int(terms.count)
            metrics, names = metrics + terms.metrics, terms.names
    return gradient / count, loss / count, mean_metrics(metrics, names)


def direct(items: list[Item], weights: LossWeights, length_normalization: bool = False) -> tuple[torch.Tensor, float]:
    """The loss of method section 5 written out token by token, with no rows, masks or micro-batches."""
    policy, frozen = Toy(1), Toy(2)

    def logp(model: Toy, context: list[int], tokens: list[int]) -> torch.Tensor:
        total, last = torch.zeros((), dtype=torch.float64), context[-1]
        for token in tokens:
            row = model.weight[last]
            total = total + row[token] - row.exp().sum().log()
            last = token
        return total

    dpo, nll, ntp, pairs, chosen_tokens, prefix_tokens = 0.0, 0.0, 0.0, 0, 0, 0
    for cut, pair in items:
        prefix = cut.prefix.tolist()
        if weights.primary == "prefix_tokens":
            text = prefix + cut.suffix.tolist()
            ntp, prefix_tokens = ntp - logp(policy, text[:1], text[1:]), prefix_tokens + len(text) - 1
            continue
        if isinstance(pair, NoPair):
            continue
        chosen = list(pair.chosen.tokens)
        nll, chosen_tokens = nll - logp(policy, prefix, chosen), chosen_tokens + len(chosen)
        ntp, prefix_tokens = ntp - logp(policy, prefix[:1], prefix[1:]), prefix_tokens + len(prefix) - 1
        if weights.dpo:
            rejected = list(pair.rejected.tokens)
            up = logp(policy, prefix, chosen) - logp(frozen, prefix, chosen).detach()
            down = logp(policy, prefix, rejected) - logp(frozen, prefix, rejected).detach()
            if length_normalization:
                up, down = up / len(chosen), down / len(rejected)
            dpo, pairs = dpo + torch.log(1.0 + torch.exp(-BETA * (up - down))), pairs + 1
    total = torch.zeros((), dtype=torch.float64)
    for weight, term, number in (
        (weights.dpo, dpo, pairs),
        (weights.nll, nll, chosen_tokens),
        (weights.ntp, ntp, prefix_tokens),
    ):
        if weight:
            total = total + weight * term / number
    total.backward()
    return policy.weight.grad, total.item()


@pytest.mark.parametrize("weights", [DPO, MIXED, NLL, NLL_MIXED, NTP], ids=["dpo", "mixed", "nll", "nll+ntp", "ntp"])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2])
def test_eight_items_with_three_invalid_give_one_gradient_at_every_layout(
    weights: LossWeights, dp: int, micro: int
) -> None:
    items = eight_items(with_rejected=weights.dpo > 0)
    gradient, loss, metrics = simulate(items, weights, dp, micro)
    expected_gradient, expected_loss = direct(items, weights)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-12)
    assert expected_gradient.norm() > 1e-3
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


def test_length_normalisation_matches_the_written_out_formula() -> None:
    gradient, loss, _ = simulate(eight_items(), DPO, dp=2, micro=2, length_normalization=True)
    expected_gradient, expected_loss = direct(eight_items(), DPO, length_normalization=True)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()
    assert abs(loss - direct(eight_items(), DPO)[1]) > 1e-3


def whole() -> tuple[PreferenceBatch, GlobalCounts, SegmentLogps, ReferenceLogps]:
    batch = collate(eight_items())
    of_reference = Toy(2).segments(batch)
    reference = ReferenceLogps(of_reference.chosen.detach(), of_reference.rejected.detach())
    return batch, GlobalCounts.from_tensor(local_counts(batch)), Toy(1).segments(batch), reference


def loss_of(logps: SegmentLogps, reference: ReferenceLogps, batch: PreferenceBatch, counts: GlobalCounts) -> float:
    return objective_terms(logps, reference, batch, DPO, counts, BETA, False).loss.item() / counts.pairs


def test_each_mutation_changes_the_loss() -> None:
    batch, counts, logps, reference = whole()
    right = loss_of(logps, reference, batch, counts)
    assert right == pytest.approx(direct(eight_items(), DPO)[1], rel=1e-12)
    zeros = torch.zeros_like(reference.chosen)
    scored = scored_tokens(batch, with_prefix=True)
    shifted = replace(scored, target=torch.roll(scored.target, 1))
    off_by_one = replace(scored, source=torch.clamp(scored.source + 1, max=batch.width - 1))
    toy = Toy(1)
    wrong = {
        "chosen and rejected swapped": loss_of(
            SegmentLogps(logps.rejected, logps.chosen, logps.prefix),
            ReferenceLogps(reference.rejected, reference.chosen),
            batch,
            counts,
        ),
        "reference swapped": loss_of(logps, ReferenceLogps(reference.rejected, reference.chosen), batch, counts),
        "reference dropped": loss_of(logps, ReferenceLogps(zeros, zeros), batch, counts),
        "labels shifted": loss_of(
            segment_sums(toy.token_logps(batch, shifted), scored, batch.rows), reference, batch, counts
        ),
        "sources shifted": loss_of(
            segment_sums(toy.token_logps(batch, off_by_one), scored, batch.rows), reference, batch, counts
        ),
        "invalid rows trained": loss_of(logps, reference, replace(batch, valid=torch.ones(8)), counts),
    }
    close = {name: value for name, value in wrong.items() if abs(value - right) < 1e-3}
    assert not close


def test_counts_see_valid_rows_and_predicted_tokens_only() -> None:
    # Valid are 2, 4, 5, 6, 7: prefixes of 3 + index tokens, less the first; chosen of 2 + index % 4 tokens.
    assert local_counts(collate(eight_items())).tolist() == [5, 4 + 2 + 3 + 4 + 5, 4 + 6 + 7 + 8 + 9]
    assert local_counts(ntp_batch([cut for cut, _ in eight_items()])).tolist() == [8, 0, sum(range(6, 14))]


def test_a_batch_without_any_pair_keeps_its_graph_and_gives_zero() -> None:
    batch = collate([(cut, NoPair(NoPairReason.TIE)) for cut, _ in eight_items()])
    for weights in (MIXED, NLL_MIXED):
        toy = Toy(1)
        logps = toy.segments(batch)
        reference = ReferenceLogps(logps.chosen.detach(), logps.chosen.detach())
        counts = GlobalCounts.from_tensor(local_counts(batch))
        terms = objective_terms(logps, reference, batch, weights, counts, BETA, False)
        terms.loss.backward()
        assert (terms.loss.item(), int(terms.count), terms.count.dtype) == (0.0, 0, torch.int32)
        assert toy.weight.grad.abs().sum().item() == 0.0
        assert mean_metrics(terms.metrics, terms.names) == {}


def test_what_stands_in_invalid_rows_is_never_read() -> None:
    batch, counts, logps, reference = whole()
    invalid = batch.valid == 0

    def spoil(sums: torch.Tensor) -> torch.Tensor:
        return sums.masked_fill(invalid, float("nan"))

    spoilt = SegmentLogps(*(spoil(part.detach()).requires_grad_() for part in vars(logps).values()))
    bad_reference = ReferenceLogps(spoil(reference.chosen), spoil(reference.rejected))
    clean = objective_terms(logps, reference, batch, MIXED, counts, BETA, False)
    terms = objective_terms(spoilt, bad_reference, batch, MIXED, counts, BETA, False)
    terms.loss.backward()
    assert terms.loss.item() == clean.loss.item()
    assert torch.equal(terms.metrics, clean.metrics)
    assert spoilt.chosen.grad[invalid].abs().sum().item() == 0.0
    assert bool(torch.isfinite(spoilt.chosen.grad).all())


def test_metrics_are_means_over_valid_pairs() -> None:
    rows = collate(eight_items())
    pairs = rows.valid > 0
    toy, frozen = Toy(1).segments(rows), Toy(2).segments(rows)
    up, down = (toy.chosen - frozen.chosen)[pairs], (toy.rejected - frozen.rejected)[pairs]
    expected = {
        "logps/chosen": toy.chosen[pairs].mean(),
        "logps/rejected": toy.rejected[pairs].mean(),
        "rewards/chosen": BETA * up.mean(),
        "rewards/rejected": BETA * down.mean(),
        "rewards/margins": BETA * (up - down).mean(),
        "rewards/accuracies": (up > down).double().mean(),
        "objective/kl": (up + down).mean() / 2,
    }
    _, loss, found = simulate(eight_items(), MIXED, dp=2, micro=1)
    assert not set(found) & set(pool_metrics([], [], [])), "each number is counted by one place"
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-12), name
    assert found["loss"] == pytest.approx(
        found["loss/dpo"] + 0.3 * found["loss/nll"] + 0.2 * found["loss/ntp"], rel=1e-12
    )
    assert math.isfinite(loss)


def test_metric_names_depend_on_the_objective_only() -> None:
    _, _, of_nll = simulate(eight_items(with_rejected=False), NLL, dp=1, micro=4)
    assert set(of_nll) == {"loss", "loss/nll", "logps/chosen"}
    _, _, of_ntp = simulate(eight_items(), NTP, dp=1, micro=4)
    assert set(of_ntp) == {"loss", "loss/ntp"}


def test_dpo_without_its_parts_is_refused() -> None:
    batch, counts, logps, reference = whole()
    with pytest.raises(ValueError, match="reference"):
        objective_terms(logps, None, batch, DPO, counts, BETA, False)
    alone = collate(eight_items(with_rejected=False))
    with pytest.raises(ValueError, match="rejected suffix"):
        objective_terms(Toy(1).segments(alone), reference, alone, DPO, counts, BETA, False)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("ntp", NTP),
        ("online-dpo", MIXED),
        ("dpo-rewrite-over-rollout", MIXED),
        ("rf-nll", replace(NLL, ntp=0.2)),
        ("sft-rewrite", replace(NLL, ntp=0.2)),
        ("sft-rollout", replace(NLL, ntp=0.2)),
    ],
)
def test_weights_of_each_objective(objective, expected: LossWeights) -> None:
    preference = PreferenceConfig(nll_weight=0.3, prefix_ntp_weight=0.2)
    config = Config(training=TrainingConfig(objective=objective), preference=preference)
    assert LossWeights.from_config(config) == expected


def test_segment_sums_are_in_float64_and_keep_the_gradient() -> None:
    batch = collate(eight_items())
    scored = scored_tokens(batch, with_prefix=True)
    tokens = torch.full((scored.row.numel(),), -0.1, dtype=torch.float32, requires_grad=True)
    sums = segment_sums(tokens, scored, batch.rows)
    assert sums.chosen.dtype == torch.float64
    torch.testing.assert_close(sums.chosen, -0.1 * batch.chosen_length.double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(sums.rejected, -0.1 * batch.rejected_length.double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(sums.prefix, -0.1 * (batch.prefix_length - 1).double(), rtol=1e-7, atol=0)
    sums.rejected.sum().backward()
    assert tokens.grad.tolist() == (scored.segment == 1).float().tolist()
