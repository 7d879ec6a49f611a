"""Bytes from and to any fsspec address, patiently: a broken transfer is tried again, a lasting fault is one sentence.

Addresses and the messages of others may carry passwords and tokens: neither is ever shown as it is.
"""

import posixpath
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from trainer.data.transfers import FAULTS, Cut, NoRanges, lasting, loaded, reason, remedy, status_of
from trainer.errors import UserError

ATTEMPTS = 5
_CHUNK = 2**18
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 10  # seconds; doubled after each further failure
PATIENCE_S = 120  # that a storage may be away from a run that writes to it
_CONNECT, _SILENCE = 10, 30  # seconds until a server that does not accept, or falls silent, counts as broken
_SLOWEST = 20_000  # bytes a second of one connection: a server that trickles counts as broken, too
# Each names one place. Others that fsspec knows lead to what nobody named, as zip://x::file:///etc/passwd does.
_SCHEMES = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "memory")
_ALLOWED = "give a folder, or s3://, gs:// or https://"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOST_SLASH = re.compile(r"^([a-z][a-z0-9+]+):/(?=[^/])")
Result = TypeVar("Result")


class OutOfReach(UserError):
    """The whole file cannot be had, whatever part of it is asked for."""


class NotThere(OutOfReach):
    """There is no file of this name."""


def text_of(address: str | Path) -> str:
    """The address as it was given: a Path, as command lines make of it, has one slash of the two behind "s3:"."""
    return _LOST_SLASH.sub(r"\1://", str(address)) if isinstance(address, Path) else address


def is_remote(address: str | Path) -> bool:
    """Whether it is an address such as s3://bucket/faces, rather than a path."""
    return "://" in text_of(address)


def shown(address: str | Path) -> str:
    """The address without user, password and query, for messages and logs."""
    text = text_of(address)
    if not is_remote(text):
        return text
    scheme, _, rest = text.partition("://")  # not by urlsplit, which refuses the malformed ones that are told of
    host, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def checked(address: str | Path) -> str:
    """The address as it was given, if it is one that may be read: a path, or a URL of one of the known kinds.

    Raises:
        UserError: it is of another kind, holds a second address ("::"), or is malformed.
    """
    text = text_of(address)
    if not is_remote(text):
        if "\0" in text:
            raise UserError(f"{text!r} is not a path: it has a zero byte in it; give a folder")
        return text
    scheme, _, rest = text.partition("://")
    told = repr(f"{scheme}://..." if "@" in rest else shown(text))  # who knows where a password ends in there
    if scheme not in _SCHEMES:
        raise UserError(f"{told} cannot be read: no such kind of address is known; {_ALLOWED}")
    if "::" in rest:
        raise UserError(f"{told} cannot be read: it has '::', which starts an address within an address; {_ALLOWED}")
    if _CONTROL.search(rest) or not _has_host(scheme, text):
        raise UserError(f"{told} cannot be read: it is malformed; {_ALLOWED}")
    return text


def _has_host(scheme: str, address: str) -> bool:
    """Whether it names a bucket, or a server and a port that is a number, where its scheme needs one."""
    try:
        parts = urlsplit(address)
        named = parts.hostname and parts.port != 0 if scheme.startswith("http") else parts.netloc
    except ValueError:
        return False
    return bool(named) or scheme in ("file", "memory")


def join(address: str, name: str) -> str:
    """The address of a file relative to a folder's; a query (a token, say) stays at the end."""
    folder, mark, query = address.partition("?") if address.startswith("http") else (address, "", "")
    protocol, _, path = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(f'{path}/{name}')}{mark}{query}"


def get(address: str) -> bytes:
    """A file that was put there, whole.

    Raises:
        UserError: as `put`; NotThere where there is none.
    """
    return _patiently(address, lambda files, path: bytes(files.cat_file(path)), doing="fetched", patience_s=PATIENCE_S)


def fetch(address: str, start: int = 0, stop: int | None = None, *, patient: bool = True) -> bytes:
    """The file's bytes from `start` to before `stop` (None: its end); not `patient`: in one attempt.

    Raises:
        OutOfReach: the file is not there or not ours to read, or the server failed in all attempts.
        UserError: these bytes of it cannot be had; others may.
    """

    def read(files: Any, path: str) -> bytes:
        if stop is None:
            if not (whole := bytes(files.cat_file(path))):
                raise Cut("it is empty")
            return whole
        data = bytes(files.cat_file(path, start=start, end=stop, timeout=_SILENCE + (stop - start) / _SLOWEST))
        if len(data) > stop - start:
            raise NoRanges("the server sends whole files where ranges are asked for")
        if len(data) < stop - start:
            raise Cut(f"it ended {stop - start - len(data)} bytes early")
        return data

    return _patiently(address, read, ATTEMPTS if patient else 1)


def fetch_small(address: str, most: int) -> bytes:
    """The file's bytes; of a file with more than `most` the first `most` + 1, whatever its server sends.

    Raises:
        UserError: as `fetch`.
    """

    def read(files: Any, path: str) -> bytes:
        if address.startswith("http"):  # servers may send all of a file where a part is asked for
            with files.open(path, block_size=0, size=1) as stream:  # a size, so that none is asked for first
                data = b"".join(_up_to(stream, most + 1))
        else:
            data = bytes(files.cat_file(path, start=0, end=most + 1))
        if not data:
            raise Cut("it is empty")
        return data

    return _patiently(address, read)


def _up_to(stream: Any, most: int) -> Iterator[bytes]:
    """What a stream gives, until it ends or there are `most` bytes."""
    since, got = time.monotonic(), 0
    while got < most and (part := stream.read(min(most - got, _CHUNK))):
        yield part
        got += len(part)
        if time.monotonic() - since > _SILENCE + got / _SLOWEST:
            raise TimeoutError


def listed(address: str) -> list[dict[str, Any]]:
    """What lies directly in a folder, as fsspec tells it: `name`, `type` ("file" or "directory"), `size` and others.

    Raises:
        UserError: as `fetch`.
    """
    return _patiently(address, lambda files, path: list(files.ls(path, detail=True)))


def matching(pattern: str) -> list[str]:
    """The addresses that a pattern with stars names, sorted; none, if the storage has no such files.

    Raises:
        UserError: as `fetch`.
    """
    return _patiently(pattern, lambda files, path: sorted(map(files.unstrip_protocol, files.glob(path))))


def size_of(address: str) -> int:
    """The file's size in bytes.

    Raises:
        UserError: as `fetch`; or the server does not tell it.
    """

    def ask(files: Any, path: str) -> int:
        size = files.info(path).get("size")
        if size is None:
            raise Cut("the server does not say how large it is")
        return int(size)

    return _patiently(address, ask)


def put(address: str, data: bytes, *, fresh: bool = False) -> bool:
    """Write a file, whole or not at all; `fresh`: only if there is none. Whether it was written.

    Raises:
        UserError: the storage refused it, or was away for `PATIENCE_S`.
    """

    def write(files: Any, path: str) -> bool:
        try:
            files.pipe_file(path, data, **({"mode": "create"} if fresh else {}))
        except FileExistsError:
            return False
        return True

    return _patiently(address, write, doing="written", patience_s=PATIENCE_S)


def below(address: str) -> dict[str, int]:
    """The bytes of each file in a folder and the folders in it, by name relative to it, as they are now; none, where
    there is no such folder.

    Raises:
        UserError: as `put`.
    """

    def find(files: Any, path: str) -> dict[str, int]:
        files.invalidate_cache()  # others write there, too
        try:
            found = files.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(f"{path.rstrip('/')}/"): int(one["size"]) for name, one in found.items()}

    return _patiently(address, find, doing="listed", patience_s=PATIENCE_S)


def remove(address: str) -> None:
    """Remove a file; one that is not there is removed already.

    Raises:
        UserError: as `put`.
    """

    def forget(files: Any, path: str) -> None:
        with suppress(FileNotFoundError):
            files.rm_file(path)
            files.invalidate_cache(path)

    _patiently(address, forget, doing="removed", patience_s=PATIENCE_S)


def _patiently(
    address: str,
    work: Callable[[Any, str], Result],
    attempts: int = ATTEMPTS,
    *,
    doing: str = "read",
    patience_s: float = 0.0,
) -> Result:
    """Try so often, and for so long at least."""
    attempt, until = 1, time.monotonic() + patience_s
    while True:
        try:
            return work(*_filesystem(address))
        except UserError:
            raise  # it is a ValueError
        except loaded(FAULTS) as error:
            final = lasting(error)
            if final or (attempt >= attempts and time.monotonic() >= until):
                tried = "" if final or attempt == 1 else f", {attempt} times"
                told = f"'{shown(address)}' cannot be {doing}: {reason(error)}{tried}; {remedy(error, doing)}"
                raise _kind(error)(told) from None  # a trace of the cause would show the address as it is
        delay = min(_FIRST_DELAY * 2 ** min(attempt - 1, 10), _LONGEST_DELAY)
        time.sleep(delay * random.uniform(0.5, 1))  # ranks do not come back in step
        attempt += 1


def _kind(error: BaseException) -> type[UserError]:
    if isinstance(error, FileNotFoundError):
        return NotThere
    return UserError if isinstance(error, Cut) or status_of(error) == 416 else OutOfReach


def _filesystem(address: str) -> tuple[Any, str]:
    """fsspec keeps one for each kind of options, and a new one after a fork."""
    checked(address)
    options: dict[str, Any] = {}
    try:
        import fsspec  # here, since programs that read no address start faster without it

        if address.startswith("http"):
            import aiohttp

            options = {
                "client_kwargs": {"timeout": aiohttp.ClientTimeout(None, sock_connect=_CONNECT, sock_read=_SILENCE)}
            }
        files, path = fsspec.core.url_to_fs(address, **options)
    except ImportError:
        package = "adlfs" if address.startswith(("az", "abfs")) else "'hypersphere[remote]'"
        raise UserError(
            f"'{shown(address)}' cannot be read: the package for such addresses is not installed; run pip install "
            f"{package}"
        ) from None
    return files, path
