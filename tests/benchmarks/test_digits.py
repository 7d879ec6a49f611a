"""The digits benchmark: its JSON, its intervals, and how it tells of the trend."""

import json
from pathlib import Path

import pytest

from benchmarks import digits as benchmark
from benchmarks.intervals import interval
from trainer.figures import digits


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)


def row(m: int, accuracy: list[float], intra: list[float]) -> benchmark.Row:
    values: dict[str, list[float] | None] = {
        "accuracy_by_centres": accuracy,
        "accuracy_by_means": accuracy,
        "intra_mean_degrees": intra,
        "inter_smallest_degrees": [30.0, 30.5],
    }
    return benchmark.Row("multiples", f"m = {m}", 2, digits.settings("l_softmax", 2, 10, margin=m), values)


def test_a_trend_that_does_not_hold_is_told() -> None:
    accuracy = [[0.90, 0.91], [0.92, 0.93], [0.91, 0.92], [0.95, 0.96]]
    rows = [row(m, accuracy[m - 1], [9.0 - m, 9.01 - m]) for m in (1, 2, 3, 4)]
    by_measure = {found["measure"]: found for found in benchmark.trends(rows)}
    grown = by_measure["accuracy_by_centres"]
    assert not grown["better_at_every_step"]
    assert grown["steps_that_are_worse"] == ["m = 2 to 3"]
    assert grown["change_m1_to_m4"]["mean"] == pytest.approx(0.05)
    assert by_measure["intra_mean_degrees"]["better_at_every_step"]
    assert by_measure["intra_mean_degrees"]["beyond_chance"]
    assert not by_measure["inter_smallest_degrees"]["better_at_every_step"]
    assert not by_measure["inter_smallest_degrees"]["beyond_chance"]
    told = "\n".join(benchmark._told(list(by_measure.values())))
    assert "accuracy: not at m = 2 to 3" in told
    assert "contains 0" in told


def test_the_command_writes_valid_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, page = tmp_path / "digits.json", tmp_path / "digits.md"
    benchmark.main(
        [
            *("--losses", "softmax", "triplet", "--seeds", "2", "--steps", "12", "--dimension", "3"),
            *("--json", str(output), "--markdown", str(page)),
        ]
    )
    content = json.loads(output.read_text())
    assert content["config"]["steps"] == 12
    assert [(r["table"], r["dimension"]) for r in content["rows"]] == [("multiples", 2)] * 4 + [
        ("multiples", 3)
    ] * 4 + [("losses", 3)] * 2
    for found in content["rows"]:
        for measure in benchmark.MEASURES:
            seeds = found["seeds"][measure]
            if found["label"] == "triplet" and measure == "accuracy_by_centres":
                assert seeds is None
                assert found[measure] is None
            else:
                assert len(seeds) == 2
                assert found[measure]["mean"] == pytest.approx(sum(seeds) / 2)
    assert len(content["trends"]) == 6
    assert page.read_text() == capsys.readouterr().out
    assert page.read_text().count("| L-Softmax, m = ") == 8
