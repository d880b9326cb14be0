from __future__ import annotations

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_sip.metrics.aggregate import StepMetrics, pool_metrics
from megatron_sip.metrics.names import metric_specs
from megatron_sip.types import (
    Candidate,
    CandidateKind,
    Missing,
    MissingReason,
    NoPair,
    NoPairReason,
    Pair,
    Pool,
    Scores,
)

ORIGINAL = Candidate(CandidateKind.ORIGINAL, (1, 2, 3, 4), "original")
REWRITE = Candidate(CandidateKind.REWRITE, (5, 6), "rewrite")
ROLLOUT_A = Candidate(CandidateKind.ROLLOUT, (7, 8, 9), "a", 0)
ROLLOUT_B = Candidate(CandidateKind.ROLLOUT, (7, 8, 8), "b", 1)


def _pool(*candidates: Candidate) -> Pool:
    return Pool(0, "prefix", "original", candidates)


def _example():
    """Two pools trained, one tie, one too small; worked by hand below."""
    pools = [
        _pool(ORIGINAL, REWRITE, ROLLOUT_A, ROLLOUT_B),
        _pool(ORIGINAL, ROLLOUT_A),
        _pool(ORIGINAL, ROLLOUT_A),
        _pool(ROLLOUT_A),
    ]
    gone = Missing(MissingReason.TOO_FEW_ANSWERS)
    scores = [
        Scores(
            (0.75, gone, 1.0, 0.25),
            {"quality": (0.75, gone, 1.0, 0.25)},
            questions_asked=12,
            missing_by_reason={"timeout": 2, "unparsable": 1},
        ),
        Scores((1.0, 0.5), {"quality": (1.0, 0.5)}, questions_asked=2),
        Scores((0.5, 0.5), {"quality": (0.5, 0.5)}, questions_asked=2),
        Scores((), {}, questions_asked=0),
    ]
    pairs = [
        Pair(ROLLOUT_A, ROLLOUT_B, 1.0, 0.25),
        Pair(ORIGINAL, ROLLOUT_A, 1.0, 0.5),
        NoPair(NoPairReason.TIE),
        NoPair(NoPairReason.TOO_FEW_CANDIDATES),
    ]
    scores[3] = None
    return pools, scores, pairs


def test_pool_metrics_by_hand():
    values = pool_metrics(*_example())
    assert values["pairs/valid"] == (2, 2)
    assert values["pairs/tie"] == (1, 1)
    assert values["pairs/too_few_candidates"] == (1, 1)
    assert values["pairs/identical_tokens"] == (0, 0)
    assert values["chosen/share_original"] == (1, 2)
    assert values["chosen/share_rewrite"] == (0, 2)
    assert values["chosen/share_rollout"] == (1, 2)
    assert values["scores/original"] == (0.75 + 1.0 + 0.5, 3)
    assert values["scores/rewrite"] == (0, 0)
    assert values["scores/rollout"] == (1.0 + 0.25 + 0.5 + 0.5, 4)
    assert values["scores/quality/rollout"] == (2.25, 4)
    assert values["scores/margin"] == (0.75 + 0.5, 2)
    assert values["judge/asked"][0] == 16
    assert values["judge/missing"][0] == 3
    assert values["judge/missing_share"] == (3, 16)
    assert values["judge/missing_timeout"][0] == 2
    assert values["judge/missing_unparsable"][0] == 1
    assert values["candidates/left"][0] == 1
    assert values["candidates/pool"] == (9, 4)
    assert values["lengths/chosen"] == (3 + 4, 2)
    assert values["lengths/rejected"] == (3 + 3, 2)


def test_result_leaves_out_means_over_nothing_but_keeps_zero_totals():
    metrics = StepMetrics(metric_specs(["quality"]))
    metrics.add_all(pool_metrics(*_example()))
    result = metrics.result()
    assert result["chosen/share_rewrite"] == 0.0
    assert "scores/rewrite" not in result
    assert result["pairs/identical_tokens"] == 0.0
    assert result["judge/missing_share"] == pytest.approx(3 / 16)
    assert "loss" not in result
    metrics.reset()
    assert "chosen/share_rewrite" not in metrics.result()


def test_pair_without_rejected_has_no_margin_and_no_rejected_length():
    values = pool_metrics([_pool(REWRITE)], [None], [Pair(REWRITE, None)])
    assert values["pairs/valid"] == (1, 1)
    assert values["scores/margin"] == (0, 0)
    assert values["lengths/rejected"] == (0, 0)
    assert values["chosen/share_rewrite"] == (1, 1)


def test_fixed_names_are_declared_and_the_same_for_any_input():
    declared = {spec.name for spec in metric_specs(["quality"])}
    full, empty = pool_metrics(*_example()), pool_metrics([], [], [])
    assert set(full) <= declared
    assert {name for name in full if not name.startswith("scores/quality/")} == set(empty)


def test_tensor_rows_do_not_depend_on_what_happened_or_on_order():
    busy, idle = StepMetrics(metric_specs(["b", "a"])), StepMetrics(metric_specs(["a", "b"]))
    busy.add("time/train", 3.0)
    busy.add("loss", 5.0, 4)
    assert busy.names == idle.names == tuple(sorted(busy.names))
    assert busy.to_tensor().shape == idle.to_tensor().shape
    idle.add("loss", 1.0, 2)
    both = busy.from_tensor(busy.to_tensor() + idle.to_tensor()).result()
    assert both["loss"] == 1.0
    assert both["time/train"] == 3.0


def test_misuse_is_refused():
    metrics = StepMetrics()
    with pytest.raises(KeyError, match="not declared"):
        metrics.add("losss", 1.0)
    with pytest.raises(ValueError, match="do not match"):
        pool_metrics([_pool(ORIGINAL)], [], [])
    with pytest.raises(ValueError, match="2 scores for the 1"):
        pool_metrics([_pool(ORIGINAL)], [Scores((1.0, 2.0), {})], [NoPair(NoPairReason.TIE)])
    with pytest.raises(ValueError, match="shape"):
        metrics.from_tensor(torch.zeros(3, 2))


def _rank(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics = StepMetrics(metric_specs(["quality"]))
    if rank == 0:  # rank 1 had no pool at all
        metrics.add_all(pool_metrics(*_example()))
    metrics.add("loss", math.log(2) * (rank + 1), 1)
    result = metrics.all_reduce().result()
    assert result["pairs/valid"] == 2
    assert result["loss"] == pytest.approx(1.5 * math.log(2))
    assert "scores/rewrite" not in result
    dist.destroy_process_group()


def test_ranks_with_and_without_pools_reduce_in_one_tensor():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port,), nprocs=2, join=True)
