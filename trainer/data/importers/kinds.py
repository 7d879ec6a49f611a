"""The kinds of sources that can be imported: one line each."""

from trainer.data.importers import Kind

KINDS: dict[str, Kind] = {}
