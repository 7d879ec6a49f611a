"""`.bin` files of verification (LFW, CFP, AgeDB): a pickle of (images, same), read without running anything.

The file is taken apart into opcodes (`pickletools`), and only those that build lists, bytes, numbers and truth values
are followed. Whatever names a class or a function, or calls one, is refused before anything is built.
"""

import mmap
import pickletools
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from trainer.errors import UserError

MOST_BYTES = 4 << 30
MOST_STEPS = 20_000_000  # opcodes; a file of 1M images has some 4M
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "INT", "NONE"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_TEXT = {"SHORT_BINSTRING", "BINSTRING"}  # what Python 2 wrote images as
_IGNORED = {"PROTO", "FRAME", "STOP"}
_MARK = object()


def read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """The 2 P images of P pairs, encoded, and whether each pair shows one identity.

    Raises:
        UserError: the file is missing, too large, no pickle of this kind, or holds anything but images and labels.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"'{path}' has {size} bytes; a .bin of pairs of at most {MOST_BYTES} is read")
        with path.open("rb") as file:
            # Mapped, so that a length beyond the end of the file reserves nothing.
            found = _built(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else BytesIO())
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; name a .bin of pairs of images") from error
    return _checked(path, found)


def _built(path: Path, file: Any) -> object:
    """What the opcodes build, of lists, tuples, bytes and numbers alone."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step >= MOST_STEPS:
                raise UserError(f"'{path}' has more than {MOST_STEPS} steps; split it into smaller lists of pairs")
            _follow(opcode.name, argument, stack, memo)
    except _Refused as error:
        raise UserError(
            f"'{path}' holds '{error}' beyond images and labels, which could run a program; "
            "write it again as a pickle (protocol 4) of a list of bytes and a list of bool"
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise UserError(f"'{path}' is not a whole .bin of pairs: {error}; fetch it again") from error
    return stack[-1] if stack else None


class _Refused(Exception):
    """The name of an opcode that is not followed."""


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One step of the machine that pickles are written for, as far as lists of bytes and numbers need it."""
    if name in _NUMBERS:
        stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name, argument))
    elif name in _BYTES:
        stack.append(bytes(argument))
    elif name in _TEXT:
        stack.append(argument.encode("latin-1"))
    elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
        memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[int(argument)])
    elif name in _BUILDERS:
        _BUILDERS[name](stack)
    elif name not in _IGNORED:
        raise _Refused(name)


def _since_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
        if place < 0:
            raise ValueError("a mark is missing")
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    stack[-1].append(item)


def _appends(stack: list[Any]) -> None:
    items = _since_mark(stack)
    stack[-1].extend(items)


def _pair(stack: list[Any]) -> None:
    second, first = stack.pop(), stack.pop()
    stack.append((first, second))


_BUILDERS: dict[str, Callable[[list[Any]], None]] = {
    "MARK": lambda stack: stack.append(_MARK),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "LIST": lambda stack: stack.append(_since_mark(stack)),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE2": _pair,
    "APPEND": _append,
    "APPENDS": _appends,
}


def _checked(path: Path, found: object) -> tuple[list[bytes], list[bool]]:
    images, same = found if isinstance(found, tuple | list) and len(found) == 2 else (None, None)
    if not isinstance(images, list) or not all(isinstance(image, bytes) for image in images):
        raise UserError(f"'{path}' does not begin with a list of encoded images; fetch it again")
    if not isinstance(same, list) or not all(isinstance(label, int) and label in (0, 1) for label in same):
        raise UserError(f"'{path}' does not end with a list of True and False; fetch it again")
    if len(images) != 2 * len(same) or not same:
        raise UserError(
            f"'{path}' has {len(images)} images for {len(same)} pairs; a .bin has two a pair, fetch it again"
        )
    return images, [bool(label) for label in same]
