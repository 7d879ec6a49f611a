"""A file from the network, checked and kept."""

import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from trainer.atomic import fresh_file
from trainer.data.index import Progress
from trainer.errors import UserError

_MAX_BYTES = 256 * 2**20
_CHUNK = 2**18
_TIMEOUT_S = 30


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/hypersphere`, by default `~/.cache/hypersphere`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypersphere"


def fetch(url: str, md5: str, name: str, progress: Progress | None = None) -> Path:
    """Download once into the cache folder, whole or not at all; a kept file is checked again.

    MD5 is what the publisher gives: it finds damage, and the connection (HTTPS) speaks for the origin.

    Raises:
        UserError: no network, or the file is not the published one.
    """
    path = cache_folder() / name
    if path.exists() and _md5(path) == md5:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(path) as file:
            found = _download(url, file, progress)
            if found != md5:
                raise UserError(f"'{url}' has MD5 {found}, not the published {md5}; try again, or give the file itself")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download '{url}' ({reason}); get the file elsewhere and name it as SOURCE or in OMNIGLOT_ZIP"
        ) from error
    return path


def _download(url: str, file: BinaryIO, progress: Progress | None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        done = 0
        while chunk := answer.read(_CHUNK):
            done += len(chunk)
            if done > _MAX_BYTES:
                raise UserError(f"'{url}' sends more than {_MAX_BYTES} bytes; name the file itself as SOURCE")
            digest.update(chunk)
            file.write(chunk)
            if progress is not None:
                progress("download", done, max(total, done))
    return digest.hexdigest()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
