"""`hypersphere serve`: every setting of the service as an option and as a variable HYPERSPHERE_SETTING."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _option(setting: str, help_: str, *names: str, **more: Any) -> Any:
    """An option for one of `Settings`' fields; its name, and that of its variable, follow the field's."""
    flags = names or (f"--{setting.replace('_', '-')}",)
    variable = None if setting == "restored" else f"HYPERSPHERE_{setting.upper()}"
    return typer.Option(*flags, envvar=variable, show_envvar=False, help=help_, **more)


_access, _limit, _time = (partial(_option, rich_help_panel=panel) for panel in ("Who is served", "Limits", "Times"))


def serve(
    *,
    embedder: Annotated[Path, _option("embedder", "Folder that `export` wrote.", "--embedder", "-e")],
    store: Annotated[Path, _option("store", "SQLite file of the gallery; made if missing.")] = Path("gallery.sqlite"),
    host: Annotated[str, _option("host", "Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, _option("port", "0 for a free one.", min=0, max=65535)] = 8000,
    restored: Annotated[bool, _option("restored", "The store comes from a backup: take it as it is.")] = False,
    verify_threshold: Annotated[float | None, _option("verify_threshold", "Instead of the calibrated one.")] = None,
    identify_threshold: Annotated[float | None, _option("identify_threshold", "Instead of the calibrated one.")] = None,
    workers: Annotated[int, _option("workers", "Requests that compute at the same time.")] = 2,
    threads: Annotated[int, _option("threads", "Cores that one of them uses.")] = 1,
    api_key: Annotated[
        str | None, _access("api_key", "Key that requests must carry; better given as the variable.")
    ] = None,
    anonymous: Annotated[bool, _access("anonymous", "Serve every network without a key.")] = False,
    allowed_hosts: Annotated[str, _access("allowed_hosts", "Host names that clients use, by commas; * for any.")] = "",
    trusted_proxies: Annotated[str, _access("trusted_proxies", "Addresses whose X-Forwarded-For is believed.")] = "",
    below_threshold: Annotated[
        Literal["never", "on_request", "always"],
        _access("below_threshold", "When identify shows candidates that are no match."),
    ] = "on_request",
    rate_limit: Annotated[float | None, _limit("rate_limit", "Requests a second from one address.")] = None,
    rate_burst: Annotated[int, _limit("rate_burst", "Requests at once before that counts.")] = 20,
    wrong_keys_a_minute: Annotated[
        int, _limit("wrong_keys_a_minute", "Wrong keys from one address before it has to wait.")
    ] = 10,
    max_requests: Annotated[int, _limit("max_requests", "Requests under way.")] = 64,
    max_connections: Annotated[
        int, _limit("max_connections", "Open; the longest idle makes room for a new one.")
    ] = 512,
    max_body_bytes: Annotated[int, _limit("max_body_bytes", "Of a request.")] = 32 * 2**20,
    max_buffered_bytes: Annotated[int, _limit("max_buffered_bytes", "Of all bodies in memory.")] = 256 * 2**20,
    max_image_bytes: Annotated[int, _limit("max_image_bytes", "Of one image file.")] = 10 * 2**20,
    max_images: Annotated[int, _limit("max_images", "Images or embeddings in a request.")] = 32,
    max_pixels: Annotated[int, _limit("max_pixels", "In all images of a request.")] = 16_000_000,
    max_samples: Annotated[int, _limit("max_samples", "Of one subject.")] = 100,
    decode_cpu_s: Annotated[float, _time("decode_cpu_s", "Of CPU, to decode the images of a request.")] = 1.8,
    head_timeout_s: Annotated[float, _time("head_timeout_s", "For a request's head to arrive.")] = 10.0,
    body_timeout_s: Annotated[float, _time("body_timeout_s", "For its body to arrive.")] = 30.0,
    keep_alive_s: Annotated[int, _time("keep_alive_s", "An idle connection stays open.")] = 75,
    shutdown_s: Annotated[int, _time("shutdown_s", "From SIGTERM to the end.")] = 30,
    idempotency_hours: Annotated[float, _time("idempotency_hours", "An Idempotency-Key is remembered.")] = 24.0,
) -> None:
    """Answer over HTTP: verify (1:1) and identify (1:N) against a gallery; documentation at /docs.

    Each option can be set by a variable, too: --max-body-bytes by HYPERSPHERE_MAX_BODY_BYTES. Only --restored cannot,
    since it is for one start.

    Example: `hypersphere serve --embedder runs/faces/embedder --store faces.sqlite`
    """
    values = dict(locals())
    from serving.server import run
    from serving.settings import from_values
    from trainer.errors import UserError

    # The processes that decode strangers' images inherit the environment, and need no key.
    if os.environ.pop("HYPERSPHERE_API_KEY", None) == "":
        raise UserError("HYPERSPHERE_API_KEY is set but empty; put a key in, or unset it to serve only this machine")
    del values["host"], values["port"]
    run(from_values(values), host, port)
