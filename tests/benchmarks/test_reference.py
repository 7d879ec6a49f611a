"""The reference compares to the last digit, and leaves out what is new in every run."""

import json
from pathlib import Path

import pytest

from benchmarks import reference

FOUND = {
    "metrics": {"loss": [[1, 0.1 + 0.2]], "samples_per_s": [[1, 812.5]]},
    "calibration": {"verify": {"value": 0.8, "model_id": "3099"}},
    "answers": {"identify": [{"request_id": "a", "candidates": [{"subject_id": "s", "sample_id": "b", "score": 0.5}]}]},
}


def kept(folder: Path, found: object) -> Path:
    folder.mkdir()
    (folder / "reference.json").write_text(json.dumps(found))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> int:
    monkeypatch.setattr("sys.argv", ["reference.py", "compare", *map(str, folders)])
    return reference.main()


def test_identities_and_times_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(FOUND).replace("3099", "4711").replace('"a"', '"z"').replace("812.5", "9.0"))
    assert run(monkeypatch, kept(tmp_path / "a", FOUND), kept(tmp_path / "b", other)) == 0
    assert capsys.readouterr().out == "all 5 values are alike, to the last digit\n"


def test_the_last_digit_and_what_one_of_them_lacks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(FOUND).replace("0.30000000000000004", "0.3"))
    del other["answers"]
    assert run(monkeypatch, kept(tmp_path / "a", FOUND), kept(tmp_path / "b", other)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "/metrics/loss/0/1: 0.30000000000000004, then 0.3" in lines
    assert "/answers/identify/0/candidates/0/score: only before" in lines
    assert len(lines) == 3
