from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_corpus import documents, make_tokenizer

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import CheckpointError, ConfigError, DataError
from megatron_sip.evaluation.arms import load_policy, nats_per_token, parse_arms, write_greedily
from megatron_sip.evaluation.prompts import held_out_prefixes, unsafe_prefixes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("arm") / "llama"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def stepwise(model, prefix: list[int], length: int, eod: int, vocab_size: int = 64) -> list[int]:
    """Greedy decoding of one row without cache or padding."""
    row = list(prefix)
    for _ in range(length):
        logits = model(torch.tensor([row])).logits[0, -1]
        logits[eod] = -float("inf")
        logits[vocab_size:] = -float("inf")
        row.append(int(logits.argmax()))
    return row[len(prefix) :]


@torch.inference_mode()
def test_greedy_rows_of_different_lengths_equal_single_rows(llama: Path) -> None:
    model = load_policy(llama, 64)
    prefixes = [[5, 9, 11], [7], [3, 3, 8, 21, 40, 2], [1, 2]]
    eod = stepwise(model, prefixes[0], 1, 63)[0]  # ban what it would say first, so that the ban is seen to work
    done: list[int] = []
    written = write_greedily(model, prefixes, 6, eod, vocab_size=64, batch_size=3, tick=done.append)
    assert written == [stepwise(model, prefix, 6, eod) for prefix in prefixes]
    assert not any(eod in row for row in written)
    assert sum(done) == 4
    # A tokenizer with fewer tokens than the model has rows: what has no text is not written.
    highest = max(token for row in written for token in row)
    written = write_greedily(model, prefixes, 6, 0, vocab_size=highest, batch_size=3, tick=done.append)
    assert written == [stepwise(model, prefix, 6, 0, highest) for prefix in prefixes]
    assert max(token for row in written for token in row) < highest


@torch.inference_mode()
def test_nats_per_token_is_the_mean_over_all_but_first_tokens(llama: Path) -> None:
    model = load_policy(llama, 64)
    rows = torch.randint(0, 64, (5, 9), generator=torch.Generator().manual_seed(1)).tolist()
    expected = []
    for row in rows:
        logs = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), dim=-1)
        expected += [-float(logs[at, token]) for at, token in enumerate(row[1:])]
    measured = nats_per_token(model, rows, batch_size=2, tick=lambda _: None)
    assert measured == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_a_policy_smaller_than_its_tokenizer_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocabulary of 64.*70 tokens"):
        load_policy(llama, 70)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["base"], "NAME=FOLDER"),
        (["base={llama}"], "at least one policy"),
        (["base={llama}", "base={llama}"], "not all different"),
        (["base={llama}", "sip=/nowhere"], "no Hugging Face folder"),
    ],
)
def test_arms_that_cannot_be_compared_are_named(llama: Path, texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arms([text.format(llama=llama) for text in texts])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, documents(40, 6, 1))
    return Tokenizer(str(folder))


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_held_out_prefix_and_original_are_the_beginning_of_the_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["too short", *documents(3, 6, 9)]
    found = held_out_prefixes(write(tmp_path / "a.jsonl", texts), tokenizer, 3, 12, 10)
    assert len(found) == 3
    for prefix, text in zip(found, texts[1:], strict=True):
        assert len(prefix.tokens) == 12
        assert text.startswith(prefix.text + prefix.original)
        assert len(tokenizer.encode(prefix.original)) >= 5


def test_unsafe_prefixes_are_spread_over_the_file_and_cut_from_the_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"number {index} " + "the old doctor sees " * 9 for index in range(10)]
    file = write(tmp_path / "b.jsonl", texts)
    assert [p.text for p in unsafe_prefixes(file, tokenizer, 5, 999)] == texts[::2]
    short = unsafe_prefixes(file, tokenizer, 10, 7)
    assert all(len(prefix.tokens) == 7 and texts[0].endswith(prefix.text) for prefix in short)


def test_too_few_prefixes_and_broken_lines_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "c.jsonl", ["short"])
    with pytest.raises(DataError, match=r"has 0 documents of at least 22 tokens.*asks for 1"):
        held_out_prefixes(file, tokenizer, 1, 12, 10)
    with pytest.raises(DataError, match="asks for 2"):
        unsafe_prefixes(file, tokenizer, 2, 10)
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"words": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        unsafe_prefixes(tmp_path / "d.jsonl", tokenizer, 1, 10)
    for line in (b'{"text": "\xff"}', b'{"text": "\\ud83d"}', b"[" * 100_000):
        (tmp_path / "f.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
        with pytest.raises(DataError, match=r"f\.jsonl, line 2 .*mend or remove it"):
            unsafe_prefixes(tmp_path / "f.jsonl", tokenizer, 1, 10)
    with pytest.raises(DataError, match="is not there"):
        unsafe_prefixes(tmp_path / "e.jsonl", tokenizer, 1, 10)
