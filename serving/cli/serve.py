"""`hypersphere serve`: the service, with its settings as options."""

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.embedder import EmbedderOption


def serve(
    *,
    embedder: EmbedderOption,
    store: Annotated[Path, typer.Option(help="SQLite file of the gallery; made if missing.")] = Path("gallery.sqlite"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    verify_threshold: Annotated[float | None, typer.Option(help="Instead of the calibrated one.")] = None,
    identify_threshold: Annotated[float | None, typer.Option(help="Instead of the calibrated one.")] = None,
    workers: Annotated[int, typer.Option(help="Requests that compute at the same time.")] = 2,
    threads: Annotated[int, typer.Option(help="Cores that one of them uses.")] = 1,
    rate_limit: Annotated[float | None, typer.Option(help="Requests a second from one address.")] = None,
    trusted_proxies: Annotated[str, typer.Option(help="Addresses whose X-Forwarded-For is believed.")] = "",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="HYPERSPHERE_API_KEY", show_envvar=True, help="Key that requests must carry; use the variable."
        ),
    ] = None,
) -> None:
    """Answer over HTTP: verify (1:1) and identify (1:N) against a gallery; documentation at /docs.

    Example: `hypersphere serve --embedder runs/faces/embedder --store faces.sqlite`
    """
    from serving.api import run
    from serving.settings import from_values

    values: dict[str, object] = {
        "embedder": embedder,
        "store": store,
        "verify_threshold": verify_threshold,
        "identify_threshold": identify_threshold,
        "workers": workers,
        "threads": threads,
        "rate_limit": rate_limit,
        "trusted_proxies": trusted_proxies,
        "api_key": api_key,
    }
    run(from_values(values), host, port)
