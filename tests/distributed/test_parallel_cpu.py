"""megatron-core without CUDA: fails first when another version needs another look. The presets ride along."""

from __future__ import annotations

from forks import run_checks


def test_megatron_core_runs_on_cpu_and_presets_have_their_size() -> None:
    assert "passed" in run_checks("check_cpu.py", 1)
