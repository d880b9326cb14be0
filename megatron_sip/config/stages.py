"""How the layers are spread over pipeline stages."""

from __future__ import annotations


def uneven_ends(num_layers: int, stages: int) -> tuple[int, int] | None:
    """Layers of the first and the last stage where the stages cannot be equal; None where they can.

    megatron-core keeps the stages in between equal and lets the two ends differ. The middle takes the larger share,
    since the ends also hold the embedding and the LM head; of the rest the first stage takes the larger half.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(f"{num_layers} layers cannot fill {stages} stages")
    if num_layers % stages == 0:
        return None
    middle = -(-num_layers // stages)
    # Each end needs a layer.
    while num_layers - (stages - 2) * middle < 2:
        middle -= 1
    ends = num_layers - (stages - 2) * middle
    return ends - ends // 2, ends // 2


def largest_stage(num_layers: int, stages: int) -> int:
    """Layers of the fullest stage."""
    ends = uneven_ends(num_layers, stages)
    if ends is None:
        return num_layers // stages
    middle = (num_layers - sum(ends)) // (stages - 2) if stages > 2 else 0
    return max(*ends, middle)
