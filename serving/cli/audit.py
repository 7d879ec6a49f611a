"""`hypersphere audit verify`, `find`: the audit log looked into."""

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.terminal import out

app = typer.Typer(no_args_is_help=True, help="Look into the audit log of a service, which may be running.")
Folder = Annotated[Path, typer.Option("--audit", envvar="HYPERSPHERE_AUDIT", help="Folder of the audit log.")]


@app.command()
def verify(folder: Folder) -> None:
    """Follow the chain through all lines, and name the first that is broken.

    Whoever may write the folder, its key included, can make a chain that holds: note the hash that is printed somewhere
    else from time to time, and compare.

    Example: `hypersphere audit verify --audit audit`
    """
    from serving.access.chain import verify as follow

    head, first = follow(folder)
    if not head.number:
        out.print("the log has no lines yet")
        return
    moved = f"; lines 1 to {first - 1} were moved away" if first > 1 else ""
    out.print(f"lines {first} to {head.number} follow one another, and none is missing at the end{moved}")
    out.print(f"hash of line {head.number}: {head.hash}")


@app.command()
def find(
    folder: Folder,
    subject: Annotated[str, typer.Option(help="Whose lines, by the id that was enrolled.")],
    collection: Annotated[str, typer.Option(help="In which collection.")] = "default",
) -> None:
    """Print the lines about a subject, whose id stands in none of them.

    Example: `hypersphere audit find --audit audit --subject alice`
    """
    from serving.access.chain import find as about

    for line in about(folder, collection, subject):
        out.print(line.decode())
