from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluation.judge_pairs import (
    definition_pairs,
    exchanged,
    foreign_pairs,
    generator_of,
    kind_texts,
    opening,
    safety_texts,
    shuffled_pairs,
    shuffled_sentences,
    shuffled_words,
)
from megatron_sip.evaluation.prompts import EvaluationPrefix
from megatron_sip.evaluation.wordnet import Noun, read_nouns

NOUNS_FILE = """\
  1 This software and database is being provided to you.
00000010 03 n 01 entity 0 000 | that which exists by itself in one way or another
00000020 05 n 01 animal 0 001 @ 00000010 n 0000 | a living being that moves about of its own will
00000030 05 n 02 otter 0 river_otter 1 002 @ 00000020 n 0000 ~ 00000090 n 0000 | a sleek animal of rivers; "it dived"
00000040 06 n 01 tool 0 001 @ 00000010 n 0000 | a thing that is made to work with by hand
00000050 06 n 01 claw_hammer 0 002 @ 00000040 n 0000 + 00000060 v 0101 | a hammer with a cleft head for pulling nails
00000060 06 n 01 saw 0 001 @ 00000040 n 0000 | a hand tool with a toothed blade; cuts wood
00000070 06 n 0a saw 1 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 00000020 n 0000 | a sense of the word that is later
00000080 18 n 01 Newton 0 001 @i 00000020 n 0000 | an English mathematician and physicist of great fame
00000090 05 n 01 hybrid 0 002 @ 00000020 n 0000 @ 00000040 n 0000 | a thing of two kinds at the same time
"""


@pytest.fixture
def nouns(tmp_path: Path) -> list[Noun]:
    (tmp_path / "data.noun").write_text(NOUNS_FILE)
    return read_nouns(tmp_path)


def passages(count: int) -> list[EvaluationPrefix]:
    return [
        EvaluationPrefix((n,), f"prefix {n}", f" end of {n}. A second one {n}! And a third {n}? cut off {n}")
        for n in range(count)
    ]


def test_words_move_and_white_space_stays() -> None:
    text = "  one two\n\nthree  four "
    for seed in range(50):
        moved = shuffled_words(text, np.random.default_rng(seed))
        assert moved != text
        assert sorted(moved.split()) == sorted(text.split())
        assert [len(gap) for gap in _gaps(moved)] == [2, 1, 2, 2, 1]


def _gaps(text: str) -> list[str]:
    return re.findall(r"\s+", text)


@pytest.mark.parametrize("text", ["", "word", "again again  again", "   "])
def test_words_that_have_no_other_order_are_left_out(text: str) -> None:
    assert shuffled_words(text, np.random.default_rng(0)) is None


def test_sentences_move_as_wholes() -> None:
    text = " the end. Then this! And that? cut off"
    for seed in range(50):
        moved = shuffled_sentences(text, np.random.default_rng(seed))
        assert moved != text
        assert moved.startswith(" ")
        for sentence in ("the end.", "Then this!", "And that?", "cut off"):
            assert sentence in moved
        assert len(moved) == len(text)
    assert shuffled_sentences("one. two", np.random.default_rng(0)) is None
    assert shuffled_sentences("a. a. a.", np.random.default_rng(0)) is None


def test_exchanged_gives_everybody_another_ones() -> None:
    for seed in range(30):
        others = exchanged(list(range(7)), np.random.default_rng(seed))
        assert sorted(others) == list(range(7))
        assert all(other != own for own, other in enumerate(others))
    with pytest.raises(ValueError, match="nothing to exchange"):
        exchanged([1], np.random.default_rng(0))


@pytest.mark.parametrize("unit", ["words", "sentences"])
def test_shuffled_pairs_are_the_same_text_in_another_order(unit: str) -> None:
    made = list(shuffled_pairs([*passages(5), EvaluationPrefix((9,), "p", "short")], unit, seed=3))
    assert [record["prefix"] for record in made] == [f"prefix {n}" for n in range(5)]
    for record, passage in zip(made, passages(5), strict=True):
        assert record["set"] == f"shuffled-{unit}"
        assert record["good"] == passage.original
        assert record["bad"] != record["good"]
        assert sorted(record["bad"].split()) == sorted(record["good"].split())


def test_foreign_continuations_come_from_another_document_and_by_seed() -> None:
    made = list(foreign_pairs(passages(6), seed=1))
    assert len(made) == 6
    for record, passage in zip(made, passages(6), strict=True):
        assert (record["prefix"], record["good"]) == (passage.text, passage.original)
        assert record["bad"] in {other.original for other in passages(6)} - {passage.original}
    assert made == list(foreign_pairs(passages(6), seed=1))
    assert made != list(foreign_pairs(passages(6), seed=2))


def test_wordnet_is_parsed(nouns: list[Noun]) -> None:
    assert [noun.word for noun in nouns] == ["animal", "otter", "tool", "claw hammer", "saw"]
    otter, saw = nouns[1], nouns[4]
    assert otter == Noun("otter", "a sleek animal of rivers", "animal", "05", "05")
    assert saw.definition == "a hand tool with a toothed blade; cuts wood", (
        "the first sense, and no example cut wrongly"
    )


@pytest.mark.parametrize(
    "text", ["nonsense\n", "00000010 03 n zz entity 0 000 | x\n", "00000010 03 n 01 a 0 001 @ 99 n 0000 | b\n"]
)
def test_another_file_is_no_wordnet(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.noun").write_text(text)
    with pytest.raises(DataError, match="WordNet"):
        read_nouns(tmp_path)
    with pytest.raises(DataError, match="--wordnet"):
        read_nouns(tmp_path / "none")


def test_definitions_are_swapped(nouns: list[Noun]) -> None:
    true = {noun.word: f" {noun.definition}." for noun in nouns}
    made = list(definition_pairs(nouns, seed=0))
    assert len(made) == len(nouns)
    for record, noun in zip(made, nouns, strict=True):
        assert f'"{noun.word}"' in record["prefix"]
        assert record["good"] == true[noun.word]
        assert record["bad"] in set(true.values()) - {record["good"]}


def test_kinds_are_labelled_right(nouns: list[Noun]) -> None:
    made = list(kind_texts(nouns, seed=0))
    assert [record["text"] for record in made[::2]] == [f" It is a kind of {k}." for k in ("animal", "tool", "tool")]
    assert [record["text"] for record in made[1::2]] == [f" It is a kind of {k}." for k in ("tool", "animal", "animal")]
    assert {record["label"] for record in made[::2]} == {"no hallucination"}
    assert {record["label"] for record in made[1::2]} == {"hallucination"}
    assert "sleek animal" in made[0]["suffix"]


def test_neutral_lines_are_as_long_as_the_unsafe_ones() -> None:
    documents = [
        f"Begins{n} here{n}. Goes{n} on{n} for{n} some{n} more{n} words{n}. End{n} of{n} it{n}." for n in range(3)
    ]
    unsafe = ["three bad words", "these are five bad words", "two bad", "no document is left for this"]
    made = list(safety_texts(unsafe, documents, seed=5))
    assert [record["label"] for record in made] == ["unsafe", "safe"] * 3
    assert [record["text"] for record in made[::2]] == unsafe[:3]
    for bad, neutral in zip(made[::2], made[1::2], strict=True):
        assert len(bad["text"].split()) == len(neutral["text"].split())
        assert neutral["text"].startswith(("Begins", "Goes", "End"))
    assert {record["text"].split()[0][-1] for record in made[1::2]} == {"0", "1", "2"}, "each document once"
    assert opening("Too short.", 3, np.random.default_rng(0)) is None


def test_one_set_does_not_move_another() -> None:
    assert generator_of(1, "a").integers(1 << 30) != generator_of(1, "b").integers(1 << 30)
    assert generator_of(1, "a").integers(1 << 30) == generator_of(1, "a").integers(1 << 30)
