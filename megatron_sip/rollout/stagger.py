"""When each pipeline stage works on which group of rows, so that a stage does not wait for the others without need."""

from __future__ import annotations

from dataclasses import dataclass

BOUNDARY_TOKENS = 16
"""Tokens of all rows in a block: between two of them all ranks are asked whether to go on, and hear what was drawn."""


@dataclass(frozen=True)
class Pass:
    """One token of all rows of a group: `step` counts from 0 in the block, `group` is a place in its groups."""

    step: int
    group: int


@dataclass(frozen=True)
class Exchange:
    """What a stage sends and receives behind a turn, by the pass that it comes from or, where it goes in, is for.

    hidden_out, hidden_in  hidden states to the next stage, and from the one before
    tokens_out, tokens_in  drawn tokens from the last stage, and to the first
    """

    hidden_out: Pass | None = None
    hidden_in: Pass | None = None
    tokens_out: Pass | None = None
    tokens_in: Pass | None = None


@dataclass(frozen=True)
class Stagger:
    """A block of `steps` tokens of every group, through all `stages`, in turns that are the same on every stage.

    Pass (step, group) is on stage p in turn `step * period + group + p`. A period is as long as a group needs through
    all stages at least, since its next token enters the first stage when the last one has drawn the one before. With
    as many groups as stages no stage is idle but at both ends of a block.

    Behind a turn neighbours exchange what they have, all of it together and on both sides in the same turn, so that
    nobody waits for somebody who waits.
    """

    stages: int
    groups: int
    steps: int

    @property
    def period(self) -> int:
        """Turns from one token of a group to its next."""
        return max(self.groups, self.stages)

    @property
    def turns(self) -> int:
        """Of the whole block."""
        return (self.steps - 1) * self.period + self.groups + self.stages - 1

    def at(self, turn: int, stage: int) -> Pass | None:
        """What `stage` computes in `turn`; None where it waits."""
        step, group = divmod(turn - stage, self.period)
        return Pass(step, group) if 0 <= step < self.steps and group < self.groups else None

    def behind(self, turn: int, stage: int) -> Exchange:
        """What `stage` exchanges behind `turn`. Tokens of the last step are not sent: all stages hear of the block."""
        last = self.stages - 1
        if last == 0:
            return Exchange()
        drawn = self.at(turn, last)
        wanted = drawn if drawn and drawn.step + 1 < self.steps else None
        return Exchange(
            hidden_out=self.at(turn, stage) if stage < last else None,
            hidden_in=self.at(turn + 1, stage) if stage > 0 else None,
            tokens_out=wanted if stage == last else None,
            tokens_in=wanted if stage == 0 else None,
        )


def rollout_turns(stages: int, groups: int, tokens: int, block: int = BOUNDARY_TOKENS) -> int:
    """Turns in which a wave is written, `tokens` a row: those of its blocks one after the other."""
    whole, rest = divmod(tokens, block)
    return whole * Stagger(stages, groups, block).turns + (Stagger(stages, groups, rest).turns if rest else 0)
