"""The file of a gallery looked after: what it holds, whether it is whole, copies of it, and its content out and in.

`stats`, `backup` and `export` read while a service has the store open, one consistent state each. The others need the
store for themselves.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.storage import rows
from serving.storage.changes import Attached, SubjectFull
from serving.storage.documents import IMAGES, METADATA, OF_SAMPLE
from serving.storage.metadata import decode
from serving.storage.reading import SAMPLES, Sample
from serving.storage.schema import APPLICATION_ID, VERSION
from serving.storage.sealing import Vault
from serving.storage.store import Store
from serving.storage.verification import verify as verify_rows
from trainer.atomic import fresh_file, room_for
from trainer.errors import UserError

Progress = Callable[[int, int], object]  # done, total
PAGES = 1000  # of a backup, 16 MB, copied at once; the service writes between them
A_CHANGE = 1000  # samples
PIECE_BYTES = 32 * 2**20  # of images, from which a piece of an export has enough
MODEL, OLDER = b"hypersphere.model_id", 3  # an older export has only the first columns
KINDS = {
    "subject_id": pa.string(),
    "created_ms": pa.int64(),
    "embedding": None,  # as many numbers as the gallery's vectors have
    "quality": pa.float64(),
    "metadata": pa.string(),
    "subject_metadata": pa.string(),
    "image": pa.binary(),
}


@dataclass(frozen=True)
class Stats:
    """What a store holds. `most` and `median`: samples of a subject; `free`: places of erased samples; `images`: how
    many samples have theirs."""

    model_id: str
    dimension: int
    subjects: int
    samples: int
    revision: int
    bytes: int
    median: float
    most: int
    free: int
    images: int


def stats(path: Path) -> Stats:
    """Raises UserError where it is no store."""
    with reading(path) as (connection, row):
        found = connection.execute("SELECT subject_id, count(*) FROM samples GROUP BY subject_id").fetchall()
        images = IMAGES.count(connection) if _version(connection) == VERSION else 0
    counts = dict(found)
    free, held = counts.pop(rows.NOBODY, 0), list(counts.values()) or [0]
    size = sum(file.stat().st_size for file in (path, Path(f"{path}-wal")) if file.exists())
    numbers = row.model_id, row.dimension, row.subjects, row.samples, row.revision
    return Stats(*numbers, size, float(np.median(held)), max(held), free, images)


def verify(path: Path, progress: Progress, key: bytes | None = None) -> Stats:
    """Read everything, as a start of the service does.

    Raises:
        UserError: it is damaged, or in use.
    """
    found = stats(path)
    with contextlib.closing(Store(path, found.model_id, found.dimension, key=key)) as store:
        store.verify()
        done = 0
        for piece in store.samples(settled=True):
            progress(done := done + len(piece.subject_ids), found.samples)
    return found


def backup(path: Path, out: Path, progress: Progress) -> Stats:
    """Copy a store to a new file, whole or not at all; a service may have it open.

    Raises:
        UserError: `path` is no store, `out` is there already, or there is no room.
    """
    refuse_existing(out, "--out")
    with fresh_file(out) as file, reading(path) as (connection, _):
        copy = Path(file.name)
        os.fchmod(file.fileno(), 0o600)
        with contextlib.closing(sqlite3.connect(copy)) as target, _as_full(out):
            connection.backup(target, pages=PAGES, progress=lambda _, left, total: progress(total - left, total))
            target.execute("PRAGMA journal_mode=DELETE").fetchone()
            if _version(target) == VERSION:  # an older one is read row by row when it is brought up to date
                verify_rows(target, lambda: False)
    return stats(out)


def restore(copy: Path, path: Path, progress: Progress, key: bytes | None = None) -> Stats:
    """Make a store of a backup, which stays as it is.

    Raises:
        UserError: `copy` is no store or damaged, or there is something at `path`.
    """
    for file in (path, *(Path(f"{path}{end}") for end in ("-wal", "-shm", "-mark", "-index"))):
        refuse_existing(file, "--store")
    with reading(copy) as (_, row):
        Vault(key).secret(row.secret, copy)
    found = backup(copy, path, progress)
    with contextlib.closing(Store(path, found.model_id, found.dimension, restored=True, key=key)) as store:
        store.verify()
    return found


def export(path: Path, out: Path, progress: Progress, key: bytes | None = None) -> int:
    """Write all samples, decrypted, as Parquet: the columns of KINDS, and the model_id among the file's metadata.

    Returns:
        The samples written.

    Raises:
        UserError: `path` is no store, a sample is damaged, `out` is there already, or there is no room.
    """
    refuse_existing(out, "--out")
    with reading(path) as (connection, row), fresh_file(out) as file:
        os.fchmod(file.fileno(), 0o600)
        if _version(connection) != VERSION:
            raise UserError(
                f"'{path}' was written by an earlier version; `hypersphere gallery verify` brings it up to date"
            )
        schema, vault, done = _schema(row), Vault(key), 0
        vault.secret(row.secret, path)
        with pq.ParquetWriter(file, schema) as writer:
            for piece in pieces(connection, vault):
                writer.write_batch(_batch(piece, schema))
                progress(done := done + len(piece), row.samples)
    return done


@dataclass(frozen=True)
class Line:
    """A sample as it is exported, decrypted; metadata as JSON."""

    sample: Sample
    name: bytes
    vector: bytes
    metadata: bytes | None
    subject_metadata: bytes | None
    image: bytes | None


def pieces(connection: sqlite3.Connection, vault: Vault) -> Iterator[list[Line]]:
    """All samples, in pieces that fit into memory whatever their images are."""
    piece, size = list[Line](), 0
    for row in connection.execute(SAMPLES + "WHERE subject_id <> ? ORDER BY samples.id", (rows.NOBODY,)):
        rows.check(f"sample number {row[0]}", *row[2:])
        sample = Sample(*row)
        box = vault.box(sample.key)
        owners = (METADATA, OF_SAMPLE + sample.place), (METADATA, sample.number), (IMAGES, OF_SAMPLE + sample.place)
        metadata, of_subject, image = (documents.get(connection, owner, box) for documents, owner in owners)
        values = box.open(b"name", sample.name), box.open(b"vector", sample.vector)
        piece.append(Line(sample, *values, metadata, of_subject, image))
        size += len(image or b"")
        if len(piece) == A_CHANGE or size >= PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _schema(row: rows.GalleryRow) -> pa.Schema:
    columns = [(name, kind or pa.list_(pa.float32(), row.dimension)) for name, kind in KINDS.items()]
    return pa.schema(columns, metadata={MODEL: row.model_id.encode()})


def _batch(piece: list[Line], schema: pa.Schema) -> pa.RecordBatch:
    numbers = pa.array(np.frombuffer(b"".join(line.vector for line in piece), "<f4"))
    qualities = np.frombuffer(b"".join(line.sample.quality for line in piece), "<f8")
    columns = (
        [line.name.decode() for line in piece],
        [line.sample.created for line in piece],
        pa.FixedSizeListArray.from_arrays(numbers, schema.field("embedding").type.list_size),
        pa.array(qualities, from_pandas=True),  # NaN is none
        [line.metadata and line.metadata.decode() for line in piece],
        [line.subject_metadata and line.subject_metadata.decode() for line in piece],
        [line.image for line in piece],
    )
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.record_batch(arrays, schema=schema)


def import_(
    file: Path, path: Path, max_samples: int, progress: Progress, key: bytes | None = None
) -> tuple[Stats, list[str]]:
    """Add the samples of an export to a store, which is made where there is none; they get new ids.

    Returns:
        What the store holds then, and why samples were left out.

    Raises:
        UserError: `file` is no export, or of another model than the store.
    """
    try:
        source = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"'{file}' cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    schema, total = source.schema_arrow, source.metadata.num_rows
    model, kind = (schema.metadata or {}).get(MODEL), schema.field("embedding").type if _fits(schema) else None
    if model is None or kind is None:
        raise UserError(f"'{file}' is not an export of a gallery; it has the columns {', '.join(schema.names[:9])}")
    done, refused = 0, list[str]()
    with contextlib.closing(Store(path, model.decode(), kind.list_size, key=key)) as store:
        for batch in source.iter_batches(A_CHANGE):
            vectors = batch.column("embedding").flatten().to_numpy().reshape(-1, kind.list_size)
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            if not (np.abs(lengths - 1) <= 1e-3).all():
                raise UserError(f"'{file}' holds an embedding that has not length 1; export the gallery again")
            names = batch.column("subject_id").to_pylist()
            items = [(name, row[None]) for name, row in zip(names, vectors, strict=True)]
            try:
                results = store.enrol_many(items, max_samples, attached=_attached(batch)).results
            except ValueError as error:  # of metadata too
                raise UserError(
                    f"'{file}' holds what cannot be enrolled ({error}); export the gallery again"
                ) from error
            refused += [str(one) for one in results if isinstance(one, SubjectFull)]
            progress(done := done + len(names), total)
    return stats(path), refused


def change_key(path: Path, old: bytes, new: bytes) -> int:
    """Wrap the data keys of a store anew, under another master key: all of them or none.

    Returns:
        How many there are.

    Raises:
        UserError: it is no store, in use, or `old` is not its key.
    """
    found = stats(path)
    with contextlib.closing(Store(path, found.model_id, found.dimension, key=old)) as store:
        return store.change_key(new)


def _fits(schema: pa.Schema) -> bool:
    """Whether it is an export's, or that of an older one."""
    known = schema.names in (list(KINDS)[:OLDER], list(KINDS))
    kinds = [(field.type, KINDS[field.name]) for field in schema] if known else [(None, pa.null())]
    return all(kind == right if right else pa.types.is_fixed_size_list(kind) for kind, right in kinds)


def _attached(batch: pa.RecordBatch) -> list[Attached]:
    """What comes with each sample. Raises ValueError where metadata is no JSON."""
    if len(batch.schema.names) == OLDER:
        return []
    columns = (column.to_pylist() for column in batch.columns[OLDER:])
    return [
        Attached(decode(of_subject) if of_subject else None, [quality], [decode(metadata)], [image])
        for quality, metadata, of_subject, image in zip(*columns, strict=True)
    ]


def _version(connection: sqlite3.Connection) -> int:
    """Of the schema."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


@contextlib.contextmanager
def reading(path: Path) -> Iterator[tuple[sqlite3.Connection, rows.GalleryRow]]:
    """A connection that sees one state and cannot write, and the gallery's row; its errors as sentences."""
    if path.is_dir():
        told = f"'{path}' is a folder; of a folder of collections, give the file of one"
        raise UserError(f"{told}: --store {path / 'NAME.db'}")
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"there is no store '{path}'; --store takes the file that a service keeps its gallery in")
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5)) as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise UserError(f"'{path}' is a database, but not a store of a gallery")
            connection.execute("BEGIN")
            yield connection, rows.read_gallery(connection)
    except sqlite3.Error as error:
        raise UserError(f"the store '{path}' cannot be read: {error}; see docs/storage.md") from error


@contextlib.contextmanager
def _as_full(out: Path) -> Iterator[None]:
    """SQLite's word for a full disk as the system's."""
    with room_for(out):
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(28, "full") from error
            raise


def refuse_existing(path: Path, option: str) -> None:
    """Raises UserError where there is something."""
    if path.exists():
        raise UserError(f"'{path}' is there already; move it away, or name another file with {option}")
