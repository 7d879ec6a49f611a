"""What can go wrong with a transfer: whether it passes, and what to say of it without the address."""

import sys

_BUSY = (408, 425, 429)  # statuses of HTTP below 500 that pass
# What the libraries behind fsspec raise, by module: those that nobody imported raise nothing.
FAULTS = {
    # RuntimeError: aiohttp, where a connection broke between two reads
    "builtins": ("OSError", "RuntimeError", "ValueError"),
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
_NO_CREDENTIALS = {
    "botocore.exceptions": ("NoCredentialsError", "PartialCredentialsError"),
    "google.auth.exceptions": ("DefaultCredentialsError",),
}


class Cut(OSError):
    """Fewer or more bytes than asked for."""


class NoRanges(Cut):
    """The whole file instead of a range."""


def loaded(table: dict[str, tuple[str, ...]]) -> tuple[type[BaseException], ...]:
    """The classes of a table whose modules somebody has imported."""
    modules = [(sys.modules[module], names) for module, names in table.items() if module in sys.modules]
    return tuple(getattr(module, name) for module, names in modules for name in names)


def status_of(error: BaseException) -> int | None:
    """The answer's status in HTTP, where the error has one."""
    found = getattr(error, "status" if hasattr(error, "status") else "code", None)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else None


def lasting(error: BaseException) -> bool:
    """Whether another attempt would end alike."""
    status = status_of(error)
    refused = status is not None and 400 <= status < 500 and status not in _BUSY
    final = (FileNotFoundError, PermissionError, NoRanges, ValueError)
    return refused or isinstance(error, final) or _no_credentials(error)


def _no_credentials(error: BaseException) -> bool:
    return isinstance(error, loaded(_NO_CREDENTIALS))


def reason(error: BaseException) -> str:
    """What was wrong, in words that carry no address."""
    if _no_credentials(error):
        return "there are no credentials"
    if isinstance(error, FileNotFoundError):
        return "the bucket is not there" if "specified bucket" in str(error) else "it is not there"
    if isinstance(error, PermissionError):
        return "access is denied"
    if isinstance(error, Cut):
        return str(error)
    if isinstance(error, ValueError):
        return "the address is malformed, or a setting of its storage is"
    if isinstance(error, TimeoutError):
        return "the server is silent or too slow"
    status = status_of(error)
    if status == 416:
        return "it ends before the bytes that are wanted"
    return f"the server answers {status}" if status else getattr(error, "strerror", None) or type(error).__name__


def remedy(error: BaseException, doing: str) -> str:
    if _no_credentials(error) or isinstance(error, PermissionError) or status_of(error) in (401, 403):
        may = "write" if doing in ("written", "removed") else "read"
        return f"give credentials that may {may} it as the storage's own tools take them (environment or files)"
    if isinstance(error, FileNotFoundError | ValueError):
        return "check the address"
    return "try again later" + (", or fetch the data set whole" if doing == "read" else "")
