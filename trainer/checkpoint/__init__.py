"""Checkpoints: everything that a run needs to go on, whole or not at all, at any number of ranks, without a pickle."""

from trainer.checkpoint.best import Best
from trainer.checkpoint.choose import go_on
from trainer.checkpoint.files import (
    MANIFEST,
    Checkpoint,
    CheckpointManifest,
    Damaged,
    FileEntry,
    in_rows,
    open_checkpoint,
)
from trainer.checkpoint.keep import CHECKPOINTS, Shelf, latest, set_aside
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.write import check_finite, save

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "Best",
    "Checkpoint",
    "CheckpointManifest",
    "Damaged",
    "FileEntry",
    "Saver",
    "Shelf",
    "check_finite",
    "go_on",
    "in_rows",
    "latest",
    "open_checkpoint",
    "save",
    "set_aside",
]
