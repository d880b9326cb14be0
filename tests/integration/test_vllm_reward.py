"""The reward judge against a real vLLM server: a small random classification model, compared with transformers."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import served

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.errors import ServiceError
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.judges import QualityJudge, Reading
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.prompts import REWARD_CHAT_TASK
from megatron_sip.types import Candidate, CandidateKind, Pool, Question

pytestmark = [pytest.mark.server, pytest.mark.nightly]

PREFIX = "The old lighthouse stood at the end of the pier. Every evening the keeper climbed the stairs to"
SUFFIXES = [
    " light the great lamp, so that the ships out at sea could find their way home through the fog.",
    " banana seventeen of the quickly under walls the purple of run.",
    " sleep. <|im_end|> Then he rose.",
    " the top, where it was cold.",
]


@pytest.fixture(scope="module")
def reward_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LlamaForSequenceClassification of one class with the tokenizer and chat template of SmolLM2."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / "tiny-reward"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,  # heads of 64: vLLM's attention on the CPU knows none of 16
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        num_labels=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (smollm2 / name).is_file():
            shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def reward_url(reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("reward-server") / "server.log"
    with served(reward_folder, log, "--dtype", "float32", "--max-model-len", "512", startup_seconds=300) as url:
        yield url


def ask(url: str, *entries: str, prefix: str = PREFIX) -> list[float]:
    """The scores of the suffixes by the judge `reward` with these settings."""
    candidates = (Candidate(CandidateKind.ROLLOUT, (index,), text, index) for index, text in enumerate(SUFFIXES))
    pool = Pool(0, prefix, SUFFIXES[0], tuple(candidates))
    fields = [f"reward.{entry}" for entry in ("weight=1", *entries)]
    judge = JudgeConfig(judge_url=(url,), judge_set=("quality.weight=0", *fields), judge_timeout=120.0)
    questions = [Question("reward", index) for index in range(len(SUFFIXES))]
    with PreferenceServices(Config(judge=judge), {}) as services:
        [answers] = services.submit_answers([pool], [questions]).result(120)
        assert services.stats()["asked/reward"] == len(SUFFIXES)
    return [answers[question] for question in questions]  # type: ignore[misc]


@pytest.fixture(scope="module")
def oracle(reward_folder: Path) -> Any:
    """From token ids to the logit of the same weights in transformers."""
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = LlamaForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logit(text: str | None = None, messages: list[dict[str, str]] | None = None) -> float:
        if messages is not None:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return float(model(torch.tensor([ids])).logits[0, 0])

    return logit


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_a_plain_text_scores_as_in_transformers(reward_url: str, oracle: Any) -> None:
    clean = [suffix.replace("<|im_end|>", "< |im_end| >") for suffix in SUFFIXES]
    logits = [oracle(PREFIX + suffix) for suffix in clean]
    assert max(logits) - min(logits) > 0.1, "the weights tell the texts apart"
    scores = ask(reward_url)
    print("logits:", [round(logit, 4) for logit in logits], "scores:", [round(score, 5) for score in scores])
    assert scores == pytest.approx([sigmoid(logit) for logit in logits], abs=2e-4)
    calibrated = ask(reward_url, "scale=2", f"offset={logits[0]}")
    assert calibrated == pytest.approx([sigmoid(2 * (logit - logits[0])) for logit in logits], abs=4e-4)


def test_a_chat_scores_as_in_transformers(reward_url: str, oracle: Any) -> None:
    scores = ask(reward_url, "input=chat")
    for suffix, score in zip(SUFFIXES, scores, strict=True):
        clean = suffix.replace("<|im_end|>", "< |im_end| >")
        turns = [{"role": "user", "content": REWARD_CHAT_TASK + PREFIX}, {"role": "assistant", "content": clean}]
        assert score == pytest.approx(sigmoid(oracle(messages=turns)), abs=2e-4)


def test_a_pair_scores_as_its_text(reward_url: str, oracle: Any) -> None:
    """This tokenizer puts nothing between the two texts of a pair."""
    scores = ask(reward_url, "route=score")
    clean = [suffix.replace("<|im_end|>", "< |im_end| >") for suffix in SUFFIXES]
    assert scores == pytest.approx([sigmoid(oracle(PREFIX + suffix)) for suffix in clean], abs=2e-4)


def test_a_long_prefix_is_trimmed_for_every_route(reward_url: str) -> None:
    prefix = "A word about nothing in particular. " * 200 + PREFIX
    for entries in (("input=text",), ("input=chat",), ("route=score",)):
        assert all(0 < score < 1 for score in ask(reward_url, *entries, prefix=prefix))


def test_a_reward_server_is_no_chat_judge_and_the_other_way_round(reward_url: str, judge_url: str) -> None:
    with pytest.raises(ServiceError, match=r"/classify.*--judge-set reward\.url"):
        ask(judge_url)
    with pytest.raises(ServiceError, match="1 classes"):
        ask(reward_url, "label=0")

    async def quality() -> object:
        server = ModelServer(ServiceClient(ClientSettings(urls=(reward_url,), timeout=60.0, retries=0), {}))
        await server.start()
        try:
            pool = Pool(0, PREFIX, "", tuple(Candidate(CandidateKind.ROLLOUT, (i,), t, i) for i, t in enumerate("ab")))
            return await QualityJudge(server, Reading()).ask(pool, Question("quality", 0, 1))
        finally:
            await server.client.close()

    assert not isinstance(asyncio.run(quality()), float), "a verdict that is no verdict must be Missing"
