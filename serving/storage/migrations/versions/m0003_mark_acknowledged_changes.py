"""From here on a store has a mark: the file is there before this step is committed."""

from serving.storage import rows
from serving.storage.mark import Reached, make_mark, mark_path
from serving.storage.migrations import raw_connection, target

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    row = rows.read_gallery(raw_connection())
    make_mark(mark_path(target().path), Reached(row.uid, row.revision))
