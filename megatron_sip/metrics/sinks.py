"""Where the metrics go: the console, a progress line, tensorboard, Weights & Biases, a JSONL file.

One rank of the world holds the `Sinks`; the metrics that it logs are already reduced.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_sip.config.groups import LoggingConfig
from megatron_sip.errors import ConfigError
from megatron_sip.metrics.jsonl import JsonlWriter
from megatron_sip.metrics.log import format_line
from megatron_sip.metrics.names import MetricSpec
from megatron_sip.metrics.redact import redact, secrets_in_environment


class Sink(Protocol):
    """One place that takes metrics."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one logged iteration."""
        ...

    def rewind(self, iteration: int) -> None:
        """Forget what was logged beyond `iteration`: the run went back to it."""
        ...

    def close(self) -> None:
        """Flush and let go; called once."""
        ...


class Sinks:
    """All places that take the metrics of a run, as one."""

    def __init__(self, sinks: Sequence[Sink], console: Console) -> None:
        """Use `open_sinks` to make the sinks that the settings name."""
        self.console = console
        """Print tables and messages here: it does not tear the progress line."""
        self._sinks = tuple(sinks)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of one iteration to every sink."""
        for sink in self._sinks:
            sink.log(iteration, metrics)

    def rewind(self, iteration: int) -> None:
        """Have every sink forget what was logged beyond `iteration`."""
        for sink in self._sinks:
            sink.rewind(iteration)

    def close(self) -> None:
        """Close every sink, also when one of them fails; the failure is raised after the last."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(
    settings: LoggingConfig,
    *,
    train_iters: int,
    run_config: Mapping[str, Any],
    start_iteration: int = 0,
    specs: Sequence[MetricSpec] | None = None,
    console: Console | None = None,
) -> Sinks:
    """The sinks that `settings` name; `start_iteration` is the iteration of the checkpoint that is resumed.

    ConfigError, naming the flag, for a place that cannot be written or reached. `run_config` goes to
    Weights & Biases without keys. Whatever was opened is closed again when a later one fails.
    """
    out = Console(soft_wrap=True) if console is None else console
    with ExitStack() as opened:
        sinks: list[Sink] = []

        def keep(sink: Sink) -> None:
            opened.callback(sink.close)
            sinks.append(sink)

        if settings.metrics_file is not None:
            keep(JsonlSink(settings.metrics_file, start_iteration))
        if settings.tensorboard_dir is not None:
            keep(TensorboardSink(settings.tensorboard_dir, start_iteration))
        if settings.wandb_project is not None:
            keep(WandbSink(settings.wandb_project, settings.wandb_exp_name, run_config))
        elif settings.wandb_exp_name is not None:
            raise ConfigError("--wandb-exp-name is given without --wandb-project; name the project too")
        # Last, since from here on a progress line may own the terminal.
        if out.is_terminal:
            keep(ProgressSink(out, train_iters, start_iteration, specs))
        else:
            keep(ConsoleSink(out, train_iters, specs))
        opened.pop_all()
    return Sinks(sinks, out)


class ConsoleSink:
    """Plain log lines."""

    def __init__(self, console: Console, train_iters: int, specs: Sequence[MetricSpec] | None = None) -> None:
        self._console = console
        self._train_iters = train_iters
        self._specs = specs

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        line = format_line(iteration, self._train_iters, metrics, specs=self._specs)
        # A log line is one line whatever the width of the terminal: scripts read it.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def rewind(self, iteration: int) -> None:
        """What is printed stays printed."""

    def close(self) -> None:
        self._console.file.flush()


class ProgressSink(ConsoleSink):
    """Log lines above a progress line, for a terminal.

    The line is drawn when something is logged, not by a thread: the cores belong to the training.
    """

    def __init__(
        self, console: Console, train_iters: int, start_iteration: int = 0, specs: Sequence[MetricSpec] | None = None
    ) -> None:
        super().__init__(console, train_iters, specs)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("training", total=train_iters, completed=start_iteration)
        self._progress.start()

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        super().log(iteration, metrics)
        self._progress.update(self._task, completed=iteration, description=progress_text(metrics), refresh=True)

    def rewind(self, iteration: int) -> None:
        self._progress.update(self._task, completed=iteration, refresh=True)

    def close(self) -> None:
        self._progress.stop()
        super().close()


def progress_text(metrics: Mapping[str, float]) -> str:
    """The few numbers that stand beside the progress bar; what is absent is left out."""
    shown = (
        ("loss", "loss", ".4f"),
        ("rewards/accuracies", "accuracy", ".2f"),
        ("rewards/margins", "margin", ".3f"),
        ("chosen/share_rollout", "rollout chosen", ".0%"),
        ("judge/missing", "missing", ".0f"),
    )
    parts = [f"{label} {metrics[name]:{form}}" for name, label, form in shown if name in metrics]
    return "  ".join(parts) or "training"


class JsonlSink:
    """One JSON line per logged iteration."""

    def __init__(self, path: str, start_iteration: int = 0) -> None:
        self._writer = JsonlWriter(path, start_iteration=start_iteration, flag="--metrics-file")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._writer.write({"iteration": iteration, "unix_time": round(time.time(), 3), **metrics})

    def rewind(self, iteration: int) -> None:
        self._writer.rewind(iteration)

    def close(self) -> None:
        self._writer.close()


class TensorboardSink:
    """Scalars as tensorboard events; a resume hides the events beyond the resumed iteration."""

    def __init__(self, folder: str, start_iteration: int = 0) -> None:
        self._folder = folder
        self._writer = self._open(start_iteration + 1 if start_iteration > 0 else None)

    def _open(self, purge: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            return SummaryWriter(folder, purge_step=purge)
        except OSError as error:
            raise ConfigError(
                f"cannot write tensorboard events to {folder} ({error.strerror}); give another folder "
                "with --tensorboard-dir"
            ) from error

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def rewind(self, iteration: int) -> None:
        self._writer.close()
        self._writer = self._open(iteration + 1)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run. The files go to WANDB_DIR (default ./wandb); WANDB_MODE=offline needs no network."""

    def __init__(self, project: str, name: str | None, run_config: Mapping[str, Any]) -> None:
        import wandb

        # The command line and the environment of the process are not sent (x_disable_meta): either may
        # hold a key in a URL. The console is not captured either.
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        config = redact(run_config, secrets_in_environment(os.environ))
        try:
            self._run = wandb.init(project=project, name=name, config=config, settings=settings)
        except (wandb.errors.Error, OSError) as error:
            raise ConfigError(
                f"Weights & Biases cannot start ({_first_line(error)}); log in (WANDB_API_KEY), set "
                "WANDB_MODE=offline, or leave out --wandb-project"
            ) from error

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)

    def rewind(self, iteration: int) -> None:
        """W&B takes no step twice: it keeps what it has and goes on where the run is beyond that."""

    def close(self) -> None:
        self._run.finish()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
