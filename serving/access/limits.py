"""Rate limits: token buckets for addresses and for keys."""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from serving.errors import ApiError

REMEMBERED = 10_000  # buckets; the one that has been quiet for longest is forgotten first


class RateLimit:
    """Token buckets: `burst` requests at once, then `rate` a second; `take` may name others for one bucket.

    Attributes:
        of, whence: what is limited and where it comes from, for the refusal.
    """

    def __init__(
        self,
        rate: float = 1.0,
        burst: int = 1,
        clock: Callable[[], float] = time.monotonic,
        of: str = "requests",
        whence: str = "from this address",
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self.of, self.whence = of, whence
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def check(self, address: str) -> None:
        """`take` for a client's address."""
        self.take(_network(address), self._rate, self._burst)

    def take(self, whose: str, rate: float, burst: int) -> None:
        """Raises ApiError 429, with the time to wait, when the bucket is empty."""
        now = self._clock()
        tokens, then = self._buckets.pop(whose, (float(burst), now))
        tokens = min(burst, tokens + (now - then) * rate)
        allowed = tokens >= 1
        self._buckets[whose] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = max(1, math.ceil((1 - tokens) / rate))
            told = f"more than {burst} {self.of} at once, or {rate:.3g} a second, came {self.whence}; wait {wait} s"
            raise ApiError(429, "too_many_requests", told, {"limit_per_second": rate}, {"retry-after": str(wait)})


def _network(client: str) -> str:
    """What one client has to itself: an IPv4 address, or 64 bits of IPv6."""
    if ":" not in client or "%" in client:
        return client
    try:
        return str(ipaddress.IPv6Interface(f"{client}/64").network)
    except ValueError:  # what a trusted proxy calls an address need not be one
        return client
