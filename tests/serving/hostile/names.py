"""Odd names of subjects, cursors, limits and idempotency keys."""

from urllib.parse import quote

from tests.serving.hostile.documents import UNIT
from tests.serving.hostile.wire import REFUSED, Attack, http

KIND = "Content-Type: application/json"
VECTOR = b'{"embeddings":[%b]}' % UNIT
# Names that look like others, like nothing, or turn what stands beside them; in percent encoding.
_SUBJECTS = {
    "a dot": ".",
    "two dots": "..",
    "a dot, encoded": "%2e",
    "two dots, encoded": "%2e%2e",
    "two dots, encoded twice": "%252e%252e/..",
    "a slash, encoded": "a%2fb",
    "a backslash": "a%5cb",
    "nothing": "",
    "a space": "%20",
    "a space at the end": "a%20",
    "a no-break space": quote("\u00a0"),
    "NUL": "a%00b",
    "a line end": "a%0d%0aSet-Cookie:%20a=b",
    "delete": "a%7f",
    "C1 control": quote("a\u0085b"),
    "not UTF-8": "%ff%fe",
    "overlong": "%c0%ae",
    "half a surrogate": "%ed%a0%80",
    "a broken escape": "%zz%",
    "right-to-left override": quote("a\u202eecila"),
    "isolate": quote("a\u2066b"),
    "zero-width space": quote("ali\u200bce"),
    "zero-width joiner": quote("ali\u200dce"),
    "byte order mark": quote("\ufeffalice"),
    "word joiner": quote("alice\u2060"),
    "soft hyphen": quote("ali\u00adce"),
    "line separator": quote("a\u2028b"),
    "tag characters": quote("alice\U000e0041"),
    "not a character": quote("a\uffffb"),
    "129 characters": "a" * 129,
    "60 KiB": "a" * 60_000,
    "1,000 combining marks": quote("a" + "\u0301" * 1000),
}
_MAYBE = {"two dots, encoded twice", "a broken escape"}  # plain, if odd, text once decoded
_PAGES = {
    "a cursor of 60 KiB": "cursor=" + "A" * 60_000,
    "a cursor below 0": "cursor=cC0x",  # p-1
    "a cursor beyond 64 bits": "cursor=cDk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5",
    "a cursor of nothing": "cursor=",
    "a cursor not in Base64": "cursor=%00%ff",
    "a cursor of other digits": "cursor=cNmj",
    "limit 0": "limit=0",
    "limit 1001": "limit=1001",
    "limit 1e3": "limit=1e3",
    "limit of 5,000 digits": "limit=" + "9" * 5000,
    "limit NaN": "limit=NaN",
}
_KEYS = {
    "nothing": "",
    "256 characters": "k" * 256,
    "60 KiB": "k" * 60_000,
    "not ASCII": "k\xe9",
    "a space": "k k",
    "a tab": "k\tk",
}


def _enrol(name: str, *headers: str) -> bytes:
    return http("POST", f"/v1/subjects/{name}/samples", VECTOR, KIND, *headers)


_ENROLLED = {
    f"subject {name}": Attack(lambda text=text: _enrol(text), REFUSED | {404} | ({201} if name in _MAYBE else set()))
    for name, text in _SUBJECTS.items()
}
_ERASED = {
    f"subject {name}, to erase": Attack(
        lambda text=text: http("DELETE", f"/v1/subjects/{text}"),
        REFUSED | {404, 405} | ({204} if name in _MAYBE else set()),
    )
    for name, text in _SUBJECTS.items()
}
_PAGED = {
    f"page by {name}": Attack(lambda query=query: http("GET", f"/v1/subjects?{query}"), REFUSED | {414})
    for name, query in _PAGES.items()
}
_KEYED = {
    f"idempotency key of {name}": Attack(lambda key=key: _enrol("keyed", f"Idempotency-Key: {key}"), REFUSED | {431})
    for name, key in _KEYS.items()
}
NAMES = {
    **_ENROLLED,
    **_ERASED,
    **_PAGED,
    **_KEYED,
    "page by 6,000 cursors": Attack(lambda: http("GET", "/v1/subjects?" + "cursor=a&" * 6_000), REFUSED | {414}),
    "two idempotency keys": Attack(
        lambda: _enrol("keyed", "Idempotency-Key: a", "Idempotency-Key: b"), REFUSED | {201}
    ),
}
