"""The count of operations against the formulas, a count by hand, and the published sizes of models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.presets import parameter_count, presets
from megatron_sip.cost.flops import Flops, StepWork, causal_pairs, plain_flops, step_flops
from megatron_sip.cost.sizes import ModelSizes, model_sizes
from megatron_sip.errors import ConfigError

SMALL = ModelSizes(
    num_layers=6,
    hidden_size=320,
    ffn_hidden_size=896,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=40,
    vocab_size=4096,
    untied=True,
)
WORK = StepWork(prefix=1024, suffix=128, rollouts=16, batch=4)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(("prefix", "rollouts", "batch"), [(1024, 16, 1), (256, 2, 4), (1, 1, 256)])
def test_linear_parts_are_the_formulas(once: bool, prefix: int, rollouts: int, batch: int) -> None:
    work = StepWork(prefix, 128, rollouts, batch, prefill_once=once, share_prefix=once)
    n, p, k, s = SMALL.matmul_parameters, prefix, rollouts, 128
    step = step_flops(SMALL, work)
    rows = (p + 2 * s) if once else 2 * (p + s)
    assert step.rollouts.linear == 2 * n * batch * (p + k * s if once else k * (p + s))
    assert step.reference.linear == 2 * n * batch * rows
    assert step.train.linear == 6 * n * batch * rows
    assert plain_flops(SMALL, work).linear == 6 * n * batch * (p + s)


def test_the_shared_prefix_costs_the_shares_of_plain_training_that_are_published() -> None:
    def ratio(work: StepWork) -> float:
        step = step_flops(SMALL, work)
        return (step.rollouts + step.reference + step.train).linear / plain_flops(SMALL, work).linear

    assert ratio(replace(WORK, prefill_once=False, share_prefix=False)) == pytest.approx(8.0, abs=0.05)
    assert ratio(WORK) == pytest.approx(2.4, abs=0.05)


def test_the_floor_of_the_bench_machine() -> None:
    assert SMALL.parameters == pytest.approx(9.6e6, rel=0.01)
    rate = 203e9
    floors = {p: step_flops(SMALL, replace(WORK, prefix=p)).total / rate for p in (1024, 256)}
    assert floors[1024] == pytest.approx(3.3, rel=0.02)
    assert floors[256] == pytest.approx(8.6 / 5.6, rel=0.02)


@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (5, 0), (3, 4), (128, 1024)])
def test_pairs_are_those_that_the_mask_leaves(tokens: int, before: int) -> None:
    assert causal_pairs(tokens, before) == int(torch.ones(tokens, before + tokens).tril(before).sum())


def test_a_row_is_counted_as_torch_counts_it() -> None:
    """Torch counts the products of a layer written out; it knows no mask, so that attention is counted unmasked."""
    model = replace(SMALL, num_layers=1, num_query_groups=8)
    work = StepWork(prefix=48, suffix=16, rollouts=0, batch=3, share_prefix=False)
    batch, tokens, width = 2 * work.rows, work.prefix + work.suffix, model.hidden_size
    x = torch.zeros(batch, tokens, width)
    with FlopCounterMode(display=False) as counter:
        q, k, v = ((x @ torch.zeros(width, width)).view(batch, tokens, 8, 40).transpose(1, 2) for _ in range(3))
        x = ((q @ k.transpose(-1, -2)) @ v).transpose(1, 2).reshape(batch, tokens, width) @ torch.zeros(width, width)
        gate, up = (x @ torch.zeros(width, model.ffn_hidden_size) for _ in range(2))
        x = (gate * up) @ torch.zeros(model.ffn_hidden_size, width)
        _ = x[:, -work.suffix - 1 : -1] @ torch.zeros(width, model.vocab_size)
    row = step_flops(model, work).reference
    unmasked = row.attention * tokens**2 / causal_pairs(tokens)
    assert counter.get_total_flops() == pytest.approx(row.linear + unmasked + row.head, rel=1e-12)


def test_attention_grows_with_the_square_of_the_prefix_and_the_head_not_at_all() -> None:
    short, long = (step_flops(SMALL, replace(WORK, prefix=p)) for p in (8192, 16384))
    assert long.prefill.attention / short.prefill.attention == pytest.approx(4.0, rel=1e-3)
    assert long.train.head == short.train.head == 3 * 2 * SMALL.head_parameters * 2 * 128 * 4


def test_what_is_left_out_costs_nothing() -> None:
    assert step_flops(SMALL, replace(WORK, rollouts=0)).rollouts == Flops()
    assert step_flops(SMALL, replace(WORK, reference=False)).reference == Flops()
    assert step_flops(SMALL, replace(WORK, trained_rows=0)).train == Flops()
    one = step_flops(SMALL, replace(WORK, suffixes=1)).train
    assert one.linear == 6 * SMALL.matmul_parameters * 4 * (1024 + 128)
    more = step_flops(SMALL, replace(WORK, suffixes=1, prefix_logits=True)).train
    assert more.head - one.head == 6 * SMALL.head_parameters * 4 * 1023


def test_a_step_is_the_sum_of_its_parts() -> None:
    step = step_flops(SMALL, WORK)
    assert step.total == step.prefill.total + step.decode.total + step.reference.total + step.train.total
    assert step.train == 3 * step.reference


@pytest.mark.parametrize("name", presets())
def test_parameters_are_those_of_the_presets(name: str) -> None:
    preset = presets()[name]
    model = replace(preset, vocab_size=preset.vocab_size or 32_000)
    sizes = model_sizes(model)
    assert sizes.parameters == parameter_count(model)
    if sizes.parameters > 5e9:
        assert sizes.matmul_parameters == pytest.approx(sizes.parameters, rel=0.14), "embedding and head are the rest"


def test_sizes_that_are_missing_are_named() -> None:
    with pytest.raises(ConfigError, match="--num-layers"):
        model_sizes(ModelConfig())
    with pytest.raises(ConfigError, match="--vocab-size"):
        model_sizes(ModelConfig(model_preset="llama-1.4b"))


@pytest.mark.parametrize("wrong", [{"prefix": 0}, {"suffix": 0}, {"batch": 0}, {"rollouts": -1}, {"suffixes": 3}])
def test_work_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|suffixes, not"):
        replace(WORK, **wrong)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        replace(SMALL, num_layers=0)
