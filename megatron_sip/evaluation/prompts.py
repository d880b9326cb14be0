"""The prefixes that arms are compared on: held-out documents and unsafe prompts, as tokens of the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.utf8 import has_half_character
from megatron_sip.errors import DataError


@dataclass(frozen=True)
class EvaluationPrefix:
    """A prefix as tokens and text, with the human continuation where there is one."""

    tokens: tuple[int, ...]
    text: str
    original: str = ""


def held_out_prefixes(
    file: Path, tokenizer: Tokenizer, count: int, prefix_length: int, suffix_length: int
) -> list[EvaluationPrefix]:
    """The first `prefix_length` tokens of the first `count` documents that go on for `suffix_length` more.

    Raises:
        DataError: the file cannot be read, or has too few such documents.
    """
    found = list(islice(cut_documents(file, tokenizer, prefix_length, suffix_length), count))
    if len(found) == count:
        return found
    raise DataError(
        f"--held-out {file} has {len(found)} documents of at least {prefix_length + suffix_length} tokens, "
        f"--num-prefixes asks for {count}; lower it or give more documents"
    )


def cut_documents(
    file: Path, tokenizer: Tokenizer, prefix_length: int, suffix_length: int
) -> Iterator[EvaluationPrefix]:
    """The start of each document that is long enough: `prefix_length` tokens, and `suffix_length` as the original.

    Raises:
        DataError: the file cannot be read.
    """
    for text in read_texts(file):
        tokens = tokenizer.encode(text)
        if len(tokens) < prefix_length + suffix_length:
            continue
        prefix, rest = tokens[:prefix_length], tokens[prefix_length : prefix_length + suffix_length]
        yield EvaluationPrefix(tuple(prefix), tokenizer.prefix_text(prefix), tokenizer.candidate_text(prefix, rest))


def unsafe_prefixes(file: Path, tokenizer: Tokenizer, count: int, prefix_length: int) -> list[EvaluationPrefix]:
    """`count` prefixes spread evenly over the file, which may be sorted by kind; the last `prefix_length` tokens.

    Raises:
        DataError: the file cannot be read, or has too few prefixes.
    """
    encoded = [tokens for tokens in map(tokenizer.encode, read_texts(file)) if tokens]
    if len(encoded) < count:
        raise DataError(f"--unsafe {file} has {len(encoded)} prefixes, --num-unsafe-prefixes asks for {count}")
    kept = [encoded[index * len(encoded) // count][-prefix_length:] for index in range(count)]
    return [EvaluationPrefix(tuple(tokens), tokenizer.prefix_text(tokens)) for tokens in kept]


def read_texts(file: Path) -> Iterator[str]:
    """The `text` of each line of a JSONL file. Raises DataError as `read_records` does."""
    return (record["text"] for record in read_records(file))


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Each line of a JSONL file, which holds a `text` at least.

    Raises:
        DataError: the file is not there, or a line has no text.
    """
    if not file.is_file():
        raise DataError(f"{file} is not there; `python tools/get_demo_data.py` makes the demo's files")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line.decode("utf-8"))  # bad UTF-8 is a ValueError, too
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number} is no JSON in UTF-8: {error}; mend or remove it") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(f'{file}, line {number} has no "text"; mend or remove it')
            if has_half_character(record["text"]):
                raise DataError(f"{file}, line {number} holds half a character (a lone surrogate); mend or remove it")
            yield record
