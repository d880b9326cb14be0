"""examples/lib/processes.sh: progress lines, the end of a failed log, and that nothing outlives the script."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "examples" / "lib" / "processes.sh"
LINE = (
    " [2026-01-01 00:00:00] iteration        3/      30 | consumed samples:           24 | global batch size:     8 | "
    "loss: 6.5E-01 | grad norm: 1.000 | valid pairs: 7 | chosen original: 0.50 | train (s): 0.90 |"
)


def start(script: str, tmp_path: Path) -> subprocess.Popen[str]:
    whole = f"set -euo pipefail\nsource {LIBRARY}\nSTOP_GRACE=3\ninstall_traps\n{script}\n"
    return subprocess.Popen(
        ["env", "--default-signal=INT", "bash", "-c", whole],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_progress_shows_the_wanted_numbers_of_new_lines_only(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text(LINE.replace("3/", "2/") + "\n")
    (tmp_path / "lines").write_text(f"noise\n{LINE}\n> saved\n> resolved configuration:\n")
    script = start("run_logged trial run.log '^( \\[|> )' cat lines", tmp_path)
    out, err = script.communicate(timeout=30)
    assert script.returncode == 0, err
    assert [line.strip() for line in out.splitlines()] == [
        "step 3/30 | loss: 6.5E-01 | valid pairs: 7 | chosen original: 0.50 | train (s): 0.90",
        "> saved",
    ]


def test_a_failed_stage_shows_the_end_of_its_log_and_ends_the_script(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text("line of an earlier run\n")
    failing = 'for i in $(seq 40); do echo "line $i"; done; exit 7'
    script = start(f"run_logged trial run.log nothing bash -c '{failing}'\necho not reached", tmp_path)
    out, err = script.communicate(timeout=30)
    assert script.returncode == 1
    assert "trial failed with status 7" in err
    assert "    line 40" in err
    assert "    line 16" in err
    assert "line 15" not in err
    assert "earlier run" not in err
    assert "not reached" not in out


def wait_for(file: Path) -> int:
    limit = time.monotonic() + 20
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < limit
        time.sleep(0.05)
    return int(file.read_text())


def test_an_interrupt_ends_even_what_sits_in_a_session_of_its_own_and_ignores_being_asked(tmp_path: Path) -> None:
    # As torchrun and the judge server do: the worker leads another session. It also ignores TERM.
    worker = 'trap "" TERM INT; echo $$ >worker; while :; do sleep 0.2; done'
    (tmp_path / "parent.sh").write_text(f"setsid bash -c '{worker}' &\necho $$ >parent\nwait\n")
    script = start("run_logged trial run.log nothing bash parent.sh", tmp_path)
    parent, child = wait_for(tmp_path / "parent"), wait_for(tmp_path / "worker")
    script.send_signal(signal.SIGINT)
    _, err = script.communicate(timeout=30)
    assert script.returncode == 130
    assert f"{child}" in err  # it had to be forced, and that is said
    assert not alive(parent)
    assert not alive(child)


def test_a_process_that_was_not_noted_yet_is_ended_too(tmp_path: Path) -> None:
    """The signal falls between a start and the line that notes it."""
    script = start("setsid sleep 600 &\necho $! >child\nwait", tmp_path)
    child = wait_for(tmp_path / "child")
    script.terminate()
    script.communicate(timeout=30)
    assert script.returncode == 143
    assert not alive(child)


def demo_of_small_sizes() -> str:
    sizes = "NTP_STEPS=1 SIP_STEPS=1 SIP_PREFIXES=1 ROLLOUTS=1 SUFFIX=8 JUDGE_INTERVAL=1 REWRITE_INTERVAL=1"
    return f"source {LIBRARY.with_name('demo.sh')}\n{sizes} TP=1 DATA_DIR=d"


@pytest.mark.parametrize("changed", ["JUDGE_INTERVAL=2", "REWRITE_INTERVAL=2", "SUFFIX=9", "ROLLOUTS=2"])
def test_a_demo_that_was_scored_otherwise_is_not_continued(tmp_path: Path, changed: str) -> None:
    again = f"RUN_DIR=own\nkeep_settings --beta 1\nkeep_settings --beta 1\necho same\n{changed}\nkeep_settings --beta 1"
    script = start(f"{demo_of_small_sizes()}\n{again}", tmp_path)
    out, err = script.communicate(timeout=30)
    assert "same" in out
    assert script.returncode == 1
    assert "own was made with other settings" in err


def test_fresh_deletes_no_folder_that_the_script_did_not_make(tmp_path: Path) -> None:
    demo = demo_of_small_sizes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    script = start(f"{demo}\nFRESH=1 RUN_DIR=mine keep_settings", tmp_path)
    _, err = script.communicate(timeout=30)
    assert script.returncode == 1
    assert "mine, which this script did not make" in err
    assert (tmp_path / "mine" / "thesis.tex").exists()
    again = "RUN_DIR=own\nkeep_settings\ntouch own/old\nFRESH=1 keep_settings\n[[ ! -e own/old && -d own/stages ]]"
    script = start(f"{demo}\n{again}", tmp_path)
    _, err = script.communicate(timeout=30)
    assert script.returncode == 0, err


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="util-linux has no setpriv here")
def test_a_script_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    # Half a launcher: it ends its worker when it is asked to end.
    launcher = 'trap "kill %1; exit" TERM; sleep 60 & echo $! >worker; echo $$ >launcher; wait'
    script = start(f"start_logged run.log bash -c '{launcher}'\nwait", tmp_path)
    pids = [wait_for(tmp_path / name) for name in ("launcher", "worker")]
    script.kill()
    script.communicate(timeout=30)
    limit = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < limit
        time.sleep(0.05)
