"""The command of the converter: what it says, where, and with which exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hf_toys import toy_llama

from tools.checkpoint import convert as tool


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = tool.main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_llama(tmp_path / "hf")
    return tmp_path


def test_what_was_converted_is_said(folder, capsys):
    there = (
        "--loader",
        "hf",
        "--saver",
        "mcore",
        "--load-dir",
        str(folder / "hf"),
        "--save-dir",
        str(folder / "mcore"),
    )
    status, out, err = run(capsys, *there, "--target-tensor-parallel-size", "4", "--dtype", "bf16")
    assert (status, err) == (0, "")
    assert "2 of zeros are added" in out
    assert out.splitlines()[-1] == f"{folder / 'hf'} converted to {folder / 'mcore'}"
    back = ("--load-dir", str(folder / "mcore"), "--save-dir", str(folder / "back"))
    status, out, err = run(capsys, *back)
    assert (status, err) == (0, "")
    assert f"reading iteration 0 of {folder / 'mcore'}" in out
    assert (folder / "back" / "model.safetensors").is_file()


def test_a_refusal_is_one_line_and_status_1(folder, capsys):
    status, out, err = run(
        capsys, "--loader", "hf", "--load-dir", str(folder / "none"), "--save-dir", str(folder / "x")
    )
    assert (status, out, err) == (1, "", f"convert: {folder / 'none'}: no such folder\n")


def test_an_interruption_is_one_line_and_status_130(folder, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "_show", interrupted)
    status, _, err = run(capsys, "--loader", "hf", "--load-dir", str(folder / "hf"), "--save-dir", str(folder / "x"))
    assert status == 130
    assert err == f"convert: interrupted; nothing was written to {folder / 'x'}\n"
    assert [path.name for path in folder.iterdir()] == ["hf"]


def test_a_bar_is_drawn_on_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, _, err = run(capsys, "--loader", "hf", "--load-dir", str(folder / "hf"), "--save-dir", str(folder / "x"))
    assert status == 0
    assert "converting: 100%" in err
