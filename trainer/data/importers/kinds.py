"""The kinds of sources that can be imported: one line each."""

from trainer.data.importers import Kind
from trainer.data.importers.folder import list_folder, read_folder
from trainer.data.importers.glyphs import list_glyphs, read_glyphs
from trainer.data.importers.omniglot import list_omniglot, read_omniglot

KINDS = {
    "omniglot": Kind(list_omniglot, read_omniglot),
    "folder": Kind(list_folder, read_folder),
    "glyphs": Kind(list_glyphs, read_glyphs),
}
