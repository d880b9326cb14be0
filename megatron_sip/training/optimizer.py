"""megatron-core's data parallel wrapper, optimizer and schedule from our settings."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sip.config.groups import Config
from megatron_sip.model.policy import PolicyModel


def wrap_data_parallel(policy: PolicyModel, config: Config) -> DistributedDataParallel:
    """The policy with gradient buffers in fp32 that are summed over data parallel ranks."""
    parallel = config.parallel
    ddp = DistributedDataParallel(
        config=policy.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            average_in_collective=False,
        ),
        module=policy,
    )
    ddp.broadcast_params()
    policy.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        policy.config.no_sync_func = ddp.no_sync
    return ddp


def build_optimizer(ddp: DistributedDataParallel, config: Config) -> MegatronOptimizer:
    """AdamW with fp32 main weights."""
    settings = config.optimizer
    return get_megatron_optimizer(
        CoreOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=final_lr(config),
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.training.bf16,
            params_dtype=ddp.module.config.params_dtype,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        ),
        [ddp],
    )


def final_lr(config: Config) -> float:
    """`--min-lr`, or a tenth of `--lr` (the paper's cosine ends there)."""
    return config.optimizer.lr / 10 if config.optimizer.min_lr is None else config.optimizer.min_lr


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Warm-up and decay in optimizer steps."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=final_lr(config),
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or config.training.train_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # On resume the flags win and the checkpoint gives the position; what differs is said (checkpoint/dist.py).
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
