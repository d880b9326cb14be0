"""A run of the product on one GPU: bf16, CUDA graphs, a trace, checkpoints and a resume."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from spawn import complaint, torchrun
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRAPHS = ("--rollout-cuda-graph", "--save-interval", "3")
RECOMPUTED = ("--recompute-granularity", "full", "--recompute-num-layers", "1", "--train-iters", "1")


class Runs:
    """Launches on one corpus."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data_path, self.tokenizer = make_corpus(root / "data")

    def __call__(self, name: str, *flags: str) -> list[dict]:
        """The metrics of every iteration."""
        log = self.root / f"{name}.jsonl"
        result = torchrun(
            1,
            *("-m", "megatron_sip.pretrain", "--data-path", self.data_path, "--tokenizer-model", self.tokenizer),
            *(*MODEL, *DATA, *TRAINING, "--metrics-file", str(log), "--save", str(self.root / name), *flags),
        )
        assert result.returncode == 0, complaint(result)
        return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> list[dict]:
    return runs("unbroken", *GRAPHS)


def test_bf16_with_graphs_and_a_trace(runs: Runs) -> None:
    trace = ("--profile", "--profile-step-start", "2", "--profile-step-end", "3")
    lines = runs("bf16", "--bf16", *GRAPHS, *trace, "--async-save", "--peak-tflops", "800")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert sum(line["pairs/valid"] for line in lines) > 12
    assert all(line["throughput/mfu"] > 0 for line in lines)
    [file] = (runs.root / "bf16" / "profile").glob("*.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events), "the trace shows nothing of the GPU"


def test_a_resume_goes_on_as_the_run_would_have(runs: Runs, unbroken: list[dict]) -> None:
    shutil.copytree(runs.root / "unbroken", runs.root / "resumed")
    (runs.root / "resumed" / "latest_checkpointed_iteration.txt").write_text("3\n")
    resumed = runs("resumed", *GRAPHS, "--load", str(runs.root / "resumed"))
    assert [line["iteration"] for line in resumed] == [4, 5, 6]
    # The first step has the very weights of the checkpoint, so that it draws the same tokens and trains the same pairs.
    for name in ("loss", "logps/chosen", "logps/rejected", "pairs/valid", "consumed_samples"):
        assert resumed[0][name] == pytest.approx(unbroken[3][name], rel=1e-5, abs=1e-6), name
    # Those behind it show that the optimizer and the reference came back too.
    for line, other in zip(resumed, unbroken[3:], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "consumed_samples"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), (line["iteration"], name)
        print(line["iteration"], "loss", line["loss"], "unbroken", other["loss"])


def test_recomputation_changes_no_loss_and_no_gradient(runs: Runs, unbroken: list[dict]) -> None:
    [line] = runs("recomputed", *GRAPHS, *RECOMPUTED)
    for name in ("loss", "grad_norm"):
        assert line[name] == pytest.approx(unbroken[0][name], rel=1e-5), name
