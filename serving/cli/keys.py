"""`hypersphere keys create`, `list`, `revoke`, `rotate`: who may use a service, and for what."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from serving.access.scopes import Scope
from serving.cli.terminal import err, out
from trainer.errors import UserError

_SECONDS = {"m": 60, "h": 3600, "d": 86_400}
_ONCE = "this is the only time that the key is shown; it is stored nowhere"

app = typer.Typer(no_args_is_help=True, help="Make and end the keys of a service, which follows within a second.")
Store = Annotated[Path, typer.Option("--store", envvar="HYPERSPHERE_STORE", help="Store of the service.")]
File = Annotated[
    Path | None, typer.Option("--keys", envvar="HYPERSPHERE_KEYS", help="File of keys; STORE-keys if not given.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]
GALLERY = Path("gallery.sqlite")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[list[Scope], typer.Option(help="What it is for; may be given several times.")],
    collection: Annotated[list[str] | None, typer.Option(help="For these only, rather than for all.")] = None,
    expires: Annotated[str | None, typer.Option(help="After how long, as in 90d, 12h or 30m; never if unset.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second; no limit if unset.", min=0.001)] = None,
    burst: Annotated[int, typer.Option(help="Requests that may come at once before the rate counts.", min=1)] = 20,
    store: Store = GALLERY,
    file: File = None,
) -> None:
    """Make a key, and print it once. The first one makes the file, and from then on the service asks for keys.

    Scopes: `read` compares, searches and lists; `enrol` adds, changes and erases subjects; `admin` makes and drops
    collections; `audit` reads metrics and the audit log. None includes another.

    Example: `hypersphere keys create door-3 --scope read --expires 90d --rate 20`
    """
    from serving.access.keys import opened

    lifetime = None if expires is None else _seconds(expires, "--expires")
    if lifetime == 0:
        raise UserError(f"--expires: a key would have expired at once after '{expires}'; give a time as in 90d")
    with opened(_path(store, file), make=True) as keys:
        token = keys.create(name, scope, collection, lifetime, rate, burst)
    out.print(token)
    err.print(_ONCE)


@app.command("list")
def list_(store: Store = GALLERY, file: File = None) -> None:
    """All keys, without the keys themselves: id, state, scopes, collections, when last used, name."""
    from serving.access.keys import opened

    with opened(_path(store, file)) as keys:
        known = keys.read()
    for key in known:
        scopes = ",".join(sorted(key.caller.scopes))
        only = "all" if key.caller.collections is None else ",".join(sorted(key.caller.collections))
        if key.revoked is not None:
            state = "revoked"
        elif key.expires is None:
            state = "good"
        else:
            state = f"{'until' if key.expires > time.time() else 'expired'} {_day(key.expires)}"
        rate = "no limit" if key.rate is None else f"{key.rate:g}/s"
        used = "never used" if key.last_used is None else f"last used {_day(key.last_used)}"
        out.print(f"{key.key_id}  {state}  {scopes}  {only}  {rate}  {used}  {key.name}")


@app.command()
def revoke(key_id: Id, store: Store = GALLERY, file: File = None) -> None:
    """End a key for good. A running service refuses it within a second."""
    from serving.access.keys import opened

    with opened(_path(store, file)) as keys:
        keys.revoke(key_id)
    out.print(f"{key_id} is revoked")


@app.command()
def rotate(
    key_id: Id,
    grace: Annotated[
        str, typer.Option(help="How long the key before stays good, as in 24h; 0m for not at all.")
    ] = "24h",
    store: Store = GALLERY,
    file: File = None,
) -> None:
    """Replace a key by a new one with the same id, scopes and limits. Both are good for a while.

    Example: `hypersphere keys rotate 0123456789ab --grace 12h`
    """
    from serving.access.keys import opened

    with opened(_path(store, file)) as keys:
        token = keys.rotate(key_id, _seconds(grace, "--grace"))
    out.print(token)
    err.print(_ONCE)


def _path(store: Path, file: Path | None) -> Path:
    from serving.access.keys import keys_path

    return file or keys_path(store)


def _seconds(text: str, option: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if found is None:
        raise UserError(
            f"{option}: '{text}' is no time; give a number of minutes, hours or days, as in 30m, 12h or 90d"
        )
    return int(found[1]) * _SECONDS[found[2]]


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
