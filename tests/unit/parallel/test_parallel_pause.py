"""What the main rank says of a pause: once at its beginning, once a minute, once at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.parallel import pause as pause_module
from megatron_sip.parallel.pause import PauseNotes


class Clock:
    """`time` with a hand that the test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pause_module, "time", made)

    def gather(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own, "no server answers"]

    monkeypatch.setattr(pause_module.dist, "all_gather_object", gather)
    return made


def notes(main: bool) -> PauseNotes:
    return PauseNotes(SimpleNamespace(size=2, is_main=main, control_group=None))  # type: ignore[arg-type]


def test_a_pause_is_told_by_the_main_rank_though_another_knows_of_it(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    told = notes(main=True)
    told.heard(False, None)
    assert capsys.readouterr().out == ""
    for second in range(0, 150, 2):
        clock.now = 1000.0 + second
        told.heard(True, None)
    told.heard(False, None)
    told.heard(False, None)
    assert capsys.readouterr().out.splitlines() == [
        "> paused: no server answers; the run goes on by itself when one does",
        "> still paused after 60 s: no server answers",
        "> still paused after 120 s: no server answers",
        "> going on after a pause of 148 s",
    ]
    told.heard(True, None)
    assert "> paused" in capsys.readouterr().out, "a second pause is told anew"


def test_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = notes(main=False)
    for paused in (True, True, False):
        clock.now += 100
        told.heard(paused, "own")
    assert capsys.readouterr().out == ""
