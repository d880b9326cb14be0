"""Kills ranks of a run with SIGKILL by a seeded plan, lets it start again, and measures how long the others live on.

The run is `murder_main.py`, the product's entry with marks of where each rank stands. A launch ends with a kill and
the next one goes on from the checkpoint; the last kills fall into one launch that restarts by `--max-restarts`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from launches import Launch, Launcher, alive, described, launched
from marks import BACKWARD, Board, Mark

AIMED = ("rollout", "judge", BACKWARD, "save")
GONE_SECONDS = 30.0
"""All ranks must be gone that long after one of them died."""
PATIENCE = 400.0
"""Seconds from one mark that is waited for to the next; imports on a busy machine may take that long."""
_ANY_SECONDS = 3.0
_POLL = 0.0003


@dataclass(frozen=True)
class Aim:
    """Kill `rank` in `stage`, not before `iteration`, when `fraction` of the stage's usual time has passed.

    Without a stage: when `fraction` of three seconds has passed after the rank began, wherever it stands then.
    """

    rank: int
    stage: str | None
    iteration: int
    fraction: float


@dataclass(frozen=True)
class Kill:
    """What a kill hit, the seconds until no process of the ranks was left, and the newest checkpoint after it.

    `ranks` are the processes of all ranks, which have ended.
    """

    aim: Aim
    ranks: tuple[int, ...]
    hit: Mark
    gone_seconds: float
    checkpoint: int

    @property
    def stage(self) -> str:
        """Where it hit; a save also where it was written while another stage went on."""
        return "save" if self.hit.saving % 2 else self.hit.stage or "between"


@dataclass(frozen=True)
class Course:
    """A run: flags of the product, in a folder of its own that takes checkpoints, metrics and logs."""

    folder: Path
    ranks: int
    flags: tuple[str, ...]

    @property
    def saved(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "saved"

    @property
    def metrics(self) -> Path:
        """The metrics of every iteration."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Every candidate with its scores."""
        return self.folder / "samples.jsonl"

    @property
    def audit(self) -> Path:
        """What became of every sample."""
        return self.saved / "audit.jsonl"

    @property
    def journal(self) -> Path:
        """Where the product keeps verdicts and rewrites."""
        return self.saved / "journal"

    @property
    def board(self) -> Path:
        """Where the ranks write how they stand."""
        return self.folder / "board"

    def argv(self) -> list[str]:
        """The wrapper with all its arguments."""
        wrapper, saved = str(Path(__file__).with_name("murder_main.py")), str(self.saved)
        places = ["--save", saved, "--load", saved, "--metrics-file", str(self.metrics)]
        return [wrapper, str(self.board), *self.flags, *places, "--sample-log", str(self.samples)]

    def resumed_at(self) -> list[int]:
        """The iterations from which launches went on, in their order."""
        said = "".join(log.read_text(errors="replace") for log in sorted(self.folder.glob("launch-*.log")))
        return [int(number) for number in re.findall(r"^> resumed from .* at iteration (\d+) ", said, re.MULTILINE)]

    def checkpoint(self) -> int:
        """Iteration of the newest checkpoint that has its name; 0 without one."""
        latest = self.saved / "latest_checkpointed_iteration.txt"
        return int(latest.read_text()) if latest.exists() else 0


def plan(seed: int, kills: int, ranks: int, last: int, *, waits: bool = False) -> list[Aim]:
    """Kills spread over the iterations up to `last`: the four stages alike, every fifth at any moment, at random.

    `waits` tells that there is a server to wait for. The wait for a scorer in the same process is over in a few
    milliseconds, so that is hit at its beginning.
    """
    draw = random.Random(seed)
    stages: list[str | None] = [(*AIMED, None)[number % 5] for number in range(kills)]
    draw.shuffle(stages)
    aims = []
    for number, stage in enumerate(stages):
        iteration = 1 + int(last * (number + draw.random()) / kills)
        fraction = draw.random()
        aims.append(Aim(draw.randrange(ranks), stage, iteration, fraction if waits or stage != "judge" else 0.0))
    return aims


def until(condition: Callable[[], bool], launch: Launch, what: str, seconds: float = PATIENCE) -> None:
    """Poll closely until `condition` holds; the launch must go on all the while."""
    deadline, polls = time.monotonic() + seconds, 0
    while not condition():
        time.sleep(_POLL)
        polls += 1
        if polls % 1000 == 0:
            launch.require_running()
            assert time.monotonic() < deadline, f"{what} did not come within {seconds:.0f} s:\n{launch.said()}"


def strike(board: Board, launch: Launch, aim: Aim) -> Mark:
    """Kill the aimed rank as the aim says; where it stood when it died."""
    if aim.stage is None:
        time.sleep(_ANY_SECONDS * aim.fraction)
        return kill(board, launch, aim.rank)
    fraction, missed = aim.fraction, frozenset[int]()
    while True:
        until(lambda: _visit(board.read(aim.rank), aim) not in {0, *missed}, launch, f"{aim}")  # noqa: B023
        visit = _visit(board.read(aim.rank), aim)
        time.sleep(fraction * board.usual_seconds(aim.rank, aim.stage))
        if visit and _visit(board.read(aim.rank), aim) == visit:
            return kill(board, launch, aim.rank)
        # Too late for this visit, since what the journal answers takes no time; at once at the next.
        missed, fraction = missed | {visit}, 0.0


def _visit(mark: Mark, aim: Aim) -> int:
    """The number of the visit of the aimed stage in which the rank is, 0 where it is elsewhere."""
    if aim.stage == "save":
        return mark.saving if mark.saving % 2 and mark.saved >= aim.iteration else 0
    return mark.visit if mark.stage == aim.stage and mark.iteration >= aim.iteration else 0


def kill(board: Board, launch: Launch, rank: int) -> Mark:
    """SIGKILL to the rank; where it stood when it died."""
    victim = psutil.Process(board.read(rank).pid)
    os.kill(victim.pid, signal.SIGKILL)
    until(lambda: not alive(victim), launch, "the death of a killed process", 10)
    return board.read(rank)


def seconds_until_gone(launch: Launch) -> float:
    """How long after this call the last process of the ranks is gone; fails after GONE_SECONDS."""
    since = time.monotonic()
    family = launch.processes()
    while left := [one for one in family if alive(one)]:
        took = time.monotonic() - since
        assert took < GONE_SECONDS, f"{took:.0f} s after a rank died there are {described(left)}:\n{launch.said()}"
        time.sleep(0.02)
    return time.monotonic() - since


def broken(launcher: Launcher, course: Course, aims: Sequence[Aim], restarts: int) -> list[Kill]:
    """The run with a kill for each aim, to its end.

    The last `restarts` kills fall into one launch under `--max-restarts`, all others end their launch.
    """
    assert 1 <= restarts <= len(aims)
    course.folder.mkdir(parents=True)
    board = Board(course.board, course.ranks)
    kills: list[Kill] = []
    groups = [[aim] for aim in aims[:-restarts]] + [list(aims[-restarts:])]
    for group in groups:
        last = group is groups[-1]
        with launched(launcher, course.folder, course.ranks, course.argv(), len(group) if last else 0) as launch:
            for aim in group:
                kills.append(_struck(board, launch, course, aim, kills[-1].ranks if kills else ()))
            status = launch.wait(PATIENCE if last else GONE_SECONDS)
            assert (status == 0) == last, f"the launch ended with {status}:\n{launch.said()}"
    return kills


def _struck(board: Board, launch: Launch, course: Course, aim: Aim, dead: Sequence[int]) -> Kill:
    """One kill in ranks that start now; the board may still show the `dead` ones."""

    def ranks() -> tuple[int, ...]:
        return tuple(board.read(rank).pid for rank in range(course.ranks))

    until(lambda: not {0, *dead} & set(ranks()), launch, "the start of all ranks")
    living = ranks()
    hit = strike(board, launch, aim)
    return Kill(aim, living, hit, seconds_until_gone(launch), course.checkpoint())


def unbroken(launcher: Launcher, course: Course) -> None:
    """The run to its end, without a kill."""
    with launched(launcher, course.folder, course.ranks, course.argv()) as launch:
        assert launch.wait(PATIENCE) == 0, launch.said()


def check_losses(kills: Sequence[Kill], resumed_at: Sequence[int], most: int) -> None:
    """Each launch went on from the newest named checkpoint, and no kill took more than `most` finished steps."""
    checkpoints = [0] + [kill.checkpoint for kill in kills]
    assert checkpoints == sorted(checkpoints)
    assert list(resumed_at) == sorted(resumed_at)
    assert set(resumed_at) <= set(checkpoints)
    assert [0, *resumed_at][-1] == checkpoints[-1]
    lost = [kill.hit.iteration - 1 - kill.checkpoint for kill in kills]
    assert max(lost) <= most, f"finished steps that were lost: {lost}"


def table(kills: Sequence[Kill]) -> str:
    """The kills by the stage that they hit, and the seconds until all ranks were gone."""
    hits = Counter(kill.stage for kill in kills)
    rows = [f"{'hit':10} {'kills':>5} {'aimed':>5}   gone after s: {'min':>6} {'median':>6} {'max':>6}"]
    for stage, count in [*sorted(hits.items()), ("all", len(kills))]:
        these = [one for one in kills if stage in (one.stage, "all")]
        spread = sorted(one.gone_seconds for one in these)
        aimed = sum(one.aim.stage == one.stage for one in these)
        numbers = f"{spread[0]:6.2f} {statistics.median(spread):6.2f} {spread[-1]:6.2f}"
        rows.append(f"{stage:10} {count:5} {aimed:5}   {'':13} {numbers}")
    return "\n".join(rows)
