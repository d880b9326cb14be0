"""What each lever saves: the same plan with one setting changed, in GPU-hours of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_sip.cost.plan import Case, Plan, make_plan


@dataclass(frozen=True)
class Lever:
    """A changed setting and the plan that it makes."""

    name: str
    plan: Plan


def _run(**changes: object) -> Callable[[Case], Case]:
    return lambda case: replace(case, run=replace(case.run, **changes))  # type: ignore[arg-type]


def _asked(**changes: object) -> Callable[[Case], Case]:
    return lambda case: replace(case, questions=replace(case.questions, **changes))  # type: ignore[arg-type]


def _dense_8b(case: Case) -> Case:
    """A judge of 8 billion parameters in bf16 with the cache of Llama 3 8B: 32 layers of 8 groups of 128."""
    cache = 2 * 32 * 8 * 128 * 2 / 1e3
    servers = replace(
        case.servers,
        judge_parameters=8.03e9,
        judge_active_parameters=8.03e9,
        judge_weight_gb=16.1,
        judge_cache_kb=cache,
        judge_gpus_per_server=1,
        judge_prompt_rate=None,
        judge_answer_rate=None,
    )
    return replace(case, servers=servers)


def _without_sharing(case: Case) -> Case:
    return _run(shared_prefix=False, prefill_once=False)(case)


def _half_budget(case: Case) -> Case:
    """Half of the 8 calls for each candidate."""
    size = case.questions.candidates(case.run.num_rollouts)
    return _asked(scoring="adaptive", adaptive_budget=4 * size)(case)


LEVERS: tuple[tuple[str, Callable[[Case], Case]], ...] = (
    ("all pairs, 5 votes", _asked(scoring="all-pairs", judge_votes=5)),
    ("all pairs, 1 vote", _asked(scoring="all-pairs", judge_votes=1)),
    ("adaptive", _asked(scoring="adaptive")),
    ("adaptive, half its budget", _half_budget),
    ("pivot", _asked(scoring="pivot", judge_votes=1)),
    ("verdicts of 60 tokens", _asked(judge_answer_tokens=60)),
    ("logit, both orders", _asked(judge_reading="logit", judge_option_order="both")),
    ("logit, one order", _asked(judge_reading="logit", judge_option_order="random")),
    ("logit, adaptive", _asked(judge_reading="logit", scoring="adaptive")),
    ("a dense judge of 8B", _dense_8b),
    ("judges every 2nd step", _asked(judge_interval=2)),
    ("K = 8", _run(num_rollouts=8)),
    ("K = 4", _run(num_rollouts=4)),
    ("prefix not shared", _without_sharing),
)


def levers(plan: Plan) -> Iterator[Lever]:
    """The plan itself, then each lever alone; those that change nothing of the case are left out."""
    yield Lever("as planned", plan)
    for name, change in LEVERS:
        case = change(plan.case)
        if case != plan.case:
            yield Lever(name, make_plan(case))
