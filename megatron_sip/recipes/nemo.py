"""A recipe as a nemo-run task (extra `nemo`), for whoever launches with nemo-run's executors."""

from __future__ import annotations

from typing import Any

from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import to_flags
from megatron_sip.errors import ConfigError


def nemo_run_task(config: Config) -> Any:
    """A `nemo_run.Script` that trains `config`.

    Give it to an executor with the torchrun launcher, which sets the rendezvous:
    `nemo_run.run(nemo_run_task(llama_1b4_sip()), executor=nemo_run.SlurmExecutor(..., launcher="torchrun"))`.
    Keys of servers stay in the environment of the nodes.

    Raises:
        ConfigError: nemo-run cannot be imported.
    """
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"nemo-run cannot be imported ({error}); install the extra: pip install 'megatron-sip[nemo]'"
        ) from error
    return nemo_run.Script(
        path="megatron_sip.pretrain",
        entrypoint="python",
        m=True,
        args=to_flags(config),
        env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )
