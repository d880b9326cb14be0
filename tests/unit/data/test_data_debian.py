from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.data.debian import unpack
from megatron_sip.errors import DataError


def command(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that stand in for Debian's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    command(folder, "apt-get", 'test "$1" = download && echo content > "$3_1.0_all.deb"')
    command(folder, "dpkg-deb", 'mkdir -p "$3/usr" && cp "$2" "$3/usr/file"')
    return folder


def test_a_package_is_fetched_and_unpacked_in_the_scratch_folder(machine: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    root = unpack("words", scratch, "bring your own")
    assert (root / "usr" / "file").read_text() == "content\n"
    assert scratch in root.parents


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("apt-get", "echo E: nothing found >&2; exit 100", "apt-get cannot get words (E: nothing found); run `apt-get"),
        ("apt-get", "exit 0", "left 0 archives of words"),
        ("dpkg-deb", "exit 2", "dpkg-deb cannot get words (it said nothing)"),
    ],
)
def test_what_goes_wrong_is_told_with_the_way_out(
    machine: Path, tmp_path: Path, name: str, script: str, message: str
) -> None:
    command(machine, name, script)
    with pytest.raises(DataError) as error:
        unpack("words", tmp_path, "bring your own")
    assert message in str(error.value)
    assert str(error.value).endswith("bring your own")


def test_another_system_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no apt-get and dpkg-deb"):
        unpack("words", tmp_path, "bring your own")
