"""One rank that raises, hangs or dies never leaves the others waiting: every stage of a run has a deadline.

    with watch.stage("rollout", iteration=3, samples=(8, 11)):
        ...

A thread of each rank looks at the deadline, at the signals and at the parent process, whatever the main thread waits
for. `Post` finds out together with the other ranks who is at fault.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from torch.distributed import DistError

from megatron_sip.errors import SipError
from megatron_sip.parallel.ending import FAILED, HUNG, NOT_AGREED, ORPHANED, REFUSED, end_now, say
from megatron_sip.parallel.inquest import Place, Report, standing
from megatron_sip.parallel.meeting import Meeting
from megatron_sip.parallel.post import ANSWER_SECONDS, Alarm, Post, Verdict
from megatron_sip.parallel.regions import region
from megatron_sip.parallel.signals import StopSignal

AGREE_SECONDS = 10.0
"""Behind the grace: how long the ranks may take to agree on a stop, unless their next boundary is further away."""
_LATE = 1.5
"""How many times as long as ever before the way to a boundary may take when the ranks were asked to stop."""
_TICK = 0.5
_PATIENCE = 2.0
"""How long a rank that hears of another's end may take to end by itself, and close its files."""
_VERDICT_SECONDS = ANSWER_SECONDS + 7.0
"""How long an overdue rank waits for a common verdict before it ends alone."""
_UNHURRIED = ("save", "load")
"""Stages that a stop does not cut short; the time to agree begins anew behind them."""
_MEMORY = 0.7
"""Share of the old mean that a new duration of a stage leaves."""


@dataclass(frozen=True)
class Standing:
    """A place with the monotonic seconds of the last progress there and of its beginning."""

    place: Place
    moved: float
    began: float


@dataclass(frozen=True)
class Boundary:
    """Where all ranks met last: the name of the way that lies ahead, and the monotonic seconds."""

    ahead: str
    left: float


class StageWatch:
    """Deadlines of one rank's stages. Every stage goes through `stage`; made and used on the main thread.

    `limits` are seconds by stage, `grace` those of `--sigterm-grace`.
    """

    def __init__(self, limits: Mapping[str, float], stop: StopSignal, grace: float) -> None:
        self.stop, self.grace = stop, grace
        self._limits = dict(limits)
        self._main = threading.get_ident()
        # Without a launcher the parent is a shell, which may end long before what it left in the background.
        self._parent = os.getppid() if "RANK" in os.environ else None
        now = time.monotonic()
        self._standing = Standing(Place(), now, now)
        self._means: dict[str, float] = {}
        self._boundary: Boundary | None = None
        self._apart: dict[str, float] = {}
        self._depth = 0
        self._post: Post | None = None
        self._rank = int(os.environ.get("RANK", "0"))
        # Written by the main thread, read by the others.
        self._stepping = self._agreed = self._ending = self._told = self._broken = False
        self._overdue_at: float | None = None
        self._unhurried_until = 0.0
        self._status = 0
        self._closing = threading.Event()
        self._guard = threading.Thread(target=self._run, name="sip-watch", daemon=True)
        self._guard.start()

    def __enter__(self) -> StageWatch:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.tell(error)
        self.close()

    def join(self, meeting: Meeting) -> None:
        """Watch together with the other ranks from here on."""
        self._post = Post(meeting, self._report, self._on_verdict)

    @contextmanager
    def stage(self, name: str, iteration: int | None = None, samples: tuple[int, int] | None = None) -> Iterator[None]:
        """Be in a stage; one of `config.timeouts.STAGES`. What is not given is as in the stage around it.

        Args:
            iteration: counted from 1, as in the log.
            samples: first and last global sample index that this rank works on.
        """
        if name not in self._limits:
            raise ValueError(f"there is no stage {name!r}")
        outer, now = self._standing.place, time.monotonic()
        place = Place(name, iteration or outer.iteration, samples or outer.samples, outer.entries + 1)
        self._standing = Standing(place, now, now)
        self._depth += 1
        try:
            with region(name):
                yield
        finally:
            self._depth -= 1
        # Behind an error the place stays, for the message.
        ended = time.monotonic()
        old = self._means.get(name, ended - now)
        self._means[name] = _MEMORY * old + (1 - _MEMORY) * (ended - now)
        if name in _UNHURRIED:
            self._unhurried_until = ended
            if self._boundary is not None:  # no part of the way to the next one, which is measured
                left = self._boundary.left
                self._boundary = replace(self._boundary, left=left + ended - max(now, left))
        back = replace(outer if self._depth else place, entries=self._standing.place.entries + 1)
        self._standing = Standing(back, ended, ended)

    def feed(self) -> None:
        """There is progress within the stage, or a lawful wait that all ranks know of: its deadline begins anew."""
        self._standing = replace(self._standing, moved=time.monotonic())

    def met(self, ahead: str | None = None) -> None:
        """All ranks are at a boundary, where they heard whether one of them was asked to stop; that is progress too.

        `ahead` names the way to the next boundary; None where it goes on as before.
        """
        last, now = self._boundary, time.monotonic()
        if last is not None:
            self._apart[last.ahead] = max(self._apart.get(last.ahead, 0.0), now - last.left)
            ahead = ahead or last.ahead
        if ahead is not None:
            self._boundary = Boundary(ahead, now)
        self.feed()

    @property
    def place(self) -> Place:
        """Where this rank stands."""
        return self._standing.place

    @property
    def seconds_in_stage(self) -> float:
        """Since the present stage began."""
        return time.monotonic() - self._standing.began

    def usual_seconds(self, stage: str) -> float:
        """What a stage takes on average of late; 0 before its first end."""
        return self._means.get(stage, 0.0)

    def begin_steps(self) -> None:
        """From here on a stop is decided between stages; before, there is nothing to save and the run ends at once."""
        self._stepping = True

    @property
    def broken(self) -> bool:
        """Whether this rank ended by an error that the others do not share, so that no collective can be trusted."""
        return self._broken

    def stop_agreed(self) -> None:
        """All ranks know that they stop: the grace is over, and only the deadlines of stages count."""
        self._agreed = True

    def tell(self, error: BaseException) -> None:
        """Let the user and the other ranks know what ended this rank, once and on one rank only.

        The error of a collective that lost a member is a consequence: the cause is told where it is known.
        """
        self._ending = True
        if self._told:
            return
        self._told = True
        if isinstance(error, SipError):
            self._status = REFUSED
            self._accuse(Verdict(str(error), REFUSED))
            return
        self._broken, self._status = True, FAILED
        consequence = _from_collective(error)
        if consequence and self._post is not None:
            self._post.look_now()
            self._await_verdict(3.0)
        first = str(error).strip().splitlines() or [""]
        text = f"rank {self._rank} failed in {self.place} with {type(error).__name__}: {first[0][:500]}"
        if self._accuse(Verdict(text, FAILED, (self._rank,))):
            traceback.print_exception(error)

    def close(self) -> None:
        """End the watch; this rank leaves by itself."""
        self._ending = True
        if self._post is not None and not self._post.close():
            # Its thread sits in a call of the store, and would abort the interpreter's own end.
            end_now(self._post.verdict.status if self._post.verdict else self._status)
        self._closing.set()
        self._guard.join(5 * _TICK)

    def _accuse(self, verdict: Verdict) -> bool:
        """Whether this verdict is the first, and so was printed."""
        if self._post is not None:
            try:
                return self._post.accuse(verdict)
            except DistError as error:
                say(f"megatron_sip: the other ranks could not be told: {error}")
        if self._post is not None or self._rank == 0 or verdict.status != REFUSED:
            say(f"megatron_sip: error: {verdict.text}" if verdict.status else f"> {verdict.text}")
        return True

    def _accuse_within(self, seconds: float, verdict: Verdict) -> None:
        """Give a verdict from a thread that must not wait for the store."""
        thread = threading.Thread(target=self._accuse, args=(verdict,), daemon=True)
        thread.start()
        thread.join(seconds)

    def _await_verdict(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._post is not None and self._post.verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _report(self, in_full: bool) -> Report:
        place = self.place
        if not in_full:
            return Report(place)
        return Report(place, *standing(sys._current_frames().get(self._main)))

    def _on_verdict(self, verdict: Verdict) -> None:
        """Another rank, or the post of this one, found the end of the run; on the thread of the post."""
        deadline = time.monotonic() + _PATIENCE
        while verdict.status in (FAILED, REFUSED) and time.monotonic() < deadline:
            if self._ending:
                return
            time.sleep(0.05)
        self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        if verdict.status == HUNG and (self._rank in verdict.ranks or not verdict.ranks):
            say(f"rank {self._rank}: what its threads do:")
            faulthandler.dump_traceback(file=2, all_threads=True)
        end_now(verdict.status)

    def _run(self) -> None:
        while not self._closing.is_set():
            self.stop.listen(_TICK)
            self._look()

    def _look(self) -> None:
        """One look at what may end this process; nothing here waits for another rank."""
        if self.stop.again is not None:
            text = f"a second {self.stop.again.name}: the run ends at once, nothing more is saved"
            self._accuse_within(1.0, Verdict(text, 128 + self.stop.again))
            end_now(128 + self.stop.again)
        if self._parent is not None and os.getppid() != self._parent:
            if self._rank == 0:
                say("megatron_sip: error: the launcher ended without a word; the ranks end too")
            end_now(ORPHANED)
        if not self._stepping and not self._ending and self.stop.seconds > _PATIENCE:
            # By now the post would have known if it was only the launcher's answer to the death of a rank.
            text = f"stopped by {self.stop.reason} before the first step; there is nothing to save"
            self._accuse_within(5.0, Verdict(text, 0))
            end_now(0)
        alarm = None if self._ending and self.place.stage != "report" else self._alarm()
        if alarm is None:
            self._overdue_at = None
        elif self._overdue_at is None:
            self._overdue_at = time.monotonic()
            if self._post is not None:
                self._post.raise_alarm(alarm)
        if alarm is not None and self._overdue_at is not None:
            waited = time.monotonic() - self._overdue_at
            if self._post is None or waited > _VERDICT_SECONDS:
                verdict = Verdict(f"{alarm.text}: rank {self._rank} in {self.place}", alarm.status, (self._rank,))
                say(f"megatron_sip: error: {verdict.text}" if verdict.status else f"> {verdict.text}")
                self._end(verdict)

    def _alarm(self) -> Alarm | None:
        """What is overdue, if anything."""
        now, place = time.monotonic(), self.place
        # Nobody is in a hurry behind --exit-duration-in-mins, so a long step ends as it does.
        asked = None if self._agreed or self._ending else self.stop.signalled_at
        limit = self.grace + AGREE_SECONDS
        unhurried = place.stage in _UNHURRIED and self._depth > 0
        if asked is not None and not unhurried:
            begun = max(asked, self._unhurried_until)
            way = self._boundary_due() - begun
            if now - begun > max(limit, way):
                far = ", and the way to a far boundary" if way > limit else ""
                return Alarm(
                    f"the ranks did not agree to stop within {max(limit, way):.0f} s of {self.stop.reason} "
                    f"(--sigterm-grace {self.grace:.0f} and {AGREE_SECONDS:.0f}{far}), and nothing is saved",
                    NOT_AGREED,
                )
        limit = self._limits[place.stage]
        if now - self._standing.moved > limit:
            return Alarm(
                f"no progress for {limit:.0f} s in {place}",
                HUNG,
                "resume from the last checkpoint; if it was only slow, raise "
                f"--stage-timeout {place.stage}={limit:.0f}",
            )
        return None

    def _boundary_due(self) -> float:
        """Until when ranks that are well come to their next boundary, or end behind one, by this run so far.

        They agree there: an end before it would lose the state for nothing.
        """
        last = self._boundary
        if last is None:
            return 0.0
        return last.left + max(_LATE * self._apart.get(last.ahead, 0.0), AGREE_SECONDS)


def _from_collective(error: BaseException) -> bool:
    """Whether an error was raised by a collective, so perhaps because another rank is gone."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "/torch/distributed/" in frames[-1].filename
