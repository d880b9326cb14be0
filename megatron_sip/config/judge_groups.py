"""The settings of judges and rewriter, which belong to `groups.py` and are imported from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptionOrder = Literal["auto", "random", "both"]


@dataclass(frozen=True)
class JudgeConfig:
    """Judges, their servers and how their verdicts are read. A judge with weight 0 is not asked."""

    judge_url: tuple[str, ...] = ()
    """Base URLs of OpenAI-compatible servers, such as http://127.0.0.1:8100/v1. The key: env JUDGE_API_KEY."""
    judge_model: str | None = None
    """Model name on the server; default the only one it serves."""
    judge_max_context: int | None = None
    """Context of the judge in tokens; default what the server reports. Longer prompts lose prefix tokens."""
    quality_weight: float = 1.0
    """Weight of the pairwise quality judge."""
    safety_weight: float = 0.0
    """Weight of the pointwise safety judge."""
    factuality_weight: float = 0.0
    """Weight of the pointwise factuality judge."""
    likelihood_weight: float = 0.0
    """Weight of the conditional likelihood of the suffix under the judge model."""
    reward_weight: float = 0.0
    """Weight of the reward model, which needs a vLLM server of its own: --judge-set reward.url=..."""
    classifier_weight: float = 0.0
    """Weight of the local safety classifier."""
    judge_set: tuple[str, ...] = ()
    """Settings of single judges as NAME.FIELD=VALUE, over those for all: safety.votes=5 quality-b.kind=quality
    quality-b.weight=0.5 quality-b.url=http://b:8100/v1; see docs/judges.md. A judge's key: env NAME_JUDGE_API_KEY."""
    classifier: Literal["profanity-check", "toxic-bilstm"] = "profanity-check"
    """Local safety classifier."""
    classifier_path: str | None = None
    """Folder with model.weights.h5 and tokenizer.pickle for --classifier toxic-bilstm."""
    judge_interval: int = 1
    """Ask the quality, safety, factuality and reward judges every this many iterations."""
    likelihood_interval: int = 1
    """Ask the likelihood judge every this many iterations; the classifier is asked in all of them."""
    judge_lag: int = 0
    """1: judges score the next batch while the policy trains this one, with rollouts one update older; 0: in turn."""
    judge_reading: Literal["generate", "logit"] = "generate"
    """generate: reason, then a parsed verdict; logit: one constrained token read as a probability."""
    judge_option_order: OptionOrder = "auto"
    """Which option a pairwise judge sees first; random: one order a pair, drawn by seed; both: either order, averaged,
    at twice the cost; auto: both with --judge-reading logit, random with generate."""
    judge_votes: int = 1
    """Votes per question with --judge-reading generate."""
    judge_temperature: float = 1.0
    """Sampling temperature of a vote."""
    judge_top_p: float = 1.0
    """Nucleus mass of a vote (paper: 0.6 for the fine-tuned 8B judge)."""
    judge_max_tokens: int = 512
    """Longest answer of a vote."""
    judge_reasoning_effort: Literal["low", "medium", "high"] | None = None
    """Reasoning effort of gpt-oss style judges."""
    reward_input: Literal["text", "chat"] = "text"
    """What a reward model reads: prefix and candidate as one text, or as the two turns of its chat template."""
    reward_route: Literal["classify", "score"] = "classify"
    """Where a reward model is asked: /classify, or /score of a cross-encoder (prefix and candidate as a pair)."""
    reward_label: int | None = None
    """Class whose probability is the score, where the reward model has several."""
    reward_scale: float = 1.0
    """A reward model's score is sigmoid(scale * (logit - offset)); a negative scale turns a badness round."""
    reward_offset: float = 0.0
    """See --reward-scale: the logit that scores one half."""
    judge_concurrency: int = 64
    """Calls in flight per leader and server."""
    judge_timeout: float = 120.0
    """Seconds that one call may take in total, retries included."""
    judge_retries: int = 3
    """Retries of a failed call within its deadline."""
    judge_hedge_after: float | None = None
    """Seconds without an answer after which a second copy of a call is sent, for at most 5 % of them; default never."""
    judge_failure: Literal["skip", "wait", "stop"] = "wait"
    """When no server of a service answers. wait: the run pauses until one does; skip: the verdicts are missing; stop:
    the run ends."""
    judge_max_missing_share: float = 0.5
    """Stop when more than this share of a judge's verdicts is missing over the last steps; they are not consumed."""
    judge_missing_window: int = 5
    """Over how many steps in which the judge was asked --judge-max-missing-share is taken."""
    judge_ca_file: str | None = None
    """PEM file with the authorities that signed the servers' certificates, beside those of the system."""
    judge_cache: str | None = None
    """Folder that keeps rewrites, and verdicts on originals and rewrites, over steps and runs; several may share it."""
    judge_cache_size_gb: float = 10.0
    """Bound of that cache in GB; the least recently used answers leave first."""
    allow_insecure_judge: bool = False
    """Allow sending a key over plain http to another host."""
    judge_trust_env_proxy: bool = False
    """Use the proxy settings of the environment for judge and rewriter."""


@dataclass(frozen=True)
class RewriterConfig:
    """The rewriter's server. Used when the pool or the objective needs rewrites."""

    rewriter_url: tuple[str, ...] = ()
    """Base URLs; default --judge-url. The key: env REWRITER_API_KEY, on hosts of --judge-url else JUDGE_API_KEY."""
    rewriter_model: str | None = None
    """Model name on the server; default the only one it serves."""
    rewriter_temperature: float = 1.0
    """Sampling temperature of a rewrite."""
    rewriter_top_p: float = 1.0
    """Nucleus mass of a rewrite."""
    rewriter_max_tokens: int | None = None
    """Longest rewrite in tokens of the rewriter; a longer one is missing. Default twice --suffix-length, because the
    rewriter's tokens are not the policy's."""
    rewrite_interval: int = 1
    """Fetch rewrites every this many iterations."""
    rewrite_ahead: int = 1
    """Iterations whose rewrites are fetched ahead of the one that is trained."""
