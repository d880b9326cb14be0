"""The worked examples of docs/scaling.md are what the planner says today."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_case import LLAMA3_8B, PAPER, with_questions, with_run, with_servers

from megatron_sip.config.presets import presets
from megatron_sip.cost.hardware import Cluster
from megatron_sip.cost.levers import levers
from megatron_sip.cost.plan import Case, Plan, make_plan
from megatron_sip.cost.sizes import model_sizes

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "scaling.md").read_text()
CHEAP = {"judge_reading": "logit", "scoring": "adaptive"}


def at_scale(name: str, gpus: int, tp: int, pp: int, **run: object) -> Case:
    model = LLAMA3_8B if name == "8B" else model_sizes(presets()["llama3-70b"])
    case = with_questions(replace(PAPER, model=model, cluster=Cluster(gpus=gpus)), judge_lag=1)
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": True}
    return with_run(case, **layout, global_batch_size=4096, **{"token_budget": 1e12, **run})


def row(plan: Plan) -> str:
    cells = (plan.memory.peak / 1e9, plan.policy.total, plan.outcome.step, plan.outcome.days)
    memory, policy, step, days = (f"{cell:.1f}" for cell in cells)
    hours = " | ".join(map(hours_of, (plan.policy_busy, plan.judge_busy, plan.outcome.gpu_hours)))
    return f"| {memory} | {policy} | {plan.outcome.servers:,} | {step} | {days} | {hours} |"


def hours_of(value: float) -> str:
    """Three digits, as the page writes them."""
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{float(f'{value:.3g}'):,.0f}"


EXAMPLES = {
    "8B, 128, written": at_scale("8B", 128, 4, 1),
    "8B, 1024": at_scale("8B", 1024, 4, 1),
    "8B, 512, `logit`": with_questions(at_scale("8B", 512, 4, 1), **CHEAP),
    "70B, 2048, written": at_scale("70B", 2048, 8, 4),
    "70B, 2048, `logit`": with_questions(at_scale("70B", 2048, 8, 4), **CHEAP),
    "70B, 2048, the same": with_questions(at_scale("70B", 2048, 8, 4, rollout_pipeline_groups=1), **CHEAP),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_at_scale(name: str) -> None:
    plan = make_plan(EXAMPLES[name])
    assert plan.fits
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {name}")]
    assert row(plan) in line
    assert f"{plan.steps:,} steps for 10^12 tokens" in PAGE


def test_fifteen_trillion_tokens() -> None:
    def millions(case: Case) -> float:
        return make_plan(with_run(case, token_budget=15e12)).outcome.gpu_hours / 1e6

    written, read = EXAMPLES["8B, 128, written"], EXAMPLES["8B, 512, `logit`"]
    assert f"the 8B with written verdicts {millions(written):.0f}M GPU-hours" in PAGE
    few, large = with_run(read, num_rollouts=4), EXAMPLES["70B, 2048, `logit`"]
    assert f"with `logit` and adaptive {millions(read):.1f}M; with K = 4 besides {millions(few):.1f}M" in PAGE
    assert f"The 70B with `logit` and adaptive {millions(large):.0f}M" in PAGE


def test_what_sharing_the_prefix_saves_at_scale() -> None:
    policy, whole = [], []
    for name in ("8B, 128, written", "70B, 2048, written"):
        case = EXAMPLES[name]
        shared, apart = make_plan(case), make_plan(with_run(case, shared_prefix=False, prefill_once=False))
        policy.append(apart.policy_busy / shared.policy_busy)
        whole.append((apart.policy_busy + apart.judge_busy) / (shared.policy_busy + shared.judge_busy))
    assert f"{policy[0]:.1f} times (8B, 128 GPUs) and {policy[1]:.1f} times (70B) as much" in PAGE
    assert f"with written verdicts {whole[0]:.2f} and {whole[1]:.2f} times" in PAGE


def test_the_papers_run() -> None:
    plan = make_plan(PAPER)
    for part in ("prefill", "decode", "train", "gradient_reduce", "optimizer", "total"):
        assert f"| {getattr(plan.policy, part):.3f} |" in PAGE
    assert f"{plan.memory.peak / 1e9:.1f} GB of a GPU" in PAGE
    for servers in (16, 64, 122, 512):
        found = make_plan(with_servers(PAPER, judge_servers=servers)).outcome
        assert f"| {found.judge:.1f} | {found.in_turn:.1f} | {found.days:.2f} |" in PAGE
    assert plan.outcome.servers == 122


def test_the_levers_of_the_papers_run() -> None:
    found = {lever.name: lever.plan for lever in levers(make_plan(PAPER))}
    base = found["as planned"].policy_busy + found["as planned"].judge_busy
    for name, head in {
        "all pairs, 5 votes": "all pairs, 5 votes",
        "adaptive": "`--scoring adaptive`",
        "adaptive, half its budget": "`--adaptive-budget 64`",
        "verdicts of 60 tokens": "verdicts of 60 tokens",
        "logit, both orders": "`--judge-reading logit`, both orders",
        "logit, adaptive": "`logit`, adaptive",
        "K = 8": "K = 8",
        "K = 4": "K = 4",
        "judges every 2nd step": "`--judge-interval 2`",
        "prefix not shared": "prefix not shared",
    }.items():
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {head}")]
        work = (found[name].policy_busy + found[name].judge_busy) / base
        hours = hours_of(found[name].outcome.gpu_hours)
        assert line.endswith(f"| {found[name].judge_busy:,.0f} | {work:.2f} | {hours} |")
