"""`hypersphere serve`: every setting of the service as an option, as a variable HYPERSPHERE_SETTING, and in a file."""

import inspect
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# The panels of --help, and which settings they show; the others are in the first one.
_PANELS = {
    "Who is served": r"api_key|keys|audit\w*|tls_\w+|anonymous|allowed_hosts|trusted_proxies|below_threshold",
    "Limits": r"(max|rate|wrong)_\w+",
    "Times": r"\w+_(s|hours)",
}
_PREFIX = "HYPERSPHERE_"  # of the variables
_FILE = "YAML or TOML file of settings, by their names."
# For a command that reads its options itself.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(context: typer.Context) -> None:
    """Answer over HTTP: verify (1:1) and identify (1:N) against a gallery; documentation at /docs.

    Each option can be set by a variable, too, --max-body-bytes by HYPERSPHERE_MAX_BODY_BYTES, and in the file that
    --settings names, as max_body_bytes. An option goes before a variable, and a variable before the file. Only
    --restored is an option alone, since it is for one start. Several embedders are several --embedder, a list in the
    file, or in the variable with a : between them.

    Example: `hypersphere serve --embedder runs/faces/embedder --store faces.sqlite`
    """
    # The options are the fields of `Settings`, which only this command shall load: so it has a command line of its own.
    _start.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
    line = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    line.command(help=inspect.getdoc(serve))(_start)
    line(context.args, prog_name=context.command_path, standalone_mode=False)


def _start(*, host: str, port: int, settings: Path | None, **values: object) -> None:
    from serving.server.process import run
    from serving.settings import from_values
    from trainer.errors import UserError

    # The processes that decode strangers' images inherit the environment, and need no key.
    _refuse_misspelt(os.environ)
    if os.environ.pop("HYPERSPHERE_API_KEY", None) == "":
        raise UserError("HYPERSPHERE_API_KEY is set but empty; put a key in, or unset it to serve only this machine")
    run(from_values(values), host, port)


def _refuse_misspelt(variables: Mapping[str, str]) -> None:
    """Refuse a variable that is nearly a setting's. Others of our prefix are for other commands, or nobody's."""
    from trainer.errors import UserError

    known = {name.upper() for name in inspect.signature(_start).parameters}
    for variable in sorted(variables):
        name = variable.removeprefix(_PREFIX)
        if variable.startswith(_PREFIX) and name not in known and (near := get_close_matches(name, known, 1, 0.8)):
            raise UserError(f"the variable {variable} is no setting; the nearest is {_PREFIX}{near[0]}")


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """What the file says stands in for options and variables that are not given."""
    from serving.settings import read_file

    if path is not None:
        known = [parameter.name or "" for parameter in context.command.params]
        found = read_file(path, [name for name in known if name not in ("settings", "restored", "help")])
        one = found.get("embedder")
        context.default_map = found | {"embedder": [one]} if isinstance(one, str) else found
    return path


def _parameters() -> list[inspect.Parameter]:
    """The settings in their order, and behind the store where to listen."""
    from serving.settings import Settings

    parameters = [_of_setting(name, field) for name, field in Settings.model_fields.items()]
    at = 1 + next(place for place, parameter in enumerate(parameters) if parameter.name == "store")
    parameters[at:at] = [
        _parameter("settings", Path | None, None, is_eager=True, callback=_from_file, help=_FILE),
        _parameter("host", str, "127.0.0.1", help="Address to listen on; 0.0.0.0 for every network."),
        _parameter("port", int, 8000, help="0 for a free one.", min=0, max=65535),
    ]
    return parameters


def _of_setting(name: str, field: "FieldInfo") -> inspect.Parameter:
    """A field as an option; its bounds are checked with all the others, when the Settings are made."""
    # A key is read as text, and kept as a secret; of a store, a slash at the end is read.
    kind = {"api_key": str | None, "embedder": list[Path], "store": str}.get(name, field.annotation)
    default = inspect.Parameter.empty if field.is_required() else field.default
    help_ = (field.description or "").replace("null:", "unset:").replace("`export`", "export")
    panel = next((title for title, names in _PANELS.items() if re.fullmatch(names, name)), None)
    more = dict[str, str]()
    if name == "store":
        default, more["metavar"] = "gallery.sqlite", "<Path>"
    return _parameter(name, kind, default, help=f"{help_[:1].upper()}{help_[1:]}.", rich_help_panel=panel, **more)


def _parameter(name: str, kind: Any, default: Any, **more: Any) -> inspect.Parameter:
    """The names of the option and of its variable follow the setting's."""
    flags = (f"--{name.replace('_', '-')}", *(["-e"] if name == "embedder" else []))
    variable = None if name == "restored" else f"{_PREFIX}{name.upper()}"
    option = typer.Option(*flags, envvar=variable, show_envvar=False, **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
