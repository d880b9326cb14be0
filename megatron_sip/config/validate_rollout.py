"""Rollouts: whether the settings of servers are meant for a run that has some, and make sense for them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_sip.config.fields import flag_of
from megatron_sip.config.groups import Config, RolloutConfig
from megatron_sip.errors import ConfigError
from megatron_sip.rollout.address import all_local, public_addresses
from megatron_sip.services.endpoint import parse_endpoints
from megatron_sip.services.settings import rollout_settings

_OF_SERVERS = (
    *("rollout_url", "rollout_model", "rollout_transfer", "rollout_weights_dir", "rollout_proof", "rollout_tolerance"),
    *("rollout_concurrency", "rollout_timeout", "rollout_retries", "allow_insecure_rollout"),
)


def rollout_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting of rollout servers that cannot be meant."""
    rollout = config.rollout
    if rollout.rollout_engine == "megatron":
        default = RolloutConfig()
        for name in _OF_SERVERS:
            if getattr(rollout, name) != getattr(default, name):
                yield (
                    f"{flag_of(name)} is given, but --rollout-engine megatron asks no server; say --rollout-engine "
                    f"vllm, or leave {flag_of(name)} out"
                )
        stages = config.parallel.pipeline_model_parallel_size
        if stages == 1 and (rollout.rollout_pipeline_groups or 1) > 1:
            yield (
                f"--rollout-pipeline-groups {rollout.rollout_pipeline_groups} would fill the stages of a pipeline, and "
                "--pipeline-model-parallel-size is 1; leave it out"
            )
        return
    if not rollout.rollout_url:
        yield (
            "--rollout-engine vllm needs --rollout-url, the base URL of a server in development mode such as "
            "http://127.0.0.1:8200/v1 (tools/serve_vllm.py --rollouts starts one)"
        )
        return
    for name in ("rollout_batch_size", "rollout_memory_gib"):
        if getattr(rollout, name) is not None:
            yield (
                f"{flag_of(name)} {getattr(rollout, name)} bounds the memory of --rollout-engine megatron; a vLLM "
                "server plans its own, so leave it out"
            )
    if rollout.rollout_cuda_graph:
        yield "--rollout-cuda-graph is of --rollout-engine megatron; a vLLM server has its own graphs, so leave it out"
    if rollout.rollout_pipeline_groups is not None:
        yield (
            f"--rollout-pipeline-groups {rollout.rollout_pipeline_groups} fills the trainer's pipeline, through which "
            "--rollout-engine vllm sends nothing; leave it out"
        )
    try:
        parse_endpoints(rollout_settings(rollout))
    except ConfigError as error:
        yield str(error)
        return
    if not rollout.allow_insecure_rollout:
        yield from public_addresses(rollout.rollout_url)
    yield from _folder(rollout)


def _folder(rollout: RolloutConfig) -> Iterator[str]:
    folder, is_shared = rollout.rollout_weights_dir, rollout.rollout_transfer == "folder"
    if folder is None:
        if is_shared and not all_local(rollout.rollout_url):
            yield (
                "--rollout-weights-dir is missing; servers on other machines need a shared folder, which they see "
                "under the same path as the trainer, or --rollout-transfer gloo or nccl"
            )
    elif is_shared and not os.path.isabs(folder):
        yield (
            f"--rollout-weights-dir {folder} is no absolute path, and the servers run in folders of their own; begin "
            "it with /"
        )
