"""The tokenizer goes with the exported weights, and its special ids stand in config.json."""

from __future__ import annotations

import json

import pytest
from hf_toys import empty_stage, padded, toy_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sip.checkpoint.hf import export_hf, load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.checkpoint.hf_names import llama_shape
from megatron_sip.errors import CheckpointError


@pytest.fixture
def policy(tmp_path):
    toy_llama(tmp_path / "hf")
    model = model_config_from_hf(tmp_path / "hf")
    stage = empty_stage(padded(llama_shape(model), 1), 1)
    load_hf_weights(tmp_path / "hf", stage, model)
    return stage, model


def make_tokenizer(folder, size):
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w7").save_pretrained(folder)
    (folder / "notes.txt").write_text("no part of a tokenizer")
    return folder


def test_files_are_copied_and_ids_are_written(policy, tmp_path):
    source = make_tokenizer(tmp_path / "tokenizer", 90)
    export_hf(tmp_path / "out", *policy, tokenizer_folder=source)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (None, 7, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)("w3 w88").input_ids == [3, 88]
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_a_tokenizer_that_cannot_belong_to_the_model_is_refused(policy, tmp_path):
    large = make_tokenizer(tmp_path / "large", 102)
    with pytest.raises(CheckpointError, match="has 102 tokens, the model's --vocab-size is 101"):
        export_hf(tmp_path / "out", *policy, tokenizer_folder=large)
    (large / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_hf(tmp_path / "out", *policy, tokenizer_folder=large)
    (large / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        export_hf(tmp_path / "out", *policy, tokenizer_folder=large)
    assert not (tmp_path / "out").exists()
