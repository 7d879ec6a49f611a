"""API keys in a small SQLite file: made, listed, revoked, rotated. The file holds no key, only each one's HMAC.

A key is `hsk_`, 12 hexadecimal digits that name it, `_`, and 256 random bits. It is shown once, when it is made. Since
it is random, a fast hash is enough; the HMAC is keyed per file, so that two files do not tell that they know one key.
"""

import contextlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.access.scopes import COLLECTION, Caller, Scope
from trainer.errors import UserError

APPLICATION_ID, VERSION = 0x48594B59, 1  # "HYKY"
TOKEN = re.compile(rb"hsk_([0-9a-f]{12})_[0-9a-f]{64}")
NAME = re.compile(r"[\w .:@/-]{1,100}")
SCHEMA = """
CREATE TABLE hmac_key (value BLOB NOT NULL);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, scopes TEXT NOT NULL, collections TEXT, created REAL NOT NULL,
    expires REAL, rate REAL, burst INTEGER NOT NULL, revoked REAL, last_used REAL
) STRICT;
CREATE TABLE secrets (key_id TEXT NOT NULL REFERENCES keys (id), hmac BLOB NOT NULL, made REAL NOT NULL, expires REAL)
STRICT;
"""


@dataclass(frozen=True)
class Key:
    """What is known of a key. Times are seconds since 1970.

    Attributes:
        rate, burst: requests a second, and at once; None for no limit.
        secrets: HMAC of each secret that is in use, and until when.
    """

    name: str
    caller: Caller
    created: float
    expires: float | None
    rate: float | None
    burst: int
    revoked: float | None
    last_used: float | None
    secrets: tuple[tuple[bytes, float | None], ...]

    @property
    def key_id(self) -> str:
        return self.caller.key_id


def keys_path(store: Path) -> Path:
    """Where the keys of a store lie if nothing else is said: beside it, as its mark does."""
    return store.with_name(store.name + "-keys")


class KeyFile:
    """The opened file. Used by one thread at a time; other processes may have it open, too."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        self.inode = os.stat(path).st_ino
        (key,) = connection.execute("SELECT value FROM hmac_key").fetchone()
        self._mac = hmac.new(key, digestmod="sha256")  # copied for each token: making one anew costs twice as much

    def version(self) -> int:
        """Another number after another process has changed the file."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def hmac(self, token: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(token)
        return mac.digest()

    def read(self) -> list[Key]:
        """All, the oldest first; revoked and expired ones as well."""
        held = dict[str, list[tuple[bytes, float | None]]]()
        for key_id, digest, expires in self._connection.execute(
            "SELECT key_id, hmac, expires FROM secrets ORDER BY made"
        ):
            held.setdefault(key_id, []).append((digest, expires))
        rows = self._connection.execute(
            "SELECT id, name, scopes, collections, created, expires, rate, burst, revoked, last_used "
            "FROM keys ORDER BY created, id"
        )
        return [_key(row, tuple(held.get(row[0], ()))) for row in rows]

    def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        collections: Sequence[str] | None = None,
        lifetime_s: float | None = None,
        rate: float | None = None,
        burst: int = 20,
    ) -> str:
        """The new key itself, which nobody can read again."""
        if not NAME.fullmatch(name):
            raise UserError(f"'{name[:100]}' is no name for a key: give up to 100 letters, digits, spaces and .:@/-")
        for collection in collections or ():
            if not re.fullmatch(COLLECTION, collection):
                raise UserError(f"'{collection[:100]}' is no collection: names are of a-z, 0-9, _ and -, at most 63")
        now, key_id = time.time(), secrets.token_hex(6)
        expires = None if lifetime_s is None else now + lifetime_s
        chosen = json.dumps(sorted(set(scopes)))
        only = None if collections is None else json.dumps(sorted(set(collections)))
        with self._change():
            row = (key_id, name, chosen, only, now, expires, rate, burst)
            self._connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", row)
            return self._add_secret(key_id)

    def revoke(self, key_id: str) -> None:
        """End a key for good. Its line stays, so that the audit log's key ids keep their meaning."""
        with self._change():
            self._live(key_id)
            self._connection.execute("UPDATE keys SET revoked = ? WHERE id = ?", (time.time(), key_id))
            self._connection.execute("DELETE FROM secrets WHERE key_id = ?", (key_id,))

    def rotate(self, key_id: str, grace_s: float) -> str:
        """A second secret for a key: the one before is good for `grace_s` seconds more, earlier ones end now."""
        with self._change():
            self._live(key_id)
            (expires,) = self._connection.execute("SELECT expires FROM keys WHERE id = ?", (key_id,)).fetchone()
            if expires is not None and expires <= time.time():
                raise UserError(f"the key {key_id} has expired; make a new one with `hypersphere keys create`")
            until, newest = time.time() + grace_s, "SELECT max(made) FROM secrets WHERE key_id = ?1"
            self._connection.execute(f"DELETE FROM secrets WHERE key_id = ?1 AND made < ({newest})", (key_id,))
            self._connection.execute("UPDATE secrets SET expires = ? WHERE key_id = ?", (until, key_id))
            return self._add_secret(key_id)

    def note_used(self, when: Mapping[str, float]) -> None:
        """When keys were last used. Raises sqlite3.Error where the file cannot be written."""
        with self._change():
            rows = [(at, key_id) for key_id, at in when.items()]
            self._connection.executemany("UPDATE keys SET last_used = ? WHERE id = ?", rows)

    def _add_secret(self, key_id: str) -> str:
        token = f"hsk_{key_id}_{secrets.token_hex(32)}"
        row = (key_id, self.hmac(token.encode()), time.time())
        self._connection.execute("INSERT INTO secrets VALUES (?, ?, ?, NULL)", row)
        return token

    def _live(self, key_id: str) -> None:
        row = self._connection.execute("SELECT revoked FROM keys WHERE id = ?", (key_id,)).fetchone()
        if row is None:
            raise UserError(f"no key has the id '{key_id[:100]}'; `hypersphere keys list` shows them")
        if row[0] is not None:
            raise UserError(f"the key {key_id} is revoked for good; make a new one with `hypersphere keys create`")

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


@contextlib.contextmanager
def opened(path: Path, make: bool = False) -> Iterator[KeyFile]:
    """The file of keys; with `make`, a new one where there is none, for its owner alone.

    Raises:
        UserError: it is missing, or is no file of keys, or cannot be read or written.
    """
    if not path.exists():
        if not make:
            raise UserError(f"there is no file of keys '{path}'; make it and a key with `hypersphere keys create`")
        with contextlib.suppress(FileExistsError), _told(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with _told(path), contextlib.closing(_connect(path)) as connection:
        if make:
            _make(connection)
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID:
            raise UserError(f"'{path}' is not a file of keys; name the right one with --keys")
        if version != VERSION:
            raise UserError(f"the file of keys '{path}' has schema {version}, but this version knows {VERSION} only")
        yield KeyFile(path, connection)


def _connect(path: Path) -> sqlite3.Connection:
    # No write-ahead log: readers need write no file, and a copy of the one file is a backup.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False, timeout=5
    )
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _make(connection: sqlite3.Connection) -> None:
    """Fill an empty file, unless another process has just done it."""
    connection.execute("BEGIN IMMEDIATE")
    if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        for statement in SCHEMA.split(";")[:-1]:
            connection.execute(statement)
        connection.execute("INSERT INTO hmac_key VALUES (?)", (secrets.token_bytes(32),))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"the file of keys '{path}' cannot be used: {reason}") from error


def _key(row: Sequence[object], held: tuple[tuple[bytes, float | None], ...]) -> Key:
    key_id, name, scopes, collections, created, expires, rate, burst, revoked, last_used = row
    only = None if collections is None else frozenset(json.loads(str(collections)))
    caller = Caller(str(key_id), frozenset(map(Scope, json.loads(str(scopes)))), only)
    return Key(str(name), caller, created, expires, rate, burst, revoked, last_used, held)  # type: ignore[arg-type]
