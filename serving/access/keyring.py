"""Who is asking: the keys that a running service knows, kept in step with their file."""

import contextlib
import functools
import hmac
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serving.access.keys import TOKEN, Key, KeyFile, keys_path, opened
from serving.access.limits import RateLimit
from serving.access.scopes import Caller
from serving.errors import ApiError
from serving.settings import Settings
from serving.storage.mark import asked_for_keys, mark_path, note_keys
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
OPERATOR = Caller("operator")  # whose key is --api-key: every scope
LOOK_EVERY_S = 0.25  # a key that was revoked is refused within a second
STALE_S = 5.0  # without a look at the file for so long, no key in it is trusted
USED_EVERY_S = 60.0


def asks_for_keys(settings: Settings) -> bool:
    """Whether a service with these settings serves only those who have a key."""
    return settings.api_key is not None or settings.keys is not None or _path(settings).exists()


class Keyring:
    """Compares keys in constant time, as HMAC-SHA-256; no key itself is kept.

    Wrong keys are logged with their address and limited for each address. The right key passes all the same: no key is
    guessed at any rate that a server can answer, and otherwise whoever shares an address with honest clients could lock
    them out.

    A file of keys that appears while the service runs is taken into use; one that disappears leaves nobody in.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises UserError where the file of keys is named and missing, or cannot be used."""
        self._path = _path(settings)
        self._mac = hmac.new(secrets.token_bytes(32), digestmod="sha256")  # of this process, for the operator's key
        key = settings.api_key.get_secret_value() if settings.api_key else None
        self._operator = self._hash(key.encode()) if key else None
        self._wrong = RateLimit(settings.wrong_keys_a_minute / 60, settings.wrong_keys_a_minute, of="wrong keys")
        self._rates = RateLimit(whence="with this key")
        self._opened = contextlib.ExitStack()
        self._file: KeyFile | None = None
        self._version, self._keys, self._looked = -1, dict[str, Key](), time.monotonic()
        self._used, self._noted = dict[str, float](), time.monotonic()
        self._end = threading.Event()
        self.on_change: Callable[[str, str], object] = lambda what, key_id: None  # told of every key that changes
        self._marks, self._marked = functools.partial(_marks, settings.store), False
        if settings.keys is not None or self._path.exists():
            self._look()
        if not self.asked:
            self._refuse_loss(settings.anonymous)

    @property
    def asked(self) -> bool:
        """Whether everybody needs a key."""
        return self._operator is not None or self._file is not None

    def _refuse_loss(self, anonymous: bool) -> None:
        """Nobody needs a key: raises UserError where that was otherwise before, and nobody said that it is meant."""
        with contextlib.suppress(OSError):  # the store itself says what is wrong with it
            if not anonymous and any(map(asked_for_keys, self._marks())):
                raise UserError(
                    f"this store was served to those with a key only, and the file of keys '{self._path}' is missing; "
                    "put it back, name it with --keys, or add --anonymous to serve without keys"
                )
        log.warning("no key is asked for: everybody who reaches this service may search, enrol and erase")

    def check(self, headers: dict[bytes, bytes], client: str) -> Caller:
        """Whose key it is.

        Raises:
            ApiError: 401 without a key or with a wrong, expired or revoked one, 429 after many wrong ones from one
                address or too many requests with a good one, 503 while the file of keys cannot be read.
        """
        sent = sent_key(headers)
        if not sent:
            raise _refusal("key_missing", "this service asks for a key")
        if (named := TOKEN.fullmatch(sent)) is None:
            if self._operator is not None and hmac.compare_digest(self._hash(sent), self._operator):
                return OPERATOR
            raise self._refuse_wrong(client)
        if self._file is None:
            raise self._refuse_wrong(client)
        return self._known(sent, named[1].decode(), self._file, client)

    def _known(self, sent: bytes, key_id: str, file: KeyFile, client: str) -> Caller:
        if time.monotonic() - self._looked > STALE_S:
            message = "the keys cannot be read just now; try again"
            raise ApiError(503, "keys_unavailable", message, headers={"retry-after": "5"})
        key, digest, now = self._keys.get(key_id), file.hmac(sent), time.time()
        held = key.secrets if key is not None else ()
        good = [until for one, until in held if hmac.compare_digest(one, digest)]
        if key is None or not good:
            raise self._refuse_wrong(client)
        if any(end is not None and end <= now for end in (key.expires, *good)):
            raise _refusal("key_expired", f"the key {key_id} has expired; ask the operator of this service for another")
        if key.rate is not None:
            self._rates.take(key_id, key.rate, key.burst)
        self._used[key_id] = now
        return key.caller

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the file in a thread until the block ends."""
        thread = threading.Thread(target=self._watch, name="keys")
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            self._note_used()
            self._opened.close()

    def _watch(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            try:
                if self._file is not None or self._path.exists():
                    self._look()
                self._looked = time.monotonic()
                self._mark()
            except (UserError, OSError, sqlite3.Error) as error:
                log.error("the file of keys cannot be read, and soon no key of it is taken: %s", error)
                continue
            if time.monotonic() - self._noted > USED_EVERY_S:
                self._note_used()

    def _look(self) -> None:
        """Read the file where it has changed or was replaced."""
        if self._file is None or os.stat(self._path).st_ino != self._file.inode:
            now = contextlib.ExitStack()
            file = now.enter_context(opened(self._path))
            self._opened.close()
            self._opened, self._file, self._version = now, file, -1
        if (version := self._file.version()) != self._version:
            before, self._keys = self._keys, {key.key_id: key for key in self._file.read() if key.revoked is None}
            self._version = version
            for key_id in sorted(before.keys() | self._keys):
                old, new = before.get(key_id), self._keys.get(key_id)
                if old is None or new is None:
                    self.on_change("key made" if old is None else "key revoked", key_id)
                elif old.secrets != new.secrets:
                    self.on_change("key rotated", key_id)

    def _mark(self) -> None:
        """Note in the stores that they are served to those with a key, so that a loss of the file is noticed."""
        if self._file is not None and not self._marked:
            self._marked = True
            try:
                for path in self._marks():
                    note_keys(path)
            except OSError as error:
                log.warning("a store cannot note that it is served with keys only: %s", error)

    def _note_used(self) -> None:
        used, self._used = self._used, {}
        self._noted = time.monotonic()
        if used and self._file is not None:
            try:
                self._file.note_used(used)
            except sqlite3.Error as error:
                log.warning("when keys were last used cannot be noted in '%s': %s", self._path, error)

    def _hash(self, key: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(key)
        return mac.digest()

    def _refuse_wrong(self, client: str) -> ApiError:
        self._wrong.check(client)
        log.warning("a wrong key came from %s", client)
        return _refusal("key_wrong", "the key is not one of this service's; ask its operator for one")


def sent_key(headers: dict[bytes, bytes]) -> bytes:
    """The key of a request; empty without one."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()


def _path(settings: Settings) -> Path:
    return settings.keys or keys_path(settings.store)


def _marks(store: Path) -> list[Path]:
    """The marks of a store that exist; of a folder of collections, those of all."""
    real = Path(os.path.realpath(store))
    return sorted(real.glob("*.db-mark")) if real.is_dir() else [path for path in [mark_path(real)] if path.exists()]


def _refusal(code: str, problem: str) -> ApiError:
    message = f"{problem}; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
    return ApiError(401, code, message, headers={"www-authenticate": "Bearer"})
