"""Work that runs ahead of its use. Reading itself is tested with the stream, which reads through it."""

import pytest

from trainer.data.reader import ahead


def test_results_come_in_order_and_only_so_many_ahead():
    begun: list[int] = []
    asked = 0

    def work(number: int) -> int:
        begun.append(number)
        assert number <= asked + 3  # the one that is waited for, and two results that wait to be fetched
        return number * number

    found = []
    for result in ahead(work, range(20), threads=4, most=2):
        found.append(result)
        asked += 1
    assert found == [number * number for number in range(20)]
    assert sorted(begun) == list(range(20))


def test_an_error_comes_at_its_item():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = ahead(work, range(100), threads=2, most=50)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
