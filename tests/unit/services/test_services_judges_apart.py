"""Several judges: each with its own server, key, reading and votes; servers are shared where nothing differs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_server import FakeServer

from megatron_sip.config.groups import Config, JudgeConfig, RewriterConfig
from megatron_sip.config.judge_set import active_judges
from megatron_sip.errors import ConfigError, ServiceError
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.services.build import build_servers, judge_specs
from megatron_sip.services.endpoint import read_key
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.settings import rewriter_settings
from megatron_sip.types import Candidate, CandidateKind, Pool, Question

POOL = Pool(
    0,
    "Once upon a time",
    " there was a king.",
    tuple(Candidate(CandidateKind.ROLLOUT, (index,), text, index) for index, text in enumerate((" x1", " y2"))),
)


def judge_config(*entries: str, **flat: Any) -> JudgeConfig:
    return JudgeConfig(judge_set=entries, judge_retries=0, **flat)


def test_every_judge_asks_its_own_server_in_its_own_way() -> None:
    with (
        FakeServer(models=("plain",)) as plain,
        FakeServer(models=("guard",), key="s-key-1234", answer=lambda _body: "Decision: unsafe") as guard,
        FakeServer(models=("taste",)) as taste,
    ):
        plain.label_logprobs = (math.log(0.3), math.log(0.1))
        taste.logits = lambda body: [1.0 if "x1" in body["input"] else -1.0]
        judge = judge_config(
            *(f"safety.url={guard.url}", "safety.weight=2", "safety.votes=3", "safety.temperature=0.6"),
            *("quality-b.kind=quality", "quality-b.weight=0.5", "quality-b.reading=logit"),
            *(f"reward.url={taste.url}", "reward.weight=1"),
            judge_url=(plain.url,),
        )
        config = Config(judge=judge)
        assert judge_specs(config) == [
            JudgeSpec("quality", pairwise=True, weight=1.0),
            JudgeSpec("safety", pairwise=False, weight=2.0, votes=3, tells_safety=True),
            JudgeSpec("reward", pairwise=False, weight=1.0),
            JudgeSpec("quality-b", pairwise=True, weight=0.5, both_orders=True, answers="probabilities", repeats=1),
        ]
        questions = [
            Question("quality", 0, 1),
            Question("quality-b", 0, 1),
            *(Question("safety", 1, None, vote) for vote in range(3)),
            Question("reward", 0),
            Question("reward", 1),
        ]
        with PreferenceServices(config, {"SAFETY_JUDGE_API_KEY": "s-key-1234"}) as services:
            [answers] = services.submit_answers([POOL], [questions]).result(20)
            told = services.asked_of()
            stats = services.stats()
    assert answers[questions[0]] == 1.0, "a written conclusion"
    assert answers[questions[1]] == pytest.approx(0.75), "a probability"
    assert [answers[question] for question in questions[2:5]] == [0.0, 0.0, 0.0]
    assert answers[questions[5]] == pytest.approx(1 / (1 + math.exp(-1)))
    assert answers[questions[6]] == pytest.approx(1 / (1 + math.exp(1)))
    assert [body["temperature"] for _, body in guard.requests] == [0.6] * 3
    assert "Authorization" not in plain.headers[-1]
    assert {headers.get("Authorization") for headers in guard.headers} == {"Bearer s-key-1234"}
    assert told["models"] == {"quality": "plain", "safety": "guard", "reward": "taste", "quality-b": "plain"}
    assert told["prompt_versions"]["quality-b"] == "quality-logit-2"
    assert told["prompt_versions"]["quality"] == "quality-generate-1"
    assert told["readings"]["quality-b"] == "logit"
    assert stats["asked/safety"] == 3
    assert stats["judge_calls"] >= len(questions)


def servers_of(judge: JudgeConfig, **environ: str) -> dict[str, int]:
    """Of each judge the number of its server, in order of appearance."""
    found = build_servers(active_judges(judge), judge, environ)
    numbers: dict[int, int] = {}
    return {name: numbers.setdefault(id(server), len(numbers)) for name, server in found.items()}


def test_a_server_is_shared_where_nothing_about_it_differs() -> None:
    flat: dict[str, Any] = {"judge_url": ("http://127.0.0.1:9/v1",), "safety_weight": 1.0, "classifier_weight": 1.0}
    assert servers_of(judge_config(**flat)) == {"quality": 0, "safety": 0}
    same = judge_config("safety.url=http://127.0.0.1:9/v1", "safety.votes=5", **flat)
    assert servers_of(same) == {"quality": 0, "safety": 0}
    assert servers_of(same, JUDGE_API_KEY="key") == {"quality": 0, "safety": 0}
    # Another key, model, address, deadline or width is another client.
    assert servers_of(same, JUDGE_API_KEY="key", SAFETY_JUDGE_API_KEY="own") == {"quality": 0, "safety": 1}
    for entry in (
        "safety.model=b",
        "safety.url=http://127.0.0.1:8/v1",
        "safety.timeout=5",
        "safety.concurrency=3",
        "safety.max-context=512",
    ):
        assert servers_of(judge_config(entry, **flat)) == {"quality": 0, "safety": 1}, entry


def test_a_key_goes_to_its_own_judge_alone() -> None:
    with FakeServer() as one, FakeServer() as other:
        judge = judge_config(f"safety.url={other.url}", "safety.weight=1", judge_url=(one.url,))
        environ = {"SAFETY_JUDGE_API_KEY": "for-safety", "QUALITY_B_JUDGE_API_KEY": "for-nobody"}
        with PreferenceServices(Config(judge=judge), environ):
            pass
        assert all("Authorization" not in headers for headers in one.headers)
        assert {headers["Authorization"] for headers in other.headers} == {"Bearer for-safety"}
        other.headers.clear()
        with PreferenceServices(Config(judge=judge), {"JUDGE_API_KEY": "for-judge-url"}):
            pass
        assert one.headers[-1]["Authorization"] == "Bearer for-judge-url"
        assert other.headers
        assert all("Authorization" not in headers for headers in other.headers), "another host"


@pytest.mark.parametrize(
    ("urls", "key"),
    [
        ((), "for-judge-url"),
        (("https://judge.corp/other/v1", "https://b:8100/v1"), "for-judge-url"),
        (("https://api.example/v1",), None),
        (("https://judge.corp/v1", "https://api.example/v1"), None),
        (("https://judge.corp:8443/v1",), None),
    ],
)
def test_the_rewriter_of_another_host_does_not_get_the_judges_key(urls: tuple[str, ...], key: str | None) -> None:
    judge = JudgeConfig(judge_url=("https://judge.corp/v1", "https://b:8100/v1"))
    settings = rewriter_settings(Config(judge=judge, rewriter=RewriterConfig(rewriter_url=urls)))
    sent = read_key(settings, {"JUDGE_API_KEY": "for-judge-url"})
    assert (sent.reveal() if sent else None) == key
    own = read_key(settings, {"JUDGE_API_KEY": "for-judge-url", "REWRITER_API_KEY": "its-own"})
    assert own is not None
    assert own.reveal() == "its-own"


def test_judges_of_one_host_share_its_key() -> None:
    with FakeServer(models=("a", "b"), key="shared-key") as server:
        judge = judge_config(
            f"safety.url={server.url}", "safety.weight=1", "safety.model=b", judge_url=(server.url,), judge_model="a"
        )
        with PreferenceServices(Config(judge=judge), {"JUDGE_API_KEY": "shared-key"}) as services:
            assert services.asked_of()["models"] == {"quality": "a", "safety": "b"}


def test_messages_name_the_judges_own_setting() -> None:
    with FakeServer(key="right") as server:
        judge = judge_config(f"safety.url={server.url}", "safety.weight=1", "quality.weight=0")
        with pytest.raises(ServiceError, match="SAFETY_JUDGE_API_KEY"):
            PreferenceServices(Config(judge=judge), {}).start()
        wrong = judge_config(f"safety.url={server.url}", "safety.weight=1", "safety.model=no", "quality.weight=0")
        with pytest.raises(ServiceError, match=r"--judge-set safety\.model"):
            PreferenceServices(Config(judge=wrong), {"SAFETY_JUDGE_API_KEY": "right"}).start()
    bad = judge_config("safety.url=nowhere", "safety.weight=1", "quality.weight=0")
    with pytest.raises(ConfigError, match=r"--judge-set safety\.url 'nowhere'"):
        PreferenceServices(Config(judge=bad), {})
    far = judge_config("safety.url=http://far/v1", "safety.weight=1", "quality.weight=0")
    with pytest.raises(ConfigError, match=r"--judge-set safety\.url http://far/v1 would send the key"):
        PreferenceServices(Config(judge=far), {"SAFETY_JUDGE_API_KEY": "k"})


def test_a_reward_model_needs_no_chat_template() -> None:
    """What is asked at the start: a plain reward model is not asked to render a turn, a chat judge beside it is."""
    with FakeServer() as server:
        rendered: list[dict[str, Any]] = []
        proper = server.render

        def render(body: dict[str, Any]) -> str:
            rendered.append(body)
            return proper(body)

        server.render = render  # type: ignore[method-assign]
        alone = judge_config("quality.weight=0", "reward.weight=1", judge_url=(server.url,))
        with PreferenceServices(Config(judge=alone), {}):
            assert rendered == []
        with PreferenceServices(Config(judge=judge_config("reward.weight=1", judge_url=(server.url,))), {}):
            assert len(rendered) == 1


def test_each_judge_has_its_own_interval() -> None:
    judge = judge_config(
        "quality-b.kind=quality", "quality-b.interval=2", judge_url=("http://127.0.0.1:9/v1",), judge_interval=3
    )
    services = PreferenceServices(Config(judge=judge), {})
    named = [[spec.name for spec in services.judges(iteration)] for iteration in range(4)]
    assert named == [["quality", "quality-b"], [], ["quality-b"], ["quality"]]
