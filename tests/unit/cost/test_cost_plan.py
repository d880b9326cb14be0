"""Plans as a whole: what overlap gains, budgets, servers, levers, tables and refusals."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from plan_case import LLAMA3_8B, PAPER, with_questions, with_run, with_servers

from megatron_sip.config.fields import flag_of
from megatron_sip.cost.assumed import assumptions
from megatron_sip.cost.flops import plain_flops, step_flops
from megatron_sip.cost.levers import LEVERS, levers
from megatron_sip.cost.plan import arithmetic_against_plain, make_plan
from megatron_sip.cost.report import as_json, grids, remarks, short
from megatron_sip.errors import ConfigError


def test_the_papers_run_is_bound_by_its_judge() -> None:
    plan = make_plan(PAPER)
    assert plan.fits
    assert plan.steps == 2000
    assert plan.judge_work.asked.calls == 256 * 120
    assert plan.judge_busy > 10 * plan.policy_busy
    assert arithmetic_against_plain(PAPER) == pytest.approx(2.3, abs=0.1), "2.4 without attention and head"


def test_overlap_hides_the_shorter_of_policy_and_judge() -> None:
    for servers in (30, 3000):
        found = make_plan(with_servers(PAPER, judge_servers=servers)).outcome
        policy = found.in_turn - found.judge
        assert found.overlapped == pytest.approx(max(policy, found.judge) + 0.1 * min(policy, found.judge))
        assert found.step == found.in_turn
    late = make_plan(with_questions(with_servers(PAPER, judge_servers=30), judge_lag=1)).outcome
    assert late.step == late.overlapped < late.in_turn


def test_no_step_takes_up_the_judging_that_another_has_left_over() -> None:
    """A judge that is asked every second step, and then takes 16 s beside a policy of 1 s."""
    for lag in (0, 1):
        every = with_questions(with_servers(PAPER, judge_servers=120), judge_lag=lag)
        each, second = make_plan(every), make_plan(with_questions(every, judge_interval=2))
        policy = each.policy.total
        assert each.outcome.judge > 10 * policy
        assert second.outcome.judge == each.outcome.judge, "answers are not written faster because there are fewer"
        assert second.outcome.step == pytest.approx((each.outcome.step + policy) / 2)
        assert second.judge_busy == pytest.approx(each.judge_busy / 2)
        assert second.needed == each.needed
        said = [any("--likelihood-weight" in line for line in remarks(plan)) for plan in (each, second)]
        assert said == [False, True]


def test_hours_are_gpus_times_time() -> None:
    plan = make_plan(with_servers(PAPER, judge_servers=30, judge_gpus_per_server=2))
    assert plan.outcome.days == pytest.approx(plan.outcome.step * 2000 / 86_400)
    assert plan.outcome.gpu_hours == pytest.approx(plan.outcome.days * 24 * (64 + 60))
    assert plan.policy_busy == pytest.approx(plan.policy.total * 2000 * 64 / 3600)
    assert plan.plain * 64 * 989e12 * 0.37 == pytest.approx(plain_flops(PAPER.model, PAPER.run.work()).total)


@pytest.mark.parametrize(("mode", "tokens"), [("random", 256 * (1024 + 128)), ("walk", 256 * 128)])
def test_a_budget_is_used_up_by_what_a_cut_takes(mode: str, tokens: int) -> None:
    plan = make_plan(with_run(PAPER, token_budget=1e9, split_mode=mode))
    assert (plan.steps - 1) * tokens < 1e9 <= plan.steps * tokens


def test_the_cheapest_number_of_servers_is_cheaper_than_its_neighbours() -> None:
    plan = make_plan(PAPER)
    hours = {found.servers: found.gpu_hours for found in plan.options()}
    assert min(hours, key=lambda count: hours[count]) == plan.outcome.servers


def test_needed_servers_keep_pace() -> None:
    read = with_questions(PAPER, judge_reading="logit")
    plan = make_plan(read)
    assert plan.needed is not None
    exactly = make_plan(with_servers(read, judge_servers=plan.needed))
    assert exactly.outcome.judge <= exactly.policy.total
    long = with_questions(PAPER, judge_answer_tokens=600)
    assert make_plan(long).needed is None, "such answers alone take longer than a step of the policy"


def test_without_a_judge_nothing_is_waited_for() -> None:
    plan = make_plan(with_questions(PAPER, quality_weight=0.0))
    assert plan.outcome.servers == plan.judge_busy == plan.needed == 0
    assert plan.outcome.step == plan.outcome.overlapped == plan.policy.total
    assert "Judge servers, predicted" not in {grid.title for grid in grids(plan)}


def test_rollout_servers_work_while_rolling_out_only() -> None:
    plan = make_plan(with_run(PAPER, rollout_engine="vllm", rollout_gpus=32))
    rolling = plan.policy.rollouts
    assert plan.policy_busy == pytest.approx(2000 / 3600 * (32 * rolling + 64 * (plan.policy.total - rolling)))
    assert plan.outcome.gpu_hours > make_plan(PAPER).outcome.gpu_hours * 96 / 200


def test_every_lever_changes_the_cost_and_is_told() -> None:
    base = with_run(with_questions(PAPER, judge_votes=2), num_rollouts=12)
    found = list(levers(make_plan(base)))
    assert [lever.name for lever in found] == ["as planned", *(name for name, _ in LEVERS)]
    costs = {lever.name: lever.plan.policy_busy + lever.plan.judge_busy for lever in found}
    assert all(cost != costs["as planned"] for name, cost in costs.items() if name != "as planned")
    assert costs["pivot"] < costs["adaptive"] < costs["all pairs, 5 votes"]
    assert costs["prefix not shared"] > costs["as planned"]
    assert "all pairs, 1 vote" not in {lever.name for lever in levers(make_plan(PAPER))}, "it is the plan itself"


def test_sharing_the_prefix_is_what_the_formulas_say() -> None:
    apart = with_run(PAPER, shared_prefix=False, prefill_once=False)
    ratio = step_flops(PAPER.model, apart.run.work()).total / step_flops(PAPER.model, PAPER.run.work()).total
    assert ratio == pytest.approx(8.0 / 2.4, rel=0.1)


def test_what_does_not_fit_is_said_with_a_way_out() -> None:
    large = replace(PAPER, model=LLAMA3_8B)
    plan = make_plan(large)
    assert not plan.fits
    assert any("does not fit" in line and "raise TP or PP" in line for line in remarks(plan))
    long = make_plan(with_run(PAPER, prefix_length=30_000))
    assert any("--recompute-granularity full" in line for line in remarks(long))
    served = with_run(large, rollout_engine="vllm", rollout_gpus=1)
    assert any("written in turns" in line for line in remarks(make_plan(served)))
    tight = replace(served, cluster=replace(served.cluster, gpu_memory_gb=16.0))
    assert any("--rollout-tensor-parallel-size" in line for line in remarks(make_plan(tight)))
    waves = make_plan(with_run(PAPER, num_rollouts=1024, rollout_batch_size=4))
    assert any("--rollout-batch-size" in line for line in remarks(waves))


def test_tables_and_json_hold_the_plan_and_say_that_it_is_predicted() -> None:
    plan = make_plan(PAPER)
    changed = list(levers(plan))
    titles = [grid.title for grid in grids(plan, changed)]
    assert titles[-2:] == ["Levers, predicted", "Assumptions"]
    assert all(len(row) == len(grid.heads) for grid in grids(plan, changed) for row in grid.rows)
    data = json.loads(json.dumps(as_json(plan, changed), allow_nan=False))
    assert data["predicted"] is True
    assert data["memory_bytes"]["peak"] == plan.memory.peak
    assert len(data["levers"]) == len(changed)
    assert any("nothing of it was measured" in line for line in data["remarks"])


def test_assumptions_have_a_source_and_a_changed_one_is_given() -> None:
    changed = replace(PAPER.efficiency, train_mfu=0.5)
    rows = {row["flag"]: row for row in assumptions(PAPER.run, PAPER.cluster, changed, PAPER.questions, PAPER.servers)}
    assert all(row["source"] for row in rows.values())
    assert rows["--train-mfu"]["source"] == "given"
    assert "H200" in assumptions(PAPER.efficiency)[0]["source"]
    assert "--gpus" not in rows, "a decision, not an assumption"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_model_parallel_size": 5}, "--gpus 64 is no multiple of TP x PP = 5 x 1"),
        ({"global_batch_size": 100}, "--global-batch-size 100 is no multiple of DP x --micro-batch-size = 64"),
        ({"pipeline_model_parallel_size": 32}, "more than the model's 24 layers"),
        ({"sequence_parallel": True}, "--sequence-parallel needs"),
        ({"tensor_model_parallel_size": 32}, "32 is more than --num-attention-heads 16"),
        ({"rollout_engine": "vllm"}, "--rollout-engine vllm and --rollout-gpus go together"),
        ({"rollout_engine": "vllm", "rollout_gpus": 3, "rollout_tensor_parallel_size": 2}, "--rollout-gpus 3 is no"),
        (
            {"micro_batch_size": 0, "prefix_length": 0},
            "--prefix-length is 0; .*--micro-batch-size is 0; it must be above",
        ),
        ({"token_budget": float("nan")}, "--token-budget is nan"),
        ({"dtype": "fp32"}, "give it with --peak-tflops"),
        ({"num_rollouts": 1}, "fewer than two candidates"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(with_run(PAPER, **changes))


def test_a_width_that_does_not_divide_is_refused() -> None:
    odd = replace(PAPER, model=replace(PAPER.model, ffn_hidden_size=5633))
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 2 does not divide --ffn-hidden-size 5633"):
        make_plan(with_run(odd, tensor_model_parallel_size=2))


def test_query_groups_that_tp_does_not_divide_are_padded_or_refused() -> None:
    """8 groups of 4 heads over 16 ranks: one half of all groups are zeros, which are stored and multiplied too."""
    eight = replace(PAPER, model=LLAMA3_8B)
    odd = with_run(eight, tensor_model_parallel_size=16)
    with pytest.raises(ConfigError, match=r"16 does not divide --num-query-groups 8; .* --pad-query-groups"):
        make_plan(odd)
    padded = make_plan(with_run(odd, pad_query_groups=True))
    double = replace(LLAMA3_8B, num_query_groups=16, num_attention_heads=64)
    assert padded.memory == make_plan(replace(odd, model=double)).memory
    assert padded.policy == make_plan(replace(odd, model=double)).policy
    even = with_run(eight, tensor_model_parallel_size=8)
    assert make_plan(with_run(even, pad_query_groups=True)).policy == make_plan(even).policy


def test_what_the_trainer_must_be_told_is_said() -> None:
    few = replace(PAPER, cluster=replace(PAPER.cluster, gpus=1))
    plan = make_plan(few)
    assert plan.memory.wave < 256
    assert any(f"in waves of {plan.memory.wave}; the trainer plans its own" in line for line in remarks(plan))
    given = make_plan(with_run(few, rollout_batch_size=plan.memory.wave))
    assert not any("in waves of" in line for line in (*remarks(given), *remarks(make_plan(PAPER))))
    assert any(
        "--reference frozen" in line for line in remarks(make_plan(with_run(few, use_distributed_optimizer=True)))
    )


@pytest.mark.parametrize(
    "changes",
    [{"judge_servers": 0}, {"judge_rows": 0}, {"judge_active_parameters": 2e12}, {"judge_bandwidth_share": 1.5}],
)
def test_servers_that_cannot_be_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match="--judge-"):
        make_plan(with_servers(PAPER, **changes))


def test_every_number_has_a_range_and_zero_is_in_some() -> None:
    free = replace(PAPER.efficiency, layer_overhead_us=0.0, tp_latency_us=0.0, token_overhead_us=0.0, overlap_loss=0.0)
    assert make_plan(replace(PAPER, efficiency=free)).policy.total < make_plan(PAPER).policy.total
    for group in ("run", "cluster", "efficiency", "questions", "servers"):
        for item in fields(getattr(PAPER, group)):
            if isinstance(getattr(getattr(PAPER, group), item.name), int | float) and item.type != "bool":
                bad = replace(PAPER, **{group: replace(getattr(PAPER, group), **{item.name: -1})})
                with pytest.raises(ConfigError, match=f"{flag_of(item.name)} is -1"):
                    make_plan(bad)


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (12.0, "12"), (1234.5, "1,234"), (5.1e9, "5.1 G"), (5.58e15, "5.58 P")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
