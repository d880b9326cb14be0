"""The sample table: what the policy wrote, how it was scored, and what was chosen and rejected."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sip.metrics.jsonl import JsonlWriter
from megatron_sip.types import Candidate, Missing, NoPair, Pair, Pool, Scores, Verdict

PREFIX_END_CHARACTERS = 300
MOST_JUDGE_COLUMNS = 3
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e", "\0": "\\0"}


def sample_records(
    iteration: int,
    pools: Sequence[Pool],
    scores: Sequence[Scores | None],
    pairs: Sequence[Pair | NoPair],
    extra: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One record per pool, ready for JSON.

    Texts are kept whole, the prefix by its last 300 characters. A score that is missing stands as null
    with its reason beside it; `judge_min` and `judge_mean` are over the judges that scored, without weights.
    `extra` (such as prompt versions) is put into every record.
    """
    return [
        _record(iteration, pool, score, pair, extra or {})
        for pool, score, pair in zip(pools, scores, pairs, strict=True)
    ]


def visible(text: str) -> str:
    """The text with line breaks, control, format and unassigned characters written as escapes.

    A terminal then shows what is there: nothing moves the cursor, changes colours or the direction of
    the writing. A backslash is doubled, so that an escape cannot be mistaken for text.
    """
    return "".join(_visible_character(character) for character in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters: the beginning and the end of the text around an ellipsis."""
    if width < 3:
        raise ValueError("a shortened text needs a width of at least 3")
    if len(text) <= width:
        return text
    head = width // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


class SampleLog:
    """Writes every sample to a JSONL file and a few of them, now and then, to the console."""

    def __init__(
        self,
        path: str | None,
        console: Console | None,
        *,
        interval: int,
        start_iteration: int = 0,
        shown: int = 2,
        width: int = 100,
    ) -> None:
        """`interval` is the number of iterations between tables (0: none), `shown` the pools of a table.

        ConfigError, naming --sample-log, if `path` cannot be written. On a resume the records beyond
        `start_iteration` are dropped.
        """
        self._writer = (
            JsonlWriter(path, start_iteration=start_iteration, flag="--sample-log") if path is not None else None
        )
        self._console = console
        self._interval = interval
        self._shown = shown
        self._width = width

    def log(
        self,
        iteration: int,
        pools: Sequence[Pool],
        scores: Sequence[Scores | None],
        pairs: Sequence[Pair | NoPair],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the pools of one iteration."""
        records = sample_records(iteration, pools, scores, pairs, extra)
        if self._writer is not None:
            for record in records:
                self._writer.write(record)
        if self._console is not None and self._interval > 0 and iteration % self._interval == 0:
            for record in records[: self._shown]:
                self._console.print(sample_table(record, self._width), soft_wrap=False)

    def rewind(self, iteration: int) -> None:
        """Drop the records beyond `iteration`: the run went back to it."""
        if self._writer is not None:
            self._writer.rewind(iteration)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def sample_table(record: Mapping[str, Any], width: int = 100) -> Table:
    """A rich table of one record; texts are shortened to `width` characters and never read as markup."""
    title = f"iteration {record['iteration']}, sample {record['sample_index']}"
    if record["no_pair"] is not None:
        title += f": no pair ({record['no_pair'].replace('_', ' ')})"
    table = Table(title=title, title_justify="left", caption_justify="left", show_lines=False)
    table.caption = Text("… " + shorten(visible(record["prefix_end"][-width:]), width))
    table.add_column("")
    table.add_column("kind", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    judges = sorted({name for candidate in record["candidates"] for name in candidate["by_judge"]})
    # Many columns would leave the text no room.
    spread = {"min": "judge_min", "mean": "judge_mean"} if len(judges) > 1 else {}
    for heading in spread:
        table.add_column(heading, justify="right", no_wrap=True)
    judges = judges if len(judges) <= MOST_JUDGE_COLUMNS else []
    for judge in judges:
        table.add_column(judge, justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for candidate in record["candidates"]:
        cells = [
            Text(_mark(candidate)),
            Text(_kind(candidate)),
            Text(_score_cell(candidate["score"], candidate["missing"])),
            *(Text(_score_cell(candidate[key], None)) for key in spread.values()),
            *(Text(_score_cell(candidate["by_judge"].get(judge), None)) for judge in judges),
            Text(shorten(visible(candidate["text"]), width)),
        ]
        table.add_row(*cells, style=_style(candidate))
    return table


def _record(
    iteration: int, pool: Pool, score: Scores | None, pair: Pair | NoPair, extra: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = _position(pool, pair.chosen) if isinstance(pair, Pair) else None
    rejected = _position(pool, pair.rejected) if isinstance(pair, Pair) and pair.rejected is not None else None
    candidates = []
    for index, candidate in enumerate(pool.candidates):
        total = None if score is None else score.total[index]
        parts = {} if score is None else {name: _number(values[index]) for name, values in score.by_judge.items()}
        given = [value for value in parts.values() if value is not None]
        candidates.append(
            {
                "kind": candidate.kind.value,
                "rollout_index": candidate.rollout_index,
                "length": len(candidate.tokens),
                "text": candidate.text,
                "score": _number(total),
                "missing": total.reason.value if isinstance(total, Missing) else None,
                "by_judge": parts,
                "judge_min": min(given, default=None),
                "judge_mean": sum(given) / len(given) if given else None,
                "chosen": index == chosen,
                "rejected": index == rejected,
            }
        )
    return {
        "iteration": iteration,
        "sample_index": pool.sample_index,
        "prefix_end": pool.prefix_text[-PREFIX_END_CHARACTERS:],
        "no_pair": pair.reason.value if isinstance(pair, NoPair) else None,
        "candidates": candidates,
        **extra,
    }


def _position(pool: Pool, wanted: Candidate) -> int:
    for index, candidate in enumerate(pool.candidates):
        if candidate == wanted:
            return index
    raise ValueError(f"the pair of sample {pool.sample_index} names a candidate that is not in its pool")


def _number(value: Verdict | None) -> float | None:
    return None if value is None or isinstance(value, Missing) else float(value)


def _visible_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    if unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _mark(candidate: Mapping[str, Any]) -> str:
    if candidate["chosen"]:
        return "+"
    return "-" if candidate["rejected"] else ""


def _style(candidate: Mapping[str, Any]) -> str:
    if candidate["chosen"]:
        return "green"
    return "red" if candidate["rejected"] else ""


def _kind(candidate: Mapping[str, Any]) -> str:
    index = candidate["rollout_index"]
    return candidate["kind"] if index is None else f"{candidate['kind']} {index}"


def _score_cell(value: float | None, missing: str | None) -> str:
    if value is not None:
        return f"{value:.3f}"
    return "n/a" if missing is None else missing.replace("_", " ")
