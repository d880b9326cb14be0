"""A plan: memory, seconds of a step, judge servers, and what a run costs, from sizes, settings and assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sip.cost.flops import plain_flops, step_flops
from megatron_sip.cost.hardware import Cluster, Efficiency
from megatron_sip.cost.judging import (
    JudgeQuestions,
    JudgeServers,
    JudgeWork,
    RunWork,
    busy_seconds,
    judge_seconds,
    run_work,
    servers_needed,
)
from megatron_sip.cost.memory import Memory, memory_per_gpu
from megatron_sip.cost.parts import spread_of_training
from megatron_sip.cost.ranges import out_of_range
from megatron_sip.cost.settings import RunSettings, as_trained, problems
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.cost.timing import PolicySeconds, policy_seconds
from megatron_sip.errors import ConfigError

HOUR = 3600.0
_GRID = 1.07
"""Numbers of servers that are tried for the cheapest run lie so far apart."""


@dataclass(frozen=True)
class Case:
    """All that a plan is made from."""

    model: ModelSizes
    run: RunSettings
    cluster: Cluster
    efficiency: Efficiency
    questions: JudgeQuestions
    servers: JudgeServers


@dataclass(frozen=True)
class Outcome:
    """A run with so many judge servers. The seconds of a step are means where --judge-interval is above 1.

    judge        seconds that they take for a step in which they are asked
    in_turn      seconds of a step that waits for its verdicts (lag 0)
    overlapped   seconds of a step of which the judges work meanwhile (lag 1)
    step         that of the two which is planned
    days         of the run
    gpu_hours    of the run with all that wait: trainer, rollout servers and judges
    """

    servers: int
    judge: float
    in_turn: float
    overlapped: float
    step: float
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """What is predicted of a run. Seconds are of one step, GPU-hours of the whole run.

    judge_work     what judges and rewriter are asked
    needed         servers with which judging takes no longer than the policy's parts; None: no number does
    outcome        the run with the servers of the settings, else with those that make it cheapest
    policy_busy    GPU-hours in which trainer and rollout servers work; their waiting is left out
    judge_busy     GPU-hours in which judge servers work, at full load
    plain          seconds of the forward and backward passes of next-token training on the same documents
    """

    case: Case
    memory: Memory
    policy: PolicySeconds
    judge_work: RunWork
    needed: int | None
    outcome: Outcome
    steps: int
    policy_busy: float
    judge_busy: float
    plain: float

    @property
    def usable_bytes(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return _usable(self.case.cluster)

    @property
    def fits(self) -> bool:
        """Whether the peak fits."""
        return self.memory.peak <= self.usable_bytes

    def options(self) -> tuple[Outcome, ...]:
        """The run with other numbers of servers: from a quarter of the planned to four times as many, and `needed`."""
        if not self.outcome.servers:
            return (self.outcome,)
        planned = self.outcome.servers
        counts = {max(1, planned // 4), max(1, planned // 2), planned, 2 * planned, 4 * planned}
        counts |= {self.needed} if self.needed else set()
        return tuple(
            outcome(self.case, self.judge_work, self.policy.total, self.steps, count) for count in sorted(counts)
        )


def make_plan(case: Case) -> Plan:
    """Predict a run.

    Raises:
        ConfigError: settings that cannot be, all of them named.
    """
    single = out_of_range(case.run, case.cluster, case.efficiency, case.questions, case.servers)
    # Relations are told of numbers that can be.
    found = list(single) or [*problems(case.run, case.model, case.cluster.gpus), *_other_problems(case)]
    if found:
        raise ConfigError("; ".join(found))
    run, cluster, efficiency = case.run, case.cluster, case.efficiency
    training = spread_of_training(run, cluster.gpus)
    model = as_trained(case.model, run)
    memory = memory_per_gpu(model, run, training.dp, _usable(cluster), efficiency.row_padding)
    policy = policy_seconds(model, run, cluster, efficiency, memory)
    lengths = run.prefix_length, run.suffix_length
    work = run_work(case.questions, *lengths, run.num_rollouts, run.global_batch_size)
    busy = work.mean(lambda asked: busy_seconds(asked, case.servers, cluster))
    steps = _steps(run)
    elsewhere = policy.rollouts if run.rollout_gpus else 0.0
    peak = 1e12 * cluster.peak_tflops * efficiency.train_mfu * cluster.gpus
    return Plan(
        case=case,
        memory=memory,
        policy=policy,
        judge_work=work,
        needed=servers_needed(work.asked, case.servers, cluster, policy.total),
        outcome=_planned(case, work, policy.total, steps),
        steps=steps,
        policy_busy=steps * ((policy.total - elsewhere) * cluster.gpus + elsewhere * run.rollout_gpus) / HOUR,
        judge_busy=steps * busy * case.servers.judge_gpus_per_server / HOUR,
        plain=plain_flops(case.model, run.work()).total / peak,
    )


def outcome(case: Case, work: RunWork, policy: float, steps: int, servers: int) -> Outcome:
    """The run with so many servers; `policy` seconds are those of its own parts."""

    def judged(asked: JudgeWork) -> float:
        return judge_seconds(asked, case.servers, case.cluster, servers)

    def together(asked: JudgeWork) -> float:
        judge = judged(asked)
        return max(policy, judge) + case.efficiency.overlap_loss * min(policy, judge)

    in_turn, overlapped = policy + work.mean(judged), work.mean(together)
    step = overlapped if case.questions.judge_lag else in_turn
    gpus = case.cluster.gpus + case.run.rollout_gpus + servers * case.servers.judge_gpus_per_server
    return Outcome(
        servers=servers,
        judge=judged(work.asked),
        in_turn=in_turn,
        overlapped=overlapped,
        step=step,
        days=step * steps / HOUR / 24,
        gpu_hours=gpus * step * steps / HOUR,
    )


def _planned(case: Case, work: RunWork, policy: float, steps: int) -> Outcome:
    """With the servers that are given, else with the number of the fewest GPU-hours."""
    if not work.asked.calls:
        return outcome(case, work, policy, steps, 0)
    if case.servers.judge_servers is not None:
        return outcome(case, work, policy, steps, case.servers.judge_servers)
    most = math.ceil(math.log(max(1.0, work.asked.calls), _GRID))
    counts = sorted({round(_GRID**power) for power in range(most + 1)})
    return min((outcome(case, work, policy, steps, count) for count in counts), key=lambda found: found.gpu_hours)


def arithmetic_against_plain(case: Case) -> float:
    """Operations of the policy's step over those of next-token training on the same documents."""
    work = case.run.work()
    return step_flops(case.model, work).total / plain_flops(case.model, work).total


def _usable(cluster: Cluster) -> float:
    return 1e9 * cluster.gpu_memory_gb * (1 - cluster.memory_reserve)


def _steps(run: RunSettings) -> int:
    if run.token_budget is None:
        return run.train_iters
    return math.ceil(run.token_budget / run.budget_tokens_per_step)


def _other_problems(case: Case) -> Iterator[str]:
    """What cannot be of the questions, the servers, and the peak."""
    if case.servers.judge_active_parameters > case.servers.judge_parameters:
        yield "--judge-active-parameters is more than --judge-parameters; give both of your judge"
    if case.questions.candidates(case.run.num_rollouts) < 2:
        yield "--pool holds fewer than two candidates; add a kind or raise --num-rollouts"
    if case.run.dtype == "fp32" and case.cluster.peak_tflops == Cluster.peak_tflops:
        yield "--dtype fp32 has another peak than bf16; give it with --peak-tflops (an H100 has 67)"
