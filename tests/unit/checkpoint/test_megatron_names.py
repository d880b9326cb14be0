"""The canary of megatron-core's checkpoint format: many of these names are private, and versions drop them.

Each pinned version was looked at name by name, in its sources where it cannot be installed beside the others. Whoever
pins another one, or takes another name, looks again and adds it here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import megatron_sip.checkpoint

CHECKPOINT = Path(next(iter(megatron_sip.checkpoint.__path__)))
LOOKED_AT = {"0.16.1", "0.19.2"}
FORMAT = "megatron.core.dist_checkpointing"
NAMES = {
    f"{FORMAT}.core": {"CheckpointingConfig", "CheckpointingException", "save_config"},
    f"{FORMAT}.dict_utils": {"merge", "nested_values"},
    f"{FORMAT}.mapping": {
        *("ShardedStateDict", "ShardedTensor", "ShardedTensorFactory", "StateDict", "apply_factory_merges")
    },
    f"{FORMAT}.state_dict_utils": {"load_preprocess", "save_preprocess"},
    f"{FORMAT}.strategies": {"torch"},
    f"{FORMAT}.strategies.filesystem_async": {"FileSystemWriterAsync"},
    f"{FORMAT}.strategies.state_dict_saver": {"save_state_dict_async_plan"},
    f"{FORMAT}.strategies.torch": {
        *("MCoreLoadPlanner", "MCoreSavePlanner", "mcore_to_pyt_state_dict", "_restore_dict_types"),
        *("_replace_state_dict_keys_with_sharded_keys", "_replace_sharded_keys_with_state_dict_keys"),
        "_unwrap_pyt_sharded_tensor",
    },
    f"{FORMAT}.utils": {"extract_sharded_base", "force_all_tensors_to_non_fp8"},
    f"{FORMAT}.validation": {
        *("StrictHandling", "determine_global_metadata", "validate_integrity_and_strict_load"),
    },
}


def taken() -> set[tuple[str, str]]:
    """Every name of megatron-core's format that the package takes, with those taken from `torch_dist`."""
    found: set[tuple[str, str]] = set()
    for path in CHECKPOINT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
                found |= {(str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "torch_dist":
                found.add((f"{FORMAT}.strategies.torch", node.attr))
    return found


def test_every_name_that_is_taken_was_looked_at() -> None:
    known = {(module, name) for module, names in NAMES.items() for name in names}
    assert taken() == known


def test_every_pinned_version_was_looked_at() -> None:
    requirements = (CHECKPOINT.parents[1] / "requirements.txt").read_text()
    assert set(re.findall(r"^megatron-core==([\d.]+)", requirements, re.MULTILINE)) == LOOKED_AT


@pytest.mark.parametrize("module", sorted(NAMES))
def test_the_installed_version_has_them(module: str) -> None:
    assert not NAMES[module] - vars(importlib.import_module(module)).keys()


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        (
            *("validation", "validate_integrity_and_strict_load"),
            *(["sharded_state_dict", "strict", "validate_access_integrity", "local_metadata", "global_metadata"],),
        ),
        ("validation", "determine_global_metadata", ["sharded_state_dict"]),
        ("strategies.filesystem_async", "FileSystemWriterAsync", ["path"]),
        ("state_dict_utils", "load_preprocess", ["sharded_state_dict"]),
        ("mapping", "apply_factory_merges", ["x1", "x2"]),
        ("strategies.torch", "mcore_to_pyt_state_dict", ["state_dict", "is_loading"]),
        ("strategies.state_dict_saver", "save_state_dict_async_plan", ["state_dict", "storage_writer"]),
    ],
)
def test_they_take_what_they_are_given(module: str, name: str, parameters: list[str]) -> None:
    signature = inspect.signature(getattr(importlib.import_module(f"{FORMAT}.{module}"), name))
    assert list(signature.parameters)[: len(parameters)] == parameters
