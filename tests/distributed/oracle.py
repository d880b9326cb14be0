"""The same mathematics by other means: transformers in float64, two separate rows a pair, closed formulas.

`make` writes a small random Llama, a perturbed reference, a batch of pairs of unequal lengths, and what the
policy must give on them: log-probabilities, loss, gradients, greedy continuations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

BETA = 0.5
NEW_TOKENS = 12
VOCAB = 515  # pads to different sizes at TP 1 and 2
PAIRS = ((24, 9, 7), (5, 3, 8), (24, 9, 7), (31, 8, 8), (12, 1, 5), (17, 8, 2), (40, 6, 6), (9, 8, 8))
INVALID = (1, 4, 5)


def small_llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped queries, large enough weights that layers matter, in float64."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=0,
        architectures=["LlamaForCausalLM"],
        attn_implementation="eager",
        **changes,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()


def perturbed(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """A copy with noise on every weight: a reference that differs from the policy."""
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other.float()


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prefix, chosen and rejected tokens of every pair; chosen and rejected differ."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    return [tuple(draw(length) for length in lengths) for lengths in PAIRS]  # type: ignore[misc]


def suffix_logps(model: LlamaForCausalLM, prefix: list[int], suffix: list[int]) -> torch.Tensor:
    """Per-token log-probabilities `[len(suffix)]` of a suffix in a row of its own."""
    logits = model(torch.tensor([prefix + suffix])).logits[0]
    logps = F.log_softmax(logits[len(prefix) - 1 : -1], dim=-1)
    return logps.gather(1, torch.tensor(suffix)[:, None]).squeeze(1)


def dpo(policy: LlamaForCausalLM, reference: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Mean DPO loss over the valid pairs (paper section 5), `[pairs, 2]` policy sums, and tokens of each pair."""
    losses, logps, tokens = [], [], []
    for index, (prefix, chosen, rejected) in enumerate(pairs()):
        both = [suffix_logps(policy, prefix, suffix) for suffix in (chosen, rejected)]
        own = [part.sum() for part in both]
        tokens.append(torch.cat(both).detach())
        logps.append(torch.stack(own))
        if index in INVALID:
            continue
        with torch.no_grad():
            ref = [suffix_logps(reference, prefix, suffix).sum() for suffix in (chosen, rejected)]
        losses.append(-F.logsigmoid(BETA * ((own[0] - ref[0]) - (own[1] - ref[1]))))
    return torch.stack(losses).mean(), torch.stack(logps), tokens


def boundary_distance(folder: Path, ids: list[int], draw: float, top_p: float) -> float:
    """How far a draw lies from the nearest step of the cumulative distribution behind `ids`, or the nucleus' edge."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    logits[0] = float("-inf")  # end of document is never sampled
    probabilities = torch.softmax(logits, dim=-1)
    ordered, index = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probabilities).scatter(0, index, torch.where(before < top_p, ordered, 0.0))
    steps = kept.cumsum(0) / kept.sum()
    return min(float((steps - draw).abs().min()), float((before - top_p).abs().min()))


def save_like(model: LlamaForCausalLM, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A folder that loads as a Llama of this configuration but holds `tensors` (gradients, say)."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def make(folder: Path, **changes: Any) -> None:
    """Write policy/, reference/, gradient/ (all as Hugging Face folders) and expected.pt."""
    policy = small_llama(1, **changes)
    reference = perturbed(policy, 2)
    for name, model in (("policy", policy), ("reference", reference)):
        save_like(model, folder / name, dict(model.state_dict()))
    policy, reference = policy.double(), reference.double()
    loss, logps, tokens = dpo(policy, reference)
    loss.backward()
    gradients = {name: parameter.grad.float() for name, parameter in policy.named_parameters()}
    save_like(policy, folder / "gradient", gradients)
    greedy = []
    with torch.no_grad():
        for prefix, _, _ in pairs():
            ids = policy.generate(
                torch.tensor([prefix]), max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=[0], pad_token_id=0
            )
            greedy.append(ids[0, len(prefix) :])
    expected = {"loss": loss.detach(), "logps": logps.detach(), "tokens": tokens, "greedy": torch.stack(greedy)}
    torch.save(expected, folder / "expected.pt")
