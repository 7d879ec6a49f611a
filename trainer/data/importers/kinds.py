"""The kinds of sources that can be imported: one line each."""

from trainer.data.importers import Importer
from trainer.data.importers.arrays import list_arrays, read_arrays
from trainer.data.importers.folder import list_folder, read_folder
from trainer.data.importers.glyphs import list_glyphs, read_glyphs
from trainer.data.importers.in_place import index_in_place
from trainer.data.importers.lists import list_list, read_list
from trainer.data.importers.omniglot import list_omniglot, read_omniglot
from trainer.data.importers.recordio import list_recordio, read_recordio
from trainer.data.importers.tars import list_tars, read_tars

KINDS = {
    "omniglot": Importer(list_omniglot, read_omniglot),
    "folder": Importer(list_folder, read_folder),
    "glyphs": Importer(list_glyphs, read_glyphs),
    "recordio": Importer(list_recordio, read_recordio),
    "list": Importer(list_list, read_list),
    "arrays": Importer(list_arrays, read_arrays),
    "tars": Importer(list_tars, read_tars, index_in_place),
}
