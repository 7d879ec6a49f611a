"""The plainest kind: every folder that holds files is an identity."""

import os
import posixpath
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.data.image import MAX_BYTES
from trainer.data.importers import Entry, Importer, ImportOptions, Listing, PassedOver, Progress, Read
from trainer.data.manifest import MANIFEST_FILE
from trainer.data.remote import fetch_small, is_remote, join, listed, shown
from trainer.errors import UserError

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind
_CONNECTIONS = 16  # that each process reads an address with
_MAX_DEPTH = 32  # folders below an address: a listing that leads back to itself has no end
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated")  # what file systems tell of a file's content
_OTHER = {
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def list_folder(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """Every folder below `source` that holds files is an identity, named by its path.

    The litter of file managers and hidden files are passed over; hidden folders, links to folders (which could go in
    circles), links that lead nowhere and what is no file at all are passed over and named. Links to files are followed.
    Folders without files are no identities.

    Args:
        source: a folder of this machine, or an fsspec address of one, such as s3://bucket/faces.

    Raises:
        UserError: `source` is not a folder, or holds files directly; or an address goes too deep.
    """
    remote = source is not None and is_remote(source)
    if source is None or not (remote or os.path.isdir(source)):
        raise UserError(f"SOURCE '{source or ''}' is not a folder; give one that holds a folder of images per identity")
    passed_over: list[PassedOver] = []
    return Listing(
        entries=(_addressed if remote else _entries)(source, passed_over),
        source=source if remote else os.path.abspath(source),
        threads=_CONNECTIONS if remote else 1,
        provenance={
            "source": posixpath.basename(shown(source).rstrip("/")) if remote else Path(source).resolve().name,
        },
        drop_duplicates=True,
        passed_over=passed_over,
    )


def read_folder(source: str, options: ImportOptions) -> Read:
    """Reads files by their path below `source`."""
    if is_remote(source):
        return lambda place: fetch_small(join(source, place), MAX_BYTES)
    return lambda place: read_regular(f"{source}/{place}", place)


IMPORTER = Importer(list_folder, read_folder)


def read_regular(path: str, name: str) -> bytes:
    """The bytes of a file; at most one more than an image may have.

    Raises:
        UserError: it cannot be read, or is no longer a plain file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer for ever
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"image '{name}' is not a plain file; give an image file")
            return os.read(handle, min(status.st_size, MAX_BYTES) + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"image '{name}' cannot be read: {error.strerror}; give a readable image file") from error


def _entries(source: str, passed_over: list[PassedOver]) -> Iterator[Entry]:
    """The files of a folder before those of the folders in it, both by name."""
    waiting = [""]  # paths below the source, each with its slash; the next one last
    while waiting:
        folder = waiting.pop()
        identity = text(folder[:-1])
        folders: list[str] = []
        for found in _sorted(source, folder, passed_over):
            place = folder + found.name
            name = text(place)
            if found.name.lower() in _LITTER:
                continue
            if found.is_dir():
                reason = _why_not_entered(found)
                if reason is None:
                    folders.append(place + "/")
                else:
                    passed_over.append(PassedOver(name, reason))
            elif not found.name.startswith("."):
                status = _status(found, name, passed_over)
                if status is not None:
                    _check_folder(folder, f"{source}/{place}")
                    yield Entry(identity, name, place, size=status.st_size, stamp=str(status.st_mtime_ns))
        waiting += reversed(folders)


def _addressed(source: str, passed_over: list[PassedOver]) -> Iterator[Entry]:
    """As `_entries`, of an fsspec address."""
    told = unquote if source.startswith("http") else str  # links in web pages are quoted
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        folders: list[str] = []
        for name, found in _below(join(source, folder)):
            place = folder + name
            if found["type"] == "directory":
                if name.startswith("."):
                    passed_over.append(PassedOver(told(place), "is a hidden folder"))
                else:
                    folders.append(place + "/")
            elif not name.startswith("."):
                _check_folder(folder, join(shown(source), place))
                stamp = "".join(str(found[key]) for key in _STAMPS if key in found)
                yield Entry(told(folder[:-1]), told(place), place, size=found.get("size"), stamp=stamp)
        if folders and folder.count("/") == _MAX_DEPTH:
            raise UserError(
                f"'{join(shown(source), folders[0])}' lies more than {_MAX_DEPTH} folders below SOURCE; give an "
                "address whose listings do not lead back to themselves"
            )
        waiting += reversed(folders)


def _below(address: str) -> list[tuple[str, dict[str, Any]]]:
    """What lies directly in a folder, by name and without litter."""
    found: dict[str, dict[str, Any]] = {}
    for one in listed(address):
        name = _name_in(address, one["name"])
        empty = one["type"] == "file" and one["name"].endswith("/")  # how an object store notes an empty folder
        if name and name.lower() not in _LITTER and not empty:
            found[name] = one
    return sorted(found.items(), key=lambda item: item[0])


def _name_in(address: str, path: str) -> str:
    """The name of what is listed; empty for links of a web page to itself, to what it sorts by, or to elsewhere."""
    if not address.startswith("http"):
        return posixpath.basename(path.rstrip("/"))
    head, _, name = path.rstrip("/").rpartition("/")
    above = unquote(head.removesuffix("/."))
    # fsspec appends a link to the address as it stands, token and all.
    inside = above in (unquote(address.rstrip("/")), unquote(address.partition("?")[0].rstrip("/")))
    return name if inside and unquote(name) not in (".", "..") and not {"?", "#"} & set(name) else ""


def _check_folder(folder: str, path: str) -> None:
    if not folder:
        raise UserError(f"'{path}' lies directly in SOURCE; put every image into the folder of its identity")


def _sorted(source: str, folder: str, passed_over: list[PassedOver]) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(os.path.join(source, folder)) as found:
            return sorted(found, key=lambda one: one.name)
    except OSError as error:
        passed_over.append(PassedOver(text(folder), f"is a folder that cannot be read: {error.strerror}"))
        return []


def _why_not_entered(folder: "os.DirEntry[str]") -> str | None:
    if folder.name.startswith("."):
        return "is a hidden folder"
    if folder.is_symlink():
        return "is a link to a folder, and only links to files are followed"
    return "is a data set, not an identity" if os.path.isfile(os.path.join(folder, MANIFEST_FILE)) else None


def _status(file: "os.DirEntry[str]", name: str, passed_over: list[PassedOver]) -> os.stat_result | None:
    """Size and time of a plain file; None for what is none, which is noted."""
    try:
        status = file.stat()
    except OSError as error:
        what = "is a link that leads nowhere" if file.is_symlink() else "cannot be read"
        passed_over.append(PassedOver(name, f"{what}: {error.strerror}"))
        return None
    if stat.S_ISREG(status.st_mode):
        return status
    passed_over.append(PassedOver(name, f"{_OTHER.get(stat.S_IFMT(status.st_mode), 'is something')}, not a file"))
    return None


def check_name(path: str) -> None:
    """Refuse the name of a source that no manifest could hold; the names of samples are written out by `text`.

    Raises:
        UserError: it is not UTF-8.
    """
    if text(path) != path:
        raise UserError(f"the name of '{text(path)}' is not UTF-8; rename it, or make a link to it and name that")


def text(path: str) -> str:
    """A path as text that every file can hold; bytes that are no UTF-8 are written out as \\xNN."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
