"""The journal without a server: records, files, launches and leaders, and what a kill or a bad disk leaves."""

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_sip.errors import CheckpointError
from megatron_sip.services.journal import Journal, Recalled
from megatron_sip.services.journal_records import (
    REWRITER,
    Entry,
    Key,
    Source,
    Value,
    decode,
    encode,
    encode_end,
    encode_void,
    read_head,
    text_hash,
    token_hash,
    verdict_keys,
)
from megatron_sip.services.rewriter import RewriteRequest, rewrite_key
from megatron_sip.types import Candidate, CandidateKind, Missing, MissingReason, Pool, Question

QUALITY = Source("quality", "smollm2", "quality-logit-1", "logit")
SAFETY = Source("safety", "smollm2", "safety-logit-1", "logit")
WRITER = Source(REWRITER, "smollm2", "rewrite-1", "temperature 1.0 top_p 1.0 max_tokens 32")


def key(sample: int, first: str = "a", second: str | None = "b", vote: int = 0, source: Source = QUALITY) -> Key:
    return Key(sample, "c0ffee", source, first, second, vote)


def entries(*samples: int, value: float = 0.25) -> list[Entry]:
    return [(key(sample), value) for sample in samples]


@contextmanager
def opened(
    folder: Path, position: int = 0, leader: int = 0, earlier: Path | None = None
) -> Iterator[tuple[Journal, Recalled]]:
    journal = Journal(folder, leader, earlier)
    try:
        yield journal, journal.recall(position)
    finally:
        journal.close()


def append(journal: Journal, items: Sequence[Entry]) -> None:
    asyncio.run(journal.append(items))


def lookup(journal: Journal, keys: Sequence[Key]) -> dict[Key, Value]:
    return asyncio.run(journal.lookup(keys))


def written(folder: Path, *items: Sequence[Entry], leader: int = 0) -> Path:
    """One launch of one leader that appends each of `items`; its only segment."""
    before = set(folder.glob("*"))
    with opened(folder, leader=leader) as (journal, _):
        for rounds in items:
            append(journal, rounds)
    [path] = set(folder.glob("*")) - before
    return path


def known(folder: Path, *samples: int, position: int = 0) -> list[Value | None]:
    with opened(folder, position) as (journal, _):
        found = lookup(journal, [key(sample) for sample in samples])
    return [found.get(key(sample)) for sample in samples]


def test_hashes_are_the_same_on_every_machine() -> None:
    # Fixed by hand: a journal must be readable after an upgrade.
    assert token_hash((1, 2, 70000)) == token_hash([1, 2, 70000]) == "b2f6c037c625829255bcc453"
    assert text_hash("one", "two\ud800") == "50be3295f796b693b807ae94"
    assert text_hash("ab", "c") != text_hash("a", "bc")
    assert token_hash((1, 2)) != token_hash((2, 1))


def test_every_part_of_a_question_is_in_its_key() -> None:
    candidates = tuple(Candidate(CandidateKind.ROLLOUT, (n, n + 1), f"text {n}") for n in range(3))
    pool = Pool(7, "prefix", "original", candidates)
    sources = {"quality": QUALITY, "safety": SAFETY}
    questions = [
        Question("quality", 0, 1),
        Question("quality", 1, 0),
        Question("quality", 0, 2),
        Question("quality", 0, 1, 1),
        Question("safety", 0),
        Question("safety", 1),
    ]
    keys = verdict_keys(pool, questions, sources)
    for other in (
        Pool(8, "prefix", "original", candidates),
        Pool(7, "another", "original", candidates),
        Pool(7, "prefix", "another", candidates),
        Pool(7, "prefix", "original", tuple(Candidate(c.kind, (*c.tokens, 9), c.text) for c in candidates)),
    ):
        keys += verdict_keys(other, questions, sources)
    for changed in (
        QUALITY._replace(model="another"),
        QUALITY._replace(version="quality-logit-2"),
        QUALITY._replace(settings="generate temperature 1.0 top_p 1.0 max_tokens 512"),
    ):
        keys += verdict_keys(pool, questions[:4], {"quality": changed})
    assert len(set(keys)) == len(keys) == 6 * 5 + 4 * 3
    # The place in the pool is not part of it: the same two texts in the same order are the same question.
    turned = Pool(7, "prefix", "original", candidates[::-1])
    assert verdict_keys(turned, [Question("quality", 2, 1)], sources) == keys[:1]


def test_values_come_back_bit_for_bit() -> None:
    draw = random.Random(3)
    # A sum of rounded shares may end a little above 1.
    edges = [0.0, 1.0, 0.1 + 0.2, 5e-324, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0)]
    floats = [*edges, *(draw.random() for _ in range(500))]
    items: list[Entry] = [(key(1, vote=number), value) for number, value in enumerate(floats)]
    items += [(key(1, f"m{reason}"), Missing(reason)) for reason in MissingReason]
    items += [(key(2, second=None, source=SAFETY), 0.5), (key(2), 0.75)]
    request = RewriteRequest(3, (5, 6), "prefix", "original")
    texts = ["plain", 'quote " \\ \n\r\u2028 tab\t\x00', "\ud800 lone", "\U0001f600", ""]
    items += [(rewrite_key(request._replace(tokens=(n,)), WRITER), text) for n, text in enumerate(texts)]
    items.append((rewrite_key(request, WRITER), Missing(MissingReason.EMPTY)))
    lines = encode(items)
    assert [line.count(b"\n") for line in lines] == [1] * 4
    heads = [read_head(line) for line in lines]
    assert [(head.kind, head.sample, head.count) for head in heads if head] == [
        ("verdicts", 1, len(floats) + len(MissingReason)),
        ("verdicts", 2, 1),
        ("verdicts", 2, 1),
        ("rewrites", 3, len(texts) + 1),
    ]
    back = dict(entry for line in lines for entry in decode(line))
    assert back.keys() == dict(items).keys()
    for name, value in items:
        if isinstance(value, Missing):
            assert back[name] == Missing(value.reason, "from the journal")
        else:
            assert repr(back[name]) == repr(value)


def test_what_a_server_said_is_not_written_down() -> None:
    [line] = encode([(key(1), Missing(MissingReason.HTTP_STATUS, "401: Bearer sk-secret is wrong"))])
    assert b"secret" not in line
    assert b"http_status" in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_verdict_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no verdict"):
        encode([(key(1), value)])


def test_any_change_of_a_line_shows() -> None:
    [line] = encode(entries(1))
    assert read_head(line) is not None
    for at in range(len(line)):
        assert read_head(line[:at] + bytes([line[at] ^ 4]) + line[at + 1 :]) is None, at
        assert read_head(line[:at]) is None, at
    with pytest.raises(ValueError, match="no whole record"):
        decode(line[:-5])


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    rest = b'"v":2,"kind":"news"}'
    path = written(tmp_path, entries(1))
    path.write_bytes(b'{"crc":"%08x",' % zlib.crc32(rest) + rest + b"\n")
    with pytest.raises(CheckpointError, match="format 2, written by a newer megatron_sip"), opened(tmp_path):
        pass


def test_a_restart_finds_what_any_leader_wrote(tmp_path: Path) -> None:
    with opened(tmp_path) as (zero, nothing), opened(tmp_path, leader=1) as (one, _):
        assert nothing == Recalled(0, 0, 0, ())
        append(zero, entries(0, 1, value=0.1))
        append(one, [*entries(2, 3, value=0.2), (key(3, second=None, source=WRITER), "text")])
        append(zero, entries(4, value=0.3))
        assert lookup(zero, [key(0)]) == {}, "a run that was not interrupted asks each question once"
    # Half the data parallel size: the samples of leader 1 are leader 0's now.
    with opened(tmp_path, position=1) as (journal, found):
        assert found == Recalled(verdicts=4, rewrites=1, torn=0, damaged=())
        keys = [key(sample) for sample in range(5)]
        assert lookup(journal, keys) == {key(1): 0.1, key(2): 0.2, key(3): 0.2, key(4): 0.3}
        assert lookup(journal, [key(3, second=None, source=WRITER), key(3, vote=1)]) == {
            key(3, second=None, source=WRITER): "text"
        }
    assert known(tmp_path, 0, 4) == [0.1, 0.3], "a journal that was only read is as it was"


def test_what_another_folder_told_is_known_without_it(tmp_path: Path) -> None:
    """--load OLD --save NEW; then a start from a checkpoint in NEW, which reads the journal of NEW alone."""
    old, new = tmp_path / "old", tmp_path / "new"
    written(old, entries(0, 1, 2, 3, value=0.73), [(key(1, vote=1), Missing(MissingReason.TIMEOUT, ""))])
    with opened(new, 1, earlier=old) as (journal, _):
        first = lookup(journal, [key(1), key(1, vote=1)])
        append(journal, entries(2, value=0.5))
        assert journal.recall(1)
        assert lookup(journal, [key(1), key(2)]) == {key(1): 0.73, key(2): 0.5}
        assert journal.recall(1).verdicts == 4 + 3, "each answer is written down once"
    with opened(new, 1) as (journal, found):
        assert found.verdicts == 3
        assert lookup(journal, [key(1), key(1, vote=1)]) == first
    assert known(new, 0, 1, 2, 3) == [None, 0.73, 0.5, None], "what nobody used is not known"


def test_a_rollback_in_the_same_process_reads_again(tmp_path: Path) -> None:
    with opened(tmp_path) as (journal, _):
        append(journal, entries(0, 1, 2))
        assert journal.recall(1) == Recalled(2, 0, 0, ())
        assert lookup(journal, [key(0), key(1), key(2)]) == {key(1): 0.25, key(2): 0.25}
        append(journal, entries(3))
        journal.checkpointed(2)
        append(journal, entries(4))
        assert journal.recall(2).verdicts == 3


def test_what_is_given_up_while_it_waits_for_the_disk_is_written(tmp_path: Path) -> None:
    """The hub ends its tasks a second time when it closes, while they write down what they have."""
    free = threading.Event()

    async def given_up(journal: Journal) -> None:
        journal._thread.submit(free.wait, 20)
        writing = asyncio.create_task(journal.append(entries(1, 2)))
        await asyncio.sleep(0.05)
        writing.cancel()
        await asyncio.wait([writing])
        assert writing.cancelled()
        free.set()

    with opened(tmp_path) as (journal, _):
        asyncio.run(given_up(journal))
    with opened(tmp_path) as (journal, recalled):
        assert recalled.verdicts == 2
        assert lookup(journal, [key(1), key(2)]) == dict(entries(1, 2))


def test_memory_and_files_end_at_the_checkpoint(tmp_path: Path) -> None:
    written(tmp_path, entries(0, 1), leader=0)
    written(tmp_path, entries(2, 3), leader=1)
    with opened(tmp_path) as (journal, _), opened(tmp_path, leader=1) as (other, _):
        append(journal, entries(4, 5))
        append(other, entries(6))
        journal.checkpointed(4)
        assert lookup(journal, [key(3)]) == {}
        assert known(tmp_path, 0, 3, 4, 5, 6) == [None, None, 0.25, 0.25, 0.25]
        append(journal, entries(7))
        # The next iteration's rewrites were asked for ahead, before the checkpoint.
        append(other, entries(8))
        other.checkpointed(8)
        journal.checkpointed(8)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["000003-0001-000000.jsonl"]
        assert known(tmp_path, 7, 8) == [None, 0.25]


def test_a_closed_segment_before_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, entries(0), entries(1))
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[-1] == encode_end(1, 0)
    path.write_bytes(b"damage\n" + lines[-1])
    with opened(tmp_path, position=2) as (_, found):
        assert found == Recalled(0, 0, 0, ())
    with opened(tmp_path, position=1) as (_, found):
        assert len(found.damaged) == 1


@pytest.mark.parametrize("cut", [1, 30, 150])
def test_a_kill_in_the_middle_of_a_line(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, entries(0), entries(1), entries(2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-cut])
    with opened(tmp_path) as (journal, found):
        assert found == Recalled(2, 0, 1, ())
        append(journal, entries(2, value=0.75))
    assert path.read_bytes().endswith(lines[2][:-cut]), "nobody writes behind a torn line"
    assert known(tmp_path, 0, 1, 2) == [0.25, 0.25, 0.75]


def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, entries(0), entries(1), entries(2))
    content = bytearray(path.read_bytes())
    content[content.index(b'"sample":1') + 9] = ord("7")
    path.write_bytes(content)
    with opened(tmp_path) as (journal, found):
        assert found == Recalled(2, 0, 0, (f"{path}, line 2",))
        assert lookup(journal, [key(sample) for sample in range(3)]) == {key(0): 0.25, key(2): 0.25}


def test_an_empty_file_and_foreign_files_are_no_trouble(tmp_path: Path) -> None:
    path = written(tmp_path, entries(0))
    path.with_name("000009-0000-000000.jsonl").touch()
    path.with_name("notes.txt").write_text("mine")
    assert known(tmp_path, 0) == [0.25]
    assert (tmp_path / "notes.txt").exists()


def test_void_takes_back_what_came_before(tmp_path: Path) -> None:
    written(tmp_path, entries(0, 1, 2, 9))
    with opened(tmp_path) as (journal, _), opened(tmp_path, leader=1) as (other, _):
        append(journal, entries(3))
        append(other, entries(4))
        journal.void(1)
        assert lookup(journal, [key(0), key(1), key(2)]) == {key(0): 0.25}
        append(journal, entries(5, value=0.5))
    assert known(tmp_path, 0, 1, 2, 3, 9) == [0.25, None, None, None, None]
    # Each leader takes back its own; another one may have written after it.
    assert known(tmp_path, 4, 5) == [0.25, 0.5]
    # The void outlives what it takes back: sample 9 of the first launch is still there.
    with opened(tmp_path, position=7) as (journal, _):
        journal.checkpointed(7)
    assert known(tmp_path, 9, position=7) == [None]
    with opened(tmp_path, position=10) as (journal, _):
        journal.checkpointed(10)
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_read_and_left_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    source = written(old, entries(0, 1, 2, value=0.1))
    before = source.read_bytes()
    with opened(new, 1, earlier=old) as (journal, found):
        assert found.verdicts == 2
        append(journal, entries(3, value=0.2))
        journal.checkpointed(100)
    assert [path.read_bytes() for path in old.iterdir()] == [before]
    assert list(new.iterdir()) == []


def test_a_refusing_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(handle: int, data: bytes) -> int:
        write(handle, data[:40])
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as (journal, _):
        append(journal, entries(0))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"cannot write the journal .*No space left.*--save"):
            append(journal, entries(1))
        monkeypatch.undo()
        append(journal, entries(2))
    assert known(tmp_path, 0, 1, 2) == [0.25, None, 0.25]
    with opened(tmp_path) as (_, found):
        assert found.torn == 1


def test_no_folder_no_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(CheckpointError, match="cannot write the journal")
    with opened(tmp_path / "file" / "journal") as (journal, _), refused:
        append(journal, entries(0))
    journal = Journal(tmp_path, 0)
    with pytest.raises(RuntimeError, match=r"recall\(\) comes first"):
        append(journal, entries(0))
    journal.close()
    journal.close()


def test_lines_of_other_kinds_hold_no_answers() -> None:
    assert read_head(encode_void(3)) is not None
    with pytest.raises(ValueError, match="no whole record"):
        decode(encode_void(3))


def test_a_disk_that_refuses_the_last_line_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as (journal, _):
        append(journal, entries(0, 1))

        def full(_handle: int, _data: memoryview) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        journal.close()
        monkeypatch.undo()
    with opened(tmp_path) as (_, recalled):
        assert recalled.verdicts == 2
