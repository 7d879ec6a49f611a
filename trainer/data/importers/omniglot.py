"""Omniglot: handwritten characters of many alphabets, from its official layout.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction", Science
2015. `images_background/<Alphabet>/character<NN>/<id>_<drawer>.png`, 105 x 105 pixels, one bit each.
"""

import hashlib
import os
import re
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from trainer.atomic import fresh_file
from trainer.data.image import MAX_BYTES
from trainer.data.importers import Entry, Importer, ImportOptions, Listing, Progress, Read, choose
from trainer.data.importers.folder import read_folder
from trainer.errors import UserError

URL = "https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip"
MD5 = "68d2efa1b9178cc56df9314c21c6e718"
VARIABLE = "OMNIGLOT_ZIP"
HOLDOUT_ALPHABETS = 5
_MAX_MEMBERS = 1_000_000
# Anything above the alphabet is the root: usually images_background or images_evaluation, or nothing.
_LAYOUT = re.compile(r"(?:(?P<root>.*)/)?(?P<alphabet>[^/]+)/(?P<character>character\d+)/[^/]+\.png", re.IGNORECASE)
_EVALUATION = "images_evaluation"
_MAX_DOWNLOAD = 256 * 2**20
_CHUNK = 2**18
_TIMEOUT_S = 30


def list_omniglot(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """An identity is a character ("Greek/character03"); whole alphabets are held out.

    `options.holdout_alphabets` of them are chosen by the seed. By default those of images_evaluation are held out where
    it is part of the source, else 5.

    Args:
        source: a zip or folder; None: the zip that the environment variable OMNIGLOT_ZIP names, else a download from
            the official repository, checked by its published MD5.

    Raises:
        UserError: no source can be had, or it does not have the layout.
    """
    path = Path(source) if source is not None else _default(progress)
    if path.is_dir():
        sizes = {file.relative_to(path).as_posix(): _stamp(file) for file in path.rglob("*.png")}
    else:
        with _open(path) as archive:
            sizes = {member.filename: (member.file_size, str(member.CRC)) for member in archive.infolist()}
    entries, roots = _entries(path, sizes)
    held = _held_out(roots, options.holdout_alphabets, options.seed)
    return Listing(
        entries=entries,
        source=os.path.abspath(path),
        held_out=lambda names: [i for i, name in enumerate(names) if name.split("/")[0] in held],
        provenance={"source": path.name, "held_out_alphabets": ", ".join(sorted(held)), "licence": "MIT, B. Lake"},
    )


def read_omniglot(source: str, options: ImportOptions) -> Read:
    """Reads the members of a zip, or the files of a folder, by name."""
    if Path(source).is_dir():
        return read_folder(source, options)
    archive = _open(Path(source))
    return lambda name: _read(archive, archive.getinfo(name))


IMPORTER = Importer(list_omniglot, read_omniglot)


def _default(progress: Progress) -> Path:
    named = os.environ.get(VARIABLE)
    if not named:
        return fetch(URL, MD5, progress)
    if not Path(named).exists():
        raise UserError(f"{VARIABLE}='{named}' does not exist; name Omniglot's images_background.zip, or unset it")
    return Path(named)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"cannot read SOURCE '{path}': {error.strerror}; give Omniglot's zip or folder") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"SOURCE '{path}' is not a zip ({error}); give images_background.zip or its folder") from error
    members = len(archive.infolist())
    if members > _MAX_MEMBERS:
        archive.close()
        raise UserError(f"SOURCE '{path}' has {members} members; at most {_MAX_MEMBERS} are read")
    return archive


def _stamp(file: Path) -> tuple[int, str]:
    status = file.stat()
    return status.st_size, str(status.st_mtime_ns)


def _entries(path: Path, sizes: dict[str, tuple[int, str]]) -> tuple[list[Entry], dict[str, str]]:
    """The images by name, and the root of each alphabet."""
    entries: list[Entry] = []
    roots: dict[str, str] = {}
    for name, (size, stamp) in sorted(sizes.items()):
        match = _LAYOUT.fullmatch(name)
        if match is None or any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            continue
        root, alphabet = match["root"] or "", match["alphabet"]
        if roots.setdefault(alphabet, root) != root:
            raise UserError(
                f"the alphabet '{alphabet}' is in '{roots[alphabet]}' and in '{root}' of SOURCE '{path}'; "
                "give a source that holds each alphabet once"
            )
        entries.append(Entry(f"{alphabet}/{match['character']}", name, name, size=size, stamp=stamp))
    if not entries:
        raise UserError(
            f"SOURCE '{path}' does not have Omniglot's layout; "
            "expected images_background/<Alphabet>/character<NN>/<id>_<drawer>.png"
        )
    return entries, roots


def _held_out(roots: dict[str, str], count: int | None, seed: int) -> set[str]:
    evaluation = {alphabet for alphabet, root in roots.items() if root.split("/")[-1] == _EVALUATION}
    if count is None and evaluation:
        return evaluation
    count = min(HOLDOUT_ALPHABETS, len(roots) - 1) if count is None else count
    if not 0 <= count <= len(roots):
        raise UserError(f"--holdout-alphabets {count} is not allowed; give 0 to the {len(roots)} alphabets of SOURCE")
    return set(choose(list(roots), count, seed))


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """One member, in memory; nothing is ever extracted to a path that an archive names.

    Raises:
        UserError: larger than an image may be (whatever its header claims), encrypted or damaged.
    """
    name = member.filename
    if member.file_size > MAX_BYTES:
        raise UserError(f"image '{name}' has {member.file_size} bytes; at most {MAX_BYTES} are read")
    try:
        with archive.open(member) as file:
            return file.read(MAX_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"image '{name}' cannot be unpacked ({error}); pack the archive again") from error


def fetch(url: str, md5: str, progress: Progress | None = None) -> Path:
    """Download once into the cache folder, whole or not at all; a kept file is checked again.

    The folder is `$XDG_CACHE_HOME/hypersphere`, by default `~/.cache/hypersphere`. MD5 is what the publisher gives: it
    finds damage, and the connection (HTTPS) speaks for the origin.

    Raises:
        UserError: no network, or the file is not the published one.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = caches / "hypersphere" / "omniglot-images_background.zip"
    if path.exists() and _md5(path) == md5:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(path) as file:
            _download(url, file, progress)
            file.flush()
            found = _md5(Path(file.name))
            if found != md5:
                raise UserError(f"'{url}' has MD5 {found}, not the published {md5}; try again, or give the file itself")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download '{url}' ({reason}); get the file elsewhere and name it as SOURCE or in {VARIABLE}"
        ) from error
    return path


def _download(url: str, file: BinaryIO, progress: Progress | None) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        total = int(answer.headers.get("Content-Length") or 0)
        done = 0
        while chunk := answer.read(_CHUNK):
            done += len(chunk)
            if done > _MAX_DOWNLOAD:
                raise UserError(f"'{url}' sends more than {_MAX_DOWNLOAD} bytes; name the file itself as SOURCE")
            file.write(chunk)
            if progress is not None:
                progress("download", done, max(total, done))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
