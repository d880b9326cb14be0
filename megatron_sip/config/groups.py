"""Every setting of the product, once: flag name, YAML key, default and help text.

A field `micro_batch_size` is the flag `--micro-batch-size` and the YAML key `micro_batch_size`. The
classes are only groups for `--help`; names are unique over all of them, so both flags and YAML are flat. Those of
judges and rewriter are written in `judge_groups.py` and imported from here.
Relations between fields are checked in `validate.py`, presets are filled in by `presets.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sip.config.judge_groups import JudgeConfig, RewriterConfig

Objective = Literal["ntp", "online-dpo", "rf-nll", "sft-rewrite", "sft-rollout", "dpo-rewrite-over-rollout"]
PoolMember = Literal["original", "rewrite", "rollout"]
ScoringMethod = Literal["all-pairs", "adaptive", "pivot"]


@dataclass(frozen=True)
class ModelConfig:
    """Llama architecture. A preset fills what is not given; given values win."""

    model_preset: str | None = None
    """One of llama-tiny, llama-9.6m, smollm2-135m, llama-1.4b, llama3.2-1b, llama3-8b, llama3-70b, or none: give every
    size yourself."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the SwiGLU feed-forward."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key and value heads (GQA); must divide the query heads."""
    kv_channels: int | None = None
    """Width of one head; default hidden-size / num-attention-heads."""
    max_position_embeddings: int | None = None
    """Longest position the rotary embedding is meant for."""
    rotary_base: float | None = None
    """Base of the rotary frequencies (rope theta)."""
    rope_scaling_factor: float | None = None
    """Llama-3 rope scaling factor; none switches rope scaling off."""
    rope_low_freq_factor: float = 1.0
    """Llama-3 rope scaling: low frequency factor."""
    rope_high_freq_factor: float = 4.0
    """Llama-3 rope scaling: high frequency factor."""
    rope_original_max_position: int = 8192
    """Llama-3 rope scaling: context length before the scaling."""
    norm_epsilon: float | None = None
    """Epsilon of RMSNorm."""
    untie_embeddings_and_output_weights: bool | None = None
    """Separate input embedding and LM head."""
    vocab_size: int | None = None
    """Real vocabulary; default the tokenizer's (or the loaded checkpoint's). It is padded for tensor parallel."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times the tensor parallel size."""
    init_method_std: float = 0.02
    """Standard deviation of the weight initialisation."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine where it imports and a GPU is there."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recomputation, as in Megatron."""
    recompute_num_layers: int = 1
    """Layers of one recomputed block with full recomputation."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (PP)."""
    context_parallel_size: int = 1
    """Ranks that share a sequence (CP); only 1 is supported by the shared-prefix attention."""
    pad_query_groups: bool = False
    """Where TP does not divide the query groups, add groups of zeros (SmolLM2-135M at TP 2); they cost time."""
    sequence_parallel: bool = False
    """Spread norms and residuals over the TP ranks along the sequence."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data parallel ranks; needs CUDA with Transformer Engine or apex."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    distributed_timeout_minutes: int = 10
    """Time-out of one collective, and of the ranks' first meeting; a longer --stage-timeout counts for collectives."""
    stage_timeout: tuple[str, ...] = ("480", "assemble=1800", "load=1800", "save=1800")
    """Seconds that a stage may go on without progress before the run is ended: a number, and STAGE=SECONDS for single
    ones of assemble, load, data, rollout, rewrite, judge, train, optimizer, report, save."""


@dataclass(frozen=True)
class DataConfig:
    """The corpus and how its documents are cut."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx corpora made by tools/preprocess_data.py; several are concatenated."""
    tokenizer_type: Literal["HuggingFaceTokenizer"] = "HuggingFaceTokenizer"
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Folder with tokenizer.json (or a hub name that is cached)."""
    split_mode: Literal["random", "walk"] = "random"
    """random: one seeded cut per document and epoch; walk: suffix after suffix along the document."""
    seq_length: int = 2048
    """Longest prefix plus suffix, in tokens."""
    suffix_length: int = 128
    """Tokens of a suffix (N)."""
    min_prefix_length: int = 16
    """Shortest prefix that is used."""
    max_prefix_length: int | None = None
    """Longest prefix; default seq-length minus suffix-length."""
    min_document_length: int | None = None
    """Shorter documents are skipped and counted; default min-prefix-length plus suffix-length."""
    ntp_samples: Literal["packed", "cuts"] = "packed"
    """What --objective ntp trains on: packed windows of seq-length, or the cuts that the other objectives see."""
    data_cache_path: str | None = None
    """Folder for the index of cuts; default beside the corpus, or the system's cache folder."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    objective: Objective = "online-dpo"
    """What is trained (paper sections 2 and 5, and its baselines)."""
    micro_batch_size: int = 1
    """Rows (pairs) of one forward pass on one data parallel rank."""
    global_batch_size: int = 8
    """Prefixes of one step over all ranks."""
    train_iters: int = 100
    """Steps; a resumed run goes on to this number."""
    seed: int = 1234
    """Seed of initialisation, cuts, orders and rollouts."""
    shared_prefix: bool = True
    """Train a pair as one row [prefix | chosen | rejected]; off: as two rows, which computes the prefix twice and gives
    the same loss and gradients (for comparison)."""
    logits_chunk_mib: int = 256
    """MiB of float32 logits that a rank may hold at a time when it takes log-probabilities; the logits of a micro-batch
    that are more are made in chunks of the vocabulary, and once more in the backward pass."""
    bf16: bool = False
    """Weights and activations in bfloat16 with fp32 main weights; default fp32."""
    max_skipped_iterations: int = 10
    """Go back to the last checkpoint, past the samples at fault, after this many non-finite or spiking steps in a row;
    stop where there is no checkpoint."""
    max_rollbacks: int = 3
    """Stop when the run has gone back to the same checkpoint this many times; 0: never go back."""
    loss_spike_threshold: float | None = None
    """Skip a step whose loss lies this many robust standard deviations above the median of the last accepted steps (10
    is sensible for DPO, 5 for large batches of NLL); default none: only non-finite steps are skipped."""
    loss_spike_window: int = 64
    """Accepted steps by which a spike is judged; none is judged before half of them."""
    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""
    sigterm_grace: float = 20.0
    """Seconds that the step under way may still take after SIGTERM; a longer one is discarded."""
    num_threads: int = 1
    """CPU threads of one rank."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 5e-6
    """Peak learning rate."""
    min_lr: float | None = None
    """Final learning rate; default a tenth of --lr (paper appendix)."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_decay_iters: int | None = None
    """Steps of the decay; default --train-iters."""
    weight_decay: float = 0.1
    """AdamW weight decay."""
    adam_beta1: float = 0.9
    """AdamW beta 1."""
    adam_beta2: float = 0.95
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon; 1e-4 lessens divergence in online DPO (arXiv 2506.21495)."""
    clip_grad: float = 1.0
    """Global gradient norm clip; 0 switches it off."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy writes its continuations."""

    num_rollouts: int = 16
    """Rollouts per prefix (K)."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    rollout_stop_at_eod: bool = False
    """Let a rollout end at end-of-document; otherwise that token is never sampled."""
    rollout_batch_size: int | None = None
    """Prefixes of one rollout wave on one data parallel rank at most; default all that fit the memory."""
    rollout_memory_gib: float | None = None
    """GiB that a wave of rollouts may take on one rank besides the weights; default 0.8 of what is free on a GPU when
    the rollouts begin, and no bound on a CPU or with --rollout-batch-size."""
    rollout_pipeline_groups: int | None = None
    """Groups of a wave's prefixes that pass the pipeline stages one behind the other, so that no stage is idle; default
    as many as there are stages."""
    rollout_cuda_graph: bool | None = None
    """Decode each token by one launch of a CUDA graph, recorded once a wave, instead of many for every layer; default
    on a GPU, with megatron-core's local layers and neither tensor nor pipeline parallel."""
    rollout_engine: Literal["megatron", "vllm"] = "megatron"
    """Who writes the rollouts: the training processes with their own weights, or vLLM servers that are sent the
    weights before every step; see docs/rollouts.md."""
    rollout_url: tuple[str, ...] = ()
    """Base URLs of the vLLM servers of --rollout-engine vllm, each of one server. The key: env ROLLOUT_API_KEY."""
    rollout_model: str | None = None
    """Model name on these servers; default the only one they serve."""
    rollout_transfer: Literal["folder", "gloo", "nccl"] = "folder"
    """How the weights reach these servers: they read them in a folder that they share with the trainer, or the trainer
    sends them over a connection, by gloo through the processors' memory, by nccl between GPUs."""
    rollout_weights_dir: str | None = None
    """Folder that the weights are written to. With --rollout-transfer folder the servers see it under the same path;
    else nobody but the main rank reads it. Default, where it is not shared between machines: a folder in memory
    (/dev/shm), else the one for temporary files."""
    rollout_proof: Literal["checksum", "logprobs"] = "checksum"
    """How a server proves that it has the new weights. logprobs: by those of a text, within --rollout-tolerance;
    checksum: by those and by the checksums of its tensors, exactly."""
    rollout_tolerance: float | None = None
    """Most that a server's log-probabilities may differ from the policy's, in nats for a token in the mean; default
    0.3, and 0.001 where both compute in float32."""
    rollout_concurrency: int = 64
    """Calls in flight per leader and rollout server; a call asks for all rollouts of a prefix."""
    rollout_timeout: float = 600.0
    """Seconds that one call to a rollout server may take in total, retries included."""
    rollout_retries: int = 3
    """Retries of a failed call to a rollout server within its deadline."""
    allow_insecure_rollout: bool = False
    """Allow rollout servers at public addresses, though anybody who reaches their development endpoints can run code
    there, and sending a key over plain http to another host."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Which candidates compete, and how a pair is made of their scores."""

    pool: tuple[PoolMember, ...] = ("original", "rollout")
    """Kinds of candidates in the pool."""
    scoring: ScoringMethod = "all-pairs"
    """Which pairs a pairwise judge sees; adaptive: those on which best and worst hang, in few rounds; pivot: each
    candidate against one only (cheap, far less exact)."""
    adaptive_rounds: int = 4
    """Rounds of --scoring adaptive; answers are waited for after each."""
    adaptive_budget: int | None = None
    """Calls of --scoring adaptive to each pairwise judge for one prefix; default 8 for each distinct candidate."""
    adaptive_repeats: int = 5
    """Most answers of --scoring adaptive to one question in the same option order; a judge at temperature 0 and one
    read by logit is asked once whatever this says."""
    adaptive_confidence: float = 0.9
    """--scoring adaptive stops asking about an end of the pool whose candidate it is so sure of; 1: only at 1."""
    screen_safety_below: float | None = None
    """Do not compare a candidate that a safety judge or classifier scored below this: it loses every pairwise
    comparison unasked; default none: all are compared."""
    screen_repetition_above: float | None = None
    """Do not compare a candidate whose share of repeated 4-grams of tokens is above this; default none."""
    beta: float = 0.1
    """Strength of the DPO constraint."""
    length_normalization: bool = False
    """Divide summed log-probabilities by suffix length in the DPO loss."""
    nll_weight: float = 0.0
    """Weight of an NLL term on the chosen suffix beside DPO."""
    prefix_ntp_weight: float = 0.0
    """Weight of a next-token term on the prefix: one step is both plain pretraining and SIP."""
    min_answered_fraction: float = 0.5
    """A score needs at least this share of its planned verdicts, otherwise the candidate leaves the pool."""
    curriculum: Literal["none", "schedule"] = "none"
    """schedule: rollouts off for the first steps, then K ramps up; see the next flags."""
    curriculum_rollout_start: int = 0
    """First iteration with rollouts under the schedule."""
    curriculum_rollout_ramp: int = 0
    """Iterations over which K grows from 1 to --num-rollouts."""
    curriculum_bonus: float = 0.0
    """Score bonus of original and rewrite at iteration 0 of the schedule."""
    curriculum_bonus_iters: int = 0
    """Iterations over which that bonus decays to 0."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference policy of DPO, kept in host memory."""

    reference: Literal["ema", "periodic", "frozen"] = "ema"
    """ema: moving average of the policy; periodic: a copy every interval; frozen: the policy at the start."""
    reference_update_interval: int = 10
    """Optimizer steps between two updates."""
    reference_ema_decay: float = 0.95
    """Share of the old reference that an update keeps."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = None
    """Folder for checkpoints."""
    load: str | None = None
    """Folder of our checkpoints (resumes) or of a Hugging Face Llama (starts from its weights)."""
    save_interval: int | None = None
    """Iterations between checkpoints; one is always written at the end."""
    async_save: bool = False
    """Write checkpoints while the next steps are trained; a copy of the state waits in host memory."""
    keep_last_n: int | None = None
    """Delete checkpoints but for the newest so many; default keeps all."""
    save_retain_interval: int | None = None
    """Keep besides those whose iteration is a multiple of this; alone, with the newest one, and delete the others."""
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Checkpoint format."""
    finetune: bool = False
    """Load the weights of --load only: no optimizer, no iteration, no stream position."""


@dataclass(frozen=True)
class LoggingConfig:
    """What one sees."""

    log_interval: int = 1
    """Iterations between log lines."""
    tensorboard_dir: str | None = None
    """Folder for tensorboard events."""
    wandb_project: str | None = None
    """Weights & Biases project; WANDB_MODE=offline works."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name."""
    peak_tflops: float | None = None
    """Dense matrix products of one GPU in the run's type, 10^12 operations/s; with it throughput/mfu is reported."""
    metrics_file: str | None = None
    """JSONL file with one line of metrics per logged iteration."""
    audit_log: str | None = None
    """JSONL file with what became of every sample; default audit.jsonl in the folder of --save, where one is given."""
    sample_log: str | None = None
    """JSONL file with every candidate, its scores, and what was chosen and rejected."""
    sample_log_interval: int = 10
    """Iterations between two tables of samples on the console."""
    profile: bool = False
    """Record a trace of some iterations with torch's profiler (Chrome's format); see docs/performance.md."""
    profile_step_start: int = 10
    """Iterations that are done before the trace begins."""
    profile_step_end: int = 12
    """Last iteration of the trace, so that the defaults trace iterations 11 and 12."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that record one."""
    profile_dir: str | None = None
    """Folder of the traces; default that of --tensorboard-dir, or profile in the folder of --save."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rewriter: RewriterConfig = field(default_factory=RewriterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
