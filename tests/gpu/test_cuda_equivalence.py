"""The checks of tests/distributed on one CUDA device, in fp32 and bf16, against the same float64 oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import oracle
from spawn import complaint, torchrun

CHECK = str(Path(oracle.__file__).with_name("check_layout.py"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("oracle")
    oracle.make(where)
    return where


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gpu_equals_float64(folder: Path, precision: str) -> None:
    arguments = [str(folder), "1", "1", "0", "4", str(folder / "samples.pt")]
    more = [precision] if precision == "bf16" else []
    result = torchrun(1, CHECK, *arguments, *more)
    print(result.stdout)
    assert result.returncode == 0, complaint(result)
    assert "passed" in result.stdout
    assert precision == "bf16" or "CUDA graphs draw the same tokens" in result.stdout
