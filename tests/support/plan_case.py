"""A plan's case to vary: the paper's run on 64 GPUs, as far as its sizes are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_sip.config.presets import presets
from megatron_sip.cost.hardware import Cluster, Efficiency
from megatron_sip.cost.judging import JudgeQuestions, JudgeServers
from megatron_sip.cost.plan import Case
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import model_sizes

LLAMA_1B4 = model_sizes(replace(presets()["llama-1.4b"], vocab_size=32_000))
LLAMA3_8B = model_sizes(presets()["llama3-8b"])
PAPER = Case(
    LLAMA_1B4, RunSettings(), Cluster(gpus=64), Efficiency(), JudgeQuestions(pool=("rollout",)), JudgeServers()
)


def with_run(case: Case, **changes: Any) -> Case:
    """The case with other settings of the run."""
    return replace(case, run=replace(case.run, **changes))


def with_questions(case: Case, **changes: Any) -> Case:
    """The case with other questions to the judges."""
    return replace(case, questions=replace(case.questions, **changes))


def with_servers(case: Case, **changes: Any) -> Case:
    """The case with other servers."""
    return replace(case, servers=replace(case.servers, **changes))
