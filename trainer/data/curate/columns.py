"""What a set says of each sample, by position: attributes as codes or numbers, and where samples lie by their key."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.curate.view import attributes_of, identities_of, labels_of
from trainer.data.split import Split
from trainer.errors import UserError


def attribute_codes(split: Split, name: str, also: Sequence[str] = ()) -> tuple[NDArray[np.int64], list[str]]:
    """A code for the attribute's value of each sample, and the values in sorted order.

    Args:
        also: what else the caller takes for a name, for the message.

    Raises:
        UserError: neither identities nor samples have such an attribute.
    """
    column, rows = _column(split, name, also)
    text = pc.fill_null(column.cast(pa.large_string()), "").combine_chunks()
    values = pc.unique(text).sort()
    return np.asarray(pc.index_in(text, value_set=values)).astype(np.int64)[rows], values.to_pylist()


def attribute_numbers(split: Split, name: str) -> NDArray[np.float64]:
    """The attribute's number of each sample; NaN where there is none.

    Raises:
        UserError: no such attribute, or its values are no numbers.
    """
    column, rows = _column(split, name)
    try:
        numbers = pc.fill_null(column.cast(pa.float64()), float("nan")).combine_chunks()
    except pa.ArrowException as error:
        raise UserError(f"attribute '{name}' is {column.type}, and numbers are wanted; name another") from error
    return np.asarray(numbers, np.float64)[rows]


def _column(split: Split, name: str, also: Sequence[str] = ()) -> tuple[pa.ChunkedArray, NDArray[np.int64]]:
    """The column of an attribute, and its row of each sample."""
    identities, samples = identities_of(split), attributes_of(split)
    if name in identities.column_names and name != "name":
        return identities[name], labels_of(split)
    if samples is not None and name in samples.column_names:
        return samples[name], np.arange(split.samples)
    known = {*identities.column_names, *(samples.column_names if samples is not None else [])} - {"name", "key"}
    choice = ", ".join([*also, *sorted(known)])
    raise UserError(
        f"'{name}' is no attribute of the set, which has {', '.join(sorted(known)) or 'none'}"
        + (f"; name one of {choice}" if choice else "; import it with a list that has such a column")
    )


def positions_of_keys(split: Split, keys: Sequence[str | bytes]) -> NDArray[np.int64]:
    """Where samples lie in the split, by their key.

    Raises:
        UserError: no sample has a key, or several have it.
    """
    wanted = {key if isinstance(key, str) else "": -1 for key in keys}
    first = 0
    for index in (split.index(shard) for shard in range(len(split.shards))):
        for row in range(index.samples):
            if (key := index.key(row)) in wanted:
                if wanted[key] >= 0:
                    raise UserError(f"several samples of split '{split.name}' have the key '{key}'; name image files")
                wanted[key] = first + row
        first += index.samples
    if missing := [key for key, position in wanted.items() if position < 0]:
        raise UserError(
            f"no sample of split '{split.name}' has the key '{missing[0]}' ({len(missing)} such); "
            "a protocol names keys of the samples, or files with --images"
        )
    return np.array([wanted[key if isinstance(key, str) else ""] for key in keys], np.int64)
