"""What ranks tell each other past the collectives: where they stand, that one is overdue, and what ended the run.

A thread of each rank talks to the store over a connection of its own. The first verdict counts: its author prints it,
and all ranks end with its status.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from torch.distributed import DistError

from megatron_sip.parallel.ending import FAILED, HUNG, ORPHANED, is_stopped, say
from megatron_sip.parallel.inquest import Finding, Home, Report, find_fault, hang_text
from megatron_sip.parallel.meeting import Meeting
from megatron_sip.parallel.silence import SILENCE_SECONDS, Silence

PERIOD = 0.5
"""Seconds between two looks at the store."""
ANSWER_SECONDS = 8.0
"""How long an overdue run waits for the reports of all ranks; a busy machine may keep a thread that long."""
_CALL_SECONDS = 10.0


@dataclass(frozen=True)
class Verdict:
    """What ended the run: one sentence, the exit status of all ranks, the ranks at fault, by whom it is said.

    `silent`: the ranks at fault do not answer, so they do not hear of this either.
    """

    text: str
    status: int
    ranks: tuple[int, ...] = ()
    silent: bool = False
    author: int = 0


@dataclass(frozen=True)
class Alarm:
    """A rank that ran out of patience: why, and the status and advice that go with it."""

    text: str
    status: int = HUNG
    advice: str = ""


class Post:
    """This rank's end of the store. `report` describes the rank, its main thread too if it is given True;
    `on_verdict` hears of the verdict, once."""

    def __init__(
        self, meeting: Meeting, report: Callable[[bool], Report], on_verdict: Callable[[Verdict], None]
    ) -> None:
        self.rank, self.size = meeting.rank, meeting.size
        self.verdict: Verdict | None = None
        self._meeting, self._report, self._on_verdict = meeting, report, on_verdict
        self._alarm: Alarm | None = None
        self._answered = self._delivered = False
        self._closing, self._wake = threading.Event(), threading.Event()
        self._store = meeting.connect(_CALL_SECONDS)
        self.homes = self._introduce(Home.here())
        mine = self.homes[self.rank].machine
        self._neighbours = {
            rank: home for rank, home in self.homes.items() if rank != self.rank and home.machine == mine
        }
        # In ring order from here, so that every machine has a rank that another machine looks after.
        ring = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._far = [rank for rank in ring if self.homes[rank].machine != mine]
        self._silence, self._beat = Silence(), 0
        self._thread = threading.Thread(target=self._run, name="sip-post", daemon=True)
        self._thread.start()

    def _introduce(self, home: Home) -> dict[int, Home]:
        """The processes of all ranks."""
        store = self._meeting.store  # it may take as long as the meeting itself
        store.set(f"home/{self.rank}", json.dumps(asdict(home)))
        texts = store.multi_get([f"home/{rank}" for rank in range(self.size)])
        return {rank: Home(**json.loads(text)) for rank, text in enumerate(texts)}

    def raise_alarm(self, alarm: Alarm) -> None:
        """Ask all ranks how they stand; the verdict follows within `ANSWER_SECONDS` and some. Returns at once."""
        if self._alarm is None:
            self._alarm = alarm
            self._wake.set()

    def look_now(self) -> None:
        """Have the thread look at the verdict and after its neighbours at once."""
        self._wake.set()

    def accuse(self, verdict: Verdict) -> bool:
        """Give this verdict if there is none yet, and print it then. Whether it was the first."""
        own = replace(verdict, author=self.rank)
        given = self._store.compare_set("verdict", "", json.dumps(asdict(own)))
        first = _verdict(given) == own
        if first:
            say(f"megatron_sip: error: {own.text}" if own.status else f"> {own.text}")
        self.verdict = _verdict(given)
        return first

    def close(self) -> bool:
        """Say that this rank leaves by itself, and end the thread; whether it ended."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_CALL_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._round()
                self._wake.wait(PERIOD)
                self._wake.clear()
            self._leave()
        except DistError as error:
            # At the end of a run its first rank, or its launcher, may take the store along.
            if not self._closing.wait(_CALL_SECONDS):
                text = f"the launcher's store is gone: {str(error).splitlines()[0][:200]}"
                say(f"megatron_sip: error: rank {self.rank} ends: {text}")
                self._on_verdict(Verdict(text, ORPHANED, author=self.rank))
        except Exception:
            # A fault of ours shall not end a training run; its deadlines stay, each rank's own.
            traceback.print_exc()
            say(f"megatron_sip: rank {self.rank} no longer hears of the others' faults; see the traceback")
            with suppress(DistError):
                self._leave()  # its silence is no death

    def _leave(self) -> None:
        """The last report of this rank; nobody misses it from now on."""
        self._store.set(f"report/{self.rank}", replace(self._report(False), done=True).dumps())

    def _round(self) -> None:
        self._beat += 1
        self._store.set(f"report/{self.rank}", replace(self._report(False), beat=self._beat).dumps())
        if self.verdict is None and self._store.check(["verdict"]):
            self.verdict = _verdict(self._store.get("verdict"))
        if self.verdict is None:
            self._look_after_neighbours()
        if self.verdict is None:
            self._look_far()
        if self.verdict is None:
            self._hear_alarm()
        if self.verdict is not None and not self._delivered and not self._closing.is_set():
            self._delivered = True
            self._end_silent(self.verdict)
            self._on_verdict(self.verdict)

    def _look_after_neighbours(self) -> None:
        """A rank of this machine that is gone without a word was killed, and its helpers with it end here."""
        for rank, home in list(self._neighbours.items()):
            if home.alive:
                continue
            del self._neighbours[rank]
            last = self._last_report(rank)
            if last is not None and last.done:
                continue
            if home.group == home.pid != os.getpgid(0):
                _end_group(home.group)
            text = f"rank {rank} is gone ({home} was killed or crashed){self._last_words(rank)}; all ranks end"
            self.accuse(Verdict(text, FAILED, (rank,)))
            return

    def _look_far(self) -> None:
        """Of the next rank on another machine only its reports can be seen; one that dies alone there gives none."""
        if not self._far:
            return
        rank = self._far[0]
        last = self._last_report(rank)
        if last is not None and last.done:
            del self._far[0]
            self._silence = Silence()
            return
        silent = self._silence.look(None if last is None else last.beat, time.monotonic())
        if silent < SILENCE_SECONDS:
            return
        text = (
            f"rank {rank} ({self.homes[rank]}) has told nothing for {silent:.0f} s: its process or its machine is gone "
            f"or stands still{self._last_words(rank)}; all ranks end"
        )
        self.accuse(Verdict(text, FAILED, (rank,), silent=True))

    def _hear_alarm(self) -> None:
        if self._alarm is not None:
            self._store.compare_set("alarm", "", json.dumps(asdict(self._alarm)))
        if not self._store.check(["alarm"]):
            return
        if not self._answered:
            self._answered = True
            self._store.set(f"answer/{self.rank}", self._report(True).dumps())
        if self._store.compare_set("arbiter", "", str(self.rank)) == str(self.rank).encode():
            self._decide(Alarm(**json.loads(self._store.get("alarm"))))

    def _decide(self, alarm: Alarm) -> None:
        """Hear all ranks, and say who is at fault."""
        deadline = time.monotonic() + ANSWER_SECONDS
        reports: dict[int, Report] = {}
        while len(reports) < self.size and time.monotonic() < deadline:
            for rank in set(range(self.size)) - set(reports):
                if self._store.check([f"answer/{rank}"]):
                    reports[rank] = Report.loads(self._store.get(f"answer/{rank}"))
            missing = set(range(self.size)) - set(reports)
            if missing and all(rank in self._neighbours and is_stopped(self.homes[rank].pid) for rank in missing):
                break
            time.sleep(0.1)
        finding = find_fault(reports, self.size)
        text = hang_text(self._told_apart(finding), reports, self.homes, alarm.text)
        if finding.ranks and finding.ranks[0] not in reports:
            text += self._last_words(finding.ranks[0])
        text = f"{text}; {alarm.advice}" if alarm.advice else text
        silent = any(rank not in reports for rank in finding.ranks)
        self.accuse(Verdict(text, alarm.status, finding.ranks, silent))

    def _told_apart(self, finding: Finding) -> Finding:
        """A stopped process is called so."""
        here = [rank for rank in finding.ranks if rank in self._neighbours]
        if here and here == list(finding.ranks) and all(is_stopped(self.homes[rank].pid) for rank in here):
            return replace(finding, what="is stopped (SIGSTOP)")
        return finding

    def _last_report(self, rank: int) -> Report | None:
        key = f"report/{rank}"
        return Report.loads(self._store.get(key)) if self._store.check([key]) else None

    def _last_words(self, rank: int) -> str:
        """Where a rank that tells no more was `PERIOD` before, or less."""
        last = self._last_report(rank)
        return f", last heard of in {last.place}" if last else ""

    def _end_silent(self, verdict: Verdict) -> None:
        """Force those at fault on this machine that hear nothing, such as stopped processes."""
        for rank in verdict.ranks if verdict.silent else ():
            home = self._neighbours.get(rank)
            if home is not None and home.started and home.alive:
                os.kill(home.pid, signal.SIGKILL)


def _verdict(text: bytes) -> Verdict:
    fields = json.loads(text)
    return Verdict(**{**fields, "ranks": tuple(fields["ranks"])})


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # it had no helpers
