"""Stores of earlier schemas brought up to date, by Alembic's revisions in `versions`.

The version is not in a table of Alembic's but in the file's header (`PRAGMA user_version`), where it is read before
anything is written, and changes in the transaction of the step. This package is only imported where a step is due:
Alembic and SQLAlchemy take half a second.
"""

import sqlite3
from pathlib import Path

from alembic import op
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from serving.storage import rows
from serving.storage.schema import VERSION, Target, commit


def migrate(connection: sqlite3.Connection, target: Target, to: int = VERSION) -> None:
    """Bring the schema to version `to`, one transaction a step.

    Raises:
        Damage: a row that a step reads is not as it was written.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    script = ScriptDirectory(Path(__file__).parent)
    steps = [step.module for step in script.iterate_revisions(f"{to:04}", f"{version:04}" if version else "base")]
    engine = create_engine("sqlite://", creator=lambda: connection, poolclass=StaticPool)
    with engine.connect() as bound:
        context = MigrationContext.configure(bound, opts={"target": target})
        for number, step in enumerate(reversed(steps), version + 1):
            connection.execute("BEGIN IMMEDIATE")
            try:
                with Operations.context(context):
                    step.upgrade()
            except ValueError as error:  # a date, a UUID or a JSON text of the first schema, without checksums
                raise rows.Damage(f"a row cannot be read ({error})") from error
            commit(connection, number)


def raw_connection() -> sqlite3.Connection:
    """SQLite's, for a step that carries over many rows."""
    connection = op.get_bind().connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    return connection


def target() -> Target:
    """The store that is brought up to date."""
    found = op.get_context().opts["target"]
    assert isinstance(found, Target)
    return found
