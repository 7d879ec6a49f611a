"""Hostile heads: forms of smuggling, odd methods and targets, and heads without end.

A head may be refused, closed without an answer, or answered as what it plainly is; it must never be read as two
requests where a proxy sees one.
"""

from tests.serving.hostile.wire import CLOSED, REFUSED, Attack, http

BAD = REFUSED | {CLOSED, 408, 431, 501, 505}
GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST /v1/identify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
SECOND = b"GET /v1/subjects HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CHUNK = b"2\r\n{}\r\n0\r\n\r\n"
KIND = "Content-Type: application/json"


def _post(*headers: bytes, body: bytes = b"{}") -> bytes:
    return POST + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


# Each ends in a second request, which must stay unread: (headers, body).
_SMUGGLED: dict[str, bytes] = {
    "both lengths": _post(b"Content-Length: 2", b"Transfer-Encoding: chunked", body=CHUNK + SECOND),
    "both lengths, turned": _post(b"Transfer-Encoding: chunked", b"Content-Length: 30", body=CHUNK + SECOND),
    "two lengths": _post(b"Content-Length: 2", b"Content-Length: 3", body=b"{} " + SECOND),
    "a list of lengths": _post(b"Content-Length: 2, 3", body=b"{} " + SECOND),
    "a length with a sign": _post(b"Content-Length: +2", body=b"{}" + SECOND),
    "a negative length": _post(b"Content-Length: -2", body=b"{}" + SECOND),
    "a hexadecimal length": _post(b"Content-Length: 0x2", body=b"{}" + SECOND),
    "a length with an underscore": _post(b"Content-Length: 1_0", body=b"{}" + SECOND),
    "a length of other digits": _post(b"Content-Length: \xb2", body=b"{}" + SECOND),
    "a length of 5,000 digits": _post(b"Content-Length: " + b"9" * 5000, body=b"{}" + SECOND),
    "an empty length": _post(b"Content-Length: ", body=b"{}" + SECOND),
    "chunked, identity": _post(b"Transfer-Encoding: chunked, identity", body=CHUNK + SECOND),
    "chunked twice": _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=CHUNK + SECOND),
    "xchunked": _post(b"Transfer-Encoding: xchunked", body=CHUNK + SECOND),
    "vertical tab": _post(b"Transfer-Encoding: \x0bchunked", body=CHUNK + SECOND),
    "a space before the colon": _post(b"Content-Length: 2", b"Transfer-Encoding : chunked", body=CHUNK + SECOND),
    "a folded header": _post(b"Content-Length: 2", b"X: a\r\n Transfer-Encoding: chunked", body=CHUNK + SECOND),
    "a bare line feed": _post(b"Content-Length: 2", b"X: a\nTransfer-Encoding: chunked", body=CHUNK + SECOND),
    "a bare carriage return": _post(b"Content-Length: 2", b"X: a\rTransfer-Encoding: chunked", body=CHUNK + SECOND),
    "NUL in a header": _post(b"Content-Length: 2", b"X: a\x00b", body=b"{}" + SECOND),
    "a chunk size with a sign": _post(b"Transfer-Encoding: chunked", body=b"+2\r\n{}\r\n0\r\n\r\n" + SECOND),
    "a chunk size too large": _post(b"Transfer-Encoding: chunked", body=b"FFFFFFFFFFFFFFFFF\r\n{}" + SECOND),
    "a chunk size in hexadecimal": _post(b"Transfer-Encoding: chunked", body=b"0x2\r\n{}\r\n0\r\n\r\n" + SECOND),
    "a chunk longer than said": _post(b"Transfer-Encoding: chunked", body=b"2\r\n{} \r\n0\r\n\r\n" + SECOND),
}

HEADS = {
    **{f"smuggling: {name}": Attack(lambda raw=raw: raw, BAD) for name, raw in _SMUGGLED.items()},
    "gzip, chunked": Attack(lambda: _post(b"Transfer-Encoding: gzip, chunked", b"Connection: close", body=CHUNK), BAD),
    "a chunk's extension of 1 MiB": Attack(
        lambda: _post(
            b"Transfer-Encoding: chunked", b"Connection: close", body=b"2;" + b"a" * 2**20 + b"\r\n{}\r\n0\r\n\r\n"
        ),
        BAD,
    ),
    "10,000 trailers": Attack(
        lambda: _post(
            b"Transfer-Encoding: chunked", b"Connection: close", body=CHUNK[:-2] + b"A: b\r\n" * 10_000 + b"\r\n"
        ),
        BAD,
    ),
    "a length too long": Attack(lambda: _post(b"Content-Length: 200", b"Connection: close"), BAD, hang_up=True),
    "a body cut off": Attack(lambda: _post(b"Transfer-Encoding: chunked", body=b"200\r\n{}"), BAD, hang_up=True),
    "a head cut off": Attack(lambda: GET, BAD, hang_up=True),
    "a second head without end": Attack(
        lambda: http("GET", "/healthz").replace(b"close", b"keep-alive") + GET, BAD | {200}, hang_up=True
    ),
    "10,000 headers": Attack(lambda: http("GET", "/healthz", b"", *["A: b"] * 10_000), BAD | {200}),
    "a header of 60 KiB": Attack(lambda: http("GET", "/healthz", b"", "A: " + "b" * 60_000), BAD | {200}),
    "a header of 4 MiB": Attack(lambda: http("GET", "/healthz", b"", "A: " + "b" * 2**22), BAD),
    "a header's name of 4 MiB": Attack(lambda: http("GET", "/healthz", b"", "A" * 2**22 + ": b"), BAD),
    "headers, 4 MiB": Attack(lambda: http("GET", "/healthz", b"", *["A: b"] * 700_000), BAD),
    "a target of 60 KiB": Attack(lambda: http("GET", "/" + "a" * 60_000), BAD | {404, 414}),
    "a target of 4 MiB": Attack(lambda: http("GET", "/" + "a" * 2**22), BAD | {404, 414}),
    "a query of 60 KiB": Attack(lambda: http("GET", "/v1/subjects?" + "a=b&" * 15_000), BAD | {200, 414}),
    "a method of 8 KiB": Attack(lambda: http("A" * 8192, "/v1/subjects"), BAD | {405}),
    "method BREW": Attack(lambda: http("BREW", "/v1/subjects"), BAD | {405}),
    "method TRACE": Attack(lambda: http("TRACE", "/v1/subjects"), BAD | {405}),
    "method get": Attack(lambda: http("get", "/healthz"), BAD | {200, 405}),
    "HEAD of a route": Attack(lambda: http("HEAD", "/healthz"), frozenset({200, 405})),
    "CONNECT": Attack(lambda: http("CONNECT", "example.com:443"), BAD | {404, 405}),
    "OPTIONS *": Attack(lambda: http("OPTIONS", "*"), BAD | {404, 405}),
    "an absolute target": Attack(lambda: http("GET", "http://127.0.0.1/healthz"), BAD | {200, 404}),
    "an absolute target elsewhere": Attack(lambda: http("GET", "http://example.com/v1/subjects"), BAD | {404}),
    "a target without a slash": Attack(lambda: http("GET", "healthz"), BAD | {404}),
    "a target that climbs": Attack(lambda: http("GET", "/docs-assets/../../../etc/passwd"), BAD | {404}),
    "a target that climbs, encoded": Attack(
        lambda: http("GET", "/docs-assets/..%2f..%2f..%2fetc%2fpasswd"), BAD | {404}
    ),
    "NUL in the target": Attack(lambda: http("GET", "/docs-assets/%00"), BAD | {404}),
    "not UTF-8 in the target": Attack(lambda: http("GET", "/v1/\xff\xfe"), BAD | {404}),
    "no host": Attack(lambda: b"GET /v1/subjects HTTP/1.1\r\nConnection: close\r\n\r\n", BAD),
    "another host": Attack(lambda: http("GET", "/v1/subjects").replace(b"127.0.0.1", b"evil.example"), BAD),
    "two hosts": Attack(lambda: http("GET", "/v1/subjects", b"", "Host: evil.example"), BAD),
    "a host with a user": Attack(
        lambda: http("GET", "/v1/subjects").replace(b"127.0.0.1", b"127.0.0.1@evil.example"), BAD
    ),
    "a host that begins well": Attack(
        lambda: http("GET", "/v1/subjects").replace(b"127.0.0.1", b"127.0.0.1.evil.example"), BAD
    ),
    "h2c": Attack(
        lambda: http("GET", "/healthz", b"", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk").replace(
            b"close", b"Upgrade, close"
        ),
        BAD | {200},
    ),
    "websocket": Attack(
        lambda: http(
            "GET",
            "/healthz",
            b"",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        ).replace(b"close", b"Upgrade, close"),
        BAD | {200},
    ),
    "HTTP/2": Attack(lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), BAD),
    "HTTP/9.9": Attack(lambda: GET.replace(b"1.1", b"9.9") + b"\r\n", BAD),
    "HTTP/1.0": Attack(lambda: GET.replace(b"1.1", b"1.0") + b"\r\n", BAD | {200}),
    "HTTP/0.9": Attack(lambda: b"GET /healthz\r\n", BAD, hang_up=True),
    "TLS": Attack(lambda: bytes.fromhex("16030100") + b"\xc8" + bytes(200), BAD, hang_up=True),
    "line ends, 4 MiB": Attack(lambda: b"\r\n" * 2**21 + GET + b"Connection: close\r\n\r\n", BAD | {200}),
    "bytes without meaning": Attack(lambda: bytes(range(256)) * 4096, BAD),
    "Expect: 100-continue": Attack(
        lambda: http("POST", "/v1/identify", b"{}", KIND, "Expect: 100-continue"), REFUSED | {100}
    ),
    "Expect: nonsense": Attack(lambda: http("POST", "/v1/identify", b"{}", KIND, "Expect: nonsense"), REFUSED | {417}),
    "a request id of 8 KiB": Attack(
        lambda: http("GET", "/healthz", b"", "X-Request-ID: " + "a" * 8192), frozenset({200})
    ),
    "a forwarded address": Attack(
        lambda: http("GET", "/healthz", b"", "X-Forwarded-For: " + "1.1.1.1, " * 5000), BAD | {200}
    ),
    "ranges": Attack(
        lambda: http("GET", "/docs-assets/swagger-ui.css", b"", "Range: bytes=" + "0-,1-," * 8000 + "2-"),
        BAD | {200, 206, 416},
    ),
}
