"""The seeded order, the share of each rank, the cache and the resume."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_helpers import corpus_of, write_corpus

from megatron_sip.config.groups import DataConfig
from megatron_sip.data.documents import Corpus
from megatron_sip.data.order import count_shared, deal_apart, slot_batches
from megatron_sip.data.stream import CutStream
from megatron_sip.errors import ConfigError, DataError

LENGTHS = [0, 3, 30, 12, 61, 25, 12, 44, 13, 90]


def _config(**settings) -> DataConfig:
    return DataConfig(**{"seq_length": 24, "suffix_length": 8, "min_prefix_length": 4, **settings})


def _stream(tmp_path, tokenizer, *, lengths=LENGTHS, seed=5, batch=4, **settings) -> CutStream:
    return CutStream(corpus_of(tmp_path, tokenizer, lengths), tokenizer, _config(**settings), seed, batch)


def _key(cut):
    return cut.sample_index, cut.document, cut.position, cut.prefix.tolist(), cut.suffix.tolist()


@pytest.mark.parametrize("mode", ["random", "walk"])
def test_ranks_together_give_the_same_list_at_every_size(tmp_path, byte_level, mode):
    stream = _stream(tmp_path, byte_level, split_mode=mode, batch=12)
    for consumed in (0, 12, 36, 12 * 7):
        whole = [_key(cut) for cut in stream.batch(consumed)]
        assert [key[0] for key in whole] == list(range(consumed, consumed + 12))
        for size in (2, 3, 4, 6, 12):
            fresh = _stream(tmp_path, byte_level, split_mode=mode, batch=12)
            parts = [_key(cut) for rank in range(size) for cut in fresh.batch(consumed, rank, size)]
            assert parts == whole
    with pytest.raises(ConfigError, match="--global-batch-size 12"):
        stream.batch(0, 0, 5)


@pytest.mark.parametrize("mode", ["random", "walk"])
def test_cuts_are_what_the_documents_hold(tmp_path, byte_level, mode):
    corpus = corpus_of(tmp_path, byte_level, LENGTHS)
    stream = CutStream(corpus, byte_level, _config(split_mode=mode), 5, 4)
    for index in range(3 * stream.samples_per_epoch):
        cut = stream.cut(index)
        start = cut.position - len(cut.prefix)
        assert len(cut.suffix) == 8
        assert 4 <= len(cut.prefix) <= 16
        assert len(cut.prefix) == min(16, cut.position)
        assert cut.position + 8 <= LENGTHS[cut.document]
        joined = np.concatenate([cut.prefix, cut.suffix])
        assert joined.tolist() == corpus.tokens(cut.document, start, cut.position + 8).tolist()
        assert byte_level.eod not in joined


def test_random_epoch_holds_each_document_once_and_is_shuffled_and_cut_anew(tmp_path, byte_level):
    stream = _stream(tmp_path, byte_level, lengths=[200] * 40)
    epochs = [[stream.cut(epoch * 40 + place) for place in range(40)] for epoch in range(3)]
    for cuts in epochs:
        assert sorted(cut.document for cut in cuts) == list(range(40))
    orders = [[cut.document for cut in cuts] for cuts in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    positions = [{cut.document: cut.position for cut in cuts} for cuts in epochs]
    moved = sum(positions[0][document] != positions[1][document] for document in range(40))
    assert moved > 30
    assert len(set(positions[0].values())) > 20


def test_order_depends_on_the_seed_alone(tmp_path, byte_level):
    np.random.seed(0)
    first = [_key(cut) for cut in _stream(tmp_path, byte_level).batch(8)]
    np.random.seed(99)
    np.random.random(7)
    assert [_key(cut) for cut in _stream(tmp_path, byte_level).batch(8)] == first
    assert [_key(cut) for cut in _stream(tmp_path, byte_level, seed=6).batch(8)] != first
    # In random mode the batch size does not change the order of samples.
    assert [_key(cut) for cut in _stream(tmp_path, byte_level, batch=2).batch(8)] == first[:2]


def test_walk_covers_each_document_once_an_epoch(tmp_path, byte_level):
    stream = _stream(tmp_path, byte_level, split_mode="walk")
    expected = {
        (document, 4 + 8 * k) for document, length in enumerate(LENGTHS) for k in range(max(0, length - 4) // 8)
    }
    for epoch in range(3):
        cuts = [stream.cut(epoch * stream.samples_per_epoch + place) for place in range(stream.samples_per_epoch)]
        assert {(cut.document, cut.position) for cut in cuts} == expected
        assert len(cuts) == len(expected)
    assert stream.skipped() == {
        "empty_document": 1,
        "document_below_minimum": 1,
        "document_without_room_for_a_cut": 0,
        "tokens_in_walk_tails": sum((length - 4) % 8 for length in LENGTHS if length >= 12),
    }


def _shared_in_batches(stream: CutStream, batch: int, batches: int) -> int:
    shared = 0
    for step in range(batches):
        counts = Counter(cut.document for cut in stream.batch(step * batch))
        shared += sum(count - 1 for count in counts.values())
    return shared


def test_walk_keeps_cuts_of_a_document_apart_over_epochs(tmp_path, byte_level):
    rng = np.random.default_rng(11)
    for trial in range(12):
        lengths = rng.integers(12, 120, size=rng.integers(30, 60)).tolist()
        batch = int(rng.integers(2, 9))
        folder = tmp_path / str(trial)
        stream = _stream(folder, byte_level, lengths=lengths, split_mode="walk", batch=batch, seed=trial)
        batches = 3 * stream.samples_per_epoch // batch
        assert _shared_in_batches(stream, batch, batches) == 0
        assert [stream.forced_shared(epoch) for epoch in range(3)] == [0, 0, 0]


def test_walk_counts_what_the_corpus_forces(tmp_path, byte_level):
    # 13 cuts of one document and 2 others in batches of 5: three batches, so 10 must share at the least.
    stream = _stream(tmp_path, byte_level, lengths=[4 + 13 * 8, 12, 12], split_mode="walk", batch=5)
    assert stream.samples_per_epoch == 15
    assert stream.forced_shared(0) == 10
    assert _shared_in_batches(stream, 5, 3) == 10


def test_forced_sharing_is_counted_as_it_happens(tmp_path, byte_level):
    rng = np.random.default_rng(12)
    forced = 0
    for trial in range(40):
        lengths = [20, *rng.integers(0, 100, size=rng.integers(1, 12)).tolist()]
        batch = int(rng.integers(2, 16))
        stream = _stream(tmp_path / str(trial), byte_level, lengths=lengths, split_mode="walk", batch=batch, seed=trial)
        size = stream.samples_per_epoch
        if size < batch:
            continue
        seen: set[tuple[int, int]] = set()
        happened = [0, 0, 0]
        for index in range(3 * size):
            place = (index // batch, stream.cut(index).document)
            happened[index // size] += place in seen
            seen.add(place)
        assert [stream.forced_shared(epoch) for epoch in range(3)] == happened
        forced += sum(happened)
    assert forced > 0


def test_corpus_smaller_than_a_batch_repeats_within_it(tmp_path, byte_level):
    for mode in ("random", "walk"):
        stream = _stream(tmp_path, byte_level, lengths=[12, 13], split_mode=mode, batch=7)
        cuts = stream.batch(7)
        assert [cut.sample_index for cut in cuts] == list(range(7, 14))
        assert {cut.document for cut in cuts} == {0, 1}


def test_dealing_is_as_good_as_can_be():
    rng = np.random.default_rng(4)
    for _ in range(300):
        sizes = rng.integers(1, 12, size=rng.integers(1, 20))
        owner = np.repeat(np.arange(len(sizes)), sizes)
        batch_size = int(rng.integers(1, 9))
        phase = int(rng.integers(0, batch_size))
        order = deal_apart(owner, phase, batch_size, rng)
        assert sorted(order.tolist()) == list(range(len(owner)))
        batch_of = slot_batches(len(owner), phase, batch_size)
        batches = int(batch_of[-1]) + 1
        least = int(np.maximum(sizes - batches, 0).sum())
        shared = count_shared(owner[order], batch_of)
        assert shared >= least
        if sizes.max() <= batches - 2:
            assert shared == 0


def test_cut_prefers_a_character_boundary(tmp_path, byte_level):
    text = "\U0001f600\u4f60\U0001f680" * 40
    document = byte_level.encode(text)
    corpus = Corpus([write_corpus(tmp_path / "emoji", [document] * 30, byte_level.eod)], byte_level.eod)
    for mode in ("random", "walk"):
        stream = CutStream(corpus, byte_level, _config(split_mode=mode), 1, 4)
        for index in range(60):
            cut = stream.cut(index)
            assert byte_level.is_char_boundary(document, cut.position)
            assert len(cut.suffix) == 8


def test_end_of_document_inside_is_never_trained(tmp_path, byte_level):
    eod = byte_level.eod
    corpus = Corpus([write_corpus(tmp_path / "bad", [[5] * 10 + [eod] + [5] * 9], eod)], eod)
    with pytest.raises(DataError, match="document 0 holds end-of-document inside"):
        CutStream(corpus, byte_level, _config(seq_length=20, max_prefix_length=12), 1, 1).cut(0)


def test_nothing_to_cut_says_why(tmp_path, byte_level):
    with pytest.raises(DataError, match=r"none of 3 documents can be cut \(1 empty_document, 2 document_below_minimum"):
        _stream(tmp_path, byte_level, lengths=[0, 5, 11])


def test_resume_accepts_the_same_and_names_what_differs(tmp_path, byte_level):
    state = _stream(tmp_path, byte_level).state_dict(24)
    assert _stream(tmp_path, byte_level).check_state(state) == 24
    # Random order does not depend on the batch size; walk does.
    assert _stream(tmp_path, byte_level, batch=8).check_state(state) == 24
    walk = _stream(tmp_path, byte_level, split_mode="walk").state_dict(24)
    with pytest.raises(DataError, match="--global-batch-size was 4 and is 8"):
        _stream(tmp_path, byte_level, split_mode="walk", batch=8).check_state(walk)
    changes = {
        "--seed was 5": {"seed": 6},
        "--split-mode was random": {"split_mode": "walk"},
        "--suffix-length was 8": {"suffix_length": 6, "seq_length": 22},
        "--max-prefix-length was 16": {"max_prefix_length": 9},
        "--min-prefix-length was 4": {"min_prefix_length": 5},
        "--min-document-length was 12": {"min_document_length": 14},
        "--data-path": {"lengths": [*LENGTHS, 40]},
    }
    for message, change in changes.items():
        with pytest.raises(DataError, match=message):
            _stream(tmp_path, byte_level, **change).check_state(state)
    with pytest.raises(DataError, match="--seed is not recorded"):
        _stream(tmp_path, byte_level).check_state({name: value for name, value in state.items() if name != "seed"})
    with pytest.raises(DataError, match="not a count"):
        _stream(tmp_path, byte_level).check_state({**state, "consumed_samples": -1})


def test_index_is_cached_used_and_built_again_when_damaged(tmp_path, byte_level, monkeypatch):
    cache = tmp_path / "cache"
    first = [_key(cut) for cut in _stream(tmp_path, byte_level, data_cache_path=str(cache)).batch(0)]
    (path,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_sip.data.index.plan_cuts", None)
        assert [_key(cut) for cut in _stream(tmp_path, byte_level, data_cache_path=str(cache)).batch(0)] == first
    for damage in (b"", path.read_bytes()[:50], b"rubbish"):
        path.write_bytes(damage)
        assert [_key(cut) for cut in _stream(tmp_path, byte_level, data_cache_path=str(cache)).batch(0)] == first
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    _stream(tmp_path, byte_level, data_cache_path=str(cache), min_prefix_length=5)
    assert len(list(cache.iterdir())) == 2


def test_cache_folder_that_cannot_be_used_is_named(tmp_path, byte_level):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        _stream(tmp_path, byte_level, data_cache_path=str(tmp_path / "file"))


def _build(folder: str, queue) -> None:
    from megatron_sip.data.cut import CutRule
    from megatron_sip.data.index import load_or_build

    corpus = Corpus([f"{folder}/corpus"], eod=0)
    rule = CutRule.from_config(_config(split_mode="walk"))
    index = load_or_build(corpus, rule, corpus.fingerprint(), f"{folder}/cache")
    queue.put((index.documents.tolist(), index.cuts.tolist()))


def test_processes_that_build_at_once_agree(tmp_path):
    write_corpus(tmp_path / "corpus", [[5] * length for length in LENGTHS])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build, args=(str(tmp_path), queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert all(result == results[0] for result in results)
    assert [path.suffix for path in Path(tmp_path / "cache").iterdir()] == [".npz"]
