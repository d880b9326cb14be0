"""An arm that makes the same step as a user of transformers would write it, without what a careful one would avoid.

python tools/bench/baseline_hf.py SPEC.json SOCKET

`generate` with num_return_sequences and a KV cache under inference mode; attention by
`scaled_dot_product_attention` without a mask, since all rows are equally long; a reference model and the policy over
the rows [prefix | chosen] and [prefix | rejected], with logits at suffix positions alone; DPO; gradient clipping and
the fused AdamW. In bf16 the weights themselves are bf16, which is the cheapest form of it.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.checkpoint.hf_config import hf_config_from_model
from megatron_sip.config.groups import OptimizerConfig, PreferenceConfig
from megatron_sip.types import Cut
from tools.bench.arm import Line, Order, Reply, mean_of
from tools.bench.matmul import DTYPES, synchronize
from tools.bench.step_inputs import EOD, picks, random_cuts
from tools.bench.step_spec import Point, Spec


class Baseline:
    """Policy, reference and optimizer of transformers and torch."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.cache = spec, spec.hf_caches[0]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(spec.all_threads)
        torch.manual_seed(spec.seed)
        dtype, ids = DTYPES[spec.dtype], {"bos_token_id": EOD, "eos_token_id": None, "pad_token_id": EOD}
        config = LlamaConfig.from_dict(hf_config_from_model(spec.model, dtype, ids))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        self.policy = model.to(self.device)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        settings = OptimizerConfig()
        self.clip = settings.clip_grad
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def step(self, point: Point, number: int) -> Reply:
        """One whole step, and the seconds of its parts."""
        cuts = random_cuts(point, int(self.policy.config.vocab_size), number, self.spec.seed)
        times = [_now()]
        rollouts = self.rollouts(cuts, point)
        times.append(_now())
        time.sleep(point.judge_seconds)
        rows = self.rows(cuts, rollouts)
        times.append(_now())
        with torch.inference_mode():
            reference = torch.cat([self.logps(self.reference, part, point) for part in self.parts(rows)])
        times.append(_now())
        self.backward(rows, reference, point)
        times.append(_now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(_now())
        names = ("rollout", "judge_wait", "reference", "train", "optimizer")
        parts = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
        return {"seconds": times[-1] - times[0], "parts": parts, "memory_gib": peak_memory()}

    @torch.inference_mode()
    def rollouts(self, cuts: list[Cut], point: Point) -> torch.Tensor:
        """`[batch, rollouts, suffix]` sampled tokens."""
        self.policy.eval()
        prefixes = torch.stack([torch.from_numpy(cut.prefix) for cut in cuts]).to(self.device)
        sampled = self.policy.generate(
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            suppress_tokens=[EOD],
            max_new_tokens=point.suffix,
            num_return_sequences=point.rollouts,
            use_cache=True,
            cache_implementation=self.cache,
            pad_token_id=EOD,
        )
        self.policy.train()
        return sampled[:, point.prefix :].view(point.batch, point.rollouts, point.suffix)

    def rows(self, cuts: list[Cut], rollouts: torch.Tensor) -> torch.Tensor:
        """`[batch, 2, prefix + suffix]`: prefix with the best and with the worst of original and rollouts."""
        rows = []
        for cut, written in zip(cuts, rollouts.cpu(), strict=True):
            pool = torch.cat([torch.from_numpy(cut.suffix)[None], written])
            scores = torch.tensor(picks(self.spec.seed, cut.sample_index, len(pool)))
            prefix = torch.from_numpy(cut.prefix)
            rows += [torch.cat([prefix, pool[index]]) for index in (int(scores.argmax()), int(scores.argmin()))]
        return torch.stack(rows).view(len(cuts), 2, -1).to(self.device)

    def parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pairs of one pass at a time."""
        return rows.split(self.spec.hf_micro_batch_size or len(rows))

    def logps(self, model: Any, pairs: torch.Tensor, point: Point) -> torch.Tensor:
        """`[pairs, 2]` log-probabilities summed over the suffix."""
        rows = pairs.flatten(0, 1)
        # One position more than the suffix has, since each token is predicted by the one before it.
        logits = model(rows, use_cache=False, logits_to_keep=point.suffix + 1).logits[:, :-1]
        target = rows[:, point.prefix :]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        return -nll.view(len(pairs), 2, point.suffix).sum(-1)

    def backward(self, rows: torch.Tensor, reference: torch.Tensor, point: Point) -> None:
        """Gradient of the mean DPO loss, clipped."""
        start, beta = 0, PreferenceConfig().beta
        for part in self.parts(rows):
            ratio = self.logps(self.policy, part, point) - reference[start : start + len(part)]
            (-F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).sum() / len(rows)).backward()
            start += len(part)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip)


def _now() -> float:
    synchronize()
    return time.perf_counter()


def peak_memory() -> float:
    """Most memory that this process ever held, in GiB: of the GPU where there is one, else of the host."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def answer(baseline: Baseline, order: Order) -> Reply:
    """The mean of as many steps as were ordered, with the cache that is named."""
    baseline.cache = order["cache"]
    point, first = Point(**order["point"]), order["first_step"]
    return mean_of([baseline.step(point, first + index) for index in range(order["steps"])])


def run_arm(spec_file: str, path: str) -> None:
    """Make the steps that are ordered."""
    baseline = Baseline(Spec.from_json(Path(spec_file).read_text()))
    line = Line.to(path)
    for order in line.read():
        line.write(answer(baseline, order))


if __name__ == "__main__":
    run_arm(*sys.argv[1:])
