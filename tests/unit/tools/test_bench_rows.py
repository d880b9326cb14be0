"""The bench of rows of different lengths: how it puts rows together, its table, and one short run."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_bench import figures_of
from rich.console import Console

from tools.bench import row_lengths
from tools.bench.row_lengths import IN_ORDER, ONE_WIDTH, SIMILAR, batch_of_lengths, table, ways

ROOT = Path(__file__).resolve().parents[3]


def test_rows_are_put_together_in_three_ways() -> None:
    batch = batch_of_lengths([10, 2, 9, 3], 2, 100, seed=1)
    assert batch.layout().tolist() == [[10, 2, 2], [2, 2, 2], [9, 2, 2], [3, 2, 2]]
    found = ways(batch, 2)
    assert {name: [(micro.pairs, micro.width) for micro in way.micros] for name, way in found.items()} == {
        SIMILAR: [((0, 2), 14), ((3, 1), 7)],
        IN_ORDER: [((0, 1), 14), ((2, 3), 13)],
        ONE_WIDTH: [((0, 1), 14), ((2, 3), 14)],
    }
    assert {name: way.padding() for name, way in found.items()} == {
        SIMILAR: (2, 42),
        IN_ORDER: (14, 54),
        ONE_WIDTH: (16, 56),
    }


def test_the_table_tells_each_way_as_a_share_of_one_width() -> None:
    def part(seconds: float) -> dict:
        return {"seconds": seconds, "processor_seconds": 2 * seconds}

    points = [
        {"micro_batch_size": 2, "way": way, "padding": padding, "reference": part(0.5), "train": part(train)}
        for way, padding, train in ((SIMILAR, 0.1, 1.0), (IN_ORDER, 0.2, 2.0), (ONE_WIDTH, 0.3, 2.5))
    ]
    console = Console(width=120, record=True)
    console.print(table(points))
    shown = console.export_text()
    for words in ((SIMILAR, "0.100", "0.50", "1.00", "1.50", "3.00"), (IN_ORDER, "0.83"), (ONE_WIDTH, "1.00", "6.00")):
        [line] = [line for line in shown.splitlines() if words[0] in line and "│" in line]
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "3", "--micro-batch-size", "2"], "--micro-batch-size 2"),
        (["--prefix", "9", "8"], "the first is the least"),
        (["--prefix", "9", "2000"], "2048 positions"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert row_lengths.main(flags) == 1
    said = capsys.readouterr().err
    assert said.startswith("row_lengths: ")
    assert words in said


def test_a_real_run_prints_and_writes_every_way(tmp_path: Path) -> None:
    flags = "--prefix 4 20 --suffix 4 --batch 4 --micro-batch-size 1 2 --repeats 2 --threads 1"
    found, printed = figures_of(row_lengths, flags, tmp_path)
    assert [(point["micro_batch_size"], point["way"]) for point in found["points"]] == [
        (size, way) for size in (1, 2) for way in (SIMILAR, IN_ORDER, ONE_WIDTH)
    ]
    for point in found["points"]:
        for part in ("reference", "train"):
            assert len(point[part]["repeats"]) == 2
            assert point[part]["seconds"] > 0
    assert [point["padding"] > 0 for point in found["points"]][:3] == [False, False, True]
    assert len(found["prefixes"]) == 4
    for word in ("of one width", "load average", "PP 1"):
        assert word in printed
