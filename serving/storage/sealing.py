"""Encryption of what a store keeps of subjects: AES-256-GCM, a data key for each, wrapped by the operator's master key.

A message is a nonce of 12 random bytes, the ciphertext, and a tag of 16. The master key wraps one message a subject, so
it may be used for 2^32 of them (NIST SP 800-38D, section 8.3). What a message is (name, vector, metadata, image) is
authenticated along with it. Erasing a subject overwrites its wrapped key, too: copies of its rows cannot be read then,
unless they are copies of the key's row as well.
"""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from serving.storage.rows import Damage
from trainer.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES, NONCE_BYTES, OVERHEAD = 32, 12, 28
SECRET_BYTES = 32


class Box:
    """What is under one key; without one, everything is stored as it is."""

    def __init__(self, key: bytes | None) -> None:
        self._cipher = None if key is None else _cipher(key)

    def seal(self, kind: bytes, content: bytes) -> bytes:
        """As it is stored."""
        if self._cipher is None:
            return content
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, kind)

    def open(self, kind: bytes, sealed: bytes) -> bytes:
        """What was sealed. Raises Damage where it was not, under this key and as this kind."""
        if self._cipher is None:
            return sealed
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], kind)
        except (InvalidTag, ValueError) as error:
            raise Damage(f"a {kind.decode()} cannot be decrypted") from error


def _cipher(key: bytes) -> "AESGCM":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


PLAIN = Box(None)


class Vault:
    """The master key of a store, or none. `overhead`: bytes by which what is stored is longer."""

    def __init__(self, master: bytes | None) -> None:
        self.encrypted, self.overhead = master is not None, 0 if master is None else OVERHEAD
        self.master = Box(master)
        self._opened = lru_cache(256)(self._open)

    def new_key(self) -> bytes:
        """A new data key, wrapped; empty without a master key."""
        return self.master.seal(b"key", os.urandom(KEY_BYTES)) if self.encrypted else b""

    def box(self, wrapped: bytes) -> Box:
        """What is under a data key. Raises Damage where it is not one of this master key's."""
        return self._opened(wrapped) if self.encrypted else PLAIN

    def _open(self, wrapped: bytes) -> Box:
        return Box(self.master.open(b"key", wrapped))

    def secret(self, stored: bytes, store: Path) -> bytes:
        """The store's secret. Raises UserError where this is not the store's master key."""
        if len(stored) == SECRET_BYTES and self.encrypted:
            raise UserError(
                f"the store '{store}' is not encrypted, but an --encryption-key-file was given; leave it out, or "
                "export the gallery and import it into a new store, with the key"
            )
        if len(stored) != SECRET_BYTES and not self.encrypted:
            raise UserError(f"the store '{store}' is encrypted; give the file of its key with --encryption-key-file")
        try:
            return self.master.open(b"secret", stored)
        except Damage as error:
            raise UserError(
                f"the store '{store}' is encrypted under another key than that of the --encryption-key-file; give the "
                "one that it was made with, or that its key was changed to"
            ) from error


def read_key(path: Path | None) -> bytes | None:
    """The master key of a file: 64 hexadecimal digits. None without a file. Raises UserError where it holds none."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"the key file '{path}' cannot be read: {reason}") from error
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise UserError(
            f"'{path}' is no key file: it must hold 64 hexadecimal digits; `hypersphere gallery key` makes one"
        )
    return bytes.fromhex(text)


def needed_key(path: Path | None) -> bytes:
    """As `read_key`, where there must be one."""
    found = read_key(path)
    if found is None:
        raise UserError("give the file of the gallery's key with --encryption-key-file")
    return found


def make_key(path: Path) -> None:
    """Write a new master key to a new file. Raises UserError where there is one already, or it cannot be made."""
    try:
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(os.urandom(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"the key file '{path}' cannot be made: {error.strerror}; name a new file with --out"
        ) from error
