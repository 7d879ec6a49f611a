"""Tables that users give, CSV or Parquet, read batch by batch; from this machine or any fsspec address."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from trainer.data.arrays import STORED, content_of_shape
from trainer.data.remote import fetch, is_remote, shown
from trainer.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BATCH = 10_000  # rows
_BLOCK = 2**20  # bytes of a CSV file that are parsed at a time; no row may be longer


class Table:
    """A table with named columns.

    Args:
        source: path or address of a .csv, .tsv or .parquet file.

    Attributes:
        address: where it lies.
        shown: the address for messages.
        schema: names and types of the columns; those of a CSV file, which knows no types, are text.

    Raises:
        UserError: it cannot be read, or two columns have one name, or a column has none.
    """

    def __init__(self, source: str) -> None:
        self.address = source if is_remote(source) else os.path.abspath(source)
        self.shown = shown(source)
        self._suffix = os.path.splitext(self.shown)[1].lower()
        if self._suffix not in (*_DELIMITERS, ".parquet"):
            raise UserError(f"'{self.shown}' is not a table; give a .csv, .tsv or .parquet file")
        if not is_remote(source) and not os.path.isfile(source):
            raise UserError(f"'{source}' is not a file; give a .csv, .tsv or .parquet file")
        self._file = pa.BufferReader(fetch(source)) if is_remote(source) else None
        with self._guard():
            self.schema = self._parquet().schema_arrow if self._suffix == ".parquet" else self._csv_schema()
        self._check_names()

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """Some of the columns, batch by batch.

        Raises:
            UserError: the file is damaged, or no table; at the batch that it concerns.
        """
        with self._guard():
            if self._suffix == ".parquet":
                found = self._parquet().iter_batches(_BATCH, columns=list(columns))
            else:
                types = {name: pa.string() for name in self.schema.names}
                found = self._csv(pa.csv.ConvertOptions(column_types=types, include_columns=list(columns)))
        while True:
            with self._guard():  # around the reading alone, not around what is done with it
                batch = next(iter(found), None)
                if batch is None:
                    return
                batch.validate(full=True)  # Arrow believes Parquet files that their text is UTF-8
            yield batch.select(list(columns))

    def rows(self) -> int:
        """How many rows a Parquet file says that it has."""
        with self._guard():
            return int(self._parquet().metadata.num_rows)

    def check_has(self, column: str) -> None:
        """The column is there.

        Raises:
            UserError: it is not.
        """
        if column not in self.schema.names:
            raise UserError(
                f"'{self.shown}' has no column '{column}' but {', '.join(map(repr, self.schema.names[:10]))}; the "
                "first line names the columns, with commas between (tabs in a .tsv file)"
            )

    def check_text(self, *columns: str) -> None:
        """Those of these columns that are there hold text.

        Raises:
            UserError: one holds something else.
        """
        for column in columns:
            if column in self.schema.names and _alias(self.schema.field(column).type) != "string":
                kind = self.schema.field(column).type
                raise UserError(f"the column '{column}' of '{self.shown}' holds {kind}, not text; write it as text")

    def attributes(self, without: Collection[str | None]) -> dict[str, str]:
        """The other columns and their types, by alias.

        Raises:
            UserError: a column is neither text nor numbers nor yes and no, or has a name that is taken.
        """
        found: dict[str, str] = {}
        for column in self.schema:
            if column.name in without:
                continue
            alias = _alias(column.type)
            if alias is None or column.name == "key":
                what = "is called 'key', a name that is taken" if alias else f"holds {column.type}"
                raise UserError(
                    f"the column '{column.name}' of '{self.shown}' {what}; attributes are text, numbers or booleans: "
                    "rename it, or leave it out"
                )
            found[column.name] = alias
        return found

    def _parquet(self) -> pa.parquet.ParquetFile:
        return pa.parquet.ParquetFile(self._file or self.address, pre_buffer=False)

    def _csv_schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self._csv(None).schema.names])

    def _csv(self, convert: pa.csv.ConvertOptions | None) -> pa.csv.CSVStreamingReader:
        if self._file is not None:
            self._file.seek(0)
        return pa.csv.open_csv(
            self._file or self.address,
            pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            pa.csv.ParseOptions(delimiter=_DELIMITERS[self._suffix], newlines_in_values=True),
            convert,
        )

    def _check_names(self) -> None:
        names = self.schema.names
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise UserError(f"two columns of '{self.shown}' are called '{twice}'; rename one of them")
        if "" in names:
            raise UserError(f"column {names.index('') + 1} of '{self.shown}' has no name; name it, or leave it out")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Say in one sentence what Arrow finds wrong with the file."""
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeError) as error:
            reason = " ".join(str(error).split())[:300]
            if "straddling" in reason:
                reason = f"a row is longer than {_BLOCK} bytes, or a quotation mark is never closed"
            raise UserError(
                f"'{self.shown}' cannot be read as a table ({reason}); mend it or write it again"
            ) from error


def _alias(kind: Any) -> str | None:
    """The type of an attribute, of those that a sample may have."""
    types = pa.types
    if types.is_dictionary(kind):
        return _alias(kind.value_type)
    for alias, fits in (
        ("string", (types.is_string, types.is_large_string, types.is_string_view, types.is_null)),
        ("int64", (types.is_integer,)),
        ("double", (types.is_floating,)),
        ("bool", (types.is_boolean,)),
    ):
        if any(test(kind) for test in fits):
            return alias
    return None


class Nested:
    """The rows of such a column.

    Attributes:
        column: its name.
        shape: of each row.
        rows: how many there are.

    Raises:
        UserError: the table has no such column or several, or no rows; here and later: a row has another shape.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        found = [field.name for field in table.schema if _depth(field.type)]
        if len(found) != 1:
            raise UserError(
                f"'{table.shown}' has {len(found)} columns of lists of numbers ({', '.join(found) or 'none'}); give a "
                "table with one: a list of numbers is a vector, a list of lists a spectrogram (frequency, time)"
            )
        self.column = found[0]
        self.rows = table.rows()
        kind = table.schema.field(self.column).type
        self._depth, self._dtype = _depth(kind), _stored(kind)
        first = next((batch.column(0).slice(0, 1) for batch in table.batches([self.column]) if len(batch)), None)
        if first is None:
            raise UserError(f"'{table.shown}' has no rows; give a table with a row for each sample")
        self.shape = self._flat(first, 0)[1]
        content_of_shape(self.shape)

    def copy(self, path: Path) -> None:
        """Write the rows as a .npy file, from which they can be read in any order.

        Raises:
            UserError: a row has another shape than the first.
        """
        done = 0
        with path.open("wb") as file:
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in self._table.batches([self.column]):
                values, shape = self._flat(batch.column(0), done)
                done += len(batch)
                if shape != self.shape:
                    raise self._unlike(done - len(batch), shape)
                with np.errstate(over="ignore"):  # what becomes infinite is told when it is read
                    file.write(values.astype(self._dtype).tobytes())
        if done != self.rows:
            raise UserError(f"'{self._table.shown}' has {done} rows, but says {self.rows}; write it again")

    def _flat(self, column: pa.Array, before: int) -> tuple[NDArray[Any], tuple[int, ...]]:
        """All numbers in the column, and the shape that all its rows have; `before`: rows before it."""
        shape: list[int] = []
        for _ in range(self._depth):
            lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
            unlike = np.flatnonzero(lengths != lengths[0]) if lengths.size else np.empty(0, np.int64)
            if unlike.size or (lengths.size and lengths[0] < 0):
                row = int(unlike[0]) if unlike.size else 0
                length = max(int(lengths[row]), 0)
                raise self._unlike(before + row // int(np.prod(shape, dtype=np.int64)), (*shape, length))
            shape.append(int(lengths[0]) if lengths.size else 0)
            column = pc.list_flatten(column)
        if column.null_count:
            raise UserError(
                f"the column '{self.column}' of '{self._table.shown}' has numbers that are missing near row {before}; "
                "fill them in, or leave their rows out"
            )
        return column.to_numpy(zero_copy_only=False), tuple(shape)

    def _unlike(self, row: int, shape: tuple[int, ...]) -> UserError:
        return UserError(
            f"row {row} in the column '{self.column}' of '{self._table.shown}' has the shape {shape}, unlike others; "
            "all samples must have the same shape, and none may be missing"
        )


def _depth(kind: Any) -> int:
    """How many lists are around a number: 1 or 2; 0: it is something else."""
    for depth in range(3):
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return depth
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return 0
        kind = kind.value_type
    return 0


def _stored(kind: Any) -> np.dtype[Any]:
    while not pa.types.is_primitive(kind):
        kind = kind.value_type
    name = str(np.dtype(kind.to_pandas_dtype()))
    return np.dtype(name if name in STORED else "float32").newbyteorder("<")
