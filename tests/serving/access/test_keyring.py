"""Who is let in: the operator's key, the keys of a file, and what happens as that file changes."""

import sqlite3
import time

import pytest

from serving.access import keyring as module
from serving.access.keyring import OPERATOR, Keyring
from serving.access.keys import opened
from serving.access.scopes import Scope
from serving.errors import ApiError
from serving.settings import from_values
from serving.storage.mark import Mark, Reached, asked_for_keys, make_mark, read_mark
from trainer.errors import UserError

KEY = "0123456789abcdef"


def ring(folder, **values):
    return Keyring(from_values({"embedder": "e", "store": folder / "s", **values}))


def bearer(token):
    return {b"authorization": f"Bearer {token}".encode()}


def refused(keys, token, status, code):
    with pytest.raises(ApiError) as error:
        keys.check(bearer(token), "10.0.0.1")
    assert (error.value.status, error.value.code) == (status, code)
    return error.value


@pytest.fixture
def make(tmp_path):
    """Makes a key in the file of the store `s`."""

    def make(scopes=(Scope.READ,), **more):
        with opened(tmp_path / "s-keys", make=True) as file:
            return file.create("a test", scopes, **more)

    return make


@pytest.fixture
def changed(tmp_path):
    def change(what, *arguments):
        with opened(tmp_path / "s-keys") as file:
            return getattr(file, what)(*arguments)

    return change


def id_of(token):
    return token.split("_")[1]


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": f"Bearer {KEY}".encode()},
        {b"authorization": f"bearer  {KEY} ".encode()},
        {b"x-api-key": KEY.encode()},
    ],
)
def test_the_operators_key_is_let_in_with_every_scope(headers, tmp_path):
    caller = ring(tmp_path, api_key=KEY).check(headers, "10.0.0.1")
    assert caller is OPERATOR
    assert (caller.scopes, caller.collections) == (frozenset(Scope), None)


@pytest.mark.parametrize(
    "headers",
    [
        *({}, {b"authorization": b"Bearer "}, {b"authorization": b"Basic abc"}, {b"authorization": b"Bearer wrong"}),
        *({b"x-api-key": KEY[:-1].encode()}, {b"x-api-key": (KEY + "0").encode()}, {b"x-api-key": b"\xff\xfe"}),
        *({b"x-api-key": f"hsk_{12 * '0'}_{64 * '0'}".encode()}, {b"x-api-key": b"hsk_"}),
    ],
)
def test_others_are_not(headers, tmp_path, make):
    make()
    keys = ring(tmp_path, api_key=KEY)
    with pytest.raises(ApiError) as error:
        keys.check(headers, "10.0.0.1")
    assert error.value.status == 401
    assert KEY not in str(vars(keys))


def test_a_key_of_the_file_has_its_scopes_and_no_others(tmp_path, make):
    token = make([Scope.READ, Scope.AUDIT], collections=["faces"])
    caller = ring(tmp_path).check(bearer(token), "10.0.0.1")
    assert (caller.key_id, caller.scopes) == (id_of(token), {Scope.READ, Scope.AUDIT})
    assert caller.collections == {"faces"}
    assert token.encode() not in (tmp_path / "s-keys").read_bytes()
    assert token[-64:].encode() not in (tmp_path / "s-keys").read_bytes()
    assert (tmp_path / "s-keys").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("place", [4, 17, -1])
def test_one_wrong_digit_is_a_wrong_key(tmp_path, make, place):
    token = make()
    wrong = list(token)
    wrong[place] = "1" if token[place] == "0" else "0"
    refused(ring(tmp_path), "".join(wrong), 401, "key_wrong")


def test_expired(tmp_path, make):
    token = make(lifetime_s=-1.0)
    assert id_of(token) in refused(ring(tmp_path), token, 401, "key_expired").message


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lets_in(keys, token):
    try:
        keys.check(bearer(token), f"10.0.0.{time.monotonic_ns() % 250}")
    except ApiError:
        return False
    return True


def test_a_running_service_follows_the_file(tmp_path, make, changed):
    keys = ring(tmp_path)
    assert not keys.asked
    with keys.watched():
        token = make()
        until(lambda: keys.asked)  # the first key closes the door
        assert lets_in(keys, token)
        second = changed("rotate", id_of(token), 3600)
        until(lambda: lets_in(keys, second))
        assert lets_in(keys, token)  # until the grace is over
        third = changed("rotate", id_of(token), 0)
        until(lambda: lets_in(keys, third))
        assert not lets_in(keys, token)
        assert not lets_in(keys, second)
        changed("revoke", id_of(token))
        until(lambda: not lets_in(keys, third))
        other = make()
        until(lambda: lets_in(keys, other))
        copy = (tmp_path / "s-keys").read_bytes()
        changed("revoke", id_of(other))
        until(lambda: not lets_in(keys, other))
        (tmp_path / "new").write_bytes(copy)  # a backup, put in its place
        (tmp_path / "new").rename(tmp_path / "s-keys")
        until(lambda: lets_in(keys, other))
    assert changed("read")[-1].last_used == pytest.approx(time.time(), abs=60)
    with pytest.raises(UserError, match="revoked for good"):
        changed("rotate", id_of(token), 0)


def test_a_file_that_goes_leaves_nobody_in(tmp_path, make, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 0.6)
    token = make()
    keys = ring(tmp_path)
    with keys.watched():
        assert lets_in(keys, token)
        (tmp_path / "s-keys").rename(tmp_path / "gone")
        until(lambda: not lets_in(keys, token))
        assert refused(keys, token, 503, "keys_unavailable").headers["retry-after"]
        (tmp_path / "gone").rename(tmp_path / "s-keys")
        until(lambda: lets_in(keys, token))


@pytest.mark.parametrize("store", ["s", "s/default.db"])
def test_a_file_that_is_lost_between_two_starts_is_noticed(tmp_path, make, store, caplog):
    path = tmp_path / f"{store}-mark"
    path.parent.mkdir(exist_ok=True)
    ring(tmp_path)
    make_mark(path, Reached(bytes(16), 7))
    ring(tmp_path)
    assert "no key is asked for" in caplog.text
    make()
    with ring(tmp_path).watched():
        until(lambda: asked_for_keys(path))
    assert read_mark(path) == Reached(bytes(16), 7)
    mark = Mark(path, Reached(bytes(16), 7))
    for revision in (8, 9):
        mark.move(revision)
    mark.close()
    (tmp_path / "s-keys").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"s-keys' is missing; put it back"):
        ring(tmp_path)
    assert ring(tmp_path, keys=tmp_path / "gone").asked
    assert not ring(tmp_path, anonymous=True).asked


def test_the_rate_of_a_key(tmp_path, make):
    limited, other = make(rate=0.01, burst=2), make()
    keys = ring(tmp_path)
    for _ in range(2):
        keys.check(bearer(limited), "10.0.0.1")
    error = refused(keys, limited, 429, "too_many_requests")
    assert "with this key" in error.message
    assert int(error.headers["retry-after"]) == 100
    for _ in range(50):
        keys.check(bearer(other), "10.0.0.1")


def test_wrong_keys_slow_down_and_good_ones_pass(tmp_path, make):
    token = make()
    keys = ring(tmp_path)
    for _ in range(10):
        refused(keys, f"hsk_{id_of(token)}_{64 * '0'}", 401, "key_wrong")
    assert "wrong keys" in refused(keys, f"hsk_{12 * '0'}_{64 * '0'}", 429, "too_many_requests").message
    assert lets_in(keys, token)


def test_a_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(UserError, match="hypersphere keys create"):
        ring(tmp_path, keys=tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"no database at all, but some text that is long enough" * 10])
def test_another_file_is_no_file_of_keys(tmp_path, content):
    (tmp_path / "s-keys").write_bytes(content)
    with pytest.raises(UserError, match="file of keys"):
        ring(tmp_path)


def test_anothers_database_is_not_written(tmp_path):
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(UserError, match="not a file of keys"), opened(tmp_path / "other", make=True):
        pass
    assert (tmp_path / "other").read_bytes() == before


@pytest.mark.parametrize("name", ["", "a" * 101, "a\nb", "\x1b[31m"])
def test_names_that_are_none(make, name, tmp_path):
    with pytest.raises(UserError, match="no name"), opened(tmp_path / "s-keys", make=True) as file:
        file.create(name, [Scope.READ])
    with pytest.raises(UserError, match="no collection"):
        make(collections=["../x"])
