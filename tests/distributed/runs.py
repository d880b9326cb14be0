"""Runs of the tiny model for `check_runs.py`, and what they left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from commands import Outcome
from forks import run_checks
from repeats import records, tensors
from spawn import free_port
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

from megatron_sip.training.audit import Record, effective_steps, read_audit

SMALLER = "--num-layers 2 --suffix-length 8 --num-rollouts 2 --sample-log-interval 1000".split()
"""Half of the tiny run: what counts here is many steps."""


@dataclass(frozen=True)
class Case:
    """A run in a folder of its own: flags beside those of the tiny run, a fault, a run to copy as its checkpoints.

    `ranks` None: all that are launched.
    """

    name: str
    flags: tuple[str, ...] = ()
    fault: dict[str, Any] | None = None
    copy_of: tuple[str, int] | None = None
    ranks: int | None = None


@dataclass(frozen=True)
class Runs:
    """Runs on one corpus, under one folder."""

    root: Path
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def launch(self, world_size: int, *cases: Case) -> None:
        """All cases one after another in the same ranks."""
        if not (self.root / "data").exists():
            make_corpus(self.root / "data")
        number = len(list(self.root.glob("launch-*")))
        out = self.root / f"launch-{number}"
        out.mkdir()
        (out / "cases.json").write_text(json.dumps([self._case(case, case.ranks or world_size) for case in cases]))
        run_checks("check_runs.py", world_size, str(out / "cases.json"), str(out), timeout=580)
        for case in cases:
            files = [out / f"{case.name}.{rank}.json" for rank in range(case.ranks or world_size)]
            self.outcomes[case.name] = [Outcome(**json.loads(file.read_text())) for file in files]

    def _case(self, case: Case, ranks: int) -> dict[str, Any]:
        saved = self.saved(case.name)
        flags = ["--data-path", str(self.root / "data" / "corpus_text_document")]
        flags += ["--tokenizer-model", str(self.root / "data" / "tokenizer")]
        flags += [*MODEL, *DATA, *TRAINING, *SMALLER]
        flags += ["--save", str(saved), "--metrics-file", str(self._metrics(case.name))]
        copy = None
        if case.copy_of:
            copy = [str(self.saved(case.copy_of[0])), str(saved), case.copy_of[1]]
            flags += ["--load", str(saved)]
        return {
            **asdict(case),
            "ranks": ranks,
            "copy": copy,
            "argv": [*flags, *case.flags],
            "environment": {},
            "port": free_port(),
            "watch": str(saved / "none"),
        }

    def saved(self, name: str) -> Path:
        """Folder of a run's checkpoints and audit log."""
        return self.root / name

    def _metrics(self, name: str) -> Path:
        return self.root / f"{name}.metrics.jsonl"

    def said(self, name: str) -> str:
        """What the ranks printed; an error is told by the rank that meets it first."""
        return "".join(outcome.stdout + outcome.stderr for outcome in self.outcomes[name])

    def require_success(self, *names: str) -> None:
        """All ranks of these runs ended well."""
        for name in names:
            assert [outcome.status for outcome in self.outcomes[name]] == [0] * len(self.outcomes[name]), self.said(
                name
            )

    def audit(self, name: str) -> list[Record]:
        """All records of a run's audit log."""
        return read_audit(self.saved(name) / "audit.jsonl")

    def steps(self, name: str) -> list[Record]:
        """The steps that no rollback took back."""
        return effective_steps(self.audit(name))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The metrics of every iteration, without what clocks say."""
        return records(self._metrics(name))

    def tensors(self, name: str, iteration: int) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint."""
        return tensors(self.saved(name), iteration)
