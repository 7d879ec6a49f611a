"""What may change between a checkpoint and the run that goes on from it: one table, and its application.

The same table is in docs/checkpoints.md.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from trainer.checkpoint import Checkpoint
from trainer.config import Config, from_tree
from trainer.data.mix import Mixed
from trainer.data.split import Split

IDENTITIES, SHARDS = "identities", "shards"  # of the data: compared like keys of the config


@dataclass(frozen=True, slots=True)
class Rule:
    """What a change of these keys means for a resume; `*` in a key stands for any text."""

    keys: str
    verdict: Literal["may change", "warns", "refused"]
    why: str

    def covers(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.keys.split())


# The first rule that covers a key counts.
RULES = (
    Rule(IDENTITIES, "refused", "the stored centres are of other classes"),
    Rule(SHARDS, "refused", "the steps done were of other samples than those that are passed over now"),
    Rule(
        "data.batch_size data.shuffle_window data.identities_per_batch data.train_split data.mix.* data.mix_identities",
        "refused",
        "it decides which samples come in which step, so that some would come twice and others never",
    ),
    Rule("run.seed", "refused", "it decides the order of the samples and all random numbers from here on"),
    Rule(
        "scaling.workers",
        "warns",
        "sums are taken in another order, so the losses are those of the uninterrupted run no longer bit for bit",
    ),
    Rule("data.height data.width", "refused", "the backbone was made for images of that size"),
    Rule(
        "backbone.dropout backbone.norm_group",
        "warns",
        "the losses from here on are not those of the uninterrupted run",
    ),
    Rule(
        "backbone.recompute backbone.channels_last backbone.compile engine.accumulate engine.offload",
        "warns",
        "numbers are rounded in another way, so the losses are those of the uninterrupted run no longer bit for bit",
    ),
    Rule("engine.ema_decay engine.ema_evaluated", "warns", "the average of the weights is another, or begins anew"),
    Rule("backbone.*", "refused", "the stored weights are of another network"),
    Rule(
        "augment.quarter_turns augment.mirrors",
        "refused",
        "each turn or mirror image is a class of its own, so the centres are of other classes",
    ),
    Rule(
        "loss.name auxiliary.*.name loss.centres auxiliary.*.centres loss.learnable auxiliary.*.learnable "
        "loss.dimension auxiliary.*.dimension loss.frozen auxiliary.*.frozen",
        "refused",
        "the stored centres and parameters are of another loss",
    ),
    Rule(
        "optimizer.name head.optimizer.name head.optimizer.state_dtype head.rows head.param_dtype",
        "refused",
        "centres and moments were stored in another form",
    ),
    Rule("run.epochs run.max_steps schedule.*", "warns", "the learning rate and the margin follow another course"),
    Rule(
        "optimizer.* head.optimizer.* engine.gradient_clipping loss.* auxiliary.* augment.* head.sample_* "
        "head.skip_tolerance data.draft",
        "warns",
        "the losses from here on are not those of the uninterrupted run",
    ),
    Rule(
        "engine.zero_stage engine.bf16 head.algorithm head.compute_dtype head.fused head.kernels head.tile "
        "scaling.use_gpu scaling.cpus_per_worker",
        "warns",
        "numbers are rounded in another way, so the losses are those of the uninterrupted run no longer bit for bit",
    ),
    Rule("data.val_split", "warns", "evaluations before and after are of other images"),
    Rule(
        "data.path data.cache_dir data.cache_bytes data.cache data.decode_threads data.decode_processes data.max_bad",
        "may change",
        "where the data lie and how they are read; their digests are compared",
    ),
    Rule(
        "run.out run.log_every run.eval_every run.collapse run.checkpoint_every run.keep_checkpoints run.keep_best",
        "may change",
        "what is written, and when",
    ),
    Rule("init.*", "may change", "only a first step begins with other weights"),
    Rule("tracking.* scaling.*", "may change", "who is told, where the workers run, and what is done about faults"),
    Rule("run.on_divergence run.back_off", "may change", "what is done when the loss is not finite"),
)


def rule_of(key: str) -> Rule:
    """The rule for a key of the config, such as `data.batch_size` or `auxiliary.0.weight`."""
    return next(rule for rule in RULES if rule.covers(key))


def data_digest(split: Split | Mixed) -> str:
    """Of all that decides which sample has which position: the shards in order, and what is used of each."""
    parts = split.parts if isinstance(split, Mixed) else [split]
    shards = [(shard.sha256, shard.index_sha256, shard.samples) for part in parts for shard in part.shards]
    return hashlib.sha256(repr(shards).encode()).hexdigest()


def changes(found: Checkpoint, config: Config, facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between a checkpoint and the run that is to go on from it: sentences that forbid it, and sentences
    that warn.

    Args:
        config: of the run.
        facts: what the run has found under `IDENTITIES`, `SHARDS` and `scaling.workers`.

    Raises:
        UserError: the checkpoint's config has keys that are not known any more.
    """
    written = found.manifest
    backbone = dict(written.config["backbone"])
    # Before there were groups, each batch norm took a worker's share.
    backbone.setdefault("norm_group", written.config["data"]["batch_size"] // written.world_size)
    before = _flat(from_tree(written.config | {"backbone": backbone}).model_dump(mode="json")) | {
        IDENTITIES: identities(written.classes, written.class_digest),
        SHARDS: written.data_digest,
        "scaling.workers": written.world_size,
    }
    now = _flat(config.model_dump(mode="json")) | dict(facts)
    refused, warned = [], []
    for key in sorted(before.keys() | now.keys()):
        old, new, rule = before.get(key), now.get(key), rule_of(key)
        if old == new or rule.verdict == "may change":
            continue
        if key == SHARDS and old is None:
            warned.append(f"the checkpoint '{found.folder}' has no digest of its shards: they are taken to be the same")
            continue
        sentence = f"{key} is {_shown(new)} now and was {_shown(old)} for '{found.folder}': {rule.why}"
        if rule.verdict == "refused":
            refused.append(f"{sentence}; set it back, or start a new run in another run.out")
        else:
            warned.append(sentence)
    return refused, warned


def identities(classes: int, digest: str) -> str:
    """The classes as they are compared."""
    return f"{classes} with digest {digest}"


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of dicts and lists, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
