"""The step with transformers computes what it is measured for, whatever its passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_sip.config.groups import PreferenceConfig
from tools.bench.baseline_hf import Baseline
from tools.bench.step_inputs import EOD, picks, random_cuts
from tools.bench.step_spec import DEFAULT_MODEL, Point, Spec

POINT = Point(prefix=7, suffix=4, rollouts=3, batch=3)


@pytest.fixture
def baseline() -> Baseline:
    model = replace(
        DEFAULT_MODEL, num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=300, init_method_std=0.3
    )
    return Baseline(Spec(model=model, tokenizer=""))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rollouts_are_of_the_wanted_length_and_never_end(baseline: Baseline, cache: str) -> None:
    baseline.cache = cache
    rollouts = baseline.rollouts(random_cuts(POINT, 300, 0, 1), POINT)
    assert rollouts.shape == (3, 3, 4)
    assert not (rollouts == EOD).any()
    assert baseline.policy.training


def test_the_best_and_the_worst_of_original_and_rollouts_are_trained(baseline: Baseline) -> None:
    cuts = random_cuts(POINT, 300, 0, 1)
    rollouts = torch.arange(36).view(3, 3, 4)
    rows = baseline.rows(cuts, rollouts)
    assert rows.shape == (3, 2, 11)
    for index, (cut, pair) in enumerate(zip(cuts, rows, strict=True)):
        pool = [cut.suffix.tolist(), *rollouts[index].tolist()]
        scores = picks(1, cut.sample_index, 4)
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        assert pair[:, :7].tolist() == [cut.prefix.tolist()] * 2
        assert pair[:, 7:].tolist() == [pool[best], pool[worst]]


@pytest.mark.parametrize("pairs_of_a_pass", [None, 1, 2])
def test_the_gradient_is_that_of_the_mean_loss(baseline: Baseline, pairs_of_a_pass: int | None) -> None:
    baseline.spec, baseline.clip = replace(baseline.spec, hf_micro_batch_size=pairs_of_a_pass), float("inf")
    rows = torch.randint(1, 300, (3, 2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in baseline.reference.parameters():
            parameter.mul_(1.1)

    def by_hand(model: torch.nn.Module) -> torch.Tensor:
        logps = F.log_softmax(model(rows.flatten(0, 1)).logits.double(), dim=-1)
        own = logps[:, :-1].gather(-1, rows.flatten(0, 1)[:, 1:, None]).squeeze(-1)
        return own[:, -POINT.suffix :].sum(-1).view(3, 2)

    with torch.no_grad():
        reference = torch.cat([baseline.logps(baseline.reference, part, POINT) for part in baseline.parts(rows)])
        torch.testing.assert_close(reference.double(), by_hand(baseline.reference), atol=1e-4, rtol=0)
    ratio = by_hand(baseline.policy) - by_hand(baseline.reference).detach()
    loss = -F.logsigmoid(PreferenceConfig().beta * (ratio[:, 0] - ratio[:, 1])).mean()
    wanted = torch.autograd.grad(loss, list(baseline.policy.parameters()))
    baseline.backward(rows, reference, POINT)
    for parameter, right in zip(baseline.policy.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, right, atol=1e-5, rtol=1e-4)
