"""One archive read from its beginning to its end, for its index."""

import os
import zlib
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.data.importers import Content, ImportOptions
from trainer.data.importers.payload import store_of
from trainer.data.importers.ranges import REQUEST, Hashed
from trainer.data.importers.tars import fields_of, identity_in, unknown
from trainer.data.index import RECORD
from trainer.data.manifest import BadSample
from trainer.data.remote import shown
from trainer.data.tar import TarSample, samples_of
from trainer.errors import UserError

IDENTITY = 1  # the place of its column in `Scan.table`: an attribute may have the same name
_BATCH = 10_000  # samples


class Work(NamedTuple):
    """What all archives are scanned with; `folder` takes what is found."""

    folder: Path
    content: Content
    shape: tuple[int, ...] | None
    attributes: list[str]
    options: ImportOptions


class Scan(NamedTuple):
    """What was found in an archive; its samples are in files, `<number>.npy` and `<number>.arrow`. `late`: fields that
    are no attributes, and the name of the first sample that has each."""

    address: str
    number: int
    size: int
    sha256: str
    samples: int
    grey: bool
    bad: list[BadSample]
    late: dict[str, str]

    def records(self, folder: Path) -> NDArray[np.void]:
        """`RECORD`s whose labels are not known yet."""
        found: NDArray[np.void] = np.load(folder / f"{self.number:06d}.npy", allow_pickle=False)
        return found

    def table(self, folder: Path) -> pa.Table:
        """Key, identity and attributes of the samples, as text; memory-mapped."""
        with pa.memory_map(str(folder / f"{self.number:06d}.arrow")) as file:
            return pa.ipc.open_file(file).read_all()


def scan(number: int, address: str, work: Work) -> Scan:
    """Read an archive once.

    Raises:
        UserError: it is missing, cut off or damaged, or a sample has no label; samples that cannot be read are noted.
    """
    raw = Hashed(address)
    reading = _Reading(work, shown(address))
    path = work.folder / f"{number:06d}"
    schema = pa.schema([(name, pa.string()) for name in ("key", "identity", *work.attributes)])
    records = [np.empty(0, RECORD)]
    with BufferedReader(raw, REQUEST) as file, pa.ipc.new_file(f"{path}.arrow", schema) as writer:
        found = filter(None, map(reading.read, samples_of(file, reading.archive)))
        while batch := list(islice(found, _BATCH)):
            rows, texts = zip(*batch, strict=True)
            records.append(np.array(list(rows), RECORD))
            columns = [pa.array(column, pa.string()) for column in zip(*texts, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        digest = raw.finish()
    whole = np.concatenate(records)
    np.save(f"{path}.npy", whole, allow_pickle=False)
    return Scan(address, number, raw.size, digest, len(whole), reading.grey, reading.bad, reading.late)


class _Reading:
    """Reads the samples of an archive, and notes what cannot be used."""

    def __init__(self, work: Work, archive: str) -> None:
        self.archive = archive
        self.grey = True
        self.bad: list[BadSample] = []
        self.late: dict[str, str] = {}
        self._known = set(work.attributes)
        self._work = work
        self._store = store_of(work.content, work.shape, work.options)

    def read(self, sample: TarSample) -> tuple[tuple[int, ...], list[str | None]] | None:
        """A `RECORD`, and what is written in words; None: the sample is left out."""
        field = self._work.options.label_field
        identity = identity_in(sample, field, self.archive)
        name = f"{os.path.basename(self.archive)}/{sample.key}"
        try:
            self.grey &= self._store(sample.payload, sample.key).grey
        except UserError as error:
            self.bad.append(BadSample(name=name, reason=str(error)))
            return None
        fields = fields_of(sample, field) if sample.text else {}
        self.late |= dict.fromkeys(unknown(fields, self._known), name)
        record = sample.offset, sample.size, 0, zlib.crc32(sample.payload), 0
        return record, [sample.key, identity, *map(fields.get, self._work.attributes)]
