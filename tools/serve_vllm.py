"""Start one vLLM server for a model folder, as judge and rewriter or for rollouts, and keep it until told to stop.

Runs in any Python (standard library only) and starts vLLM with the judge environment's own interpreter. It picks
a free port, waits until the server is healthy, prints the base URL as the only line on standard output, and then
stays in the foreground. SIGTERM, SIGINT, SIGHUP or the death of the calling process end the whole server.
A key is taken from the environment (JUDGE_API_KEY, with --rollouts ROLLOUT_API_KEY, or VLLM_API_KEY) and never put on a
command line.

    python tools/serve_vllm.py --model models/smollm2-135m-instruct [--ready-file FILE] [-- more vLLM flags]
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.ports import free_port, is_free

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1
CPU_BLOCK = 32
"""Tokens of a block of the prefix cache on a CPU; vLLM prefers multiples of 32 there."""
PROGRESS_SECONDS = 5.0
RECEIVER = "megatron_sip.rollout.receiver.WeightReceiver"
"""What takes weights over a connection (--rollout-transfer of the trainer) in the server's processes."""
KEYS = ("JUDGE_API_KEY", "ROLLOUT_API_KEY")
KEYS_OF_OTHERS = ("REWRITER_API_KEY", "WANDB_API_KEY")


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status (0 after an orderly stop)."""
    args = parse(argv)
    try:
        python = judge_python(args.judge_venv)
        if not (args.model / "config.json").is_file():
            raise RuntimeError(f"--model {args.model} is no model folder: it holds no config.json")
        if args.rollouts:
            require_private(args.host)
        port = choose_port(args.host, args.port)
        make_folders(args)
        log = args.log_file.open("ab") if args.log_file else None
    except (RuntimeError, OSError) as error:
        say(str(error))
        return 2
    stopper = Stopper(die_with_parent=not args.outlive_parent)
    device = args.device if args.device != "auto" else ("gpu" if has_gpu() else "cpu")
    server = subprocess.Popen(
        server_command(args, python, device, port),
        env=server_environment(device, args.threads, args.kv_cache_gib, args.rollouts),
        stdin=subprocess.DEVNULL,
        stdout=log or sys.stderr,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,  # a process group of its own, which ends as one
        preexec_fn=death_signal_setter(),  # noqa: PLW1509 - this process has one thread
    )
    try:
        return supervise(args, server, port, stopper)
    finally:
        end_group(server, args.stop_grace)
        if args.ready_file:
            args.ready_file.unlink(missing_ok=True)
        if log:
            log.close()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this tool; what follows `--` goes to vLLM unchanged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument(
        "--rollouts",
        action="store_true",
        help="for --rollout-engine vllm of the trainer: with the development endpoints that take new weights",
    )
    parser.add_argument("--served-model-name", help="name that clients use (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port; 0 picks a free one (default)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where one is")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="type of weights and activations; auto: float32 on a CPU that cannot multiply bfloat16, else bfloat16",
    )
    parser.add_argument(
        "--head-dtype",
        default="float32",
        help="type of the output logits; bfloat16 ones are too coarse to compare labels (default %(default)s)",
    )
    parser.add_argument("--max-model-len", type=int, default=2048, help="longest prompt plus answer, in tokens")
    parser.add_argument("--memory-share", type=float, help="share of memory to use (default 0.2 on cpu, 0.9 on gpu)")
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="room for keys and values on cpu, in GiB")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model on cpu (default %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--judge-venv", type=Path, help="environment with vLLM (default: SIP_JUDGE_VENV, .venv-judge)")
    parser.add_argument("--ready-file", type=Path, help="write the URL here once the server is healthy")
    parser.add_argument("--log-file", type=Path, help="append the server's output here (default: standard error)")
    parser.add_argument("--startup-timeout", type=float, default=600.0, help="seconds to become healthy")
    parser.add_argument("--stop-grace", type=float, default=15.0, help="seconds to end before the server is killed")
    parser.add_argument("--outlive-parent", action="store_true", help="stay when the calling process ends")
    parser.add_argument("vllm_flags", nargs="*", metavar="-- FLAG", help="further vLLM flags, after --")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.kv_cache_gib < 1 or args.tensor_parallel_size < 1:
        parser.error("--threads, --kv-cache-gib and --tensor-parallel-size must be at least 1")
    return args


def judge_python(venv: Path | None) -> str:
    """The interpreter of the environment that holds vLLM; RuntimeError says how to make one."""
    folder = venv or Path(os.environ.get("SIP_JUDGE_VENV") or ROOT / ".venv-judge")
    python = folder / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"{folder} holds no Python; make it with `bash tools/setup.sh judge` or give --judge-venv")
    return str(python)


def choose_port(host: str, wanted: int) -> int:
    """The wanted port, or a free one for 0; RuntimeError where the server could not listen there.

    Without this look, whoever listens there already would answer /health and be announced as our server.
    """
    if wanted == 0:
        try:
            return free_port(host)
        except OSError as error:
            raise RuntimeError(f"--host {host} is no address of this machine ({error})") from error
    if not is_free(host, wanted):
        raise RuntimeError(f"--port {wanted} of --host {host} is in use, or not ours to use; give another, or 0")
    return wanted


def require_private(host: str) -> None:
    """RuntimeError where the development endpoints, by which one can run code, would face a public network."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise RuntimeError(
            f"--host {host} is a name; with --rollouts give the private address of this machine"
        ) from error
    if address.is_unspecified or not (address.is_loopback or address.is_private or address.is_link_local):
        raise RuntimeError(
            f"--host {host} would open the development endpoints of --rollouts, by which anybody can run code here, to "
            "networks that are not private; give the private address of this machine"
        )


def make_folders(args: argparse.Namespace) -> None:
    """The folders of the log and of the ready file, and no ready file of an earlier server."""
    for file in (args.log_file, args.ready_file):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if args.ready_file is not None:
        args.ready_file.unlink(missing_ok=True)


def has_gpu() -> bool:
    """Whether the driver lists a card (a bare nvidia-smi binary is not one)."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def server_command(args: argparse.Namespace, python: str, device: str, port: int) -> list[str]:
    """The command line of vLLM's OpenAI-compatible server."""
    memory = args.memory_share if args.memory_share is not None else (0.2 if device == "cpu" else 0.9)
    # The module, not the `vllm` script: the script fails under the CPU build's distribution name.
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(args.model.resolve()), "--served-model-name", served_name(args)]
    dtype = default_dtype(device, cpu_flags()) if args.dtype == "auto" else args.dtype
    command += ["--host", args.host, "--port", str(port), "--dtype", dtype]
    command += ["--hf-overrides", json.dumps({"head_dtype": args.head_dtype})]
    command += ["--max-model-len", str(args.max_model_len), "--gpu-memory-utilization", str(memory)]
    command += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    if device == "cpu":
        # Only whole blocks of keys and values are shared between prompts. vLLM's 128 tokens on a CPU are longer than
        # what two short prompts have in common; what stands behind `--` comes later and wins.
        command += ["--enforce-eager", "--block-size", str(CPU_BLOCK)]
    if args.rollouts:
        # What the model's folder says of sampling is meant for its users, not for the policy that is trained.
        command += ["--generation-config", "vllm"]
        command += ["--worker-extension-cls", RECEIVER]
    return command + list(args.vllm_flags)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What this machine's processor can do, as Linux names it; empty where nothing tells."""
    if not cpuinfo.exists():
        return set()
    lines = cpuinfo.read_text().splitlines()
    return next((set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), set())


def default_dtype(device: str, flags: set[str]) -> str:
    """bfloat16, but float32 on a CPU without bfloat16 arithmetic, which would emulate it several times slower."""
    return "bfloat16" if device == "gpu" or flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def served_name(args: argparse.Namespace) -> str:
    """The model name that clients use."""
    return str(args.served_model_name or args.model.resolve().name)


def server_environment(device: str, threads: int, kv_cache_gib: int, rollouts: bool = False) -> dict[str, str]:
    """The server's environment: no hub, no usage report, bounded CPU threads, the key under vLLM's name."""
    env = dict(os.environ)
    env.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    for name in [name for name in env if name in KEYS_OF_OTHERS or name.endswith("_JUDGE_API_KEY")]:
        del env[name]
    keys = {name: env.pop(name, None) for name in KEYS}
    key = keys["ROLLOUT_API_KEY" if rollouts else "JUDGE_API_KEY"]
    if rollouts:
        env["VLLM_SERVER_DEV_MODE"] = "1"
        # For RECEIVER; behind what is there already.
        env["PYTHONPATH"] = os.pathsep.join([part for part in (env.get("PYTHONPATH"), str(ROOT)) if part])
    if key:
        env.setdefault("VLLM_API_KEY", key.strip())  # as the client sends it
    if device == "cpu":
        env.update(VLLM_HOST_IP="127.0.0.1", VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib))
        # "nobind" makes vLLM honour OMP_NUM_THREADS; its own binding would take every core.
        env.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE")
    return env


class Stopper:
    """Remembers that a stop was asked for, by a signal or by the death of the calling process."""

    def __init__(self, die_with_parent: bool) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        parent = os.getppid()
        if die_with_parent:
            death_signal_setter()()
            self.asked = os.getppid() != parent  # the parent may have died before the request was in place

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def death_signal_setter() -> Callable[[], None]:
    """A function that asks Linux to send SIGTERM to its process when its parent dies; elsewhere it does nothing."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: the child only calls it
    return lambda: libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def supervise(args: argparse.Namespace, server: subprocess.Popen[bytes], port: int, stopper: Stopper) -> int:
    """Wait for health, announce the URL, then wait for the end of the server or the wish to stop."""
    started = time.monotonic()
    if not wait_healthy(args, server, port, stopper):
        return 0 if stopper.asked else 1
    url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}/v1"
    say(f"{served_name(args)} is ready after {time.monotonic() - started:.0f} s")
    print(url, flush=True)
    if args.ready_file:
        unfinished = args.ready_file.with_name(args.ready_file.name + ".part")
        unfinished.write_text(url + "\n")
        unfinished.rename(args.ready_file)  # a reader sees the whole URL or no file
    while not stopper.asked:
        if server.poll() is not None:
            say(f"the server ended by itself with status {server.returncode}")
            show_log_end(args)
            return 1
        time.sleep(0.2)
    return 0


def wait_healthy(args: argparse.Namespace, server: subprocess.Popen[bytes], port: int, stopper: Stopper) -> bool:
    """Poll /health, with a progress line now and then; False when it failed, timed out or was stopped."""
    started = time.monotonic()
    next_line = started + PROGRESS_SECONDS
    while not stopper.asked:
        now = time.monotonic()
        if server.poll() is not None:
            say(f"the server ended with status {server.returncode} before it was ready")
            show_log_end(args)
            return False
        if is_healthy(args.host, port):
            return True
        if now - started > args.startup_timeout:
            say(f"not healthy after {args.startup_timeout:.0f} s; see its output, or raise --startup-timeout")
            show_log_end(args)
            return False
        if now >= next_line:
            say(f"loading {served_name(args)}: {now - started:.0f} s")
            next_line = now + PROGRESS_SECONDS
        time.sleep(0.3)
    return False


def is_healthy(host: str, port: int) -> bool:
    """One look at /health, past any proxy."""
    connection = http.client.HTTPConnection("127.0.0.1" if host in ("0.0.0.0", "") else host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def end_group(server: subprocess.Popen[bytes], grace: float) -> None:
    """End every process of the server's group: first asked, then, after `grace` seconds, forced."""
    if not signal_group(server.pid, signal.SIGTERM):
        server.wait()
        return
    limit = time.monotonic() + grace
    while time.monotonic() < limit:
        server.poll()  # reaps the leader, so that an empty group is seen as such
        if not signal_group(server.pid, 0):
            return
        time.sleep(0.1)
    signal_group(server.pid, signal.SIGKILL)
    server.wait()


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False when the group has no process left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def show_log_end(args: argparse.Namespace) -> None:
    """The last lines of the server's log, where it went to a file."""
    if args.log_file and args.log_file.is_file():
        with args.log_file.open(errors="replace") as lines:
            print("".join(deque(lines, maxlen=20)), file=sys.stderr)
        say(f"whole log: {args.log_file}")


def say(text: str) -> None:
    """A line for people; standard output is kept for the URL."""
    print(f"serve_vllm: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
