"""The bench of the LM head: its ways agree, its tables, and one real run at sizes that take a moment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_bench import figures_of
from rich.console import Console

from megatron_sip.model.lm_head import VocabularyPart, token_logprobs
from tools.bench import head_report, lm_head
from tools.bench.head_arms import (
    CUMULATIVE,
    MULTINOMIAL,
    ONE_CHUNK,
    PASSES,
    TWO_LEVELS,
    WHOLE,
    HeadCase,
    draw_works,
    head_works,
)
from tools.bench.live_bytes import peak_bytes

ROOT = Path(__file__).resolve().parents[3]
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
CPU = torch.device("cpu")
MIB = 2**20


class Policy:
    """The LM head of a policy without its layers."""

    real_vocab_size = 40_000

    def __init__(self) -> None:
        self.head_weight = torch.nn.Parameter(torch.randn(40_064, 16, generator=torch.Generator().manual_seed(1)))
        self.logits_chunk_bytes = 1

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        part = VocabularyPart(0, self.real_vocab_size, self.logits_chunk_bytes, ALONE)
        return token_logprobs(hidden, self.head_weight, targets, part)


def test_a_chunk_that_holds_all_logits_is_the_one_chunk() -> None:
    policy = Policy()
    case = HeadCase.random(policy, 32, seed=2)
    assert case.logits_bytes == 4 * 32 * 40_064
    works = head_works(policy, case, [1, 64, 2], PASSES[1])
    assert list(works) == [WHOLE, ONE_CHUNK, "2 MiB", "1 MiB"]
    peaks = {}
    for name in (ONE_CHUNK, "2 MiB", "1 MiB"):
        works[name]()
        peaks[name] = peak_bytes(works[name], CPU)
    assert case.logits_bytes <= peaks[ONE_CHUNK] < case.logits_bytes + 0.1 * MIB
    assert 1.8 * MIB < peaks["2 MiB"] < 2.1 * MIB
    assert 0.9 * MIB < peaks["1 MiB"] < 1.1 * MIB


def test_a_pass_with_gradients_holds_that_of_the_weight_and_leaves_none_behind() -> None:
    policy = Policy()
    case = HeadCase.random(policy, 32, seed=2)
    work = head_works(policy, case, [1], PASSES[0])["1 MiB"]
    beside = peak_bytes(work, CPU) - 4 * policy.head_weight.numel()
    assert 0.9 * MIB < beside < 1.2 * MIB, "one chunk and what belongs to positions"
    assert policy.head_weight.grad is None
    assert case.hidden.grad is None


@pytest.mark.parametrize("vocab_size", [300, 4096])
def test_two_levels_and_the_cumulative_sum_draw_the_same_tokens(vocab_size: int) -> None:
    world = SimpleNamespace(tp_size=1, tp_rank=0, tp_group=ALONE, device=CPU)
    works = draw_works(512, vocab_size, world, seed=3)
    drawn = {name: work() for name, work in works.items()}
    assert torch.equal(drawn[TWO_LEVELS], drawn[CUMULATIVE])
    assert all(int(tokens.max()) < vocab_size and tokens.shape == (512,) for tokens in drawn.values())
    assert len(drawn[MULTINOMIAL].unique()) > 100


def test_the_tables_have_a_column_for_every_size_of_chunk() -> None:
    def arm(seconds: float, mib: float = 0.0) -> dict:
        return {"seconds": seconds, "peak_bytes": mib * MIB, "repeats": [{"seconds": seconds}]}

    row = {"positions": 256, "pass": PASSES[0]}
    few = {**row, "vocab_size": 4096, "logits_bytes": 4 * MIB, "arms": {WHOLE: arm(0.5, 12), ONE_CHUNK: arm(0.25, 8)}}
    many = {**row, "vocab_size": 131_072, "logits_bytes": 128 * MIB}
    many["arms"] = {WHOLE: arm(1.0, 384), ONE_CHUNK: arm(0.75, 256), "64 MiB": arm(1.5, 224)}
    draw = {"rows": 64, "vocab_size": 4096, "arms": {TWO_LEVELS: arm(0.00047), CUMULATIVE: arm(0.001)}}
    console = Console(width=160, record=True)
    for shown in [*head_report.head_tables([few, many]), head_report.draw_table([draw])]:
        console.print(shown)
    text = console.export_text()
    for word in ("256 x 131,072 (128 MiB)", "64 MiB", "1500", "384", "224", "0.47", "64 x 4,096"):
        assert word in text


def test_a_real_run_prints_and_writes_every_arm(tmp_path: Path) -> None:
    flags = "--vocab-sizes 300 9000 --positions 32 --rows 4 --hidden-size 16 --chunk-mib 1 --repeats 2 --threads 1"
    found, printed = figures_of(lm_head, flags, tmp_path)
    assert [(head["vocab_size"], head["pass"]) for head in found["heads"]] == [
        (v, p) for v in (300, 9000) for p in PASSES
    ]
    for head in found["heads"]:
        assert list(head["arms"]) == [WHOLE, ONE_CHUNK, *(["1 MiB"] if head["vocab_size"] == 9000 else [])]
        assert all(len(arm["repeats"]) == 2 and arm["seconds"] > 0 for arm in head["arms"].values())
    # All logits are 1.1 MiB; megatron-core's loss keeps them until the backward pass, and makes a gradient beside them.
    backward = found["heads"][2]["arms"]
    assert backward[WHOLE]["peak_bytes"] > backward["1 MiB"]["peak_bytes"] > MIB
    assert [list(draw["arms"]) for draw in found["draws"]] == [[TWO_LEVELS, CUMULATIVE, MULTINOMIAL]] * 2
    assert (found["ranks"], found["threads"], found["dtype"], found["hidden_size"]) == (1, 1, "fp32", 16)
    for word in ("most memory", "torch.multinomial", "load average", "9,000"):
        assert word in printed
