"""The kinds of sources that can be imported: one line each."""

from trainer.data.importers import Kind
from trainer.data.importers.folder import list_folder, read_folder
from trainer.data.importers.glyphs import list_glyphs, read_glyphs
from trainer.data.importers.lists import list_list, read_list
from trainer.data.importers.omniglot import list_omniglot, read_omniglot
from trainer.data.importers.recordio import list_recordio, read_recordio

KINDS = {
    "omniglot": Kind(list_omniglot, read_omniglot),
    "folder": Kind(list_folder, read_folder),
    "glyphs": Kind(list_glyphs, read_glyphs),
    "recordio": Kind(list_recordio, read_recordio),
    "list": Kind(list_list, read_list),
}
