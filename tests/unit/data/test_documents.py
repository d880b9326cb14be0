"""IndexedDataset files: read as Megatron wrote them, written as Megatron reads them, refused when damaged."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_corpus

from megatron_sip.data.documents import Corpus, open_corpus, sidecar_path
from megatron_sip.data.indexed import IndexedWriter, open_indexed, smallest_dtype
from megatron_sip.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]


def test_documents_come_back_without_their_end(tmp_path):
    corpus = Corpus([write_corpus(tmp_path / "a", DOCUMENTS), write_corpus(tmp_path / "b", [[1, 2]])], eod=0)
    assert corpus.num_documents == 5
    assert corpus.lengths.tolist() == [3, 1, 0, 4, 2]
    assert [corpus.length(document) for document in range(5)] == [3, 1, 0, 4, 2]
    assert corpus.tokens(3, 1, 3).tolist() == [10, 11]
    assert corpus.tokens(4, 0, 2).tolist() == [1, 2]
    assert corpus.tokens(4, 0, 2).dtype == np.int64
    for document, start, stop in [(5, 0, 1), (-1, 0, 1), (3, 2, 6), (3, 3, 2)]:
        with pytest.raises(IndexError):
            corpus.tokens(document, start, stop)


def test_corpus_without_end_of_document(tmp_path):
    corpus = Corpus([write_corpus(tmp_path / "a", DOCUMENTS, eod=None)], eod=0)
    assert corpus.lengths.tolist() == [3, 1, 0, 4]


def test_megatron_reads_what_we_write(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for dtype in (np.uint16, np.int32):
        dataset = IndexedDataset(write_corpus(tmp_path / np.dtype(dtype).name, DOCUMENTS, dtype=dtype), mmap=True)
        assert [dataset[index].tolist() for index in range(len(dataset))] == [[*tokens, 0] for tokens in DOCUMENTS]
        assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_we_read_what_megatron_writes_also_documents_of_several_sequences(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([70000, 2, 3, 4]), [3, 1])
    builder.add_item(torch.tensor([5, 6]))
    builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    corpus = Corpus([str(tmp_path / "m")], eod=6)
    assert corpus.lengths.tolist() == [4, 1]
    assert corpus.tokens(0, 0, 4).tolist() == [70000, 2, 3, 4]


@pytest.mark.parametrize(("documents", "length"), [(1, 4000), (1000, 2)])
def test_a_full_disk_leaves_nothing(tmp_path, documents, length):
    """Once the .bin is too long, once the .idx; the limit of a file's size stands in for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"--output-prefix .* cannot be written"):
            write_corpus(tmp_path / "c", [[1] * length] * documents, eod=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_smallest_dtype_is_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65499, 65500, 128256):
        assert smallest_dtype(size) == np.dtype(DType.optimal_dtype(size))


def _put(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


INDEX_DAMAGE = {
    "idx half": lambda content: content[: len(content) // 2],
    "idx header": lambda content: content[:20],
    "idx empty": lambda content: b"",
    "idx one byte": lambda content: content[:-1],
    "magic": lambda content: _put(content, 0, b"NOTMMIDIX"),
    "version": lambda content: _put(content, 9, struct.pack("<Q", 2)),
    "dtype": lambda content: _put(content, 17, b"\x06"),
    "huge count": lambda content: _put(content, 18, struct.pack("<Q", 1 << 50)),
    "offsets": lambda content: _put(content, 34 + 4 * len(DOCUMENTS) + 8, struct.pack("<q", 3)),
    "bounds": lambda content: _put(content, len(content) - 8, struct.pack("<q", 99)),
}


def _damage(prefix: Path, how: str) -> None:
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if how in INDEX_DAMAGE:
        idx.write_bytes(INDEX_DAMAGE[how](idx.read_bytes()))
    elif how == "bin truncated":
        data.write_bytes(data.read_bytes()[:-2])
    elif how == "bin longer":
        data.write_bytes(data.read_bytes() + b"\0\0")
    elif how == "no bin":
        data.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("idx half", r"c\.idx is truncated"),
        ("idx header", r"c\.idx is truncated"),
        ("idx empty", r"c\.idx is not an index"),
        ("idx one byte", r"c\.idx is truncated"),
        ("magic", r"c\.idx is not an index"),
        ("version", "version 2"),
        ("dtype", "type code 6"),
        ("huge count", r"c\.idx is truncated"),
        ("offsets", "offsets do not follow"),
        ("bounds", "document bounds"),
        ("bin truncated", r"c\.bin is truncated"),
        ("bin longer", r"c\.bin has"),
        ("no bin", r"c\.bin does not exist"),
    ],
)
def test_damage_is_named_with_the_way_out(tmp_path, how, message):
    prefix = tmp_path / "c"
    write_corpus(prefix, DOCUMENTS)
    _damage(prefix, how)
    with pytest.raises(DataError, match=message) as caught:
        open_indexed(str(prefix))
    assert "tools/preprocess_data.py" in str(caught.value)


def test_empty_and_missing_corpora(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        Corpus([write_corpus(tmp_path / "none", [])], eod=0)
    with pytest.raises(DataError, match="--data-path"):
        Corpus([], eod=0)


def _fail_in_the_middle(prefix: Path) -> None:
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add([1, 2])
        raise RuntimeError("stop")


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        _fail_in_the_middle(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_follows_content_not_place(tmp_path):
    (tmp_path / "moved").mkdir()
    first = Corpus([write_corpus(tmp_path / "a", DOCUMENTS)], eod=0).fingerprint()
    assert Corpus([write_corpus(tmp_path / "moved" / "b", DOCUMENTS)], eod=0).fingerprint() == first
    changed = [[5, 6, 7], [8], [], [9, 10, 11, 13]]
    assert Corpus([write_corpus(tmp_path / "c", changed)], eod=0).fingerprint() != first
    assert Corpus([str(tmp_path / "a")], eod=12).fingerprint() != first


def test_token_beyond_the_vocabulary(tmp_path, byte_level):
    prefix = write_corpus(tmp_path / "a", [[1, 2], [byte_level.vocab_size]], byte_level.eod)
    with pytest.raises(DataError, match=f"token id {byte_level.vocab_size}.*--tokenizer-model"):
        open_corpus([prefix], byte_level)
    fitting = write_corpus(tmp_path / "b", [[1, 2], [byte_level.vocab_size - 1]], byte_level.eod)
    assert open_corpus([fitting], byte_level).num_documents == 2


def test_end_of_document_inside_a_document(tmp_path, byte_level):
    eod = byte_level.eod
    prefix = write_corpus(tmp_path / "a", [[1, 2], [], [3, eod, 4]], eod)
    with pytest.raises(DataError, match="document 2 holds end-of-document inside"):
        open_corpus([prefix], byte_level)


def test_corpus_of_another_tokenizer_of_the_same_size(tmp_path, byte_level):
    prefix = write_corpus(tmp_path / "a", [[1, 2]], byte_level.eod)
    sidecar_path(prefix).write_text(json.dumps({"tokenizer": byte_level.fingerprint(), "vocab_size": 300}))
    assert open_corpus([prefix], byte_level).num_documents == 1
    sidecar_path(prefix).write_text(json.dumps({"tokenizer": "another", "vocab_size": 300}))
    with pytest.raises(DataError, match="another tokenizer"):
        open_corpus([prefix], byte_level)
    sidecar_path(prefix).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_corpus([prefix], byte_level)
