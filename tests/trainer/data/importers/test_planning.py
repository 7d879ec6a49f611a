import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from trainer.data.importers import Entry, ImportOptions, Listing, planning, share_held_out
from trainer.data.importers.plan import Plan
from trainer.data.importers.planning import make_plan
from trainer.errors import UserError


def plan(folder: Path, entries: Iterable[Entry], share: float = 0, **options: object) -> Plan:
    folder.mkdir(exist_ok=True)
    listing = Listing(entries, "source", share_held_out(share, 0))
    make_plan(folder, "folder", listing, ImportOptions(**options), lambda *_: None)
    return Plan(folder)


def entries(samples: int, identities: int = 3, **fields: object) -> list[Entry]:
    return [Entry(f"who {i % identities}", f"{i}", f"place {i}", **fields) for i in range(samples)]


def test_each_sample_is_planned_once_with_the_label_of_its_identity(tmp_path: Path):
    made = plan(tmp_path, entries(40, 4), samples_per_shard=15)
    assert [(shard.name, shard.first, shard.samples) for shard in made.shards] == [
        ("train-000000.tar", 0, 15), ("train-000001.tar", 15, 15), ("train-000002.tar", 30, 10),
    ]  # fmt: skip
    samples = [sample for shard in made.shards for sample in made.samples(shard)]
    assert [sample.number for sample in samples] == list(range(40))
    assert sorted(sample.row for sample in samples) == list(range(40))
    for sample in samples:
        assert (sample.identity, sample.place) == (f"who {sample.row % 4}", f"place {sample.row}")
        assert sample.label == sample.row % 4
    assert [sample.row for sample in samples] != list(range(40))


def test_large_payloads_make_shards_of_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "MAX_SHARD_BYTES", 100_000)
    made = plan(tmp_path, entries(9, size=45_000), samples_per_shard=4)
    assert [shard.samples for shard in made.shards] == [2, 2, 2, 2, 1]
    huge = plan(tmp_path / "huge", entries(3, size=10**12), samples_per_shard=4)
    assert [shard.samples for shard in huge.shards] == [1, 1, 1]


def test_splits_that_the_source_names(tmp_path: Path):
    named = [
        Entry(f"{split} {i % 2}", f"{split} {i}", "", split) for split in ("test", "val", "train") for i in range(6)
    ]
    made = plan(tmp_path, named, share=1)
    assert [(shard.name, shard.samples) for shard in made.shards] == [
        ("train-000000.tar", 6), ("val-000000.tar", 6), ("test-000000.tar", 6),
    ]  # fmt: skip
    names = [sample.name for sample in made.samples(made.shards[2])]
    assert names == [f"test {i}" for i in range(6)]  # only training samples are shuffled


def test_identities_without_a_split_are_held_out_by_the_rule(tmp_path: Path):
    named = [Entry(f"t{i % 2}", f"t{i}", "", "train") for i in range(6)] + entries(20, 10)
    made = plan(tmp_path, named, share=0.5)
    assert {shard.split: shard.samples for shard in made.shards} == {"train": 6 + 10, "val": 10}


def test_attributes_keep_their_types(tmp_path: Path):
    listing = Listing(
        [Entry("a", "1", "", attributes={"age": 3}), Entry("b", "2", "", attributes={"name": "ü", "left": True})],
        "source",
        share_held_out(0, 0),
        attributes={"age": "int64", "name": "string", "left": "bool"},
    )
    make_plan(tmp_path, "list", listing, ImportOptions(), lambda *_: None)
    found = {sample.name: sample.attributes for sample in Plan(tmp_path).samples(Plan(tmp_path).shards[0])}
    assert found == {
        "1": {"age": 3, "name": None, "left": None},
        "2": {"age": None, "name": "ü", "left": True},
    }


def test_digest_is_of_all_that_decides_about_the_bytes(tmp_path: Path):
    def digest(name: str, made: list[Entry], **options: object) -> str:
        return plan(tmp_path / name, made, **options).file.digest

    first = digest("a", entries(10))
    assert digest("b", entries(10), max_bad=1.0, jobs=7, overwrite=True) == first
    others = [
        digest("c", entries(10), seed=1),
        digest("d", entries(10), check=False),
        digest("e", entries(11)),
        digest("f", entries(10, stamp="changed")),
        digest("g", entries(10, size=3)),
        digest("h", entries(10, split="train")),
        digest("i", [entry._replace(place="elsewhere") for entry in entries(10)]),
    ]
    assert len({first, *others}) == 8


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "SOURCE 'source' holds no samples"),
        ([Entry("a", "1", "")], r"at least 2 identities .* found 1 in the train split"),
        ([Entry("a", "1", "", "train"), Entry("a", "2", "", "val")], r"'a' has samples in the splits train and val"),
        ([Entry("a", "1", "", "train"), Entry("a", "2", "")], r"'a' has samples in the splits none and train"),
        ([Entry("a", "1", "", "../up")], r"the split '\.\./up' cannot name a file"),
        ([Entry("a", "1", "", "val\n")], r"the split 'val\\n' cannot name a file"),
        ([Entry("a", str(i), "", f"s{i}") for i in range(100)], "names 102 splits; at most 100"),
    ],
)
def test_what_cannot_be_planned(tmp_path: Path, made: list[Entry], words: str):
    with pytest.raises(UserError, match=words):
        plan(tmp_path, made)


def test_an_attribute_that_is_too_large_is_named(tmp_path: Path):
    made = [Entry(f"{i}", f"{i}", "", attributes={"serial": 2**64 - i}) for i in range(3)]
    listing = Listing(made, "source", share_held_out(0, 0), attributes={"serial": "int64"})
    with pytest.raises(
        UserError, match=r"the attribute serial of one of the samples 1 to 3 is no int64 .*; write it as"
    ):
        make_plan(tmp_path, "folder", listing, ImportOptions(), lambda *_: None)


def test_too_few_samples_of_each(tmp_path: Path):
    with pytest.raises(UserError, match=r"2 identities with 5 or more readable samples in every split and found none"):
        plan(tmp_path, entries(9), min_samples=5)


MILLION = """
import sys, threading
from pathlib import Path
from trainer.data.importers import Entry, ImportOptions, Listing, share_held_out
from trainer.data.importers.planning import make_plan

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

identities = int(sys.argv[2])
entries = (Entry(f"person {i % identities:07d}", f"{i:07d}.jpg", f"person {i % identities:07d}/{i:07d}.jpg",
                 size=9000, stamp=str(i)) for i in range(1_000_000))
def plan(folder, entries):
    listing = Listing(entries, "", share_held_out(0.1, 0))
    make_plan(Path(sys.argv[1], folder), "folder", listing, ImportOptions(), lambda *_: None)

plan("first", (Entry(f"{i % 10}", f"{i}", "") for i in range(20_000)))  # all that is loaded or kept whatever the size
peak, before, done = 0, anonymous(), threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

watching = threading.Thread(target=watch, daemon=True)
watching.start()
plan("million", entries)
done.set()
watching.join()
print(peak - before)
"""


@pytest.mark.parametrize("identities", [50_000, 300_000])
def test_planning_costs_less_than_100_bytes_a_sample(tmp_path: Path, identities: int):
    for name in ("first", "million"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", MILLION, str(tmp_path), str(identities)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < grown < 100 * 1_000_000
    made = Plan(tmp_path / "million")
    assert made.file.total == 1_000_000
    assert len(np.unique(made.rows("train"))) == sum(s.samples for s in made.shards if s.split == "train")
