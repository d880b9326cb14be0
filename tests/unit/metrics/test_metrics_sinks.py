from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sip.config.groups import LoggingConfig
from megatron_sip.errors import ConfigError, DataError
from megatron_sip.metrics.jsonl import JsonlWriter, decode_number, drop_after, read_jsonl
from megatron_sip.metrics.redact import REMOVED, redact, secrets_in_environment
from megatron_sip.metrics.sinks import open_sinks, progress_text


def _open(settings: LoggingConfig, *, terminal: bool = False, start: int = 0, config=None):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None, legacy_windows=False)
    sinks = open_sinks(settings, train_iters=10, run_config=config or {}, start_iteration=start, console=console)
    return sinks, stream


def test_console_prints_one_plain_line_per_iteration():
    sinks, stream = _open(LoggingConfig())
    with sinks:
        sinks.log(1, {"loss": -0.5, "consumed_samples": 8, "elapsed_ms": 12.0, "scores/margin": 0.25})
        sinks.log(2, {"loss": 0.25})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "iteration        1/      10 |" in lines[0]
    assert "loss: -5.000000E-01 |" in lines[0]
    assert "\x1b" not in stream.getvalue()


def test_progress_line_only_on_a_terminal():
    sinks, stream = _open(LoggingConfig(), terminal=True, start=3)
    with sinks:
        sinks.log(4, {"loss": 0.5, "chosen/share_rollout": 0.5})
        sinks.console.print("a message in between")
    text = stream.getvalue()
    assert "4/10" in text
    assert "rollout chosen 50%" in text
    assert "a message in between" in text
    assert "iteration        4/      10 |" in text
    assert progress_text({}) == "training"


def test_metrics_file_round_trip_with_non_finite_values(tmp_path: Path):
    path = tmp_path / "deep" / "metrics.jsonl"
    sinks, _ = _open(LoggingConfig(metrics_file=str(path)))
    with sinks:
        sinks.log(1, {"loss": 0.5, "grad_norm": math.nan})
        sinks.log(2, {"loss": 0.25, "grad_norm": math.inf})
    records = list(read_jsonl(path))
    assert [record["iteration"] for record in records] == [1, 2]
    assert math.isnan(decode_number(records[0]["grad_norm"]))
    assert decode_number(records[1]["grad_norm"]) == math.inf
    assert "NaN" not in path.read_text().replace('"NaN"', "")  # strict JSON


def test_resume_drops_what_lies_beyond_and_the_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": step, "loss": 1.0 / step}) for step in range(1, 7)]
    path.write_text("\n".join(lines) + '\n{"iteration": 7, "lo')
    sinks, _ = _open(LoggingConfig(metrics_file=str(path)), start=4)
    with sinks:
        sinks.log(5, {"loss": 9.0})
    records = list(read_jsonl(path))
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["loss"] == 9.0
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_goes_back_takes_its_later_steps_out_of_every_sink(tmp_path: Path):
    path, events = tmp_path / "metrics.jsonl", tmp_path / "events"
    sinks, stream = _open(LoggingConfig(metrics_file=str(path), tensorboard_dir=str(events)), terminal=True)
    with sinks:
        for step in (1, 2, 3, 4):
            sinks.log(step, {"rewards/margins": float(step)})
        sinks.rewind(2)
        assert [record["iteration"] for record in read_jsonl(path)] == [1, 2]
        sinks.log(3, {"rewards/margins": -3.0})
    assert [record["rewards/margins"] for record in read_jsonl(path)] == [1.0, 2.0, -3.0]
    assert _tensorboard(events) == {1: 1.0, 2: 2.0, 3: -3.0}
    assert "2/10" in stream.getvalue().rpartition("4/10")[2]


def test_a_file_that_cannot_be_rewound_names_its_flag(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "deep" / "metrics.jsonl", flag="--metrics-file")
    writer.write({"iteration": 1})
    (tmp_path / "deep").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="--metrics-file"):
        writer.rewind(0)


def test_a_full_disk_is_told_once_and_the_file_is_closed():
    """What ends the run is the refused write; closing must not put an error of another kind in its place."""
    writer = JsonlWriter("/dev/full", flag="--metrics-file")
    with pytest.raises(ConfigError, match=r"cannot write /dev/full \(No space left on device\).*--metrics-file"):
        writer.write({"iteration": 1})
    writer.close()
    writer.close()


def test_a_disk_that_refuses_only_the_last_flush_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = JsonlWriter(tmp_path / "metrics.jsonl", flag="--metrics-file")
    writer.write({"iteration": 1})

    def refuse(_handle: int):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        writer.rewind(0)
    writer.close()
    assert [record["iteration"] for record in read_jsonl(writer.path)] == [1]


def test_fresh_run_keeps_the_file_of_an_earlier_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        writer = JsonlWriter(path, flag="--metrics-file")
        writer.write({"iteration": 1, "run": run})
        writer.close()
    assert next(read_jsonl(path))["run"] == 2
    assert next(read_jsonl(tmp_path / "metrics.jsonl.1"))["run"] == 0
    assert next(read_jsonl(tmp_path / "metrics.jsonl.2"))["run"] == 1


def test_broken_line_in_the_middle_is_refused_and_left_as_it_is(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    content = '{"iteration": 1}\nnot json\n{"iteration": 2}\n'
    path.write_text(content)
    with pytest.raises(DataError, match="line 2"):
        drop_after(path, 1)
    assert path.read_text() == content
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert drop_after(tmp_path / "none.jsonl", 3) == 0


def test_a_large_file_is_cut_line_by_line(tmp_path: Path):
    """Sample logs grow to gigabytes, and the rank that cuts them holds a policy."""
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"iteration": step, "text": "é" * 20_000}, ensure_ascii=False) for step in range(1, 101)]
    path.write_text("\n".join(lines) + "\n")
    tracemalloc.start()
    try:
        assert drop_after(path, 90) == 10
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size
    assert path.read_text().splitlines() == lines[:90]


def test_unwritable_places_name_their_flag(tmp_path: Path):
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(ConfigError, match="--metrics-file"):
        _open(LoggingConfig(metrics_file=str(blocker / "metrics.jsonl")))
    with pytest.raises(ConfigError, match="--tensorboard-dir"):
        _open(LoggingConfig(tensorboard_dir=str(blocker / "tb")))
    with pytest.raises(ConfigError, match="--wandb-project"):
        _open(LoggingConfig(wandb_exp_name="run"))


def _tensorboard(folder: Path) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("rewards/margins")}


def test_tensorboard_holds_the_scalars_and_a_resume_replaces_the_lost_steps(tmp_path: Path):
    settings = LoggingConfig(tensorboard_dir=str(tmp_path))
    sinks, _ = _open(settings)
    with sinks:
        for step in (1, 2, 3):
            sinks.log(step, {"rewards/margins": float(step)})
    assert _tensorboard(tmp_path) == {1: 1.0, 2: 2.0, 3: 3.0}
    sinks, _ = _open(settings, start=1)
    with sinks:
        sinks.log(2, {"rewards/margins": -2.0})
    assert _tensorboard(tmp_path) == {1: 1.0, 2: -2.0}


# wandb keeps its settings for the life of a process, so each case has a process of its own.
WANDB_RUN = """
import sys
from megatron_sip.config.groups import LoggingConfig
from megatron_sip.errors import ConfigError
from megatron_sip.metrics.sinks import open_sinks

config = {
    "judge_url": ["http://me:hunter2@judge/v1"],
    "api_key": "written-in-the-file",
    "note": "key-from-the-environment",
    "train_iters": 10,
}
settings = LoggingConfig(wandb_project="sip-test", wandb_exp_name="run", metrics_file="metrics.jsonl")
try:
    with open_sinks(settings, train_iters=10, run_config=config) as sinks:
        sinks.log(7, {"loss": 0.5, "rewards/margins": -0.125})
except ConfigError as error:
    print(f"refused: {error}")
    sys.exit(3)
"""


def _wandb_process(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[3]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, "--judge-url", "http://me:hunter2@judge/v1"],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(root), "HOME": str(folder), "WANDB_DIR": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_wandb_offline_writes_a_run_without_keys(tmp_path: Path):
    done = _wandb_process(tmp_path, WANDB_MODE="offline", JUDGE_API_KEY="key-from-the-environment")
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    runs = [path for path in files if path.suffix == ".wandb"]
    assert len(runs) == 1
    assert b"rewards/margins" in runs[0].read_bytes()
    assert b"http://judge/v1" in runs[0].read_bytes()
    for path in files:
        data = path.read_bytes()
        for secret in (b"hunter2", b"written-in-the-file", b"key-from-the-environment"):
            assert secret not in data, (path, secret)


def test_wandb_that_cannot_start_names_the_flag(tmp_path: Path):
    done = _wandb_process(tmp_path, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 3, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 1
    assert "--wandb-project" in refused[0]
    assert "WANDB_MODE=offline" in refused[0]
    assert "Traceback" not in done.stderr


def test_close_reaches_every_sink_though_one_fails(tmp_path: Path):
    sinks, _ = _open(LoggingConfig(metrics_file=str(tmp_path / "m.jsonl")))
    closed = []

    class Failing:
        def log(self, iteration, metrics):
            pass

        def close(self):
            closed.append("failing")
            raise OSError("disk")

    class Quiet(Failing):
        def close(self):
            closed.append("quiet")

    both = type(sinks)([Quiet(), Failing(), Quiet()], sinks.console)
    with pytest.raises(OSError, match="disk"):
        both.close()
    assert closed == ["quiet", "failing", "quiet"]
    sinks.close()


def test_redaction_by_name_url_and_value():
    secrets = secrets_in_environment({"JUDGE_API_KEY": "abcdefgh", "HF_TOKEN": "zyxwvut", "KEYBOARD": "qwertyui"})
    assert set(secrets) == {"abcdefgh", "zyxwvut"}
    config = {
        "judge_max_tokens": 512,
        "tokenizer_model": "models/tok",
        "num_query_groups": 4,
        "hf-token": "x",
        "password": None,
        "url": "https://u:p@host:8000/v1?api_key=1#top",
        "nested": [{"text": "see abcdefgh here"}],
        "path": "a/b",
    }
    assert redact(config, secrets) == {
        "judge_max_tokens": 512,
        "tokenizer_model": "models/tok",
        "num_query_groups": 4,
        "hf-token": REMOVED,
        "password": None,
        "url": "https://host:8000/v1",
        "nested": [{"text": f"see {REMOVED} here"}],
        "path": "a/b",
    }
