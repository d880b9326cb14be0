"""Settings of a trace that cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.validate_profile import profile_folder, profile_problems


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--profile --save s",
        "--profile --tensorboard-dir t",
        "--profile --profile-dir p --profile-ranks 0 3 --profile-step-start 0 --profile-step-end 1",
        # Fewer iterations than the window has: what there is of them is traced.
        "--profile --profile-dir p --train-iters 11",
    ],
)
def test_sensible_settings_pass(line: str) -> None:
    assert list(profile_problems(parse_config(line.split()), 4)) == []


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--profile-dir p", ["--profile-dir is given without --profile"]),
        ("--profile-step-end 20", ["--profile-step-end is given without --profile"]),
        ("--profile", ["no folder", "--profile-dir, --tensorboard-dir or --save"]),
        (
            "--profile --save s --profile-step-start 12",
            ["--profile-step-start 12 is not below --profile-step-end 12"],
        ),
        ("--profile --save s --train-iters 10", ["--profile-step-start 10 lies beyond --train-iters 10", "lower it"]),
        ("--profile --save s --profile-ranks 0 4", ["--profile-ranks 0 4: 4 of them", "4 launched ranks", "0 to 3"]),
        ("--profile --save s --profile-ranks", ["--profile-ranks names no rank"]),
    ],
)
def test_each_fault_names_flag_and_way_out(line: str, parts: list[str]) -> None:
    [problem] = profile_problems(parse_config(line.split()), 4)
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("--save s", "s/profile"),
        ("--save s --tensorboard-dir t", "t"),
        ("--save s --tensorboard-dir t --profile-dir p", "p"),
    ],
)
def test_the_folder(line: str, folder: str) -> None:
    assert profile_folder(parse_config(line.split())) == Path(folder)
