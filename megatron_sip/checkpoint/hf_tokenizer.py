"""The tokenizer beside exported weights: its files are copied, and its special ids stand in config.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
HF_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""What one Hugging Face folder hands on to another."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(folder: str | Path | None, model: ModelConfig) -> dict[str, int | None]:
    """Ids of the tokenizer's special tokens; none without a tokenizer.

    Raises:
        CheckpointError: no tokenizer there, or one with more tokens than the model has rows.
    """
    if folder is None:
        return {}
    from transformers import AutoTokenizer

    path = Path(folder)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"--tokenizer-model {path} has no tokenizer.json to put beside the exported weights")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise CheckpointError(f"--tokenizer-model {path} cannot be read: {error}") from error
    if len(tokenizer) > (model.vocab_size or 0):
        raise CheckpointError(
            f"--tokenizer-model {path} has {len(tokenizer)} tokens, the model's --vocab-size is {model.vocab_size}"
        )
    return {key: getattr(tokenizer, key) for key in SPECIAL_IDS}


def copy_files(folder: str | Path | None, target: Path, names: tuple[str, ...] = TOKENIZER_FILES) -> None:
    """Copy those of the named files that are there.

    Raises:
        CheckpointError: one is a link that leads elsewhere (see `require_own_file`).
    """
    if folder is None:
        return
    for name in names:
        source = Path(folder) / name
        if source.is_file():
            require_own_file(source)
            shutil.copyfile(source, target / name)


def require_own_file(path: Path) -> None:
    """Refuse a link out of the folder, whose content would travel along with the copy.

    A fetched folder may hold `merges.txt -> ~/.ssh/id_rsa`, and an export is often published. The links of the
    Hugging Face cache (`snapshots/<revision>/file -> ../../blobs/<hash>`) are let pass.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    if not path.is_symlink():
        return
    real, home = path.resolve(), path.parent.resolve()
    if real.parent == home or (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"):
        return
    raise CheckpointError(f"{path} is a link to {real}, outside its folder; put a copy of that file in its place")
