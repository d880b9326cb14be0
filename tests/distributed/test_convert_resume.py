"""Checkpoints that were converted, in runs: one with padded query groups goes on without, one out of a Llama begins.

Two launches: a run at TP 2 whose three query groups are padded to four, and every run that goes on from it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Command, Outcome, run_commands
from forks import forked
from spawn import complaint
from tiny_corpus import make_corpus
from tiny_run import DATA, TRAINING
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.checkpoint.hf import Conversion, convert
from megatron_sip.checkpoint.stream_read import StoredTensors
from megatron_sip.errors import CheckpointError

RUN = [*DATA, *TRAINING, "--train-iters", "4", "--rollout-batch-size", "8"]
PP2 = ["--pipeline-model-parallel-size", "2"]


class Ran:
    """Folders of the runs, and what they said."""

    def __init__(self, root: Path, outcomes: dict[str, list[Outcome]]) -> None:
        self.root = root
        self.outcomes = outcomes

    def metrics(self, name: str) -> list[dict]:
        lines = (self.root / f"{name}.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("converted")
    data_path, tokenizer = make_corpus(root / "data")
    llama = LlamaConfig(
        vocab_size=331,
        hidden_size=36,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    LlamaForCausalLM(llama).save_pretrained(root / "hf")

    def flags(name: str, load: str, *more: str) -> list[str]:
        own = ["--data-path", data_path, "--tokenizer-model", tokenizer, "--metrics-file", str(root / f"{name}.jsonl")]
        return [*own, *RUN, "--load", str(root / load), "--save", str(root / name), *more]

    padded = ["--tensor-model-parallel-size", "2", "--pad-query-groups"]
    first = forked(2, "-m", "megatron_sip.pretrain", *flags("padded", "hf", *padded, "--save-interval", "2"))
    assert first.returncode == 0, complaint(first)
    convert(Conversion("mcore", "mcore", root / "padded", root / "plain", iteration=2, tensor_parallel=1))
    convert(Conversion("mcore", "mcore", root / "plain", root / "padded-again", tensor_parallel=2))
    convert(Conversion("hf", "mcore", root / "hf", root / "base", tensor_parallel=2))
    convert(Conversion("mcore", "mcore", root / "base", root / "base-plain", tensor_parallel=1, pipeline_parallel=2))
    # What the Llama's config.json told the first run, the others take from the checkpoint's run_config.yaml.
    model = ["--config", str(root / "plain" / "iter_0000002" / "run_config.yaml"), "--no-pad-query-groups", *PP2]
    commands = [
        Command("mismatch", flags("mismatch", "padded", *model), str(root / "mismatch")),
        Command("went-on", flags("went-on", "plain", *model), str(root / "data")),
        Command("began", flags("began", "base-plain", *model, "--train-iters", "2"), str(root / "data")),
    ]
    return Ran(root, run_commands(commands, 2, root / "commands"))


def test_a_mismatch_names_the_command_that_mends_it(ran: Ran) -> None:
    outcomes = ran.outcomes["mismatch"]
    assert all(outcome.status != 0 for outcome in outcomes)
    said = "".join(outcome.stderr for outcome in outcomes)
    assert "4 query groups, of which the model has 3; size 1 needs 3. Convert it: python tools/checkpoint/conv" in said
    assert "--iteration 4 --save-dir NEW_FOLDER --target-tensor-parallel-size 1" in said
    assert "Traceback" not in said
    assert not list((ran.root / "mismatch").glob("iter_*"))


def test_a_run_with_padded_groups_goes_on_without(ran: Ran) -> None:
    outcome = ran.outcomes["went-on"][0]
    assert outcome.status == 0, outcome.stderr
    assert "at iteration 2 (8 samples consumed)" in outcome.stdout
    assert "anew" not in outcome.stdout
    assert "starts as a copy" not in outcome.stdout
    before, after = ran.metrics("padded"), ran.metrics("went-on")
    assert [line["iteration"] for line in after] == [3, 4]
    for line, wanted in zip(after, before[2:], strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)


def test_a_run_begins_with_a_converted_llama_as_with_the_llama_itself(ran: Ran) -> None:
    outcome = ran.outcomes["began"][0]
    assert outcome.status == 0, outcome.stderr
    assert "start anew (it holds nothing else)" in outcome.stdout
    before, after = ran.metrics("padded"), ran.metrics("began")
    assert [line["iteration"] for line in after] == [1, 2]
    assert after[0]["loss"] == pytest.approx(before[0]["loss"], rel=1e-4)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(folder)
    return {name: stored.read(name, (0,) * len(stored.size(name)), stored.size(name)) for name in stored.names}


def test_the_whole_state_comes_back_when_padding_goes_and_comes(ran: Ran) -> None:
    before, after = (everything(ran.root / name / "iter_0000002") for name in ("padded", "padded-again"))
    kinds = {name.split("decoder.layers.mlp.linear_fc1.weight")[0] for name in before if "fc1.weight" in name}
    assert kinds == {"", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "reference."}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = 331 if "embedding" in name or "output_layer" in name else None  # padded rows may hold anything
        assert torch.equal(after[name][:rows], tensor[:rows]), name
    common, again = (
        (ran.root / name / "iter_0000002" / "common.pt").read_bytes() for name in ("padded", "padded-again")
    )
    assert common == again


def test_what_a_save_stores_of_the_policy_is_what_a_conversion_writes(ran: Ran) -> None:
    """A canary: another megatron-core may name or shape things otherwise."""
    saved, made = (StoredTensors(ran.root / name) for name in ("padded/iter_0000002", "base/iter_0000000"))
    assert made.names == {name for name in saved.names if not name.startswith(("optimizer.", "reference."))}
    assert {name: made.size(name) for name in made.names} == {name: saved.size(name) for name in made.names}
    assert sorted(made.objects) == sorted(saved.objects)
    for name in made.objects:
        assert torch.load(saved.read_object(name), weights_only=True) == torch.load(
            made.read_object(name), weights_only=True
        )
    notes = [(ran.root / name / "metadata.json").read_text() for name in ("padded/iter_0000002", "base/iter_0000000")]
    assert notes[0] == notes[1]


def test_another_type_leaves_the_optimizer_behind_only_when_told(ran: Ran, tmp_path: Path) -> None:
    job = Conversion("mcore", "mcore", ran.root / "padded", tmp_path / "half", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="say --weights-only to convert the policy alone, or leave --dtype out"):
        convert(job)
    assert not job.save_dir.exists()
    convert(Conversion(**(vars(job) | {"weights_only": True})))
    stored = StoredTensors(job.save_dir / "iter_0000000")
    assert {stored.dtype(name) for name in stored.names} == {torch.bfloat16}
    assert not [name for name in stored.names if name.startswith(("optimizer.", "reference."))]
