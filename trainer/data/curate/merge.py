"""Data sets joined into one, whose identities are different persons or, by name, the same."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.data.curate.view import Piece, fresh_view, identities_of
from trainer.data.manifest import Manifest
from trainer.data.remote import shown
from trainer.errors import UserError


def merge(
    addresses: Sequence[str | Path], out: Path, *, shared: bool = False, prefix: bool = False, overwrite: bool = False
) -> Manifest:
    """Write a data set at `out` that has the samples of several; splits of one name are joined, no shard is rewritten.

    The identities of the first set keep their labels; those of the next ones follow.

    Args:
        addresses: of two sets or more.
        out: new folder.
        shared: identities of one name are one person; else each name may occur in one set only.
        prefix: put the set's name and a slash before each of its identities.
        overwrite: replace `out`.

    Raises:
        UserError: sets of different content, identities that clash, or `out` exists.
    """
    sets = _named(addresses)
    people = {
        (name, split): _identities(manifest, split, f"{name}/" if prefix else "")
        for name, manifest in sets.items()
        for split in manifest.splits
    }
    _refuse_clashes(people, shared)
    told = {f"{name}/{key}": value for name, manifest in sets.items() for key, value in manifest.provenance.items()}
    told["merged"] = f"{', '.join(sets)}; identities {'shared by name' if shared else 'disjoint'}"
    with fresh_view(out, overwrite, _described(sets), told, sets.values()) as view:
        for split in dict.fromkeys(split for _, split in people):
            tables = {name: people[name, split] for name in sets if (name, split) in people}
            identities = _join(list(tables.values()))
            pieces = [
                Piece(sets[name].split(split), None, _rows(table["name"], identities["name"]))
                for name, table in tables.items()
            ]
            view.add(split, pieces, identities)
    return Manifest.read(out)


def _named(addresses: Sequence[str | Path]) -> dict[str, Manifest]:
    """The sets by the last part of their address, which goes into the manifest: without password and token."""
    if len(addresses) < 2:
        raise UserError(f"{len(addresses)} data sets were given; name two or more to merge")
    sets: dict[str, Manifest] = {}
    for address in addresses:
        name = shown(address).rstrip("/").rpartition("/")[2]
        if name in sets:
            raise UserError(f"two of the sets are called '{name}'; rename the folder of one")
        sets[name] = Manifest.read(address)
    return sets


def _described(sets: dict[str, Manifest]) -> Manifest:
    """What is said of all sets together, but for splits and provenance."""
    (first_name, first), *others = sets.items()
    for name, manifest in others:
        if (manifest.content, manifest.shape) != (first.content, first.shape):
            raise UserError(
                f"'{name}' holds {_content(manifest)}, but '{first_name}' holds {_content(first)}; "
                "merge sets of one content"
            )
    kinds, modes = ({getattr(manifest, field) for manifest in sets.values()} for field in ("kind", "image_mode"))
    return first.model_copy(
        update={
            "kind": first.kind if len(kinds) == 1 else "merged",
            "image_mode": first.image_mode if len(modes) == 1 else "RGB",  # grey images serve among coloured ones
            "bad": [bad for manifest in sets.values() for bad in manifest.bad],
            "provenance": {},
        }
    )


def _content(manifest: Manifest) -> str:
    return f"{manifest.content}s" + (f" of shape {manifest.shape}" if manifest.shape else "")


def _identities(manifest: Manifest, split: str, prefix: str) -> pa.Table:
    table = identities_of(manifest.split(split))
    if not prefix:
        return table
    before, nothing = pa.scalar(prefix, pa.large_string()), pa.scalar("", pa.large_string())
    names = pc.binary_join_element_wise(before, table["name"].cast(pa.large_string()), nothing)
    return table.set_column(table.column_names.index("name"), "name", names)


def _refuse_clashes(people: dict[tuple[str, str], pa.Table], shared: bool) -> None:
    for (one, here), (two, there) in combinations(people, 2):
        if one == two or (here == there and shared):
            continue
        names = people[one, here]["name"]
        common = names.filter(pc.is_in(names, value_set=people[two, there]["name"].combine_chunks()))
        if not len(common):
            continue
        some = ", ".join(f"'{name}'" for name in common[:3].to_pylist())
        found = f"{some}{', ...' if len(common) > 3 else ''} ({len(common)} in all)"
        if here != there:
            raise UserError(
                f"the split '{here}' of '{one}' and the split '{there}' of '{two}' both have {found}, who would be in "
                "two splits of the whole; add --prefix if they are different persons, or draw the splits after merging"
            )
        raise UserError(
            f"'{one}' and '{two}' both have {found}; say --identities shared if they are the same persons, "
            "or add --prefix if they are not"
        )


def _join(tables: list[pa.Table]) -> pa.Table:
    """Each name once, in the order of the first occurrence; an attribute is what the first set says that has it."""
    names = pc.unique(pa.chunked_array([table["name"] for table in tables]))
    columns: dict[str, pa.Array] = {"name": names}
    for table in tables:
        rows = pc.index_in(names, value_set=table["name"].combine_chunks())
        for column in table.column_names:
            if column == "name":
                continue
            values = table[column].combine_chunks().take(rows)
            try:
                columns[column] = pc.coalesce(columns[column], values) if column in columns else values
            except pa.ArrowException as error:
                raise UserError(
                    f"the attribute '{column}' has different types in the sets ({error}); rename or convert one"
                ) from error
    return pa.table(columns)


def _rows(names: pa.ChunkedArray, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each name its row among the others."""
    rows = pc.index_in(names, value_set=among.combine_chunks())
    return np.asarray(rows.to_numpy()).astype(np.int64)
