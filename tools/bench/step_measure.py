"""Runs the arms of a step bench in turn and collects what they measure."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

from megatron_sip.cost.sizes import model_sizes
from tools.bench.arm import Arm, Others, Reply
from tools.bench.step_report import PrefixSample, Result, Sample
from tools.bench.step_spec import Point, Spec

_HERE = Path(__file__).parent


@dataclass
class _Found:
    """What the repeats at one point have given so far."""

    sip: list[Sample] = field(default_factory=list)
    hf: dict[str, list[Sample]] = field(default_factory=dict)
    prefix: list[PrefixSample] = field(default_factory=list)
    save: list[float] = field(default_factory=list)

    def result(self, spec: Spec, point: Point, rate: float) -> Result:
        """The same as a value."""
        hf = {cache: tuple(samples) for cache, samples in self.hf.items()}
        return Result(
            *(point, spec.tensor, spec.pipeline, rate, tuple(self.sip), hf, tuple(self.prefix), tuple(self.save))
        )


class Bench:
    """The arms that were asked for, started once; `compare` holds "hf" and "unshared" where these are compared.

    Within a repeat all arms measure a point one after the other, each repeat in another order.
    """

    def __init__(
        self, spec: Spec, compare: Sequence[str], *, save: bool, steps: int, say: Callable[[str], None]
    ) -> None:
        self._spec, self._compare, self._save, self._steps, self._say = spec, compare, save, steps, say
        self._stack = ExitStack()
        self._number = 0
        self._rates: dict[str, float] = {}
        self.gpu: str | None = None
        """Name of the GPU that computed; None without one."""

    def __enter__(self) -> Bench:
        from tools.bench.step_inputs import make_tokenizer

        # Ended from outside, it takes its arms and folders along as well.
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        self._stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sip-step-")))
            tokenizer = folder / "tokenizer"
            make_tokenizer(tokenizer, model_sizes(self._spec.model).vocab_size)
            spec = replace(self._spec, tokenizer=str(tokenizer), save=str(folder / "save") if self._save else None)
            file = folder / "spec.json"
            file.write_text(spec.to_json())
            scripts = {"matmul": "matmul.py", "sip": "step_sip.py", "hf": "baseline_hf.py"}
            names = [name for name in scripts if name != "hf" or "hf" in self._compare]
            self._arms = {name: self._started(name, _HERE / scripts[name], file) for name in names}
            for arm in self._arms.values():
                arm.wait_ready()
            self._others = Others(list(self._arms.values()))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stack.close()

    def _started(self, name: str, script: Path, spec_file: Path) -> Arm:
        ranks = self._spec.ranks if name == "sip" else 1
        command = [sys.executable, str(script), str(spec_file)]
        if ranks > 1:
            # torchrun looks at its ranks ten times a second unless told otherwise, in the turns of other arms too.
            launch = ["--standalone", "--monitor-interval=1", f"--nproc-per-node={ranks}"]
            command[1:1] = ["-m", "torch.distributed.run", *launch]
        threads = self._spec.threads if name == "sip" else self._spec.all_threads
        return self._stack.enter_context(Arm(name, command, arm_environment(threads, ranks)))

    def measure(self, points: Sequence[Point], repeats: int) -> list[Result]:
        """Every point with every arm, `repeats` times, there and back. SipError where an arm ends."""
        found = [_Found() for _ in points]
        for point in points:
            self._warm_up(point)
        for repeat in range(repeats):
            # A point that is always measured behind the same one has always the same start: idle cores, or warm ones.
            for index, point in list(enumerate(points))[:: -1 if repeat % 2 else 1]:
                self._number += self._steps
                turns = self._turns()
                for turn in turns[repeat % len(turns) :] + turns[: repeat % len(turns)]:
                    turn(point, found[index])
                self._say(f"repeat {repeat + 1} of {repeats}: {_seconds(found[index])}")
        rate = max(self._rates.values()) * (self._spec.ranks if self.gpu else 1)
        return [one.result(self._spec, point, rate) for point, one in zip(points, found, strict=True)]

    @property
    def matmul_rates(self) -> dict[str, float]:
        """The best rate of each size so far, in operations a second of one device."""
        return dict(self._rates)

    def _warm_up(self, point: Point) -> None:
        """Imports within the first call and memory pools are no part of a step."""
        self._number += 1
        self._step("sip", point.small, 1)
        if "hf" in self._arms:
            for cache in self._spec.hf_caches:
                self._step("hf", point.small, 1, cache=cache)

    def _turns(self) -> list[Callable[[Point, _Found], None]]:
        turns = [self._measure_matmul, self._measure_sip]
        if "hf" in self._arms:
            turns.append(self._measure_hf)
        if "unshared" in self._compare:
            turns.append(self._measure_prefix)
        return turns

    def _measure_matmul(self, _point: Point, _found: _Found) -> None:
        reply = self._arms["matmul"].ask({})
        self.gpu = reply["gpu"]
        for size, rate in reply["rates"].items():
            self._rates[size] = max(rate, self._rates.get(size, 0.0))

    def _measure_sip(self, point: Point, found: _Found) -> None:
        found.sip.append(self._step("sip", point, self._steps))
        if self._save:
            reply = self._arms["sip"].ask({"kind": "save", "first_step": self._number})
            found.save.append(reply["seconds"])

    def _measure_hf(self, point: Point, found: _Found) -> None:
        for cache in self._spec.hf_caches:
            found.hf.setdefault(cache, []).append(self._step("hf", point, self._steps, cache=cache))

    def _measure_prefix(self, point: Point, found: _Found) -> None:
        reply = self._ask("sip", "prefix", point, shared_first=len(found.prefix) % 2 == 0)
        found.prefix.append(PrefixSample(sum(reply["shared"].values()), sum(reply["unshared"].values())))

    def _step(self, name: str, point: Point, steps: int, **further: str) -> Sample:
        self._others.cores()
        reply = self._ask(name, "step", point, steps=steps, **further)
        return Sample(reply["seconds"], reply["parts"], reply["memory_gib"], self._others.cores())

    def _ask(self, name: str, kind: str, point: Point, **further: int | str) -> Reply:
        return self._arms[name].ask({"kind": kind, "point": asdict(point), "first_step": self._number, **further})


def _seconds(found: _Found) -> str:
    last = {"sip": found.sip, **{f"hf {cache}": samples for cache, samples in found.hf.items()}}
    return ", ".join(f"{name} {samples[-1].seconds:.2f} s" for name, samples in last.items() if samples)


def arm_environment(threads: int, ranks: int) -> dict[str, str]:
    """The environment of an arm's processes.

    Threads of one process may spin for the moment between two parallel regions and then sleep, as OpenMP does by
    itself; those of several ranks must sleep at once, or they take the processors from each other.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if ranks > 1:
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return environment
