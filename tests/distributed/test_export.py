"""A Hugging Face Llama through the trainer at TP2 and back by tools/checkpoint/convert.py: bitwise the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import forked
from spawn import ROOT, complaint
from tiny_corpus import make_corpus

from tools.checkpoint import convert as tool


def convert(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "checkpoint" / "convert.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def random_llama(folder: Path, tokenizer_size: int) -> None:
    """A small Llama with what is easy to get wrong: three KV groups at TP2, odd vocabulary, head width of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=tokenizer_size + 11,
        hidden_size=36,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, and `saved`: the same weights after a step whose learning rate is too small to move them."""
    root = tmp_path_factory.mktemp("export")
    data_path, tokenizer = make_corpus(root / "data")
    random_llama(root / "hf", 320)
    result = forked(
        2,
        *("-m", "megatron_sip.pretrain", "--data-path", data_path, "--tokenizer-model", tokenizer),
        *(
            "--tensor-model-parallel-size",
            "2",
            "--pad-query-groups",
            "--objective",
            "ntp",
            "--seq-length",
            "64",
            "--train-iters",
            "1",
        ),
        *("--lr", "1e-30", "--load", str(root / "hf"), "--save", str(root / "saved")),
    )
    assert result.returncode == 0, complaint(result)
    return root


def test_hf_to_mcore_to_hf_is_bitwise(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = convert("--load-dir", str(trained / "saved"), "--save-dir", str(trained / "back"))
    assert done.returncode == 0, done.stderr
    before = AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(trained / "back", dtype=torch.float32)
    names = dict(before.named_parameters())
    assert set(names) == set(dict(after.named_parameters()))
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, names[name]), name
    ids = torch.arange(1, 33)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert len(AutoTokenizer.from_pretrained(trained / "back")) == 320


def test_dtype_is_that_which_was_asked_for(trained: Path) -> None:
    from safetensors.torch import load_file

    half = ("--load-dir", str(trained / "saved"), "--save-dir", str(trained / "half"), "--dtype", "bf16")
    assert tool.main(half) == 0
    assert {tensor.dtype for tensor in load_file(trained / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_refusals_name_the_cause_and_write_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint_about(*flags: str) -> str:
        assert tool.main(flags) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    saved, out = str(trained / "saved"), str(tmp_path / "out")
    assert "holds no checkpoint" in complaint_about("--load-dir", str(tmp_path), "--save-dir", out)
    assert str(trained / "hf") in complaint_about("--load-dir", saved, "--save-dir", str(trained / "hf"))
    assert "iter_0000007" in complaint_about("--load-dir", saved, "--save-dir", out, "--iteration", "7")
    assert not (tmp_path / "out").exists()
