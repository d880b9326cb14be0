"""Windows for next-token training."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import write_corpus

from megatron_sip.data.documents import Corpus
from megatron_sip.data.packed import PackedStream
from megatron_sip.errors import ConfigError, DataError

DOCUMENTS = [[11, 12, 13], [], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39], [41, 42]]
LINE = [11, 12, 13, 0, 21, 0, 31, 32, 33, 34, 35, 36, 37, 38, 39, 0, 41, 42, 0]


@pytest.mark.parametrize("eod_in_file", [True, False])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 9, 19])
def test_windows_tile_the_line_of_documents(tmp_path, length, eod_in_file):
    corpus = Corpus([write_corpus(tmp_path / "c", DOCUMENTS, 0 if eod_in_file else None)], eod=0)
    stream = PackedStream(corpus, length, seed=3, global_batch_size=1)
    count = len(LINE) // length
    assert stream.samples_per_epoch == count
    for epoch in range(2):
        windows = [stream.window(epoch * count + place) for place in range(count)]
        expected = sorted(LINE[start : start + length] for start in range(0, count * length, length))
        assert sorted(window.prefix.tolist() for window in windows) == expected
        for window in windows:
            assert len(window.suffix) == 0
            first = [*DOCUMENTS[window.document], 0][window.position]
            assert first == window.prefix[0]
    assert stream.skipped() == {"empty_document": 1, "tokens_behind_the_last_window": len(LINE) % length}


def test_order_is_by_seed_and_epoch_and_ranks_share_it(tmp_path):
    corpus = Corpus([write_corpus(tmp_path / "c", [list(range(1, 400))])], eod=0)
    stream = PackedStream(corpus, 4, seed=3, global_batch_size=6)
    places = [[stream.window(epoch * 100 + place).position for place in range(100)] for epoch in range(2)]
    assert sorted(places[0]) == sorted(places[1]) == list(range(0, 400, 4))
    assert places[0] != places[1]
    assert places[0] != sorted(places[0])
    whole = [(cut.sample_index, cut.position) for cut in stream.batch(96)]
    assert [index for index, _ in whole] == list(range(96, 102))
    for size in (2, 3):
        fresh = PackedStream(corpus, 4, seed=3, global_batch_size=6)
        assert [(c.sample_index, c.position) for rank in range(size) for c in fresh.batch(96, rank, size)] == whole
    other = PackedStream(corpus, 4, seed=4, global_batch_size=6)
    assert [cut.position for cut in other.batch(0)] != places[0][:6]


def test_resume_is_refused_with_another_window_or_corpus(tmp_path):
    corpus = Corpus([write_corpus(tmp_path / "c", [list(range(1, 400))])], eod=0)
    state = PackedStream(corpus, 4, 3, 6).state_dict(12)
    assert PackedStream(corpus, 4, 3, 2).check_state(state) == 12
    with pytest.raises(DataError, match="--seq-length was 4 and is 5"):
        PackedStream(corpus, 5, 3, 6).check_state(state)
    other = Corpus([write_corpus(tmp_path / "d", [list(range(1, 401))])], eod=0)
    with pytest.raises(DataError, match="--data-path"):
        PackedStream(other, 4, 3, 6).check_state(state)
    with pytest.raises(DataError, match="--objective"):
        PackedStream(corpus, 4, 3, 6).check_state({**state, "kind": "cuts"})


def test_too_little_text_and_bad_sizes(tmp_path):
    corpus = Corpus([write_corpus(tmp_path / "c", [[1, 2, 3]])], eod=0)
    with pytest.raises(DataError, match=r"4 tokens, fewer than one window of --seq-length 5"):
        PackedStream(corpus, 5, 3, 1)
    with pytest.raises(ConfigError, match="--seq-length 1"):
        PackedStream(corpus, 1, 3, 1)
    assert PackedStream(corpus, 4, 3, 1).window(0).prefix.dtype == np.int64
