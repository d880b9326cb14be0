"""The scenarios in which scoring plans are measured, and the tables and curves of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from megatron_sip.evaluation.line_plot import Line, Panel
from megatron_sip.evaluation.scoring_plans import (
    Outcome,
    Plan,
    adaptive,
    every_pair,
    knockout,
    pivot,
    random_pairs,
    share,
)
from megatron_sip.evaluation.simulated_judge import JudgeModel, SimulatedJudge
from megatron_sip.preference.adaptive import AdaptiveSettings

POOL = 17
CURVE_BUDGETS = (34, 51, 68, 102, 136, 204, 272, 408)
CURVE_ROUNDS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Scenario:
    """A kind of judge, what the adaptive plan may spend on a pool, and the share of the margin it must reach."""

    name: str
    model: JudgeModel
    settings: AdaptiveSettings
    size: int = POOL
    target: float | None = None


def _settings(rounds: int, budget: int | None) -> AdaptiveSettings:
    return AdaptiveSettings(rounds=rounds, budget=budget)


TARGETS = (
    Scenario("75 %", JudgeModel(0.75), _settings(4, 136), target=0.95),
    Scenario("90 %", JudgeModel(0.90), _settings(3, 96), target=0.99),
    Scenario("65 %", JudgeModel(0.65), _settings(4, 272), target=0.95),
    Scenario("75 %, same answer again", JudgeModel(0.75, repeats_itself=True), _settings(4, 136), target=0.95),
    Scenario("75 %, intransitive (sd 1)", JudgeModel(0.75, pair_sd=1.0), _settings(4, 136), target=0.91),
    Scenario("75 %, position bias (1.5)", JudgeModel(0.75, bias=1.5), _settings(4, 136), target=0.91),
)
"""What has to hold."""

REPORTED = (
    Scenario("75 %, 10 % missing", JudgeModel(0.75, missing=0.1), _settings(4, 136)),
    Scenario("65 %, probabilities", JudgeModel(0.65, probabilities=True), _settings(4, 136)),
    Scenario("75 %, probabilities", JudgeModel(0.75, probabilities=True), _settings(4, 136)),
    Scenario("90 %, probabilities", JudgeModel(0.90, probabilities=True), _settings(4, 136)),
    Scenario(
        "75 %, probabilities, intransitive (sd 1)",
        JudgeModel(0.75, probabilities=True, pair_sd=1.0),
        _settings(4, 136),
    ),
    Scenario(
        "75 %, probabilities, bias (1.5), 10 % missing",
        JudgeModel(0.75, probabilities=True, bias=1.5, missing=0.1),
        _settings(4, 136),
    ),
    *(Scenario(f"75 %, pool of {size}", JudgeModel(0.75), _settings(4, None), size) for size in (2, 3, 5, 9, 18)),
)
"""Told beside it; pools of other sizes with the default budget."""


@dataclass(frozen=True)
class Row:
    """One plan in one scenario: shares of two margins, mean calls, most rounds.

    `share` is of what all pairs x 5 votes find with the same judge, `error` its standard error; `plain` of what they
    find with a judge of the same vote rate without bias, without an intransitive part, that votes anew each time.
    """

    scenario: str
    plan: str
    share: float
    error: float
    plain: float
    calls: float
    rounds: float
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.share >= self.target


@dataclass(frozen=True)
class References:
    """All pairs x 5 votes (680 calls for 17): with votes of the same judge, none missing, and with a plain one."""

    own: Outcome
    plain: Outcome

    def row(self, scenario: Scenario, plan: str, outcome: Outcome, target: float | None = None) -> Row:
        """The row of a plan."""
        found, error = share(outcome, self.own)
        calls, rounds = float(outcome.calls.mean()), float(outcome.rounds.max())
        return Row(scenario.name, plan, found, error, share(outcome, self.plain)[0], calls, rounds, target)


def references(scenario: Scenario, pools: int, seed: int) -> References:
    """The measures of 1 in a scenario."""
    models = (
        replace(scenario.model, probabilities=False, missing=0.0),
        JudgeModel(scenario.model.vote_rate),
    )
    own, plain = (every_pair(5)(SimulatedJudge(model, pools, scenario.size, seed)) for model in models)
    return References(own, plain)


def measure(scenario: Scenario, pools: int, seed: int, *, only_adaptive: bool = False) -> list[Row]:
    """The adaptive plan and those it is compared with."""
    judge = SimulatedJudge(scenario.model, pools, scenario.size, seed)
    measure_of_1 = references(scenario, pools, seed)
    outcome = adaptive(scenario.settings)(judge)
    rows = [measure_of_1.row(scenario, "adaptive", outcome, scenario.target)]
    if not only_adaptive:
        budget = round(float(outcome.calls.max()))
        others: dict[str, Plan] = {
            "random pairs, fitted": random_pairs(budget),
            "all pairs x 5": every_pair(5),
            "all pairs": every_pair(1),
            "knockout": knockout(),
            "pivot": pivot(),
        }
        rows += [measure_of_1.row(scenario, name, plan(judge)) for name, plan in others.items()]
    return rows


def curves(pools: int, seed: int, told: Callable[[str], None]) -> tuple[list[Row], list[Panel]]:
    """Share of the margin against calls and against rounds at a vote rate of 75 %, never stopping early."""
    judge = SimulatedJudge(TARGETS[0].model, pools, TARGETS[0].size, seed)
    measure_of_1 = references(TARGETS[0], pools, seed)
    rows: list[Row] = []

    def point(name: str, plan: Plan) -> Row:
        told(name)
        rows.append(measure_of_1.row(TARGETS[0], name, plan(judge)))
        return rows[-1]

    def full(rounds: int, budget: int) -> Plan:
        return adaptive(AdaptiveSettings(rounds=rounds, budget=budget, confidence=1.0))

    lines = [
        Line("adaptive, 4 rounds", _by_calls(point(f"adaptive {b} calls", full(4, b)) for b in CURVE_BUDGETS)),
        Line("random pairs, fitted", _by_calls(point(f"random {b} calls", random_pairs(b)) for b in CURVE_BUDGETS)),
        Line("all pairs, 1 to 5 votes", _by_calls(point(f"all pairs x {v}", every_pair(v)) for v in (1, 2, 3, 5))),
        Line("knockout", _by_calls([point("knockout", knockout())])),
        Line("pivot", _by_calls([point("pivot", pivot())])),
    ]
    by_rounds = [point(f"adaptive {r} rounds", full(r, 136)) for r in CURVE_ROUNDS]
    rounds = Line("adaptive, 136 calls", tuple((row.rounds, 100 * row.share) for row in by_rounds))
    unit = "share of the margin of 680 calls, %"
    return rows, [
        Panel("Margin against calls, judge right in 75 %", "calls a pool", unit, tuple(lines), (20.0, 100.0), True),
        Panel("Margin against rounds, judge right in 75 %", "rounds", unit, (rounds,), (85.0, 100.0)),
    ]


def _by_calls(rows: Iterator[Row] | Sequence[Row]) -> tuple[tuple[float, float], ...]:
    return tuple((row.calls, 100 * row.share) for row in rows)


def table(rows: Sequence[Row], title: str) -> Table:
    """One line a plan; `title` names the scenario."""
    shown = Table(title=title, title_justify="left")
    for head in ("plan", "calls", "rounds", "share, %", "of plain, %", "target, %"):
        shown.add_column(head, justify="left" if head == "plan" else "right", no_wrap=True)
    for row in rows:
        goal = "" if row.target is None else f"{100 * row.target:.0f} {'met' if row.met else 'MISSED'}"
        found = f"{100 * row.share:.1f} ± {100 * row.error:.1f}"
        shown.add_row(row.plan, f"{row.calls:.1f}", f"{row.rounds:.0f}", found, f"{100 * row.plain:.1f}", goal)
    return shown


def as_json(rows: Sequence[Row], pools: int, seed: int) -> dict[str, Any]:
    """What was measured, for a file."""
    return {"pools": pools, "seed": seed, "rows": [{**asdict(row), "met": row.met} for row in rows]}
