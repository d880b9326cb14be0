"""Every metric of a step, once: its name, how ranks and steps are combined, and how the log line shows it.

The list is the same on every rank whatever happened there, which is what lets one tensor be reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_sip.metrics.position import position_names
from megatron_sip.types import CandidateKind, MissingReason, NoPairReason

Reduction = Literal["mean", "total"]


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    `reduction` mean: sum / count over all ranks and steps, absent when nothing was counted.
    total: the sum itself; zero is a true zero. `label` is its name in the log line (None: not in the
    line), `form` its format there, `show_zero` whether a zero is worth a place in the line.
    """

    name: str
    reduction: Reduction = "mean"
    label: str | None = None
    form: str = ".4f"
    show_zero: bool = True


TRAINING: tuple[MetricSpec, ...] = (
    MetricSpec("loss", label="loss", form=".6E"),
    MetricSpec("loss/dpo"),
    MetricSpec("loss/nll", label="nll loss", form=".6E"),
    MetricSpec("loss/ntp", label="ntp loss", form=".6E"),
    MetricSpec("grad_norm", label="grad norm", form=".3f"),
    MetricSpec("rewards/margins", label="margin", form=".4f"),
    MetricSpec("rewards/accuracies", label="accuracy", form=".3f"),
    MetricSpec("rewards/chosen", label="reward chosen"),
    MetricSpec("rewards/rejected", label="reward rejected"),
    MetricSpec("logps/chosen", label="logp chosen", form=".2f"),
    MetricSpec("logps/rejected", label="logp rejected", form=".2f"),
    MetricSpec("objective/kl"),
    # Of the positions of the rows that went through the layers those without a token.
    MetricSpec("tokens/padding_share", label="padding", form=".3f", show_zero=False),
)

STEPS: tuple[MetricSpec, ...] = (
    MetricSpec("steps/skipped", "total", label="number of skipped iterations", form="3.0f"),
    MetricSpec("steps/nan", "total", label="number of nan iterations", form="3.0f"),
    MetricSpec("steps/spike", "total", label="number of loss spikes", form=".0f", show_zero=False),
    MetricSpec("steps/without_pair", "total", label="iterations without a pair", form=".0f", show_zero=False),
)

TIMES: tuple[MetricSpec, ...] = (
    MetricSpec("time/rollout", label="rollout (s)", form=".2f"),
    MetricSpec("time/judge_wait", label="judge wait (s)", form=".2f"),
    MetricSpec("time/rewrite_wait", label="rewrite wait (s)", form=".2f", show_zero=False),
    # Of the rollouts on vLLM servers: weights to the servers, proof that they have them, and the writing.
    MetricSpec("time/rollout_push", label="push (s)", form=".2f", show_zero=False),
    MetricSpec("time/rollout_probe", label="probe (s)", form=".2f", show_zero=False),
    MetricSpec("time/rollout_write", label="write (s)", form=".2f", show_zero=False),
    # Of the positions of prefixes that went through the trainer's layers to be continued those without a token.
    MetricSpec("rollout/padding_share", label="rollout padding", form=".3f", show_zero=False),
    MetricSpec("rollout/tokens_per_second", label="rollout tokens/s", form=".0f", show_zero=False),
    MetricSpec("rollout/servers_behind", label="rollout servers behind", form=".0f", show_zero=False),
    MetricSpec("time/reference", label="reference (s)", form=".2f"),
    MetricSpec("time/train", label="train (s)", form=".2f"),
    # Operations that the step needed, over its whole time and all GPUs; and over what these could do at their peak.
    MetricSpec("throughput/tflops_per_gpu", label="throughput per GPU (TFLOP/s/GPU)", form=".3f"),
    MetricSpec("throughput/mfu", label="MFU", form=".4f"),
)

_SHARES = tuple(MetricSpec(f"chosen/share_{kind}", label=f"chosen {kind}", form=".2f") for kind in CandidateKind)
_SCORES = tuple(MetricSpec(f"scores/{kind}", label=f"score {kind}", form=".3f") for kind in CandidateKind)
_NO_PAIR = tuple(
    MetricSpec(f"pairs/{reason}", "total", label=f"no pair, {reason.replace('_', ' ')}", form=".0f", show_zero=False)
    for reason in NoPairReason
)
_MISSING = tuple(
    MetricSpec(
        f"judge/missing_{reason}", "total", label=f"missing, {reason.replace('_', ' ')}", form=".0f", show_zero=False
    )
    for reason in MissingReason
)

PREFERENCE: tuple[MetricSpec, ...] = (
    MetricSpec("pairs/valid", "total", label="valid pairs", form=".0f"),
    *_NO_PAIR,
    *_SHARES,
    *_SCORES,
    MetricSpec("scores/chosen"),
    MetricSpec("scores/rejected"),
    MetricSpec("scores/margin", label="score margin", form=".3f"),
    MetricSpec("judge/asked", "total"),
    MetricSpec("judge/missing", "total", label="missing verdicts", form=".0f"),
    MetricSpec("judge/missing_share"),
    *_MISSING,
    # Belief in the option shown first, less one half; of pairs asked in both orders, the share with one winner.
    MetricSpec("judge/position_bias", label="position bias", form="+.3f"),
    MetricSpec("judge/order_consistency", label="order consistency", form=".3f"),
    # Under --scoring adaptive, whose option orders are no fair draw.
    MetricSpec("judge/position_bias_logits", label="position bias (logits)", form="+.2f"),
    # Prompts to judges and rewriter that lost the beginning of the prefix to fit the server's context.
    MetricSpec("judge/prompts_trimmed", "total", label="prompts trimmed", form=".0f", show_zero=False),
    # Verdicts and rewrites of steps that are made again: nobody was asked for them.
    MetricSpec("judge/from_journal", "total", label="from the journal", form=".0f", show_zero=False),
    # Of the others those that the cache of --judge-cache held: nobody was asked either.
    MetricSpec("judge/from_cache", "total", label="from the cache", form=".0f", show_zero=False),
    MetricSpec("candidates/pool", label="pool size", form=".1f"),
    # Candidates that a screen kept from being compared.
    MetricSpec("candidates/screened", "total", label="candidates screened", form=".0f", show_zero=False),
    # Rewrites and rollouts that could not be made; those of `candidates/left` were made and lack a score.
    MetricSpec("candidates/missing", "total", label="candidates missing", form=".0f", show_zero=False),
    MetricSpec("candidates/left", "total", label="candidates left out", form=".0f", show_zero=False),
    MetricSpec("lengths/chosen", label="length chosen", form=".1f"),
    MetricSpec("lengths/rejected", label="length rejected", form=".1f"),
)


def metric_specs(judges: Sequence[str] = (), pairwise: Sequence[str] = ()) -> tuple[MetricSpec, ...]:
    """All metrics of a run that asks `judges` (names as in `Question.judge`), in the order of the log line.

    `pairwise` are those among them that compare. Every rank must pass the same names; their order does not matter.
    """
    by_judge = [MetricSpec(f"scores/{judge}/{kind}") for judge in sorted(set(judges)) for kind in CandidateKind]
    by_judge += [MetricSpec(name) for judge in sorted(set(pairwise)) for name in position_names(judge)]
    return (*TRAINING, *PREFERENCE, *by_judge, *STEPS, *TIMES)
