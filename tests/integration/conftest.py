"""One real model and one real vLLM server for all integration tests of a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import served

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))  # the helpers that launch ranks


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Folder that keeps models between sessions (SIP_TEST_MODELS, default .cache in the repository)."""
    return Path(os.environ.get("SIP_TEST_MODELS") or ROOT / ".cache")


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16; made once."""
    folder = model_cache / "smollm2-135m-instruct"
    tool = [sys.executable, str(ROOT / "tools" / "get_judge_model.py"), "--output", str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def judge_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a real vLLM server with that model, started once and ended with the session."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with served(smollm2, log, "--threads", "2", startup_seconds=300) as url:
        yield url
