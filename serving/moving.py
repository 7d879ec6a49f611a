"""A gallery moved to another model: every kept image is embedded anew, into a new store."""

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.images.decoding import Decoders, ImageRefused, Limits
from serving.storage.changes import Attached
from serving.storage.metadata import decode
from serving.storage.sealing import Vault
from serving.storage.store import Store
from serving.upkeep import Line, Progress, Stats, pieces, reading, refuse_existing, restore
from trainer.data.image import Preprocessing
from trainer.embedder import Embedder
from trainer.errors import UserError

ANY = 2**31  # samples of a subject: the old gallery had them, too
Moved = tuple[Line, NDArray[np.uint8]]  # and what the model sees of its image [C, H, W]


def migrate(
    path: Path,
    embedder: Path,
    out: Path,
    jobs: int,
    progress: Progress,
    detector: Path | None = None,
    key: bytes | None = None,
) -> tuple[Stats, list[str]]:
    """Fill a new store with a gallery's subjects, their vectors made of the kept images; whole or not at all.

    Metadata and qualities come along; samples get new ids. A service may have the old store open: what is changed
    meanwhile is not moved.

    Args:
        jobs: images that are decoded at the same time, and threads of the model.
        detector: folder of the one that finds and aligns faces; the largest of an image is taken.
        key: the master key, of both stores.

    Returns:
        What the new store holds, and why samples were left out.

    Raises:
        UserError: `path` is no store, already of this model or damaged; the model reads no images; `out` exists; or no
            image could be used.
    """
    refuse_existing(out, "--out")
    model = Embedder.open(embedder, jobs)
    form = model.preprocessing
    if not isinstance(form, Preprocessing):
        raise UserError(f"the model '{embedder}' reads {form.reads}, not images; enrol the gallery's subjects anew")
    refused = list[str]()
    with contextlib.ExitStack() as opened:
        connection, row = opened.enter_context(reading(path))
        if row.model_id == model.model_id:
            raise UserError(f"the gallery '{path}' is of model {row.model_id} already; there is nothing to move")
        (vault := Vault(key)).secret(row.secret, path)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)))
        made = opened.enter_context(
            contextlib.closing(Store(folder / "store", model.model_id, model.manifest.dimension, key=key))
        )
        decoders = opened.enter_context(contextlib.closing(Decoders(form, jobs, Limits(seconds=60.0), detector)))
        pool, done = opened.enter_context(ThreadPoolExecutor(jobs)), 0
        for piece in pieces(connection, vault):
            _move(piece, list(_seen(piece, decoders, pool, refused)), model, made, refused)
            progress(done := done + len(piece), row.samples)
        if not made.state().samples:
            raise UserError(
                f"none of the {row.samples} samples of '{path}' has an image that can be used; images are kept by "
                f"`serve --keep-images` alone{': ' + refused[0] if refused else ''}"
            )
        made.close()
        return restore(folder / "store", out, lambda done, total: None, key), refused


def _seen(piece: list[Line], decoders: Decoders, pool: ThreadPoolExecutor, refused: list[str]) -> Iterator[Moved]:
    """The samples that have an image which can be used; the others are told of."""

    def see(line: Line) -> NDArray[np.uint8] | str:
        if line.image is None:
            return "its image was not kept"
        try:
            (picture,) = decoders.decode([line.image], ["kept"])
        except ImageRefused as error:
            return error.message
        return picture.pixels_FCHW[0] if picture.seen else "the detector finds no face in its image"

    for line, found in zip(piece, pool.map(see, piece), strict=True):
        if isinstance(found, str):
            refused.append(f"a sample of '{line.name.decode()}' is left out: {found}")
        else:
            yield line, found


def _move(piece: list[Line], seen: list[Moved], model: Embedder, made: Store, refused: list[str]) -> None:
    """Enrol samples under their new vectors."""
    good, x_BD = _embedded(seen, model, refused)
    items = [(line.name.decode(), x_D[None]) for line, x_D in zip(good, x_BD, strict=True)]
    attached = [
        Attached(
            decode(line.subject_metadata) if line.subject_metadata else None,
            [_number(line.sample.quality)],
            [decode(line.metadata)],
            [line.image],
        )
        for line in good
    ]
    if items:
        made.enrol_many(items, ANY, attached=attached)


def _number(quality: bytes) -> float | None:
    (number,) = np.frombuffer(quality, "<f8")
    return None if np.isnan(number) else float(number)


def _embedded(seen: list[Moved], model: Embedder, refused: list[str]) -> tuple[list[Line], list[NDArray[np.float32]]]:
    """Unit vectors; an image that gives none does not keep the others from theirs."""
    if not seen:
        return [], []
    try:
        return [line for line, _ in seen], list(model.embed(np.stack([pixels for _, pixels in seen])))
    except UserError as error:
        if len(seen) == 1:
            refused.append(f"a sample of '{seen[0][0].name.decode()}' is left out: {error}")
            return [], []
    middle = len(seen) // 2
    (left, x), (right, y) = (_embedded(half, model, refused) for half in (seen[:middle], seen[middle:]))
    return left + right, x + y
