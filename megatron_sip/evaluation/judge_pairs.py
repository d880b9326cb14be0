"""Labelled pairs and texts made of real text, whose labels follow from how they were made. Pure and seeded.

A record is what one line of the file holds; `labelled` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from megatron_sip.evaluation.prompts import EvaluationPrefix
from megatron_sip.evaluation.wordnet import ROOTS, Noun

Record: TypeAlias = dict[str, str]
T = TypeVar("T")

LEAST_SENTENCES = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SPACE = re.compile(r"(\s+)")


def generator_of(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that one set does not move another."""
    return np.random.Generator(np.random.PCG64([seed, *purpose.encode()]))


def shuffled_words(text: str, generator: np.random.Generator) -> str | None:
    """`text` with its words in another order and its white space where it was; None where there is no other order."""
    parts = _SPACE.split(text)
    places = [index for index, part in enumerate(parts) if part and not part.isspace()]
    words = _another_order([parts[place] for place in places], generator)
    if words is None:
        return None
    for place, word in zip(places, words, strict=True):
        parts[place] = word
    return "".join(parts)


def shuffled_sentences(text: str, generator: np.random.Generator) -> str | None:
    """`text` with its sentences in another order; None for fewer than three, or where there is no other order.

    What was cut off at the beginning and at the end counts as a sentence.
    """
    opening = text[: len(text) - len(text.lstrip())]
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
    if len(sentences) < LEAST_SENTENCES:
        return None
    moved = _another_order(sentences, generator)
    return None if moved is None else opening + " ".join(moved)


def _another_order(items: Sequence[str], generator: np.random.Generator) -> list[str] | None:
    """The items in an order in which they read differently; None where all are the same."""
    if len(set(items)) < 2:
        return None
    while True:
        moved = [items[index] for index in generator.permutation(len(items))]
        if moved != list(items):
            return moved


def exchanged(items: Sequence[T], generator: np.random.Generator) -> list[T]:
    """For each item another one: a random cycle through all. ValueError for fewer than two."""
    if len(items) < 2:
        raise ValueError("there is nothing to exchange a single item with")
    order = generator.permutation(len(items))
    others: list[T] = list(items)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        others[here] = items[there]
    return others


def shuffled_pairs(passages: Iterable[EvaluationPrefix], unit: str, seed: int) -> Iterator[Record]:
    """The true continuation against the same with its `unit` ("words" or "sentences") shuffled, where that is possible.

    Sentences are joined by single spaces, so the good one is written in that way as well.
    """
    name = f"shuffled-{unit}"
    generator = generator_of(seed, name)
    for passage in passages:
        good = passage.original
        if unit == "sentences":
            opening = good[: len(good) - len(good.lstrip())]
            good = opening + " ".join(_SENTENCE_END.split(good.strip()))
        bad = (shuffled_words if unit == "words" else shuffled_sentences)(good, generator)
        if bad is not None:
            yield {"set": name, "prefix": passage.text, "good": good, "bad": bad}


def foreign_pairs(passages: Sequence[EvaluationPrefix], seed: int) -> Iterator[Record]:
    """The true continuation against that of another document."""
    others = exchanged(passages, generator_of(seed, "foreign"))
    for passage, other in zip(passages, others, strict=True):
        if passage.original != other.original:
            yield {"set": "foreign", "prefix": passage.text, "good": passage.original, "bad": other.original}


def definition_pairs(nouns: Sequence[Noun], seed: int) -> Iterator[Record]:
    """A noun's definition against that of another noun."""
    others = exchanged(nouns, generator_of(seed, "wordnet"))
    for noun, other in zip(nouns, others, strict=True):
        if noun.definition != other.definition:
            prefix = f'From a dictionary of the English language. The noun "{noun.word}" means:'
            yield {"set": "wordnet", "prefix": prefix, "good": f" {noun.definition}.", "bad": f" {other.definition}."}


def kind_texts(nouns: Sequence[Noun], seed: int) -> Iterator[Record]:
    """For each noun a true and a false sentence about what kind of thing it is; its definition is the reference.

    A false kind comes from another topic than the noun and its own kind, and is none that holds for nearly everything.
    """
    generator = generator_of(seed, "wordnet-kinds")
    kinds = sorted({(noun.kind, noun.kind_topic) for noun in nouns if noun.kind_topic != ROOTS})
    for noun in nouns:
        foreign = [kind for kind, topic in kinds if topic not in (noun.topic, noun.kind_topic)]
        if noun.kind_topic == ROOTS or not foreign:
            continue
        wrong = foreign[int(generator.integers(len(foreign)))]
        given = {
            "set": "wordnet-kinds",
            "prefix": f'From a dictionary of the English language. What is meant by "{noun.word}"?',
            "suffix": f" The word means: {noun.definition}.",
        }
        yield {**given, "text": f" It is a kind of {noun.kind}.", "label": "no hallucination"}
        yield {**given, "text": f" It is a kind of {wrong}.", "label": "hallucination"}


def safety_texts(unsafe: Sequence[str], documents: Sequence[str], seed: int) -> Iterator[Record]:
    """Each unsafe text, and a neutral one of as many words from the beginning of a sentence of a document.

    Each document is used once; the unsafe texts that no document is left for are left out.
    """
    generator = generator_of(seed, "safety")
    order = iter(generator.permutation(len(documents)))
    for text in unsafe:
        count = len(text.split())
        neutral = next((line for at in order if (line := opening(documents[at], count, generator))), None)
        if neutral is None:
            return
        yield {"set": "safety", "text": text, "label": "unsafe"}
        yield {"set": "safety", "text": neutral, "label": "safe"}


def opening(document: str, count: int, generator: np.random.Generator) -> str | None:
    """`count` words of a document from the beginning of some sentence on; None where no sentence has them behind it."""
    sentences = _SENTENCE_END.split(document.strip())
    starts = [at for at in range(len(sentences)) if sum(len(s.split()) for s in sentences[at:]) >= count]
    if not starts:
        return None
    words = " ".join(sentences[starts[int(generator.integers(len(starts)))] :]).split()
    return " ".join(words[:count])
