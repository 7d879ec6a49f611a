"""`data clean` on drawings of which some lie in the folder of another character."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from serving.cli import app
from trainer.data.curate.clean import _read_csv, clean, clean_by_lists, joined
from trainer.data.curate.lists import as_csv
from trainer.data.manifest import Manifest
from trainer.data.tar import samples_of
from trainer.data.verify import verify
from trainer.errors import UserError


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, lines: list[dict[str, str]], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def source_names(address: Path) -> list[str]:
    """Where each sample of the train split came from, by position."""
    split = Manifest.read(address).split("train")
    names = []
    for shard in range(len(split.shards)):
        index = split.index(shard)
        with split.path(shard).open("rb") as file:
            for sample in samples_of(file, "shard"):
                names.append(json.loads(sample.text)["name"])
        assert index.samples == split.shards[shard].samples
    return names


@pytest.fixture(scope="module")
def cleaned(
    wrong_labels: tuple[Path, set[str]], embedder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder that the command line wrote, and what it said."""
    out = tmp_path_factory.mktemp("cleaned") / "clean"
    done = CliRunner().invoke(
        app, ["data", "clean", str(wrong_labels[0]), "--embedder", str(embedder), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    return out, done.output


def test_most_suspects_are_planted_and_most_planted_ones_are_suspects(
    wrong_labels: tuple[Path, set[str]], cleaned: tuple[Path, str]
) -> None:
    source, planted = wrong_labels
    names = source_names(source)
    suspects = [names[int(row["position"])] for row in rows(cleaned[0] / "suspects.csv")]
    right = sum(name in planted for name in suspects)
    print(f"{len(suspects)} suspects, precision {right / len(suspects):.2f}, recall {right / len(planted):.2f}")
    assert right >= 0.65 * len(suspects)
    assert right >= 0.5 * len(planted)
    first = suspects[: len(suspects) // 2]
    assert sum(name in planted for name in first) >= 0.9 * len(first)


def test_the_filtered_set_has_all_other_samples_and_no_shard(
    wrong_labels: tuple[Path, set[str]], cleaned: tuple[Path, str], contents: Callable[[Path], dict[str, object]]
) -> None:
    out, said = cleaned
    manifest = Manifest.read(out)
    verify(manifest)
    suspects = rows(out / "suspects.csv")
    assert manifest.split("train").samples == 1440 - len(suspects)
    assert f"{len(suspects)} samples left out" in said
    assert not list(out.glob("*.tar"))
    before, after = contents(wrong_labels[0])["train"], contents(out)["train"]
    assert after < before


def test_the_sheets_are_pictures(cleaned: tuple[Path, str]) -> None:
    for name in ("suspects.png", "twins.png"):
        with Image.open(cleaned[0] / name) as sheet:
            assert sheet.width > 600
            assert sheet.convert("L").getextrema()[0] < 64


def test_by_lists_that_a_person_shortened(
    wrong_labels: tuple[Path, set[str]], cleaned: tuple[Path, str], tmp_path: Path
) -> None:
    suspects, twins = rows(cleaned[0] / "suspects.csv"), rows(cleaned[0] / "twins.csv")
    write_rows(tmp_path / "suspects.csv", suspects[:5], list(suspects[0]))
    write_rows(tmp_path / "twins.csv", twins[:1], list(twins[0]))
    arguments = [
        "data",
        "clean",
        str(wrong_labels[0]),
        "--lists",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--join",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    split = Manifest.read(tmp_path / "out").split("train")
    assert (split.samples, split.identities) == (1435, 71)
    left_out = {row["identity"] for row in suspects[:5]}
    one, two = twins[0]["identity_a"], twins[0]["identity_b"]
    assert two not in split.classes.names()
    if not left_out & {one, two}:
        both = int(twins[0]["samples_a"]) + int(twins[0]["samples_b"])
        assert split.classes.counts()[split.classes.names().index(one)] == both


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position": "99999"}, "line 2 of .* names the sample .* at position 99999, which the split 'train'"),
        ({"position": "-1"}, "at position -1"),
        ({"key": "nobody"}, "names the sample 'nobody'"),
    ],
)
def test_a_list_of_another_set_is_refused(
    wrong_labels: tuple[Path, set[str]],
    cleaned: tuple[Path, str],
    tmp_path: Path,
    change: dict[str, str],
    sentence: str,
) -> None:
    suspects = rows(cleaned[0] / "suspects.csv")
    write_rows(tmp_path / "suspects.csv", [suspects[0] | change], list(suspects[0]))
    with pytest.raises(UserError, match=sentence):
        clean_by_lists(wrong_labels[0], tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: .*No such file.* name the folder that 'data clean' wrote"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"position,shard\n1,2\n", "lacks a column or a value of position, shard, key"),
        (b"position,shard,key\n1,2\n", "lacks a column or a value"),
    ],
)
def test_a_list_that_is_none_is_refused(
    wrong_labels: tuple[Path, set[str]], tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "suspects.csv").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        clean_by_lists(wrong_labels[0], tmp_path, tmp_path / "out")


def test_one_of_embedder_and_lists_is_needed(wrong_labels: tuple[Path, set[str]], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "clean", str(wrong_labels[0]), "--out", str(tmp_path / "out")])
    assert str(done.exception).startswith("data clean needs either --embedder, to search with, or --lists")


def test_nothing_is_left_where_the_embedding_fails(wrong_labels: tuple[Path, set[str]], tmp_path: Path) -> None:
    def fails(split: object) -> None:
        raise UserError("no embedding")

    with pytest.raises(UserError, match="no embedding"):
        clean(wrong_labels[0], tmp_path / "out", fails)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_pairs_are_joined_over_several_steps() -> None:
    assert joined(7, [(1, 2), (4, 5), (2, 4), (6, 6)]).tolist() == [0, 1, 1, 3, 1, 1, 6]


def test_names_with_line_ends_come_back_from_the_lists(tmp_path: Path) -> None:
    names = ["a\rb", "c\nd", 'e"f', "\r"]
    (tmp_path / "x.csv").write_text(as_csv([("name", "number"), *zip(names, range(4), strict=True)]), newline="")
    assert [row["name"] for _, row in _read_csv(tmp_path / "x.csv", ("name", "number"))] == names
