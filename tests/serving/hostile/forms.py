"""Hostile multipart forms. A good picture is in none of them, so each must be refused."""

from tests.serving.hostile.wire import REFUSED, Attack, chunked, form, http, image_form, part

MIB = 2**20
END = b"--b--\r\n"


def _headers(*headers: bytes) -> bytes:
    return form(part(b"x", "image", *headers) + END)


def _disposition(value: bytes) -> bytes:
    return form(b"--b\r\nContent-Disposition: " + value + b"\r\n\r\nx\r\n" + END)


def _field(name: bytes, value: bytes) -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n"


def _nested() -> bytes:
    inside = b"--c\r\nContent-Disposition: file; filename=a\r\n\r\nx\r\n--c--\r\n"
    return form(part(inside, "image", b"Content-Type: multipart/mixed; boundary=c") + END)


_CHARSETS = (
    *("undefined", "idna", "punycode", "hex", "rot13", "zlib", "base64", "mbcs", "no-such", "\xff"),
    *("unicode_escape", "raw_unicode_escape", "utf-16", "utf-32", "utf-7"),
)
_FIELDS = (
    b"0",
    b"101",
    b"-1",
    b"5.0",
    b"1e1",
    b"1_0",
    b"+5",
    b"\xef\xbc\x95",
    b"\xd9\xa3",
    b"\xff",
    b"",
    b"9" * 4096,
    b"9" * 5000,
)
_BOUNDARIES = {
    "none": "",
    "empty": "; boundary=",
    "of 70": "; boundary=" + "b" * 70,
    "of 4 KiB": "; boundary=" + "b" * 4096,
    "of 60 KiB": "; boundary=" + "b" * 60_000,
    "quoted, unended": '; boundary="b',
    "of backslashes": '; boundary="' + "\\" * 30_000,
    "of semicolons": ";" * 60_000 + " boundary=b",
    "after 10,000 parameters": "; a=b" * 10_000 + "; boundary=b",
    "after 8,000 quotes": '; a="' * 8_000 + "; boundary=b",
    "twice": "; boundary=c; boundary=b",
    "of two lines": "; boundary*0=b; boundary*1=c",
    "encoded": "; boundary*=utf-8''%62",
    "not ASCII": "; boundary=\xe9",
}
_DISPOSITIONS = {
    "empty": b"",
    "no name": b'form-data; filename="a"',
    "a name without a file": b'form-data; name="image"',
    "a name of 100 KiB": b'form-data; name="' + b"A" * 100_000 + b'"; filename="a"',
    "an unknown name of 8 KiB": b'form-data; name="' + b"A" * 8_000 + b'"',
    "a name twice": b'form-data; name="image"; name="subject_id"; filename="a"',
    "filename* undefined": b"form-data; name=image; filename*=undefined''x",
    "filename* of NUL": b"form-data; name=image; filename*=utf-8''%00%ff",
    "filename* in pieces": b"form-data; name=image; " + b"; ".join(b"filename*%d*=utf-8''x" % n for n in range(500)),
    "name*": b"form-data; name*=utf-8''image; filename=a",
    "a path": rb'form-data; name=image; filename="..\..\/../etc/passwd"',
    "quotes": b'form-data; name=image; filename="' + b'\\"' * 4_000,
    "backslashes": b'form-data; name=image; filename="' + b"\\" * 8_000,
    "1,000 parameters": b"form-data; " + b"a=b; " * 1_000 + b"name=image; filename=a",
    "not UTF-8": b'form-data; name="\xff\xfe"; filename="\xff"',
    "attachment": b"attachment; name=image; filename=a",
}
# What a form may consist of, to the last of 30 MiB.
_FLOODS: dict[str, bytes] = {
    "preamble": b"x",
    "line ends": b"\r\n",
    "carriage returns": b"\r",
    "dashes": b"-",
    "almost boundaries": b"\r\n--",
    "boundaries": b"--b\r\n",
    "empty parts": b"--b\r\n\r\n\r\n",
    "small fields": b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n5\r\n',
    "small files": part(b"x"),
}

FORMS = {
    **{
        f"charset {name}": Attack(lambda name=name: form(part(b"x") + END, parameters=f"; boundary=b; charset={name}"))
        for name in _CHARSETS
    },
    **{
        f"boundary {name}": Attack(lambda text=text: form(part(b"x") + END, parameters=text), REFUSED | {431})
        for name, text in _BOUNDARIES.items()
    },
    **{f"disposition {name}": Attack(lambda value=value: _disposition(value)) for name, value in _DISPOSITIONS.items()},
    **{
        f"top_k {value[:9]!r}": Attack(lambda value=value: form(part(b"x") + _field(b"top_k", value) + END))
        for value in _FIELDS
    },
    "a part's header without a colon": Attack(lambda: _headers(b"A" * 1000)),
    "a part's length that lies": Attack(lambda: _headers(b"Content-Length: 99999999999")),
    "base64": Attack(lambda: _headers(b"Content-Transfer-Encoding: base64")),
    "a part's charset": Attack(lambda: _headers(b"Content-Type: text/plain; charset=undefined")),
    "a form in a form": Attack(_nested),
    "_charset_": Attack(lambda: form(_field(b"_charset_", b"undefined") + part(b"x") + END)),
    "no end": Attack(lambda: form(part(b"x"))),
    "mixed": Attack(
        lambda: http("POST", "/v1/identify", part(b"x") + END, "Content-Type: multipart/mixed; boundary=b")
    ),
}
LARGE_FORMS = {
    **{
        f"a form of {name}": Attack(lambda unit=unit: form(unit * (30 * MIB // len(unit))))
        for name, unit in _FLOODS.items()
    },
    **{
        f"a file of {name}": Attack(lambda unit=unit: image_form(unit * (9 * MIB // len(unit))))
        for name, unit in _FLOODS.items()
        if not unit.startswith(b"--b")
    },
    "100,000 headers in a part": Attack(lambda: _headers(*[b"A: b"] * 100_000)),
    "a part's header of 4 MiB": Attack(lambda: _headers(b"A: " + b"b" * 4 * MIB)),
    "a part's header name of 4 MiB": Attack(lambda: _headers(b"A" * 4 * MIB + b": b")),
    "30 MiB after the end": Attack(lambda: form(part(b"x") + END + b"x" * 30 * MIB)),
    "a file of 11 MiB": Attack(lambda: image_form(b"x" * 11 * MIB)),
    "chunks of one byte": Attack(lambda: chunked(part(b"x" * MIB) + END, 1)),
    "chunks of two bytes": Attack(lambda: chunked(b"x" * 2 * MIB, 2)),
}
