"""What may change on a resume: every key has a rule, and the page says what the table says."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from trainer.checkpoint import Checkpoint, CheckpointManifest
from trainer.config import Config, from_tree
from trainer.data.manifest import Manifest
from trainer.data.mix import Mixed
from trainer.data.split import ShardEntry, Split
from trainer.data.store import open_store
from trainer.losses import LOSSES
from trainer.resume import IDENTITIES, RULES, SHARDS, _flat, changes, data_digest, identities, rule_of
from trainer.storage import Folder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
FORMAT_1 = Path(__file__).parent / "data" / "format1"
FACTS = {IDENTITIES: identities(8, "who"), SHARDS: "which", "scaling.workers": 2}
# A change that each rule covers.
EXAMPLES: dict[str, dict[str, Any]] = {
    "data.batch_size": {"data": {"batch_size": 128}},
    "data.shuffle_window": {"data": {"shuffle_window": 10}},
    "data.identities_per_batch": {"data": {"identities_per_batch": 4}},
    "data.mix.0.weight": {"data": {"mix": [{"path": "a", "weight": 2}]}},
    "run.seed": {"run": {"seed": 1}},
    "data.height": {"data": {"height": 96}},
    "backbone.dropout": {"backbone": {"dropout": 0.1}},
    "backbone.norm_group": {"backbone": {"norm_group": 64}},
    "engine.accumulate": {"engine": {"accumulate": 2}},
    "engine.ema_decay": {"engine": {"ema_decay": 0.9}},
    "backbone.width": {"backbone": {"width": 32}},
    "augment.quarter_turns": {"augment": {"quarter_turns": True}},
    "augment.mirrors": {"augment": {"mirrors": True}},
    "loss.name": {"loss": "cosface"},
    "auxiliary.0.name": {"auxiliary": ["center"]},
    "head.optimizer.state_dtype": {"head": {"optimizer": {"state_dtype": "int8"}}},
    "run.epochs": {"run": {"epochs": 40}},
    "schedule.margin_warmup_steps": {"schedule": {"margin_warmup_steps": 5}},
    "optimizer.lr": {"optimizer": {"lr": 0.01}},
    "loss.margin": {"loss": {"margin": 0.3}},
    "augment.flip": {"augment": {"flip": True}},
    "head.optimizer.lr": {"head": {"optimizer": {"lr": 0.5}}},
    "head.compute_dtype": {"head": {"compute_dtype": "bf16"}},
    "engine.bf16": {"engine": {"bf16": True}},
    "data.val_split": {"data": {"val_split": "test"}},
    "data.path": {"data": {"path": "s3://bucket/faces?token=t0ken"}},
    "run.on_divergence": {"run": {"on_divergence": "skip"}},
    "run.keep_checkpoints": {"run": {"keep_checkpoints": 9}},
    "init.samples": {"init": {"samples": 2}},
    "tracking.uri": {"tracking": {"uri": "http://user:password@host"}},
}


def checkpoint(**other: Any) -> Checkpoint:
    fields = {"step": 5, "world_size": 2, "classes": 8, "class_digest": "who", "data_digest": "which", "files": {}}
    return Checkpoint(
        Folder(Path("step")), CheckpointManifest(**(fields | {"config": Config().model_dump(mode="json")} | other))
    )


def test_nothing_is_said_of_nothing() -> None:
    assert changes(checkpoint(), Config(), FACTS) == ([], [])


@pytest.mark.parametrize("key", EXAMPLES)
def test_each_rule_is_applied(key: str) -> None:
    rule = rule_of(key)
    refused, warned = changes(checkpoint(), from_tree(EXAMPLES[key]), FACTS)
    said = {"refused": refused, "warns": warned, "may change": []}[rule.verdict]
    if rule.verdict == "may change":
        assert (refused, warned) == ([], [])
    else:
        (sentence,) = [one for one in said if one.startswith(f"{key} is ")]
        assert "now and was" in sentence
        assert rule.why in sentence
        assert ("set it back, or start a new run in another run.out" in sentence) == (rule.verdict == "refused")


@pytest.mark.parametrize("fact", FACTS)
def test_the_data_and_the_workers_are_compared(fact: str) -> None:
    refused, warned = changes(checkpoint(), Config(), FACTS | {fact: 3})
    (sentence,) = [*refused, *warned]
    assert bool(warned) == (fact == "scaling.workers")
    assert sentence.startswith(f"{fact} is 3 now and was {FACTS[fact]} for 'step': {rule_of(fact).why}")


def test_the_examples_and_facts_meet_every_rule() -> None:
    assert {rule_of(key) for key in [*EXAMPLES, *FACTS]} == set(RULES)


def test_every_key_of_every_config_has_a_rule() -> None:
    trees = [
        Config().model_dump(mode="json"),
        from_tree({"data": {"mix": [{"path": "a"}]}}).model_dump(mode="json"),
        *({"loss": one, "auxiliary": [one]} for loss in LOSSES for one in [dict.fromkeys(loss.__dataclass_fields__)]),
    ]
    keys = {key for tree in trees for key in _flat(tree)}
    assert len(keys) > 100
    assert {rule_of(key).verdict for key in keys} == set(get_args(type(RULES[0]).__annotations__["verdict"]))


def test_an_older_checkpoint_without_a_digest_of_the_shards_warns() -> None:
    refused, (warned,) = changes(checkpoint(format=1, data_digest=None), Config(), FACTS)
    assert refused == []
    assert warned == "the checkpoint 'step' has no digest of its shards: they are taken to be the same"


def test_before_there_were_groups_a_batch_norm_took_a_workers_share() -> None:
    tree = Config().model_dump(mode="json")
    del tree["backbone"]["norm_group"]
    refused, (warned,) = changes(checkpoint(config=tree), Config(), FACTS)
    assert refused == []
    assert warned.startswith("backbone.norm_group is 32 now and was 128 for 'step'")


def test_the_page_has_the_table() -> None:
    rows = re.findall(r"^\| (`.+`) \| ([\w ]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(" ".join(f"`{key}`" for key in r.keys.split()), r.verdict, r.why) for r in RULES]


def test_the_digest_of_the_data_is_of_shards_and_indexes_in_their_order(tmp_path: Path) -> None:
    entry = Manifest.read(FORMAT_1).split("train").entry

    def digest(*shards: ShardEntry) -> str:
        samples = sum(shard.samples for shard in shards)
        split = entry.model_copy(update={"shards": list(shards), "samples": samples})
        return data_digest(Split("train", split, open_store(tmp_path)))

    a, b, _ = entry.shards
    moved = a.model_copy(update={"url": "s3://bucket/a.tar", "name": "other.tar"})
    reordered = a.model_copy(update={"index_sha256": "0" * 64})
    assert digest(a, b) == digest(moved, b)
    assert len({digest(a, b), digest(b, a), digest(a), digest(reordered, b)}) == 4
    split = Manifest.read(FORMAT_1).split("train")
    assert data_digest(Mixed([split, split], [1, 1], shared=False)) != data_digest(split)
