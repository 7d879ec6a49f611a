"""How much memory Python takes at most, for tests of input that asks for much."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """The block takes at most so many bytes at a time; it may end with an exception."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= size, f"{peak} bytes were taken, and {size} are allowed"
