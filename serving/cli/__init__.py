"""The one command line, `hypersphere`: reads options, calls a room, prints.

Each command imports what it needs when it runs, so that `--help` is quick and `serve` loads no torch.
"""

import sys

import typer

from serving.cli import audit, data, embedder, gallery, keys, losses
from serving.cli.evaluate import evaluate
from serving.cli.serve import PASSED_ON, serve
from serving.cli.terminal import fail
from trainer.errors import UserError

# Imported names of the packages that only the extra [serving] brings; whatever else is missing, [trainer] brings.
_SERVING = {"faiss", "fastapi", "fastapi_offline", "onnxruntime", "prometheus_client", "uvicorn"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train embeddings of very many identities, and serve them: **who is this, or is it nobody we know?**\n\n"
    "The order of a first use: `data import`, `train`, `export`, `evaluate`, `calibrate`, `serve`.",
)
app.add_typer(data.app, name="data")
app.add_typer(gallery.app, name="gallery")
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")
for command in (embedder.train, embedder.submit, embedder.export, evaluate, embedder.calibrate):
    app.command()(command)
app.command(context_settings=PASSED_ON, add_help_option=False)(serve)
app.command("losses")(losses.table)
app.add_typer(losses.plot, name="plot")


def main() -> None:
    """Run the command line; input that cannot be used is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        fail(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "trainer", "serving"):  # not an extra, but a fault of the program
            raise
        extra = "serving" if package in _SERVING else "trainer"
        fail(f"this command needs '{package}', which is not installed: run pip install 'hypersphere[{extra}]'")
        sys.exit(2)
