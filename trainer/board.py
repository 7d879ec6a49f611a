"""Where rank 0 leaves its records and the launcher picks them up: an actor, whose process imports nothing else."""

from typing import Any


class Board:
    """A queue of dictionaries."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        """Add one."""
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All that have been put since the last call."""
        records, self._records = self._records, []
        return records
