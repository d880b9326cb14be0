"""The launcher with a stand-in for vLLM: it announces, forwards, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tools import serve_vllm

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "serve_vllm.py"

# Serves /health, starts a child as vLLM starts its engine, and writes down what it was given.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys
from importlib import import_module
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
note = Path(os.environ["STAND_IN_NOTE"])
if os.environ.get("STAND_IN_FAILS"):
    print("the engine core failed to start")
    sys.exit(7)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if os.environ.get("STAND_IN_IGNORES_TERM"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), os._exit(0)))
names = "VLLM_API_KEY JUDGE_API_KEY B_JUDGE_API_KEY WANDB_API_KEY".split()
names += "OMP_NUM_THREADS VLLM_CPU_OMP_THREADS_BIND HF_HUB_OFFLINE ROLLOUT_API_KEY VLLM_SERVER_DEV_MODE".split()
seen = {name: os.environ.get(name) for name in names}
note.write_text(json.dumps({"pids": [os.getpid(), child.pid], "argv": sys.argv[1:], "env": seen}))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer((flags["--host"], int(flags["--port"])), Health).serve_forever()
"""


class Launch:
    """One run of the tool with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note = folder / "note.json"
        self.ready = folder / "ready"
        package = folder / "site" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for level in (package, package.parent, package.parent.parent):
            (level / "__init__.py").write_text("")
        (package / "api_server.py").write_text(STAND_IN)
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(sys.executable)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.process: subprocess.Popen[str] | None = None

    def command(self, *flags: str) -> list[str]:
        places = ["--judge-venv", str(self.folder / "venv"), "--model", str(self.folder / "model")]
        files = ["--ready-file", str(self.ready), "--log-file", str(self.folder / "log")]
        return [sys.executable, str(TOOL), *places, *files, "--device", "cpu", *flags]

    def environment(self, **more: str) -> dict[str, str]:
        path = {"PYTHONPATH": str(self.folder / "site"), "STAND_IN_NOTE": str(self.note)}
        return {**os.environ, **path, **more}

    def start(self, *flags: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command(*flags), env=self.environment(**more), stdout=pipe, stderr=pipe, text=True
        )
        return self.process

    def noted(self) -> dict[str, object]:
        return dict(json.loads(self.note.read_text()))

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.noted()["pids"]]  # type: ignore[attr-defined]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started = Launch(tmp_path)
    yield started
    if started.process is not None and started.process.poll() is None:
        started.process.kill()
    if started.note.exists():
        for pid in started.pids():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs (a dead one that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition did not come true"
        time.sleep(0.02)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_announces_the_server_and_ends_it(launch: Launch, number: signal.Signals) -> None:
    keys = {"JUDGE_API_KEY": "secret-key", "WANDB_API_KEY": "not-yours", "B_JUDGE_API_KEY": "nor-this"}
    process = launch.start("--threads", "2", "--", "--seed", "5", **keys)
    url = first_line(process)
    wait_until(launch.ready.exists)
    assert launch.ready.read_text().strip() == url
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url.removesuffix("/v1") + "/health") as seen:
        assert seen.status == 200
    noted = launch.noted()
    argv = noted["argv"]
    assert isinstance(argv, list)
    assert argv[argv.index("--block-size") + 1] == "32"
    assert argv.index("--block-size") < argv.index("--seed"), "what the user says comes last and wins"
    assert noted["env"] == {
        "VLLM_API_KEY": "secret-key",
        "JUDGE_API_KEY": None,
        "B_JUDGE_API_KEY": None,
        "WANDB_API_KEY": None,
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "ROLLOUT_API_KEY": None,
        "VLLM_SERVER_DEV_MODE": None,
    }
    argv = " ".join(noted["argv"])  # type: ignore[arg-type]
    assert "--seed 5" in argv
    assert "--served-model-name model" in argv
    assert "secret-key" not in argv
    process.send_signal(number)
    assert process.wait(20) == 0
    assert not any(alive(pid) for pid in launch.pids())
    assert not launch.ready.exists()


def test_a_rollout_server_has_the_development_endpoints_and_its_own_key(launch: Launch) -> None:
    keys = {"JUDGE_API_KEY": "of-the-judge", "ROLLOUT_API_KEY": "secret-key"}
    assert first_line(launch.start("--rollouts", **keys))
    wait_until(launch.ready.exists)
    noted = launch.noted()
    argv, env = noted["argv"], noted["env"]
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    assert argv[argv.index("--generation-config") + 1] == "vllm"
    module, _, name = argv[argv.index("--worker-extension-cls") + 1].rpartition(".")
    assert hasattr(import_module(module), name)
    assert (env["VLLM_API_KEY"], env["JUDGE_API_KEY"], env["ROLLOUT_API_KEY"]) == ("secret-key", None, None)
    assert env["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8", "this-machine"])
def test_a_rollout_server_faces_private_networks_only(launch: Launch, host: str) -> None:
    process = launch.start("--rollouts", "--host", host)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "private address of this machine" in errors
    assert not launch.note.exists()


def test_nothing_is_left_when_the_tool_is_killed(launch: Launch) -> None:
    process = launch.start()
    assert first_line(process)
    process.kill()
    process.wait(10)
    wait_until(lambda: not any(alive(pid) for pid in launch.pids()))


def test_it_ends_with_the_process_that_called_it(launch: Launch) -> None:
    calling = f"import subprocess, sys, time; subprocess.Popen({launch.command()!r}); time.sleep(600)"
    launch.process = subprocess.Popen(
        [sys.executable, "-c", calling], env=launch.environment(), stdout=subprocess.PIPE, text=True
    )
    assert first_line(launch.process)
    launch.process.kill()
    wait_until(lambda: not any(alive(pid) for pid in launch.pids()))


def test_a_stubborn_server_is_killed(launch: Launch) -> None:
    process = launch.start("--stop-grace", "0.5", STAND_IN_IGNORES_TERM="1")
    assert first_line(process)
    process.terminate()
    assert process.wait(30) == 0
    assert not any(alive(pid) for pid in launch.pids())


def test_a_server_that_fails_is_explained(launch: Launch) -> None:
    process = launch.start(STAND_IN_FAILS="1")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "status 7 before it was ready" in errors
    assert "the engine core failed to start" in errors


def test_a_server_that_dies_later_is_noticed(launch: Launch) -> None:
    process = launch.start()
    assert first_line(process)
    os.kill(launch.pids()[0], signal.SIGKILL)
    assert process.wait(30) == 1
    assert not any(alive(pid) for pid in launch.pids())


def test_a_port_that_somebody_has_is_refused(launch: Launch) -> None:
    """That somebody may well answer /health, and would be taken for the server that was asked for."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(answer), daemon=True).start()
        process = launch.start("--port", str(other.getsockname()[1]))
        announced, errors = process.communicate(timeout=30)
    assert (announced, process.returncode) == ("", 2)
    assert "--port" in errors
    assert "is in use" in errors


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--host", "192.0.2.1"], "--host 192.0.2.1 is no address of this machine"),
        (["--log-file", "/proc/none/log"], "/proc/none"),
    ],
)
def test_places_that_cannot_be_used_are_named(launch: Launch, flags: list[str], part: str) -> None:
    process = launch.start(*flags)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert part in errors
    assert "Traceback" not in errors
    assert not launch.note.exists()


def test_folders_of_log_and_ready_file_are_made(launch: Launch) -> None:
    launch.ready = launch.folder / "new" / "ready"
    process = launch.start("--log-file", str(launch.folder / "logs" / "judge.log"))
    assert first_line(process)
    wait_until(launch.ready.exists)


def test_wrong_places_are_named(launch: Launch) -> None:
    missing = [*launch.command()[:2], "--model", str(launch.folder / "none"), "--judge-venv", str(launch.folder)]
    done = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tools/setup.sh judge" in done.stderr
    missing[-1] = str(launch.folder / "venv")
    done = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "config.json" in done.stderr


@pytest.mark.parametrize(
    ("device", "flags", "wanted"),
    [
        ("cpu", "fpu avx avx2 avx512f", "float32"),
        ("cpu", "fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("cpu", "fpu amx_bf16", "bfloat16"),
        ("gpu", "fpu avx2", "bfloat16"),
    ],
)
def test_bfloat16_is_used_only_where_it_is_fast(tmp_path: Path, device: str, flags: str, wanted: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: bf16\nflags\t\t: {flags}\n")
    assert serve_vllm.default_dtype(device, serve_vllm.cpu_flags(cpuinfo)) == wanted


def test_a_machine_that_tells_nothing_gets_float32(tmp_path: Path) -> None:
    assert serve_vllm.default_dtype("cpu", serve_vllm.cpu_flags(tmp_path / "none")) == "float32"
