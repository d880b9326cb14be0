"""A judge that needs no server and takes as long as it is told, behind the product's own services."""

from __future__ import annotations

import asyncio

from megatron_sip.config.groups import Config
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Pool, Question, Verdict
from tools.bench.step_inputs import picks


class ScriptedJudge:
    """Scores each candidate by a seeded draw, one question after the other as a server of a fixed rate does.

    What a question takes of the judge it takes whatever the trainer does meanwhile.
    """

    name = "classifier"
    pairwise = False
    model = "scripted"
    version = "scripted-1"
    settings = "a seeded draw"
    settled = True
    prompting = None

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._free_at = 0.0
        self._question_seconds = 0.0

    def start_anew(self, question_seconds: float) -> None:
        """Be idle, and take so long for a question from now on."""
        self._free_at, self._question_seconds = 0.0, question_seconds

    async def start(self) -> None:
        """Nothing to learn."""

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """The draw of candidate `first`, once the questions before it are answered."""
        score = picks(self._seed, pool.sample_index, len(pool.candidates))[question.first]
        if self._question_seconds > 0:
            now = asyncio.get_running_loop().time()
            self._free_at = max(now, self._free_at) + self._question_seconds
            await asyncio.sleep(self._free_at - now)
        return score


class ScriptedServices(PreferenceServices):
    """The product's services with that judge as the only one; `config` gives weight to the classifier alone."""

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, environ={})
        self.judge = ScriptedJudge(seed)
        self._judges = {self.judge.name: self.judge}

    def take(self, seconds: float, questions: int) -> None:
        """From now on so many questions take so long; none is left of those that were asked before."""
        self.judge.start_anew(seconds / questions)
