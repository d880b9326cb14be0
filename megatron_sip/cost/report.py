"""A plan as tables, sentences and plain data. Whatever stands in them is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_sip.cost.assumed import assumptions
from megatron_sip.cost.flops import step_flops
from megatron_sip.cost.levers import Lever
from megatron_sip.cost.plan import HOUR, Plan, arithmetic_against_plain
from megatron_sip.evaluation.report import Grid

PART_NAMES = {
    "weight_push": "weights to the rollout servers",
    "prefill": "rollouts: prefill",
    "decode": "rollouts: decode",
    "reference_swap": "reference: weights from the host",
    "reference": "reference: forward",
    "train": "train: forward and backward",
    "gradient_reduce": "gradient reduction",
    "optimizer": "optimizer",
    "reference_update": "reference: update (mean over steps)",
}


def short(value: float) -> str:
    """Three digits of a number, with thousands apart; a suffix for what is larger than a million."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def grids(plan: Plan, changed: Sequence[Lever] = ()) -> list[Grid]:
    """The tables of a plan."""
    tables = [_case_grid(plan), _memory_grid(plan), _step_grid(plan)]
    if plan.judge_work.asked.calls:
        tables += [_judge_grid(plan), _servers_grid(plan)]
    tables.append(_run_grid(plan))
    if changed:
        tables.append(_lever_grid(changed))
    return [*tables, _assumption_grid(plan)]


def _case_grid(plan: Plan) -> Grid:
    run, model = plan.case.run, plan.case.model
    dp = plan.case.cluster.gpus // run.model_parallel
    layout = f"TP {run.tensor_model_parallel_size} x PP {run.pipeline_model_parallel_size} x DP {dp}"
    rows = [
        ("policy", f"{short(model.parameters)} parameters, {run.dtype}"),
        ("trainer", f"{plan.case.cluster.gpus} GPUs: {layout}"),
        ("a step", f"{run.global_batch_size} prefixes of {run.prefix_length} tokens, K = {run.num_rollouts}"),
        ("suffix", f"{run.suffix_length} tokens"),
        ("objective", run.objective),
    ]
    if run.rollout_gpus:
        rows.append(("rollouts", f"on {run.rollout_gpus} further GPUs"))
    return Grid("Plan", ("what", "value"), tuple(rows))


def _memory_grid(plan: Plan) -> Grid:
    memory = plan.memory
    named = {
        "weights": memory.weights,
        "gradients (fp32)": memory.gradients,
        "optimizer and fp32 main weights": memory.optimizer,
        "while training: activations": memory.activations,
        "while training: logits": memory.logits,
        "while the reference scores: its weights and a pass": memory.reference_pass,
        f"while rolling out: keys and values of {memory.wave} prefixes": memory.rollouts.prefixes,
        "while rolling out: keys and values of their rows": memory.rollouts.rows,
        "while rolling out: a prefill": memory.rollouts.prefill,
        "while rolling out: a step with logits": memory.rollouts.step,
        "at most at once": memory.peak,
        "usable of a GPU": plan.usable_bytes,
        "on the host, for each GPU: reference in fp32": memory.host_reference,
    }
    if plan.case.run.rollout_gpus:
        named["a rollout server's GPU: weights"] = memory.server_weights
        named["a rollout server's GPU: keys and values of its rows"] = memory.server_cache
    return Grid(
        "Memory of a GPU", ("part", "GB"), tuple((name, f"{size / 1e9:.2f}") for name, size in named.items() if size)
    )


def _step_grid(plan: Plan) -> Grid:
    """Seconds by part. A part of 0 seconds is one that this run has not."""
    flops = step_flops(plan.case.model, plan.case.run.work())
    rows = []
    for part in fields(plan.policy):
        seconds = getattr(plan.policy, part.name)
        if seconds > 0:
            count = short(getattr(flops, part.name).total) if hasattr(flops, part.name) else ""
            share = f"{100 * seconds / plan.policy.total:.0f}"
            rows.append((PART_NAMES[part.name], f"{seconds:.3f}", share, count))
    rows.append(("policy in all", f"{plan.policy.total:.3f}", "100", short(flops.total)))
    return Grid("A step of the policy, predicted", ("part", "seconds", "%", "operations"), tuple(rows))


def _judge_grid(plan: Plan) -> Grid:
    batch, work = plan.case.run.global_batch_size, plan.judge_work.asked
    rows = (
        ("calls", short(work.calls / batch), short(work.calls)),
        ("prompt tokens", short(work.prompt_tokens / batch), short(work.prompt_tokens)),
        ("of these computed", short(work.computed_tokens / batch), short(work.computed_tokens)),
        ("answer tokens", short(work.answer_tokens / batch), short(work.answer_tokens)),
        ("rounds of answers", str(work.rounds), str(work.rounds)),
    )
    return Grid("Judges (and rewriter)", ("what", "a prefix", "a step"), rows)


def _servers_grid(plan: Plan) -> Grid:
    rows = tuple(
        (
            f"{found.servers:,}" + (" (planned)" if found.servers == plan.outcome.servers else ""),
            f"{found.judge:.2f}",
            f"{found.in_turn:.2f}",
            f"{found.overlapped:.2f}",
            short(found.days),
            short(found.gpu_hours),
        )
        for found in plan.options()
    )
    heads = ("judge servers", "judge, s", "step in turn, s", "step with lag 1, s", "days", "GPU-hours")
    return Grid("Judge servers, predicted", heads, rows)


def _run_grid(plan: Plan) -> Grid:
    run = plan.case.run
    plain = _plain_hours(plan)
    rows = (
        ("steps", f"{plan.steps:,}"),
        (f"tokens of the corpus ({run.split_mode})", short(plan.steps * run.budget_tokens_per_step)),
        ("days", short(plan.outcome.days)),
        ("GPU-hours, with what waits", short(plan.outcome.gpu_hours)),
        ("GPU-hours of work, policy", short(plan.policy_busy)),
        ("GPU-hours of work, judges at full load", short(plan.judge_busy)),
        ("GPU-hours of next-token training on the same documents", short(plain)),
        ("policy and judges over that", f"{(plan.policy_busy + plan.judge_busy) / plain:.1f}"),
        ("operations of the policy over those", f"{arithmetic_against_plain(plan.case):.2f}"),
    )
    return Grid("The run, predicted", ("what", "value"), rows)


def _plain_hours(plan: Plan) -> float:
    """GPU-hours of forward and backward of next-token training."""
    return plan.plain * plan.steps * plan.case.cluster.gpus / HOUR


def _lever_grid(changed: Sequence[Lever]) -> Grid:
    base = changed[0].plan
    whole = base.policy_busy + base.judge_busy
    rows = tuple(
        (
            lever.name,
            short(lever.plan.policy_busy),
            short(lever.plan.judge_busy),
            f"{(lever.plan.policy_busy + lever.plan.judge_busy) / whole:.2f}",
            short(lever.plan.outcome.gpu_hours),
        )
        for lever in changed
    )
    heads = ("one setting changed", "policy, GPU-hours", "judges, GPU-hours", "work over planned", "with what waits")
    return Grid("Levers, predicted", heads, rows)


def _assumption_grid(plan: Plan) -> Grid:
    rows = tuple((row["flag"], short(row["value"]), row["meaning"], row["source"]) for row in _assumptions(plan))
    return Grid("Assumptions", ("flag", "value", "meaning", "source"), rows)


def _assumptions(plan: Plan) -> list[dict[str, Any]]:
    case = plan.case
    return assumptions(case.run, case.cluster, case.efficiency, case.questions, case.servers)


def remarks(plan: Plan) -> list[str]:
    """What a reader must know of the numbers, and what to change where the plan does not hold."""
    lines = ["All of this is predicted from the assumptions below; nothing of it was measured."]
    if not plan.fits:
        over = (plan.memory.peak - plan.usable_bytes) / 1e9
        lines.append(f"It does not fit: {over:.1f} GB too much on a GPU. {_way_out(plan)}")
    run = plan.case.run
    share = run.global_batch_size // (plan.case.cluster.gpus // run.model_parallel)
    if run.rollout_batch_size is None and plan.memory.wave < share:
        lines.append(
            f"The rollouts of a rank's {share} prefixes do not fit at once and are planned in waves of "
            f"{plan.memory.wave}; the trainer plans its own from what is free on its GPUs, unless --rollout-batch-size "
            "is given."
        )
    if run.use_distributed_optimizer:
        lines.append("The trainer takes --use-distributed-optimizer only without --save, and with --reference frozen.")
    server = plan.memory.server_weights + plan.memory.server_cache
    if plan.memory.server_weights > plan.usable_bytes:
        lines.append("The policy does not fit a rollout server: raise --rollout-tensor-parallel-size.")
    elif server > plan.usable_bytes:
        lines.append("The rows of a step do not fit the rollout servers at once; they are written in turns, slower.")
    if plan.judge_work.asked.calls and plan.needed is None:
        floor = "the rounds of answers alone take longer than the policy's step"
        lines.append(f"No number of judge servers keeps pace with the policy: {floor}. Larger batch, shorter answers.")
    elif plan.needed:
        lines.append(f"{plan.needed:,} judge servers keep pace with the policy.")
    if plan.judge_work.interval > 1:
        lines.append(
            f"The judges are asked every {plan.judge_work.interval} steps; the trainer wants a cheaper one in all of "
            "them (--likelihood-weight or --classifier-weight), which is not in the plan."
        )
    if plan.case.servers.judge_servers is None and plan.outcome.servers:
        lines.append("The planned number of judge servers is that of the fewest GPU-hours.")
    return lines


def _way_out(plan: Plan) -> str:
    """What to change, by what is largest."""
    memory = plan.memory
    if memory.static > plan.usable_bytes:
        return "Weights and optimizer state are too large: raise TP or PP."
    parts = {
        "Raise TP, or say --recompute-granularity full.": memory.activations + memory.logits,
        "Raise TP or PP.": memory.reference_pass,
        "Lower --rollout-batch-size.": memory.rollouts.peak,
    }
    return max(parts, key=lambda way: parts[way])


def as_json(plan: Plan, changed: Sequence[Lever] = ()) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "predicted": True,
        "case": asdict(plan.case),
        "memory_bytes": {**asdict(plan.memory), "static": plan.memory.static, "peak": plan.memory.peak},
        "fits": plan.fits,
        "policy_seconds": {**asdict(plan.policy), "total": plan.policy.total},
        "flops": asdict(step_flops(plan.case.model, plan.case.run.work())),
        "judge_work": asdict(plan.judge_work),
        "judge_servers_needed": plan.needed,
        "outcome": asdict(plan.outcome),
        "options": [asdict(found) for found in plan.options()],
        "steps": plan.steps,
        "corpus_tokens": plan.steps * plan.case.run.budget_tokens_per_step,
        "policy_busy_gpu_hours": plan.policy_busy,
        "judge_busy_gpu_hours": plan.judge_busy,
        "plain_gpu_hours": _plain_hours(plan),
        "levers": [
            {
                "name": lever.name,
                "policy_busy_gpu_hours": lever.plan.policy_busy,
                "judge_busy_gpu_hours": lever.plan.judge_busy,
                "gpu_hours": lever.plan.outcome.gpu_hours,
            }
            for lever in changed
        ],
        "assumptions": _assumptions(plan),
        "remarks": remarks(plan),
    }
