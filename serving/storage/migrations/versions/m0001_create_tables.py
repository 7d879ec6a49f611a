"""The first schema. Only stores that an early version wrote have it."""

from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    for statement in (
        """CREATE TABLE galleries (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, model_id TEXT NOT NULL,
            dimension INTEGER NOT NULL CHECK (dimension > 0),
            subjects INTEGER NOT NULL DEFAULT 0 CHECK (subjects >= 0),
            samples INTEGER NOT NULL DEFAULT 0 CHECK (samples >= 0),
            revision INTEGER NOT NULL DEFAULT 0, created TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            gallery_id INTEGER NOT NULL REFERENCES galleries (id) ON DELETE CASCADE,
            external_id TEXT NOT NULL, created TEXT NOT NULL, UNIQUE (gallery_id, external_id)
        ) STRICT""",
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            subject_id INTEGER NOT NULL REFERENCES subjects (id) ON DELETE CASCADE,
            sample_id TEXT NOT NULL UNIQUE, vector BLOB NOT NULL, checksum BLOB NOT NULL, created TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        """CREATE TABLE idempotency (
            key TEXT PRIMARY KEY, request BLOB NOT NULL, outcome TEXT NOT NULL, created TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX idempotency_by_age ON idempotency (created)",
    ):
        op.execute(statement)
