from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluation.bootstrap import Estimate, bootstrap_difference, bootstrap_mean
from megatron_sip.evaluation.text_measures import distinct, has_loop, measure_texts
from megatron_sip.evaluation.unigram import count_tokens, unigram_nats_per_token
from megatron_sip.ngrams import repeated_share


def test_distinct_by_hand():
    texts = [["a", "b", "a"], ["a", "b"], []]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # ab, ba, ab
    assert distinct(texts, 3) == 1.0
    assert distinct(texts, 4) is None


def test_repetition_by_hand():
    assert repeated_share("a b c d a b c d".split()) == 1 - 4 / 5
    assert repeated_share("x x x x x x".split()) == 1 - 1 / 3
    assert repeated_share("one two three four five".split()) == 0
    assert repeated_share("one two three".split()) is None


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("and so on " * 3, True),  # 9 words, three turns
        ("and so on " * 2, False),
        ("the the the", False),  # three turns, but too short to call it a loop
        ("no " * 8, True),
        ("Before it. " + "we go round and round again " * 3 + "and out of it.", True),
        ("a" * 64, True),
        ("a" * 63, False),
        ("哈哈" * 40, True),
        ("The cat sat on the mat and the dog sat on the log and the bird sat on the wire.", False),
        ("", False),
    ],
)
def test_loops(text: str, loops: bool):
    assert has_loop(text) is loops


def test_measures_of_a_set():
    measures = measure_texts(["a b c d a b c d", "", "one two", "no " * 12])
    assert measures.texts == 4
    assert measures.empty == 0.25
    assert measures.looping == 0.25
    assert measures.mean_words == (8 + 0 + 2 + 12) / 4
    assert measures.repetition == pytest.approx((0.2 + (1 - 1 / 9)) / 2)
    nothing = measure_texts([])
    assert (nothing.repetition, nothing.empty, nothing.distinct[1], nothing.mean_words) == (None,) * 4


def test_bootstrap_is_seeded_and_agrees_with_the_normal_interval():
    values = np.random.default_rng(5).normal(2.0, 1.0, size=400)
    first, again = bootstrap_mean(values, seed=1), bootstrap_mean(values, seed=1)
    assert first == again
    assert first is not None
    assert first != bootstrap_mean(values, seed=2)
    half = 1.96 * values.std() / math.sqrt(400)
    assert first.mean == pytest.approx(values.mean())
    assert first.low == pytest.approx(values.mean() - half, abs=0.01)
    assert first.high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_covers_the_truth_about_95_times_of_100():
    generator = np.random.default_rng(11)
    hits, trials = 0, 400
    for trial in range(trials):
        sample = generator.random(80) < 0.6
        estimate = bootstrap_mean(sample.astype(float), seed=trial, resamples=800)
        assert estimate is not None
        hits += estimate.low <= 0.6 <= estimate.high
    # Binomial(400, 0.94): the bounds are about three standard deviations away.
    assert 0.905 <= hits / trials <= 0.98


def test_paired_difference_is_narrower_than_unpaired():
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 1, 200)
    first, second = hard + 0.1 + generator.normal(0, 0.05, 200), hard + generator.normal(0, 0.05, 200)
    paired = bootstrap_difference(first, second, seed=0)
    assert paired is not None
    assert paired.low > 0.08
    assert paired.high < 0.12
    shuffled = bootstrap_difference(first, generator.permutation(second), seed=0)
    assert shuffled is not None
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_small_and_bad_samples():
    assert bootstrap_mean([], seed=0) is None
    assert bootstrap_mean([0.5], seed=0) == Estimate(0.5, None, None, 1)
    assert bootstrap_mean([1.0, 1.0, 1.0], seed=0) == Estimate(1.0, 1.0, 1.0, 3)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_mean([1.0, math.nan], seed=0)
    with pytest.raises(ValueError, match="match"):
        bootstrap_difference([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="shape"):
        bootstrap_mean(np.zeros((2, 2)), seed=0)


def test_unigram_by_hand():
    train = np.array([3, 1, 0, 0])  # add-one: 4/8, 2/8, 1/8, 1/8
    held_out = np.array([2, 1, 1, 0])
    expected = -(2 * math.log(0.5) + math.log(0.25) + math.log(0.125)) / 4
    assert unigram_nats_per_token(train, held_out) == pytest.approx(expected)
    uniform = unigram_nats_per_token(np.zeros(50, dtype=np.int64), np.ones(50, dtype=np.int64))
    assert uniform == pytest.approx(math.log(50))


def test_unigram_cannot_beat_the_entropy_of_its_own_counts():
    counts = np.array([50, 30, 20])
    p = counts / 100
    assert unigram_nats_per_token(counts, counts) >= -(p * np.log(p)).sum()


def test_counts_of_documents():
    documents = [np.array([0, 1, 1], dtype=np.uint16), np.array([], dtype=np.uint16), np.array([3], dtype=np.int32)]
    assert count_tokens(documents, 5).tolist() == [1, 2, 0, 1, 0]
    with pytest.raises(DataError, match="--tokenizer-model"):
        count_tokens([np.array([5])], 5)
    with pytest.raises(DataError, match="held-out"):
        unigram_nats_per_token(np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.int64))
