"""The kinds of sources that can be imported: one line each."""

from importlib import import_module

from trainer.data.importers import Importer

KINDS = {
    "omniglot": "trainer.data.importers.omniglot",
    "folder": "trainer.data.importers.folder",
    "glyphs": "trainer.data.importers.glyphs",
    "recordio": "trainer.data.importers.recordio",
    "list": "trainer.data.importers.lists",
    "arrays": "trainer.data.importers.arrays",
    "tars": "trainer.data.importers.tars",
}


def importer_of(kind: str) -> Importer:
    """What a kind's module says of it. The others are not imported: all together start as slowly as the rest."""
    found: Importer = import_module(KINDS[kind]).IMPORTER
    return found
