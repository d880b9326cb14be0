"""Tokenizers that the tests of this folder share."""

from __future__ import annotations

import pytest
from data_helpers import byte_level_folder, llama2_folder

from megatron_sip.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE of 300 tokens."""
    return Tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("tokenizers") / "bytes")))


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Llama-2 style BPE."""
    return Tokenizer(str(llama2_folder(tmp_path_factory.mktemp("tokenizers") / "llama2")))
