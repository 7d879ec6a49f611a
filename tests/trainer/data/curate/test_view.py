"""`data merge` and `data split`: the same samples under new manifests."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from serving.cli import app
from trainer.data.curate.check import check
from trainer.data.curate.holdout import hold_out
from trainer.data.curate.merge import merge
from trainer.data.curate.view import Piece, attributes_of, fresh_view, identities_of, labels_of
from trainer.data.image import Preprocessing
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.data.reader import Reader
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import UserError

FORMAT1 = Path(__file__).parent.parent / "format1"
Contents = dict[str, Counter[tuple[str, int]]]
Look = Callable[[Path], Contents]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, noise: Callable[..., object]) -> Path:
    """Two folders of images: `one` has ada, bob, cy, dot and eve, `two` has eve, fay, gus and hal; 6 images each."""
    root = tmp_path_factory.mktemp("two")
    for i, (name, people) in enumerate({"one": "ada bob cy dot eve", "two": "eve fay gus hal"}.items()):
        for j, person in enumerate(people.split()):
            (root / name / person).mkdir(parents=True)
            for k in range(6):
                noise(1000 * i + 100 * j + k).save(root / name / person / f"{k}.png")  # type: ignore[attr-defined]
    return root


@pytest.fixture(scope="module")
def sets(folders: Path) -> dict[str, Path]:
    found = {name: folders / f"{name}.set" for name in ("one", "two")}
    for name, out in found.items():
        run_import("folder", folders / name, out, ImportOptions(holdout_share=0, samples_per_shard=10))
    return found


@pytest.fixture(scope="module")
def attributed(folders: Path) -> Path:
    """The images of `one` by a list with a camera of each sample; to which a country of each identity is added."""
    lines = [
        f"one/{person}/{k}.png,{person},c{k % 4}" for person in ("ada", "bob", "cy", "dot", "eve") for k in range(6)
    ]
    (folders / "list.csv").write_text("\n".join(["path,label,camera", *lines]) + "\n")
    run_import("list", folders / "list.csv", folders / "listed", ImportOptions(holdout_share=0, samples_per_shard=10))
    manifest = Manifest.read(folders / "listed")
    split = manifest.split("train")
    with fresh_view(folders / "attributed", False, manifest, {}) as view:
        countries = pa.array(["fr", "de", "fr", "it", "de"])
        view.add("train", [Piece.whole(split)], identities_of(split).append_column("country", countries))
    return folders / "attributed"


def cameras(split: Split) -> list[str | None]:
    table = attributes_of(split)
    assert table is not None
    found: list[str | None] = table["camera"].to_pylist()
    return found


def sizes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    return {name: (entry.samples, entry.identities) for name, entry in manifest.splits.items()}


def test_disjoint_sets_are_joined_and_no_shard_is_written(
    sets: dict[str, Path], tmp_path: Path, contents: Look
) -> None:
    manifest = merge(list(sets.values()), tmp_path / "both", prefix=True)
    assert sizes(manifest) == {"train": (54, 9)}
    verify(manifest)
    assert not list((tmp_path / "both").glob("*.tar"))
    wanted: Counter[tuple[str, int]] = Counter()
    for path in sets.values():
        wanted += Counter({(f"{path.name}/{name}", crc): n for (name, crc), n in contents(path)["train"].items()})
    assert contents(tmp_path / "both")["train"] == wanted
    assert "merged" in manifest.provenance


def test_shared_identities_keep_the_first_sets_labels(sets: dict[str, Path], tmp_path: Path, contents: Look) -> None:
    manifest = merge(list(sets.values()), tmp_path / "both", shared=True)
    classes = manifest.split("train").classes
    assert classes.names() == ["ada", "bob", "cy", "dot", "eve", "fay", "gus", "hal"]
    assert classes.counts().tolist() == [6, 6, 6, 6, 12, 6, 6, 6]
    assert contents(tmp_path / "both")["train"] == sum(
        (contents(path)["train"] for path in sets.values()), Counter[tuple[str, int]]()
    )
    verify(manifest)


def test_a_view_is_read_and_may_be_moved_with_its_source(sets: dict[str, Path], tmp_path: Path) -> None:
    first = Manifest.read(sets["one"]).split("train")
    both = merge(list(sets.values()), sets["one"].parent / "moved", shared=True).split("train")
    assert [entry.url for entry in both.shards[:2]] == [
        "../one.set/train-000000.tar",
        "../one.set/train-000001.tar",
    ]
    form = Preprocessing(mode="L", height=12, width=12)

    def read(split: Split, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[str]]:
        reader = Reader(split, form)
        with reader.pool() as pool:
            images, labels, keys = reader.read(positions, pool)
        return images, [*keys, *map(str, labels)]

    positions = np.array([0, 7, 29])
    images, told = read(first, positions)
    again, told_again = read(both, positions)
    assert (images == again).all()
    assert told == told_again


def test_a_name_in_two_sets_is_told(sets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        merge(list(sets.values()), tmp_path / "both")
    assert str(raised.value) == (
        "'one.set' and 'two.set' both have 'eve' (1 in all); say --identities shared if they are the same persons, "
        "or add --prefix if they are not"
    )
    assert not list(tmp_path.iterdir())


def test_an_identity_may_not_come_into_two_splits(sets: dict[str, Path], tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    hold_out(sets["one"], drawn, share=0.4)
    with pytest.raises(UserError, match=r"the split 'train' of 'one.set' and the split 'val' of 'drawn' both have"):
        merge([sets["one"], drawn], tmp_path / "both", shared=True)


def test_one_set_alone_and_two_of_one_name_are_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 data sets were given; name two or more"):
        merge([sets["one"]], tmp_path / "out")
    with pytest.raises(UserError, match=r"two of the sets are called 'one.set'; rename"):
        merge([sets["one"], sets["one"]], tmp_path / "out")


def test_sets_of_different_content_are_refused(sets: dict[str, Path], tmp_path: Path) -> None:
    other = Manifest.read(sets["two"]).model_copy(update={"content": "vector", "image_mode": None, "shape": [3]})
    shutil.copytree(sets["two"], tmp_path / "vectors")
    other.write(tmp_path / "vectors")
    with pytest.raises(UserError, match=r"'vectors' holds vectors of shape \[3\], but 'one.set' holds images; merge"):
        merge([sets["one"], tmp_path / "vectors"], tmp_path / "both", prefix=True)
    assert not (tmp_path / "both").exists()


def test_attributes_are_merged_by_name(sets: dict[str, Path], attributed: Path, tmp_path: Path) -> None:
    split = merge([sets["two"], attributed], tmp_path / "both", shared=True).split("train")
    identities = identities_of(split)
    assert dict(zip(identities["name"].to_pylist(), identities["country"].to_pylist(), strict=True)) == {
        **dict.fromkeys(["fay", "gus", "hal"]), "eve": "de", "ada": "fr", "bob": "de", "cy": "fr", "dot": "it",
    }  # fmt: skip
    given = cameras(Manifest.read(attributed).split("train"))
    assert cameras(split) == [None] * 24 + given
    assert Counter(given) == {"c0": 10, "c1": 10, "c2": 5, "c3": 5}


def test_a_set_from_elsewhere_is_merged_and_checked(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elsewhere = fsspec.filesystem("memory")
    elsewhere.put(str(sets["two"]), "/far/two", recursive=True)
    split = merge([sets["one"], "memory://far/two"], tmp_path / "both", shared=True).split("train")
    assert [entry.url for entry in split.shards if entry.url and "://" in entry.url] == [
        f"memory://far/two/train-{number:06d}.tar" for number in range(3)
    ]
    found = check(tmp_path / "both", jobs=1)
    assert found.scan.good.sum() == 54
    assert not found.wrong
    elsewhere.rm("/far", recursive=True)


def test_a_set_of_format_1_is_merged(sets: dict[str, Path], tmp_path: Path, copy: Callable[[Path], Path]) -> None:
    old = copy(FORMAT1)
    manifest = merge([old, sets["one"]], tmp_path / "both", prefix=True)
    before = Manifest.read(old)
    assert sizes(manifest)["train"][0] == before.split("train").samples + 30
    verify(manifest)


def test_identities_are_held_out(sets: dict[str, Path], tmp_path: Path, contents: Look) -> None:
    manifest = hold_out(sets["one"], tmp_path / "drawn", share=0.4, into="test")
    assert sizes(manifest) == {"train": (18, 3), "test": (12, 2)}
    verify(manifest)
    found = contents(tmp_path / "drawn")
    assert not {name for name, _ in found["train"]} & {name for name, _ in found["test"]}
    assert found["train"] + found["test"] == contents(sets["one"])["train"]
    again = hold_out(sets["one"], tmp_path / "again", share=0.4, into="test")
    assert again.splits == manifest.splits
    draws = {
        tuple(hold_out(sets["one"], tmp_path / str(seed), share=0.4, into="t", seed=seed).split("t").classes.names())
        for seed in range(6)
    }
    assert len(draws) > 1


def test_samples_are_held_out_of_every_identity(sets: dict[str, Path], tmp_path: Path, contents: Look) -> None:
    manifest = hold_out(sets["one"], tmp_path / "drawn", by="sample", share=0.5)
    for name in ("train", "val"):
        split = manifest.split(name)
        assert split.classes.names() == ["ada", "bob", "cy", "dot", "eve"]
        assert split.classes.counts().tolist() == [3] * 5
    found = contents(tmp_path / "drawn")
    assert found["train"] + found["val"] == contents(sets["one"])["train"]


def test_a_share_of_samples_is_right_in_the_mean(data_set: Path, tmp_path: Path) -> None:
    held = [
        hold_out(data_set, tmp_path / str(seed), by="sample", share=0.3, seed=seed).split("val").samples
        for seed in range(20)
    ]
    assert 0.27 < np.mean(held) / 47 < 0.33


def test_by_an_attribute_all_with_one_value_go_to_one_side(attributed: Path, tmp_path: Path) -> None:
    by_country = hold_out(attributed, tmp_path / "country", by="country", values=["fr", "it"])
    assert by_country.split("val").classes.names() == ["ada", "cy", "dot"]
    assert by_country.split("train").classes.names() == ["bob", "eve"]
    by_camera = hold_out(attributed, tmp_path / "camera", by="camera", share=0.4)
    seen = [set(cameras(by_camera.split(name))) for name in ("train", "val")]
    assert seen[0] | seen[1] == {"c0", "c1", "c2", "c3"}
    assert not seen[0] & seen[1]
    assert 12 <= by_camera.split("val").samples <= 20


def test_the_other_splits_stay(attributed: Path, tmp_path: Path, contents: Look) -> None:
    hold_out(attributed, tmp_path / "one", share=0.4, into="val")
    again = hold_out(tmp_path / "one", tmp_path / "two", by="sample", share=0.2, into="test")
    assert contents(tmp_path / "two")["val"] == contents(tmp_path / "one")["val"]
    assert again.provenance["split_val"].startswith("0.4 by identity")
    assert again.provenance["split_test"].startswith("0.2 by sample")


WRONG = {
    "a share of all": ({"share": 1.0}, "--holdout 1 is not allowed; give a share between 0 and 1"),
    "no number": ({"share": float("nan")}, "--holdout nan is not allowed"),
    "a negative seed": ({"seed": -1}, "--seed -1 is not allowed; give 0 or more"),
    "a split that is there": ({"into": "train"}, "has a split 'train' already; name the new one with --into"),
    "a split that leads out": ({"into": "../x"}, "--into '../x' is not allowed; use letters"),
    "no such split": ({"split": "test"}, "has no split 'test'"),
    "no such attribute": (
        {"by": "hat"},
        "'hat' is no attribute of the set, which has camera, country; name one of identity, sample, camera, country",
    ),
    "no such value": ({"by": "country", "values": ["es"]}, "no sample has the value 'es' of 'country'; the values are"),
    "values of nothing": ({"values": ["fr"]}, "--values needs an attribute, and --by is 'identity'"),
    "all values": ({"by": "country", "values": ["fr", "it", "de"]}, "the split 'train' would have 0 identities"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(attributed: Path, tmp_path: Path, case: str) -> None:
    options, sentence = WRONG[case]
    with pytest.raises(UserError) as raised:
        hold_out(attributed, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_commands_tell_what_they_wrote(sets: dict[str, Path], tmp_path: Path) -> None:
    one, drawn, both = str(sets["one"]), str(tmp_path / "drawn"), str(tmp_path / "both")
    done = CliRunner().invoke(app, ["data", "split", one, "--out", drawn, "--by", "sample", "--holdout", "0.5"])
    assert done.output.splitlines() == [
        "train: 15 samples of 5 identities in 3 shards",
        "val: 15 samples of 5 identities in 3 shards",
        f"written: {drawn}",
    ]
    done = CliRunner().invoke(app, ["data", "merge", one, str(sets["two"]), "--out", both, "--identities", "shared"])
    assert done.output.splitlines() == [
        "train: 54 samples of 8 identities in 6 shards",
        f"written: {both}",
    ]


def test_labels_are_those_of_the_indexes(sets: dict[str, Path]) -> None:
    split = Manifest.read(sets["one"]).split("train")
    assert np.bincount(labels_of(split)).tolist() == split.classes.counts().tolist()


def test_a_label_that_the_manifest_does_not_have_is_told(sets: dict[str, Path], tmp_path: Path) -> None:
    split = Manifest.read(sets["one"]).split("train")
    short = Piece(split, None, np.arange(3))
    with (
        pytest.raises(
            UserError, match=r"the index of shard 'train-000000.tar' has label 4, but the split 'train' has 3"
        ),
        fresh_view(tmp_path / "out", False, Manifest.read(sets["one"]), {}) as view,
    ):
        view.add("train", [short], identities_of(split))
