"""Puts a run together from its configuration: data, policy, checkpoint, services."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_sip.checkpoint import dist as dist_checkpoint
from megatron_sip.checkpoint.choose import choose
from megatron_sip.checkpoint.convert_layout import padding_mismatch
from megatron_sip.checkpoint.hf import load_hf_weights
from megatron_sip.checkpoint.hf_config import is_hf_folder, model_config_from_hf, model_differences
from megatron_sip.checkpoint.latest import LATEST, iteration_of, same_folder
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.config.presets import resolve_model, with_preset
from megatron_sip.config.run_config import load_run_config
from megatron_sip.data.cursor import Ranges
from megatron_sip.data.documents import Corpus, open_corpus
from megatron_sip.data.packed import PackedStream
from megatron_sip.data.stream import CutStream
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import CheckpointError, ConfigError
from megatron_sip.model.build import build_policy, first_layer
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.leader import Leader
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import RolloutEngine
from megatron_sip.rollout.megatron import MegatronEngine
from megatron_sip.rollout.vllm import VllmEngine
from megatron_sip.rollout.wave_plan import WaveLimits
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.training.faults import Boundaries
from megatron_sip.training.preferences import BatchMaker, NextTokenMaker, PreferenceMaker
from megatron_sip.training.step import PolicyTrainer
from megatron_sip.types import Cut


class Stream(Protocol):
    """What the loop needs of a stream of samples; its position is the loop's count of consumed samples."""

    def batch(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1, jumped: Ranges = ()) -> list[Cut]:
        """This rank's share of the next global batch; `jumped` samples are left out."""
        ...

    def skipped(self) -> dict[str, int]:
        """What one epoch leaves out, by reason."""
        ...

    def state_dict(self, consumed_samples: int) -> dict[str, Any]:
        """What a resume must find unchanged."""
        ...

    def check_state(self, state: dict[str, Any]) -> int:
        """The consumed samples of a saved state, if it still means the same samples."""
        ...


@dataclass(frozen=True)
class Data:
    """Tokenizer, corpus and the stream of samples of a run."""

    tokenizer: Tokenizer
    corpus: Corpus
    stream: Stream


def open_data(config: Config) -> Data:
    """Open tokenizer and corpus and build the index of samples.

    Raises:
        ConfigError: no tokenizer was named.
        DataError: corpus or tokenizer cannot be used, or they disagree.
    """
    data, training = config.data, config.training
    if data.tokenizer_model is None:
        raise ConfigError("--tokenizer-model is missing; name the folder with the tokenizer of the policy")
    tokenizer = Tokenizer(data.tokenizer_model)
    corpus = open_corpus(data.data_path, tokenizer)
    stream: Stream
    if training.objective == "ntp" and data.ntp_samples == "packed":
        stream = PackedStream(corpus, data.seq_length, training.seed, training.global_batch_size)
    else:
        stream = CutStream(corpus, tokenizer, data, training.seed, training.global_batch_size)
    return Data(tokenizer, corpus, stream)


def with_model(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with every size of the model filled in.

    A Hugging Face folder at `--load` decides the architecture; flags that contradict it are an error.

    Raises:
        ConfigError: a size is missing, a flag contradicts the folder, or the vocabulary is too small for the tokenizer.
        CheckpointError: the folder is no Llama.
    """
    load = config.checkpoint.load
    if load is not None and is_hf_folder(load):
        config = replace(config, model=_merged(with_preset(config.model), model_config_from_hf(load), load))
    config = resolve_model(config, tokenizer.vocab_size)
    vocabulary = config.model.vocab_size
    if vocabulary is None or vocabulary < tokenizer.vocab_size:
        raise ConfigError(
            f"the model has a vocabulary of {vocabulary}, the tokenizer of --tokenizer-model has "
            f"{tokenizer.vocab_size}; name the tokenizer that belongs to the model, or raise --vocab-size"
        )
    return config


def _merged(given: ModelConfig, of_folder: ModelConfig, folder: str) -> ModelConfig:
    """The folder's architecture with our own run settings (implementation, recomputation)."""
    merged = {}
    for name, value in vars(of_folder).items():
        own, default = getattr(given, name), getattr(ModelConfig(), name)
        if value is None or name in ("init_method_std", "make_vocab_size_divisible_by"):
            merged[name] = own
        elif value == default or own in (default, value):
            merged[name] = own if value == default else value
        else:
            raise ConfigError(f"--{name.replace('_', '-')} {own} contradicts {folder}, which has {value}; leave it out")
    return ModelConfig(**merged)


def connect_services(config: Config, world: World) -> PreferenceServices | None:
    """Judges and rewriter, connected and checked, on leaders of objectives that make pairs; None elsewhere.

    Raises:
        ConfigError: a setting of a service is missing.
        ServiceError: a server refuses, or does not serve the model.
    """
    if config.training.objective == "ntp" or not world.is_leader:
        return None
    services = PreferenceServices(config)
    services.start()
    return services


def build_maker(
    config: Config,
    world: World,
    leader: Leader,
    boundaries: Boundaries,
    tokenizer: Tokenizer,
    policy: PolicyModel,
    services: PreferenceServices | None,
    say: Callable[[str], None],
) -> BatchMaker:
    """What turns cuts into rows for this objective; `say` hears how its rollouts are written.

    Raises:
        ServiceError: a rollout server cannot be used; on all ranks alike.
    """
    if config.training.objective == "ntp":
        return NextTokenMaker(config, world)
    engine = _rollout_engine(config, world, leader, boundaries, policy, say)
    return PreferenceMaker(config, world, leader, boundaries, tokenizer, engine, services)


def _rollout_engine(
    config: Config,
    world: World,
    leader: Leader,
    boundaries: Boundaries,
    policy: PolicyModel,
    say: Callable[[str], None],
) -> RolloutEngine:
    def at_boundary() -> None:
        boundaries.before("rollout")

    if config.rollout.rollout_engine == "vllm":
        return VllmEngine(policy, config, world, leader, at_boundary)
    rollout = config.rollout
    limits = WaveLimits(rollout.rollout_batch_size, rollout.rollout_memory_gib)
    groups, graph = rollout.rollout_pipeline_groups, rollout.rollout_cuda_graph
    return MegatronEngine(policy, world, limits, at_boundary, groups, say=say, cuda_graph=graph)


def build_trainer(config: Config, world: World) -> PolicyTrainer:
    """The policy with its optimizer, freshly initialised."""
    return PolicyTrainer(build_policy(config, world), config, world)


def load_checkpoint(
    config: Config,
    world: World,
    trainer: PolicyTrainer,
    stream: Stream,
    say: Callable[[str], None],
    on_progress: Callable[[], None] = lambda: None,
    *,
    named: int | None = None,
    among: Collection[int] | None = None,
) -> Progress:
    """Take weights, and with our own checkpoints the whole state, from `--load`.

    `on_progress` is called often while the files are compared with their checksums; `named` and `among` as of `choose`.

    Raises:
        CheckpointError: nothing is there, or it does not fit.
        DataError: the checkpoint was trained on other data or settings.
    """
    load, fresh = config.checkpoint.load, Progress(0, 0, {})
    if load is None:
        say("policy initialised from --seed; no --load was given")
    elif is_hf_folder(load):
        parameters = dict(trainer.policy.named_parameters())
        load_hf_weights(
            load,
            parameters,
            config.model,
            tp_rank=world.tp_rank,
            tp_size=world.tp_size,
            first_layer=first_layer(trainer.policy),
        )
        trainer.after_weights_changed()
        say(f"weights of the Hugging Face Llama {load} loaded")
    elif (folder := choose(Path(load), world, say, on_progress, named=named, among=among)) is not None:
        return _resume(config, folder, world, trainer, stream, say)
    elif same_folder(load, config.checkpoint.save):
        say(f"{load} holds no checkpoint yet; starting a new run there")
    else:
        raise CheckpointError(f"--load {load}: no {LATEST} there; name a folder that --save wrote")
    if trainer.reference:
        say("the reference policy starts as a copy of the policy")
    return fresh


def _resume(
    config: Config, folder: Path, world: World, trainer: PolicyTrainer, stream: Stream, say: Callable[[str], None]
) -> Progress:
    load = config.checkpoint.load
    require_own_model(folder, config)
    converted = iteration_of(folder) == 0  # no run saves before its first iteration; tools/checkpoint/convert.py does
    weights_only = converted or config.checkpoint.finetune
    progress = dist_checkpoint.load(folder, world, trainer, say, weights_only=weights_only)
    if weights_only:
        why = "it holds nothing else" if converted else "--finetune"
        say(f"weights of {load} loaded; iteration, optimizer and stream start anew ({why})")
        return progress
    stream.check_state(progress.stream)
    say(f"resumed from {load} at iteration {progress.iteration} ({progress.consumed_samples} samples consumed)")
    return progress


def require_own_model(folder: Path, config: Config) -> None:
    """Refuse our own checkpoint of another architecture, also where its tensors happen to have the same shapes.

    Raises:
        CheckpointError: naming each flag that disagrees with the checkpoint's run_config.yaml, or the command that
            pads its query groups as this run's layout needs them.
    """
    file = folder / "run_config.yaml"
    if not file.is_file():
        raise CheckpointError(f"--load {folder} has no {file.name}, so it is no whole checkpoint; name another")
    stored = load_run_config(file)
    wrong = model_differences(stored.model, config.model, file.name)
    if wrong:
        raise CheckpointError(
            f"--load {folder} is another model: {'; '.join(wrong)}. Give the model flags of {file}, or leave --load out"
        )
    mismatch = padding_mismatch(stored, config, folder)
    if mismatch is not None:
        raise CheckpointError(mismatch)
