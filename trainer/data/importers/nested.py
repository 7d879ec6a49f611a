"""The column of a Parquet file whose rows are lists of numbers, or lists of such lists, all of one shape."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.arrays import STORED, content_of_shape
from trainer.data.importers.table import Table
from trainer.errors import UserError


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
