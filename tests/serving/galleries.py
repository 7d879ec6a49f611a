"""A gallery of vectors in 32 dimensions, opened and loaded; and the files of one that an earlier version wrote."""

import gzip
from pathlib import Path

from serving.gallery import Gallery
from serving.storage.store import Store
from serving.threshold import Rule

MODEL = "a" * 32
STORES = Path(__file__).parent / "stores"


def open_gallery(path):
    opened = Gallery(Store(path, MODEL, 32), Rule(0.5, "a test"), Rule(0.6, "a test"))
    opened.load()
    return opened


def third_schema(folder):
    """A store that the version before metadata wrote: alice with two samples, zoë and carol, and somebody erased."""
    for name in ("gallery.db", "gallery.db-mark"):
        packed = STORES / f"{name.replace('gallery', 'schema3')}.gz"
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder / "gallery.db"
