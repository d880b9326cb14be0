"""Which optional GPU packages are installed, told without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def has_transformer_engine() -> bool:
    """Whether a compiled Transformer Engine for torch is there; its bare name is an empty shell.

    The compiled module stands beside the package, in it, or in its `wheel_lib`, by the way it was installed, and can
    be found by name only after the package was imported.
    """
    if importlib.util.find_spec("transformer_engine_torch") is not None:
        return True
    package = importlib.util.find_spec("transformer_engine")
    if package is None or package.submodule_search_locations is None:
        return False
    roots = [Path(place) for place in package.submodule_search_locations]
    places = [place for root in roots for place in (root.parent, root, root / "wheel_lib")]
    return any(any(place.glob("transformer_engine_torch*.so")) for place in places)


def has_apex() -> bool:
    """Whether NVIDIA's apex with its fused optimizers is there; the PyPI name `apex` is another project."""
    return importlib.util.find_spec("amp_C") is not None
