"""What Llama 3.2 needs of a resume: bf16 weights with fp32 main weights, and tied embeddings over two stages.

Tied, the embedding stands on the first and the last stage; both must hold the same bits whatever is saved or loaded.
"""

from __future__ import annotations

import pytest
import torch
from repeats import record_differences, tensor_differences
from runs import Case, Runs

from megatron_sip.training.audit_check import check_audit

STEPS, RESUMED = 4, 2
FLAGS = (*("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS)), "--save-interval", str(RESUMED))
BF16 = ("--bf16", "--tensor-model-parallel-size", "2")
TIED = ("--no-untie-embeddings-and-output-weights", "--pipeline-model-parallel-size", "2")
FOUR = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
CASES = (
    Case("bf16", (*FLAGS, *BF16)),
    Case("bf16-resumed", (*FLAGS, *BF16), copy_of=("bf16", RESUMED)),
    Case("tied", (*FLAGS, *TIED)),
    Case("tied-resumed", (*FLAGS, *TIED), copy_of=("tied", RESUMED)),
    Case("untied-tp2", (*FLAGS, "--tensor-model-parallel-size", "2")),
)


@pytest.mark.parametrize("name", ["bf16", "tied"])
def test_a_resume_repeats_the_unbroken_run(runs: Runs, name: str) -> None:
    """Bit for bit: losses, metrics, the fate of each sample, and every tensor of the last checkpoint."""
    again = f"{name}-resumed"
    runs.require_success(name, again)
    assert record_differences(runs.metrics(again), runs.metrics(name)[RESUMED:]) == []
    assert runs.steps(again) == runs.steps(name)
    last = runs.tensors(name, STEPS)
    assert tensor_differences(runs.tensors(again, STEPS), last) == []
    # The steps behind the resume moved what is compared.
    assert len(tensor_differences(runs.tensors(name, RESUMED), last)) > 20
    assert all(record["trained"] for record in runs.steps(name)[RESUMED:])


def test_a_bf16_checkpoint_holds_what_bf16_would_round_away(runs: Runs) -> None:
    """Main weights, both moments and the reference in fp32, with bits that bf16 has no room for."""
    saved = runs.tensors("bf16", STEPS)
    policy = {name for name, tensor in saved.items() if tensor.dtype is torch.bfloat16}
    assert any(name.endswith("mlp.linear_fc2.weight") for name in policy)
    for kind in (*(f"optimizer.state.{part}." for part in ("fp32_param", "exp_avg", "exp_avg_sq")), "reference."):
        found = [tensor for name, tensor in saved.items() if name.startswith(kind)]
        assert found, sorted(saved)
        assert {tensor.dtype for tensor in found} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found), kind


def test_a_tied_checkpoint_holds_one_embedding(runs: Runs) -> None:
    """The last stage's copy is no tensor of its own, of the policy, the optimizer or the reference."""
    saved = runs.tensors("tied", STEPS)
    assert sorted(name for name in saved if "word_embeddings" in name)
    assert not [name for name in saved if "output_layer.weight" in name]
    assert [name for name in runs.tensors("untied-tp2", STEPS) if "output_layer.weight" in name]


@pytest.mark.nightly
def test_four_ranks_go_on_from_two(runs: Runs) -> None:
    """TP 2 and PP 2 go on at TP 2 x PP 2: the same samples, the same losses to rounding."""
    pairs = {"four": "untied-tp2", "tied-four": "tied"}
    flags = (*FLAGS, *FOUR)
    runs.launch(
        4,
        Case("four", flags, copy_of=("untied-tp2", RESUMED)),
        Case("tied-four", (*flags, TIED[0]), copy_of=("tied", RESUMED)),
    )
    for name, source in pairs.items():
        runs.require_success(source, name)
        found, wanted = runs.steps(name), runs.steps(source)
        assert [step["consumed"] for step in found] == [step["consumed"] for step in wanted]
        assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in wanted], rel=1e-4)
        assert check_audit(runs.audit(name)).faults == ()
