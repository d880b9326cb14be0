"""The journal in step with checkpoints: what is read at a start and a rollback, and what goes after a save."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sip.checkpoint.progress import Progress, to_state
from megatron_sip.config.groups import CheckpointConfig
from megatron_sip.services.journal import Journal, Recalled
from megatron_sip.services.journal_records import Key, Source
from megatron_sip.training import journal as keeping
from megatron_sip.training.journal import JournalKeeper, oldest_sample, report

SOURCE = Source("quality", "model", "version", "logit")


class Services:
    """What the keeper needs of a leader's services."""

    def __init__(self, asks: bool = True) -> None:
        self.asks, self.journal = asks, None

    def use_journal(self, journal: Journal) -> None:
        self.journal = journal

    def recall(self, next_sample: int) -> Recalled | None:
        return self.journal.recall(next_sample) if self.journal else None

    def checkpointed(self, oldest_sample: int) -> None:
        if self.journal:
            self.journal.checkpointed(oldest_sample)


class Kept:
    """A keeper on one rank, with what it said."""

    def __init__(self, checkpoint: CheckpointConfig, services: Services | None) -> None:
        self.said: list[str] = []
        leader: Any = SimpleNamespace(together=lambda action: action(), world=SimpleNamespace(dp_rank=0))
        self.keeper = JournalKeeper(checkpoint, leader, services, self.said.append)  # type: ignore[arg-type]
        self.services = services

    def answer(self, *samples: int) -> None:
        """Write down one verdict a sample."""
        assert self.services is not None
        assert self.services.journal is not None
        entries = [(Key(sample, "", SOURCE, "a", "b"), 0.5) for sample in samples]
        asyncio.run(self.services.journal.append(entries))

    def close(self) -> None:
        """End the journal as the services do."""
        if self.services is not None and self.services.journal is not None:
            self.services.journal.close()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(_world: object, action: Callable[[], int]) -> int:
        return action()

    monkeypatch.setattr(keeping, "from_main", alone)


def checkpoint(root: Path, iteration: int, samples: int) -> None:
    """As much of a checkpoint as tells where it stands."""
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    torch.save(to_state(Progress(iteration, samples, {})), folder / "common.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


def progress(iteration: int) -> Progress:
    return Progress(iteration, 4 * iteration, {})


def test_a_run_its_rollback_and_its_restart(tmp_path: Path) -> None:
    settings = CheckpointConfig(save=str(tmp_path), load=str(tmp_path))
    run = Kept(settings, Services())
    run.keeper.open(progress(0))
    run.keeper.checkpointed(None)
    for sample in range(12):
        run.answer(sample)
        if sample in (3, 7):
            checkpoint(tmp_path, (sample + 1) // 4, sample + 1)
            run.keeper.checkpointed((sample + 1) // 4)
    run.keeper.stand_at(progress(2))
    run.close()
    assert run.said == [
        "journal: 0 verdicts and 0 rewrites of the steps since iteration 0",
        "journal: 4 verdicts and 0 rewrites of the steps since iteration 2",
    ]
    # What the checkpoint of iteration 1, which is kept, has trained is gone.
    again = Kept(settings, Services())
    again.keeper.open(progress(0))
    again.close()
    assert again.said == ["journal: 8 verdicts and 0 rewrites of the steps since iteration 0"]


def test_going_on_from_another_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    first = Kept(CheckpointConfig(save=str(old)), Services())
    first.keeper.open(progress(0))
    first.answer(0, 4, 5)
    first.close()
    then = Kept(CheckpointConfig(save=str(new), load=str(old)), Services())
    then.keeper.open(progress(1))
    then.close()
    assert then.said == ["journal: 2 verdicts and 0 rewrites of the steps since iteration 1"]
    anew = Kept(CheckpointConfig(save=str(new), load=str(old), finetune=True), Services())
    anew.keeper.open(progress(0))
    anew.close()
    assert anew.said == ["journal: 0 verdicts and 0 rewrites of the steps since iteration 0"]


def test_without_a_place_or_anybody_to_ask(tmp_path: Path) -> None:
    nowhere = Kept(CheckpointConfig(), Services())
    nowhere.keeper.open(progress(0))
    nowhere.keeper.checkpointed(3)
    assert nowhere.said == ["no journal of verdicts and rewrites without --save: a run that starts again asks anew"]
    for services in (None, Services(asks=False)):
        silent = Kept(CheckpointConfig(save=str(tmp_path)), services)
        silent.keeper.open(progress(0))
        silent.keeper.stand_at(progress(0))
        assert silent.said == []
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_checkpoint_decides(tmp_path: Path) -> None:
    assert oldest_sample(tmp_path) == 0
    checkpoint(tmp_path, 20, 80)
    checkpoint(tmp_path, 30, 120)
    assert oldest_sample(tmp_path) == 80
    # Beyond the named one: another history of the run.
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert oldest_sample(tmp_path) == 80
    (tmp_path / "iter_0000020" / "common.pt").write_bytes(b"damaged")
    assert oldest_sample(tmp_path) == 0, "it may be mended yet"


def test_what_could_not_be_read_is_said() -> None:
    found = Recalled(7, 1, 2, tuple(f"file, line {n}" for n in range(7)))
    counted, torn, damaged = report(found, 5)
    assert counted == "journal: 7 verdicts and 1 rewrites of the steps since iteration 5"
    assert torn == "journal: 2 file(s) end in a record that was cut off, as by a kill; it was never used"
    assert damaged.startswith("WARNING: journal: 7 damaged record(s) are left out (file, line 0; file, line 1;")
    assert "and others)" in damaged
