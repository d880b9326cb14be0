"""Operations by second and GPU: the arithmetic of known steps, written out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sip.config.groups import Config, LoggingConfig, ModelConfig, PreferenceConfig, TrainingConfig
from megatron_sip.cost.done import DoneWork, rollout_work
from megatron_sip.metrics.aggregate import StepMetrics
from megatron_sip.preference.collate import collate, ntp_batch
from megatron_sip.training.throughput import MFU, TFLOPS, Throughput
from megatron_sip.types import Candidate, CandidateKind, Cut, Pair, PreferenceBatch

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=128,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    vocab_size=500,
)
# Query and output 32 x 32 each, key and value 32 x 16 each; three products of SwiGLU, 32 x 64 each.
BEHIND = 32 * 32 + 3 * 32 * 64
LAYER = 32 * 32 + 2 * 32 * 16 + BEHIND
HEAD = 32 * 500
SECONDS = 2.5
NOTHING = DoneWork()


def cut(prefix: int, suffix: int) -> Cut:
    return Cut(0, 0, prefix, np.arange(1, prefix + 1), np.arange(1, suffix + 1))


def pair_batch() -> PreferenceBatch:
    """One pair: prefix 10, chosen 4, rejected 3."""
    chosen, rejected = (Candidate(CandidateKind.ROLLOUT, tuple(range(1, n + 1)), "", n) for n in (4, 3))
    return collate([(cut(10, 4), Pair(chosen, rejected, 1.0, 0.0))])


def world_of(tp: int = 1, pp: int = 1) -> Any:
    return SimpleNamespace(tp_size=tp, pp_size=pp)


def config_of(**training: Any) -> Config:
    return Config(model=MODEL, training=TrainingConfig(**training))


def flops_of(config: Config, batch: PreferenceBatch, written: DoneWork = NOTHING, trained: bool = True) -> float:
    found = Throughput(config, world_of()).metrics(written, batch, SECONDS, trained=trained)
    assert list(found) == [TFLOPS]
    done, spent = found[TFLOPS]
    assert spent == SECONDS
    return 1e12 * done


def attended(pairs: int) -> int:
    """Two products of 2 operations for each of 32 numbers of all heads."""
    return 4 * 32 * pairs


# Prefix, chosen and rejected in a whole layer; in the last one 4 positions see 10 to 13 tokens, and 3 see 10 to 12.
PAIRS, LAST = 55 + (11 + 12 + 13 + 14) + (11 + 12 + 13), (10 + 11 + 12 + 13) + (10 + 11 + 12)
PAIR = 2 * (3 * LAYER * 17 - BEHIND * 10) + attended(2 * PAIRS + LAST) + 2 * HEAD * 7


def test_a_pair_is_trained_and_scored_by_the_reference() -> None:
    assert flops_of(config_of(), pair_batch()) == pytest.approx(4 * PAIR)


def test_rollouts_are_added_and_a_step_without_a_pair_has_them_alone() -> None:
    """One prefix of 10, a row of 4 and one of 2 tokens, of which 3 and 1 are fed."""
    written = rollout_work([10], [[4, 2]])
    pairs = 2 * (55 + (11 + 12 + 13) + 11) + 10 + (11 + 12 + 13) + 11
    wanted = 2 * (3 * LAYER * 14 - BEHIND * 9) + attended(pairs) + 2 * HEAD * 5
    assert flops_of(config_of(), pair_batch(), written) == pytest.approx(4 * PAIR + wanted)
    assert flops_of(config_of(), pair_batch(), written, trained=False) == pytest.approx(wanted)


def test_two_rows_a_pair_compute_the_prefix_twice() -> None:
    apart = PAIR + 2 * (3 * LAYER - BEHIND) * 10 + attended(2 * 55)
    assert flops_of(config_of(shared_prefix=False), pair_batch()) == pytest.approx(4 * apart)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_with_recomputation_the_last_layer_is_whole_and_nothing_counts_twice(granularity: Any) -> None:
    config = replace(config_of(), model=replace(MODEL, recompute_granularity=granularity))
    whole = 2 * 3 * LAYER * 17 + attended(3 * PAIRS) + 2 * HEAD * 7
    assert flops_of(config, pair_batch()) == pytest.approx(4 * whole)


def test_a_scored_prefix_has_logits_and_a_whole_last_layer() -> None:
    config = replace(config_of(), preference=PreferenceConfig(prefix_ntp_weight=0.5))
    whole = 2 * 3 * LAYER * 17 + attended(3 * PAIRS) + 2 * HEAD * (7 + 9)
    assert flops_of(config, pair_batch()) == pytest.approx(4 * whole)


def test_one_suffix_has_no_reference() -> None:
    chosen = Candidate(CandidateKind.REWRITE, (1, 2, 3, 4), "")
    batch = collate([(cut(10, 4), Pair(chosen, None, 1.0, None))])
    pairs = 2 * (55 + 11 + 12 + 13 + 14) + 10 + 11 + 12 + 13
    forward = 2 * (3 * LAYER * 14 - BEHIND * 10) + attended(pairs) + 2 * HEAD * 4
    for objective in ("rf-nll", "sft-rewrite"):
        assert flops_of(config_of(objective=objective), batch) == pytest.approx(3 * forward)


def test_next_token_prediction() -> None:
    """Rows of 14 and 5 tokens; each but the first is predicted."""
    batch = ntp_batch([cut(10, 4), cut(3, 2)])
    forward = 2 * 3 * LAYER * 19 + attended(3 * (14 * 15 // 2 + 5 * 6 // 2)) + 2 * HEAD * (13 + 4)
    assert flops_of(config_of(objective="ntp"), batch) == pytest.approx(3 * forward)


def test_groups_and_steps_add_up_to_operations_of_all_by_the_seconds_of_all_gpus() -> None:
    """Two groups of TP 2 x PP 2, one of which took longer, over two steps; the peak is that of one GPU."""
    config = replace(config_of(), logging=LoggingConfig(peak_tflops=0.25))
    group, metrics = Throughput(config, world_of(tp=2, pp=2)), StepMetrics()
    for seconds in (1.0, 1.5, 2.0, 2.5):
        metrics.add_all(group.metrics(NOTHING, pair_batch(), seconds, trained=True))
    found = metrics.result()
    assert found[TFLOPS] == pytest.approx(4 * 4 * PAIR / 1e12 / (4 * 7.0))
    assert found[MFU] == pytest.approx(found[TFLOPS] / 0.25)
