"""Memory does not grow with the model: random Llamas of 0.1, 0.5 and 2 GB go there and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure_convert import random_llama

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder

ROOT = Path(__file__).resolve().parents[3]
ALLOWED = 500_000_000
"""What the interpreter and its libraries may take beside two tensors; less than 300 MB of it are the imports."""
GROWTH = 40_000_000
"""What a conversion may add to the imports beside two tensors: too little for a model of 0.1 GB."""
MODELS = {
    "0.1 GB": {"hidden": 1024, "ffn": 2816, "layers": 4, "vocab": 1000},
    "0.5 GB": {"hidden": 2048, "ffn": 8192, "layers": 4, "vocab": 2000},
    "2 GB": {"hidden": 2048, "ffn": 8192, "layers": 16, "vocab": 16000},
}


def measured(*arguments: str) -> tuple[int, int]:
    """Anonymous memory before a conversion and at its peak, in bytes."""
    command = [sys.executable, str(Path(__file__).with_name("measure_convert.py")), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stderr[-3000:]
    return result["before"], result["peak"]


@pytest.mark.parametrize(
    "name", ["0.1 GB", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("0.5 GB", "2 GB"))]
)
def test_anonymous_memory_is_that_of_two_tensors(name: str, tmp_path: Path) -> None:
    sizes = MODELS[name]
    total = random_llama(tmp_path / "hf", dtype=torch.bfloat16, **sizes)
    assert abs(total / 1e9 - float(name.split(maxsplit=1)[0])) < 0.05 * total / 1e9 + 0.005
    # Gate and up are stored as one tensor; a layer's part of it, and the embedding, are the largest of all.
    largest = 2 * sizes["hidden"] * max(2 * sizes["ffn"], sizes["vocab"])
    ways = {
        "mcore": ("--loader", "hf", "--saver", "mcore", "--load-dir", str(tmp_path / "hf")),
        "back": ("--loader", "mcore", "--saver", "hf", "--load-dir", str(tmp_path / "mcore")),
    }
    for target, arguments in ways.items():
        before, peak = measured(*arguments, "--save-dir", str(tmp_path / target))
        print(f"{name} to {target}: {before / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at the peak")
        assert peak <= 2 * largest + ALLOWED
        assert peak - before <= 2 * largest + GROWTH
    with SafetensorsFolder(tmp_path / "hf") as original, SafetensorsFolder(tmp_path / "back") as back:
        assert original.names == back.names
        for tensor in original.names:
            assert torch.equal(original.lazy(tensor)[:], back.lazy(tensor)[:]), tensor
    shutil.rmtree(tmp_path)
