"""Lists that a person reads and shortens, as CSV."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file with these rows; names in them may hold anything."""
    text = StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:  # before 3.13 Python leaves a lone carriage return unquoted, and takes it for the end of a line
        (quoted if any("\r" in str(value) for value in row) else plain).writerow(row)
    return text.getvalue()
