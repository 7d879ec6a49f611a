"""Rate limits."""

import pytest

from serving.access.limits import REMEMBERED, RateLimit
from serving.errors import ApiError


def test_a_bucket_empties_and_fills():
    now = 0.0
    limit = RateLimit(rate=2, burst=3, clock=lambda: now)
    for _ in range(3):
        limit.check("a")
    with pytest.raises(ApiError) as refused:
        limit.check("a")
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "1")
    limit.check("b")  # another client's bucket is its own
    now = 0.5
    limit.check("a")
    with pytest.raises(ApiError):
        limit.check("a")
    now = 100.0
    for _ in range(3):
        limit.check("a")
    with pytest.raises(ApiError):
        limit.check("a")


@pytest.mark.parametrize("rate", [0.001, 0.3, 7.0])
def test_after_the_time_that_it_tells_a_request_passes(rate):
    now = 0.0
    limit = RateLimit(clock=lambda: now)
    limit.take("k", rate, 1)
    with pytest.raises(ApiError) as refused:
        limit.take("k", rate, 1)
    now = float(refused.value.headers["retry-after"])
    limit.take("k", rate, 1)


def test_the_memory_of_clients_is_bounded():
    limit = RateLimit(rate=1, burst=1, clock=lambda: 0.0)
    for number in range(REMEMBERED + 10):
        limit.check(str(number))
    assert len(limit._buckets) == REMEMBERED


@pytest.mark.parametrize("client", ["a:b:c", "::1", "1:2:3:4:5:6:7:8%eth0", "\xff:", "10.0.0.1", ""])
def test_whatever_a_proxy_calls_an_address_is_counted(client):
    limit = RateLimit(rate=1, burst=1, clock=lambda: 0.0)
    limit.check(client)
    with pytest.raises(ApiError):
        limit.check(client)
