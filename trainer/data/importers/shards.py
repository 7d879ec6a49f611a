"""One shard of an import: a WebDataset tar and its index, each written whole or not at all."""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trainer.atomic import fresh_file
from trainer.data.index import RECORD, make_index, write_index
from trainer.data.split import ShardEntry
from trainer.errors import UserError

_BLOCK, _RECORD = 512, 10_240  # bytes; an archive ends with two empty blocks, filled up to a record
_BUFFER = 2**20
_NAME, _SIZE, _SUM = 0, 124, 148  # where a header's fields begin
_describe = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def describe(identity: str, name: str, attributes: dict[str, object]) -> bytes:
    """A sample's `.json`: canonical, so that the same sample gives the same bytes."""
    ...
