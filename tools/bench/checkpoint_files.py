"""The parts of `checkpoint.py` that need one process: journal, checksums, audit log, and the rule for loss spikes."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megatron_sip.checkpoint.manifest import file_entry
from megatron_sip.services.journal import Journal
from megatron_sip.services.journal_files import segments_of
from megatron_sip.services.journal_records import Entry, Key, Source, encode, token_hash
from megatron_sip.training.audit import AuditLog, step_record
from megatron_sip.training.spikes import SpikeRule

Row = dict[str, str | float]

CANDIDATES, VOTES = 17, 5
"""16 rollouts and the original; all pairs are asked so often: 680 answers a prefix."""
AUDITED = 256
WINDOW = 64
THRESHOLDS = (5.0, 10.0, 20.0)
SPIKE_STEPS = 20_000
PAIRS = (4, 8, 64, 256)


def answers(sample: int, draw: Callable[[], float]) -> list[Entry]:
    """What a pairwise judge said of one sample."""
    source = Source("quality", "smollm2", "quality-1", "generate 0.6 0.95")
    hashes = [token_hash([sample, place]) for place in range(CANDIDATES)]
    return [
        (Key(sample, "0123456789abcdef01234567", source, hashes[one], hashes[two], vote), draw())
        for one in range(CANDIDATES)
        for two in range(one)
        for vote in range(VOTES)
    ]


def journal(folder: Path, repeats: int, seed: int) -> list[Row]:
    """Bytes and CPU time of an answer, of votes and of probabilities; time of a round's append; speed of a scan."""
    generator = random.Random(seed)
    kinds = {"votes": lambda: float(generator.random() < 0.5), "probabilities": generator.random}
    rows: list[Row] = []
    for kind, draw in kinds.items():
        rounds = [answers(sample, draw) for sample in range(repeats)]
        started = time.process_time()
        size = sum(len(line) for entries in rounds for line in encode(entries))
        spent = time.process_time() - started
        count = sum(len(entries) for entries in rounds)
        seconds = asyncio.run(_append_all(folder / kind, rounds))
        stored = sum(segment.path.stat().st_size for segment in segments_of(folder / kind))
        again, started = Journal(folder / kind, 0), time.process_time()
        found = again.recall(0)
        scanned = time.process_time() - started
        again.close()
        if found.verdicts != count:
            raise RuntimeError(f"{count} answers were written and {found.verdicts} found")
        rows.append(
            {
                "answers": kind,
                "bytes an answer": round(size / count, 1),
                "encoding, us an answer": round(1e6 * spent / count, 2),
                f"append of {CANDIDATES * (CANDIDATES - 1) // 2 * VOTES}, ms (median of {repeats})": _ms(seconds),
                "scan, MB/s": round(stored / scanned / 1e6),
            }
        )
    return rows


async def _append_all(folder: Path, rounds: list[list[Entry]]) -> list[float]:
    written, seconds = Journal(folder, 0), []
    written.recall(0)
    for entries in rounds:
        started = time.perf_counter()
        await written.append(entries)
        seconds.append(time.perf_counter() - started)
    written.close()
    return seconds


def checksum(folder: Path, size: int) -> list[Row]:
    """Speed of the checksum of a file that the system has in memory."""
    file, block = folder / "data", random.Random(0).randbytes(1 << 20)
    with file.open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(block)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        file_entry(file)
        seconds.append(time.perf_counter() - started)
    file.unlink()
    return [{"MB": size >> 20, "GB/s (median of 5)": round(size / statistics.median(seconds) / 1e9, 2)}]


def audit(folder: Path, repeats: int) -> list[Row]:
    """Time until the line of an iteration is on disk."""
    log, seconds = AuditLog(folder / "audit.jsonl", iteration=0, next_sample=0, jumped=()), []
    for iteration in range(repeats):
        first = AUDITED * iteration
        started = time.perf_counter()
        # Every fifth sample has no pair, so that the ranges are many.
        log.write(step_record(iteration + 1, {first + n: int(n % 5 == 0) for n in range(AUDITED)}, "", 0.69))
        seconds.append(time.perf_counter() - started)
    log.close()
    return [{"batch": AUDITED, f"ms (median of {repeats})": _ms(seconds)}]


def spikes(steps: int, seed: int) -> list[Row]:
    """How often a DPO loss without any spike lies beyond a threshold: chance alone.

    Margins are normal; their mean rises from 0 to 4 and their deviation from 0 to 3 over the steps, as in a run that
    learns. The loss of a step is the mean of -log sigmoid(margin) over its pairs.
    """
    rows: list[Row] = []
    for pairs in PAIRS:
        generator = random.Random(f"{seed} {pairs}")
        recent: deque[float] = deque(maxlen=WINDOW)
        beyond, largest = dict.fromkeys(THRESHOLDS, 0), 0.0
        middle, unit = SpikeRule(0.0, WINDOW), SpikeRule(1.0, WINDOW)
        for step in range(steps):
            done = step / steps
            margins = (generator.gauss(4 * done, 3 * done) for _ in range(pairs))
            loss = statistics.fmean(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))) for margin in margins)
            median = middle.limit(list(recent))
            if math.isfinite(median):
                distance = (loss - median) / (unit.limit(list(recent)) - median)
                largest = max(largest, distance)
                for threshold in THRESHOLDS:
                    beyond[threshold] += distance > threshold
            recent.append(loss)
        counts: Row = {f"T = {threshold:.0f}": beyond[threshold] for threshold in THRESHOLDS}
        rows.append({"pairs in a batch": pairs, **counts, "largest": round(largest, 1)})
    return rows


def _ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)
