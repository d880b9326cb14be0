"""Command lines of the product for `check_commands.py`, and what each rank said and did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forks import run_checks
from spawn import free_port


@dataclass(frozen=True)
class Command:
    """One call of the entry. `watch` is a folder whose content is recorded behind it."""

    name: str
    argv: list[str]
    watch: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one rank did."""

    status: int | str
    seconds: float
    watched: dict[str, str]
    stdout: str
    stderr: str


def run_commands(commands: list[Command], world_size: int, folder: Path) -> dict[str, list[Outcome]]:
    """Run all in one launch; the outcomes of the ranks by the command's name."""
    folder.mkdir(parents=True)
    cases: list[dict[str, Any]] = [{**asdict(command), "port": free_port()} for command in commands]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_checks("check_commands.py", world_size, str(folder / "cases.json"), str(folder))
    return {
        command.name: [
            Outcome(**json.loads((folder / f"{command.name}.{rank}.json").read_text())) for rank in range(world_size)
        ]
        for command in commands
    }
