"""The Slurm script with stand-ins for srun and scontrol: what each node is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SBATCH = ROOT / "examples" / "slurm" / "sip_llama.sbatch"
SHOWN = "MODEL NODE_RANK NNODES GPUS_PER_NODE MASTER_ADDR MASTER_PORT JUDGE_URL CHECKPOINT_PATH"
NEEDED = {"DATA_PATH": "corpus", "TOKENIZER_MODEL": "tokenizer", "JUDGE_URL": "https://judge:8100/v1"}


def _executable(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A submit folder with a script that prints what it sees, and a Slurm that runs two tasks one after the other."""
    programs = tmp_path / "bin"
    (tmp_path / "examples").mkdir()
    programs.mkdir()
    report = (
        f'for name in {SHOWN}; do printf "%s=%s " "$name" "${{!name-unset}}"; done; '
        'echo "key=${JUDGE_API_KEY-} args=$*"'
    )
    _executable(tmp_path / "examples" / "pretrain_sip_llama.sh", report)
    _executable(programs / "scontrol", 'echo "node-a"; echo "node-b"')
    _executable(
        programs / "srun",
        f'echo "$*" > {tmp_path}/srun-line\nwhile [[ $1 == --* ]]; do shift; done\n'
        'for id in 0 1; do SLURM_NODEID=$id "$@"; done',
    )
    return tmp_path


def _submit(repository: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    slurm = {
        "PATH": f"{repository / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(repository),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "sip-llama",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:8",
    }
    return subprocess.run(
        ["bash", str(SBATCH), *flags], env=slurm | environment, capture_output=True, text=True, check=False
    )


def test_each_node_runs_the_script_once_with_its_rank(repository: Path) -> None:
    shown = _submit(repository, NEEDED, "--train-iters", "5 0")
    assert shown.returncode == 0, shown.stderr
    first, second = shown.stdout.splitlines()
    for rank, line in enumerate((first, second)):
        assert f"NODE_RANK={rank} NNODES=2 GPUS_PER_NODE=8 MASTER_ADDR=node-a MASTER_PORT=29845" in line
        assert "MODEL=llama-1.4b" in line
        assert "args=--train-iters 5 0" in line
        assert f"CHECKPOINT_PATH={repository}/runs/sip-llama" in line


def test_keys_travel_in_the_environment_only(repository: Path) -> None:
    shown = _submit(repository, NEEDED | {"JUDGE_API_KEY": "sk-hidden"})
    assert [line.count("key=sk-hidden") for line in shown.stdout.splitlines()] == [1, 1]
    assert "sk-hidden" not in (repository / "srun-line").read_text(encoding="utf-8")
    assert "sk-hidden" not in shown.stderr


def test_the_real_script_serves_the_judge_on_the_first_node_alone(repository: Path) -> None:
    environment = {
        "DATA_PATH": "corpus",
        "TOKENIZER_MODEL": "tokenizer",
        "JUDGE_MODEL_DIR": "judge",
        "SIP_ROOT": str(ROOT),
        "CHECKPOINT_PATH": "saved",
        "PYTHON": sys.executable,
        "DRY_RUN": "1",
    }
    shown = _submit(repository, environment, "--seed", "7")
    assert shown.returncode == 0, shown.stderr
    first, second = shown.stdout.split("node 1 of 2")
    assert ("serve_vllm.py" in first, "serve_vllm.py" in second) == (True, False)
    for rank, node in enumerate((first, second)):
        assert f"--nnodes 2 --node-rank {rank} --master-addr node-a --master-port 29845" in node
        assert "--judge-url http://node-a:8100/v1" in node
        assert "--save saved" in node
        assert "--seed 7" in node


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_missing_is_named_before_anything_starts(repository: Path, missing: str) -> None:
    shown = _submit(repository, {name: value for name, value in NEEDED.items() if name != missing})
    assert shown.returncode == 2
    assert missing in shown.stderr
    assert not (repository / "srun-line").exists()


def test_a_wrong_folder_is_named(repository: Path) -> None:
    shown = _submit(repository, NEEDED | {"SIP_ROOT": "/no-such-folder"})
    assert shown.returncode == 2
    assert "SIP_ROOT" in shown.stderr
