"""Ranks that meet at a store and tell each other how they stand, as threads of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_sip.errors import ConfigError, SipError
from megatron_sip.parallel import meeting as meeting_module
from megatron_sip.parallel import post as post_module
from megatron_sip.parallel.inquest import Home, Place, Report
from megatron_sip.parallel.meeting import Meeting, meet
from megatron_sip.parallel.post import Alarm, Post, Verdict
from megatron_sip.parallel.silence import Silence

WAITS = Report(Place("train", 3, (8, 11), 7), True, "step.py:5 in step")
WORKS = Report(Place("train", 3, (12, 15), 7), False, "loss.py:9 in loss")


@pytest.fixture
def server() -> dist.TCPStore:
    """The store of a launcher."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def meeting_of(server: dist.TCPStore, rank: int, size: int) -> Meeting:
    def connect(_seconds: float) -> dist.Store:
        client = dist.TCPStore(
            "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20)
        )
        return dist.PrefixStore("start", client)

    made = Meeting(rank, size, "start", connect(20))
    object.__setattr__(made, "connect", connect)
    return made


@pytest.fixture
def posts(server: dist.TCPStore) -> Iterator[Callable[..., tuple[list[Post], list[list[Verdict]]]]]:
    """Posts of ranks with these reports, and the verdicts that each rank hears."""
    made: list[Post] = []

    def make(*reports: Report) -> tuple[list[Post], list[list[Verdict]]]:
        heard: list[list[Verdict]] = [[] for _ in reports]
        with ThreadPoolExecutor(len(reports)) as pool:
            futures = [
                pool.submit(
                    Post, meeting_of(server, rank, len(reports)), lambda _in_full, own=own: own, heard[rank].append
                )
                for rank, own in enumerate(reports)
            ]
            made.extend(future.result(30) for future in futures)
        return made, heard

    yield make
    for post in made:
        post.close()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_alarm_ends_in_one_verdict_on_the_rank_at_fault(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]], capfd: pytest.CaptureFixture[str]
) -> None:
    (first, second, _third), heard = posts(WAITS, WAITS, WORKS)
    first.raise_alarm(Alarm("no progress for 5 s", 3, "resume"))
    second.raise_alarm(Alarm("no progress for 6 s", 3, "resume"))
    until(lambda: all(len(verdicts) == 1 for verdicts in heard))
    (verdict,) = heard[0]
    assert heard == [[verdict]] * 3
    assert verdict.ranks == (2,)
    assert verdict.status == 3
    assert not verdict.silent
    assert verdict.text.endswith("is in loss.py:9 in loss, in stage train of iteration 3 (samples 12 to 15); resume")
    assert capfd.readouterr().err.count("megatron_sip: error: no progress for ") == 1


def test_the_first_verdict_counts_and_is_printed_once(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]], capfd: pytest.CaptureFixture[str]
) -> None:
    (first, second), heard = posts(WAITS, WORKS)
    assert second.accuse(Verdict("rank 1 failed", 1, (1,)))
    assert not first.accuse(Verdict("rank 0 lost a peer", 1, (0,)))
    until(lambda: all(heard))
    assert [verdict.text for (verdict,) in heard] == ["rank 1 failed"] * 2
    assert capfd.readouterr().err == "megatron_sip: error: rank 1 failed\n"


def test_a_rank_that_is_gone_is_missed_by_its_neighbours_and_one_that_left_is_not(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]],
) -> None:
    (first, _second, third), heard = posts(WAITS, WORKS, WORKS)
    until(lambda: first._last_report(1) is not None)
    assert third.close()
    until(lambda: (first._last_report(2) or WORKS).done)
    for rank in (1, 2):  # their processes are no longer what they were
        first._neighbours[rank] = replace(first._neighbours[rank], started="1", group=0)
    until(lambda: all(heard[:2]))
    (verdict,) = heard[0]
    assert verdict.ranks == (1,)
    assert "rank 1 is gone (process" in verdict.text
    assert "last heard of in stage train of iteration 3 (samples 12 to 15)" in verdict.text


def on_machines(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Each rank that introduces itself is on the next of these machines."""
    left, here = iter(names), Home.here()
    monkeypatch.setattr(Home, "here", classmethod(lambda _: replace(here, machine=next(left))))
    monkeypatch.setattr(post_module, "SILENCE_SECONDS", 2.0)


def test_a_rank_alone_on_its_machine_is_missed_when_it_falls_silent(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on_machines(monkeypatch, "one", "two", "three")
    made, heard = posts(WAITS, WORKS, WORKS)
    until(lambda: all((post._last_report(post.rank) or WORKS).beat > 5 for post in made), 60)
    assert not any(heard)  # they live
    made[1]._round = lambda: None  # type: ignore[method-assign]
    until(lambda: bool(heard[0] and heard[2]))
    assert heard[0] == heard[2]
    (verdict,) = heard[0]
    assert (verdict.ranks, verdict.status, verdict.silent, verdict.author) == ((1,), 1, True, 0)
    assert f"rank 1 (process {made[1].homes[1].pid} on " in verdict.text
    assert " has told nothing for 2 s: its process or its machine is gone or stands still, last heard of in stage " in (
        verdict.text
    )
    assert capfd.readouterr().err.count("megatron_sip: error: ") == 1


def test_who_left_by_itself_is_not_missed_and_the_next_one_is_looked_after(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machines(monkeypatch, "one", "two", "three")
    made, heard = posts(WAITS, WORKS, WORKS)
    assert made[1].close()
    until(lambda: made[0]._far == [2])
    time.sleep(3)
    assert not any(heard)
    made[2]._round = lambda: None  # type: ignore[method-assign]
    until(lambda: bool(heard[0]))
    assert heard[0][0].ranks == (2,)


def test_a_thread_of_ours_that_fails_is_no_death(
    posts: Callable[..., tuple[list[Post], list[list[Verdict]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machines(monkeypatch, "one", "two")
    made, heard = posts(WAITS, WORKS)

    def fail() -> None:
        raise ValueError("ours")

    made[1]._round = fail  # type: ignore[method-assign]
    until(lambda: made[0]._far == [])
    time.sleep(3)
    assert not any(heard)


def test_silence_counts_only_what_could_have_been_heard() -> None:
    silence = Silence()
    assert [silence.look(None, now) for now in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert silence.look(1, 1.5) == 0.0
    assert silence.look(1, 2.0) == 0.5
    # The store did not answer for a minute, or this process was stopped.
    assert silence.look(1, 62.0) == 1.5
    assert silence.look(2, 62.5) == 0.0
    assert Report.loads(replace(WORKS, beat=7).dumps()).beat == 7


def test_a_meeting_is_among_those_of_one_start_only(server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    deadline = time.monotonic() + 30
    clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False) for _ in range(6)]
    # The ranks of the start before, which died before rank 0 came: their greetings are still there.
    for rank in (1, 2):
        clients[0].set(f"sip/hello/{rank}", f"dead{rank}")
    names: dict[int, str] = {}

    def follow(rank: int, wait: float) -> None:
        time.sleep(wait)
        names[rank] = meeting_module._follow(clients[rank], rank, deadline)

    threads = [threading.Thread(target=follow, args=(rank, 0.2 * rank)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    names[0] = meeting_module._invite(clients[3], 3, deadline)
    for thread in threads:
        thread.join(30)
    assert len(set(names.values())) == 1
    assert meeting_module._invite(clients[4], 1, deadline) != names[0]


def test_a_start_without_a_launcher_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set beside RANK"):
        meet(1)


def test_a_rank_that_does_not_come_is_named(server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "WORLD_SIZE": "3", "RANK": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SipError, match="ranks 1, 2 did not come to the meeting at "):
        meet(0.3)
