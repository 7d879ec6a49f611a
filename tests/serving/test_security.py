import pytest

from serving.errors import ApiError
from serving.security import CLIENTS_REMEMBERED, KeyCheck, RateLimit

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": f"Bearer {KEY}".encode()},
        {b"authorization": f"bearer  {KEY} ".encode()},
        {b"x-api-key": KEY.encode()},
    ],
)
def test_the_key_is_let_in(headers):
    KeyCheck(KEY, 100).check(headers, "10.0.0.1")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({b"authorization": b"Bearer "}, 401),
        ({b"authorization": b"Basic abc"}, 401),
        ({b"authorization": b"Bearer wrong"}, 401),
        ({b"x-api-key": KEY[:-1].encode()}, 401),
        ({b"x-api-key": (KEY + "0").encode()}, 401),
        ({b"x-api-key": b"\xff\xfe"}, 401),
    ],
)
def test_others_are_not(headers, status):
    with pytest.raises(ApiError) as refused:
        KeyCheck(KEY, 100).check(headers, "10.0.0.1")
    assert refused.value.status == status
    assert KEY not in str(vars(KeyCheck(KEY, 100)))


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


def test_too_many_wrong_keys_are_called_so():
    check = KeyCheck(KEY, 1)
    for told in ("is not one of", "more than 1 wrong keys"):
        with pytest.raises(ApiError, match=told):
            check.check({b"x-api-key": b"wrong"}, "10.0.0.1")


def test_the_memory_of_clients_is_bounded():
    limit = RateLimit(rate=1, burst=1, clock=lambda: 0.0)
    for number in range(CLIENTS_REMEMBERED + 10):
        limit.check(str(number))
    assert len(limit._buckets) == CLIENTS_REMEMBERED


@pytest.mark.parametrize("client", ["a:b:c", "::1", "1:2:3:4:5:6:7:8%eth0", "\xff:", "10.0.0.1", ""])
def test_whatever_a_proxy_calls_an_address_is_counted(client):
    limit = RateLimit(rate=1, burst=1, clock=lambda: 0.0)
    limit.check(client)
    with pytest.raises(ApiError):
        limit.check(client)
