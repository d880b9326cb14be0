"""tools/plan.py by its command line."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from plan_case import PAPER

from megatron_sip.checkpoint.hf_config import hf_config_from_model
from megatron_sip.config.fields import settings
from megatron_sip.config.groups import Config
from megatron_sip.config.presets import presets
from megatron_sip.cost.plan import make_plan
from tools import plan

PAPER_FLAGS = "--model-preset llama-1.4b --vocab-size 32000 --gpus 64 --pool rollout".split()
# The plan is for GPUs of a kind that it names, and for the paper's batch; a run does not know what it runs on.
OWN_DEFAULTS = {"global_batch_size", "train_iters", "recompute_granularity", "peak_tflops"}


def test_the_plan_of_the_command_line_is_that_of_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "plan.json"), "--report", str(tmp_path / "plan.md")]
    assert plan.main([*PAPER_FLAGS, "--levers", *files]) == 0
    data = json.loads((tmp_path / "plan.json").read_text())
    expected = make_plan(PAPER)
    assert data["outcome"]["gpu_hours"] == pytest.approx(expected.outcome.gpu_hours)
    assert data["case"]["cluster"]["gpus"] == 64
    shown, page = capsys.readouterr().out, (tmp_path / "plan.md").read_text()
    for text in (shown, page):
        assert "Judge servers, predicted" in text
        assert "arXiv 2407.21783" in text
        assert "nothing of it was measured" in text
        assert "logit, both orders" in text


def test_given_values_reach_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    flags = "--token-budget 1e9 --no-shared-prefix --judge-servers 7 --train-mfu 0.5 --overlap-grad-reduce".split()
    assert plan.main([*PAPER_FLAGS, *flags, "--pool", "original", "rewrite", "rollout", "--json", str(out)]) == 0
    case = json.loads(out.read_text())["case"]
    assert (case["run"]["token_budget"], case["run"]["shared_prefix"]) == (1e9, False)
    assert (case["servers"]["judge_servers"], case["efficiency"]["train_mfu"]) == (7, 0.5)
    assert case["run"]["overlap_grad_reduce"] is True
    assert case["questions"]["pool"] == ["original", "rewrite", "rollout"]


def test_sizes_of_a_folder_and_by_hand_are_those_of_the_preset(tmp_path: Path) -> None:
    preset = presets()["llama3.2-1b"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({**hf_config_from_model(preset, torch.bfloat16), "architectures": ["LlamaForCausalLM"]})
    )
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    by_hand = "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32".split()
    by_hand += "--num-query-groups 8 --vocab-size 128256 --no-untie-embeddings-and-output-weights".split()
    found = []
    for name, flags in enumerate((["--model-preset", "llama3.2-1b"], ["--load", str(tmp_path / "hf")], by_hand)):
        out = tmp_path / f"{name}.json"
        assert plan.main([*flags, "--json", str(out)]) == 0
        found.append(json.loads(out.read_text())["case"]["model"])
    assert found[0] == found[1] == found[2]
    assert plan.main(["--load", str(tmp_path / "hf"), "--num-layers", "4"]) == 2


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpus", "8"]) == 2
    assert "--num-layers" in capsys.readouterr().err
    assert plan.main([*PAPER_FLAGS, "--gpus", "63"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan: --global-batch-size 256 is no multiple")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        plan.main([*PAPER_FLAGS, "--vocab-size", "0"])
    assert "--vocab-size: 0 is below 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert plan.main([*PAPER_FLAGS, "--json", str(tmp_path / "file" / "plan.json")]) == 2
    assert "cannot write --json" in capsys.readouterr().err


def test_flags_that_the_trainer_has_mean_the_same_there() -> None:
    known, config = settings(), Config()
    shared = 0
    for _, kind in plan.GROUPS:
        for item in fields(kind):
            if item.name in known and item.name not in OWN_DEFAULTS:
                assert item.default == getattr(getattr(config, known[item.name].group), item.name), item.name
                shared += 1
    assert shared > 15
