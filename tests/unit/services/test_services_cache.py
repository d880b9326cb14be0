"""The persistent cache: what is kept, what is refused, several processes, damage, and the bound."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sip.errors import ConfigError
from megatron_sip.services import cache as module
from megatron_sip.services.cache import FILE, AnswerCache
from megatron_sip.services.cache_names import DIGEST_BYTES, Name, decode, encode

BOUND = 10**9


def name_of(number: int, text: bool = False, on_disk: bool = True) -> Name:
    return Name(number.to_bytes(DIGEST_BYTES, "big"), on_disk, text)


def store(cache: AnswerCache, answers: Sequence[tuple[Name, float | str]]) -> None:
    asyncio.run(cache.store(answers))


def lookup(cache: AnswerCache, *names: Name) -> dict[Name, float | str]:
    return asyncio.run(cache.lookup(names))


def test_answers_outlive_the_process_bit_for_bit(tmp_path: Path) -> None:
    answers: list[tuple[Name, float | str]] = [
        (name_of(1), 0.1 + 0.2),
        (name_of(2), 0.0),
        (name_of(3, text=True), "Zeile\nzwei \u00e9 \U0001f600"),
        (name_of(4, text=True), "0.5"),
    ]
    cache = AnswerCache(tmp_path / "made" / "here", BOUND)
    assert lookup(cache, *(name for name, _ in answers)) == {}
    store(cache, answers)
    cache.close()
    cache.close()
    again = AnswerCache(tmp_path / "made" / "here", BOUND)
    assert lookup(again, *(name for name, _ in answers), name_of(5)) == dict(answers)
    again.close()
    assert [path.name for path in (tmp_path / "made" / "here").iterdir() if path.suffix == ".sqlite3"] == [FILE]


def test_what_does_not_belong_on_disk_is_passed_over(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, BOUND)
    passing = name_of(1, on_disk=False)
    store(cache, [(passing, 0.5)])
    assert lookup(cache, passing, name_of(1)) == {}
    cache.close()


def test_the_first_answer_wins(tmp_path: Path) -> None:
    one, other = AnswerCache(tmp_path, BOUND), AnswerCache(tmp_path, BOUND)
    store(one, [(name_of(1), 0.25)])
    store(other, [(name_of(1), 0.75), (name_of(2), 1.0)])
    assert lookup(one, name_of(1), name_of(2)) == {name_of(1): 0.25, name_of(2): 1.0}
    one.close()
    other.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1, True, "0.5"])
def test_no_value_that_is_no_verdict_is_kept(value: float) -> None:
    with pytest.raises(ValueError, match="no verdict"):
        encode(name_of(1), value)
    with pytest.raises(ValueError, match="no text"):
        encode(name_of(1, text=True), 0.5)


def test_a_value_of_another_kind_is_refused_though_its_checksum_fits() -> None:
    name, text = name_of(1), name_of(1, text=True)
    spelt, check = encode(text, "good")
    assert decode(text, spelt, check) == "good"
    with pytest.raises(ValueError, match="another kind"):
        decode(name, spelt, check)
    deep = b"[" * 100_000
    with pytest.raises(ValueError, match="another kind"):
        decode(name, deep, module_check(name, deep))
    for wrong in (None, 1, "text", spelt[:-1], spelt + b" "):
        with pytest.raises(ValueError, match="checksum"):
            decode(text, wrong, check)
    with pytest.raises(ValueError, match="checksum"):
        decode(name_of(2, text=True), spelt, check)


def module_check(name: Name, spelt: bytes) -> bytes:
    import hashlib

    return hashlib.blake2b(spelt, key=name.digest, digest_size=8).digest()


def change(folder: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(folder / FILE)
    with connection:
        connection.execute(statement, values)
    connection.close()


def test_a_damaged_answer_is_absent_and_can_be_kept_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = AnswerCache(tmp_path, BOUND)
    names = [name_of(number) for number in range(6)]
    store(cache, [(name, 0.5) for name in names])
    change(tmp_path, "UPDATE answers SET value = ? WHERE name = ?", b"0.7", names[0].digest)
    change(tmp_path, "UPDATE answers SET value = ? WHERE name = ?", 0.5, names[1].digest)
    change(tmp_path, "UPDATE answers SET sum = ? WHERE name = ?", b"", names[2].digest)
    change(tmp_path, "UPDATE answers SET value = CAST(? AS TEXT) WHERE name = ?", b"\xff\xfe", names[3].digest)
    with caplog.at_level(logging.WARNING):
        assert lookup(cache, *names) == {names[4]: 0.5, names[5]: 0.5}
    assert cache.damaged == 4
    assert caplog.text.count("holds damaged answers") == 1
    store(cache, [(names[0], 0.75)])
    assert lookup(cache, names[0]) == {names[0]: 0.75}
    assert cache.works
    cache.close()


def test_a_file_that_breaks_during_the_run_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = AnswerCache(tmp_path, BOUND)
    store(cache, [(name_of(number, text=True), "x" * 1000) for number in range(2000)])
    size = (tmp_path / FILE).stat().st_size
    with (tmp_path / FILE).open("r+b") as file:
        for offset in range(0, size, 4096):
            file.seek(offset)
            file.write(b"\x5a" * 4096)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = lookup(cache, *(name_of(number, text=True) for number in range(2000)))
            store(cache, [(name_of(9999), 0.5)])
    assert all(value == "x" * 1000 for value in found.values())
    assert not cache.works
    assert caplog.text.count("goes on without the cache") == 1
    cache.close()
    with pytest.raises(ConfigError, match=r"judge-cache.sqlite3 cannot be used \(.*delete the file"):
        AnswerCache(tmp_path, BOUND)


def test_what_is_no_cache_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--judge-cache: .* cannot be used"):
        AnswerCache(tmp_path / "file" / "folder", BOUND)
    other = tmp_path / "other"
    other.mkdir()
    change(other, "CREATE TABLE things (a)")
    with pytest.raises(ConfigError, match="is no cache of megatron_sip; name another folder"):
        AnswerCache(other, BOUND)
    more = tmp_path / "more"
    AnswerCache(more, BOUND).close()
    change(more, "CREATE TRIGGER t AFTER UPDATE ON answers BEGIN DELETE FROM answers; END")
    with pytest.raises(ConfigError, match="is no cache of megatron_sip"):
        AnswerCache(more, BOUND)
    newer = tmp_path / "newer"
    AnswerCache(newer, BOUND).close()
    change(newer, "PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match="of format 2, written by another megatron_sip"):
        AnswerCache(newer, BOUND)
    text = tmp_path / "text"
    text.mkdir()
    (text / FILE).write_text("no database at all " * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        AnswerCache(text, BOUND)


def test_the_bound_holds_and_the_least_recently_used_leave(tmp_path: Path) -> None:
    now = [0.0]
    bound = 400_000
    cache = AnswerCache(tmp_path, bound, clock=lambda: now[0])
    favourite = name_of(1, text=True)  # the first by name as well as by age
    store(cache, [(favourite, "kept in use")])
    for step in range(40):
        now[0] += 2 * module.TOUCH_SECONDS
        store(cache, [(name_of(1000 + 100 * step + n, text=True), "y" * 500) for n in range(100)])
        assert lookup(cache, favourite) == {favourite: "kept in use"}
    assert (tmp_path / FILE).stat().st_size < bound + 100_000
    newest = [name_of(4900 + n, text=True) for n in range(100)]
    assert len(lookup(cache, *newest)) == 100
    assert lookup(cache, *(name_of(1000 + n, text=True) for n in range(100))) == {}
    cache.close()
    smaller = AnswerCache(tmp_path, bound // 4)
    assert (tmp_path / FILE).stat().st_size <= bound // 4 + 50_000, "the file shrinks to a smaller bound"
    smaller.close()


def numbers(process: int, step: int) -> list[int]:
    """What a process asks for in one round; the processes ask for much of the same."""
    return [step * 7 + n * (process + 1) for n in range(40)]


def answer_to(name: Name) -> str:
    """The one right answer."""
    return f"answer {int.from_bytes(name.digest, 'big')} " * 20


def hammer(folder: str, process: int, rounds: int, bound: int) -> tuple[int, int]:
    """Look up and keep answers that all processes share; how many were found, and how many of them were wrong."""
    cache = AnswerCache(Path(folder), bound)
    found = wrong = 0
    for step in range(rounds):
        names = [name_of(number, text=True) for number in numbers(process, step)]
        known = lookup(cache, *names)
        found += len(known)
        wrong += sum(value != answer_to(name) for name, value in known.items())
        store(cache, [(name, answer_to(name)) for name in names if name not in known])
    assert cache.works
    cache.close()
    return found, wrong


@pytest.mark.parametrize("bound", [BOUND, 60_000], ids=["ample", "tight"])
def test_several_processes_share_it(tmp_path: Path, bound: int) -> None:
    """Also while they make the file at the same moment, and while each makes room."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        results = pool.starmap(hammer, [(str(tmp_path), process, 30, bound) for process in range(4)], chunksize=1)
    assert all(found > 0 and wrong == 0 for found, wrong in results)
    cache = AnswerCache(tmp_path, bound)
    known = lookup(cache, *(name_of(n, text=True) for n in range(500)))
    asked = {number for process in range(4) for step in range(30) for number in numbers(process, step)}
    assert len(known) == len(asked) if bound == BOUND else 0 < len(known) < len(asked)
    assert cache.damaged == 0
    cache.close()
    connection = sqlite3.connect(tmp_path / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_a_process_that_is_killed_while_it_writes_harms_nothing(tmp_path: Path) -> None:
    AnswerCache(tmp_path, BOUND).close()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=hammer, args=(str(tmp_path), 0, 10**6, BOUND))
    process.start()
    cache = AnswerCache(tmp_path, BOUND)
    deadline = time.monotonic() + 60
    while not lookup(cache, name_of(1000, text=True)):
        assert time.monotonic() < deadline
    process.kill()
    process.join()
    known = lookup(cache, *(name_of(n, text=True) for n in range(2000)))
    assert len(known) > 900
    assert all(value == answer_to(name) for name, value in known.items())
    store(cache, [(name_of(7777), 0.5)])
    assert lookup(cache, name_of(7777)) == {name_of(7777): 0.5}
    assert cache.works
    cache.close()
