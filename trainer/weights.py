"""The weights of a trained backbone, from a run, one of its checkpoints, or an Embedder."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.checkpoint import CHECKPOINTS, MANIFEST, Checkpoint, go_on, open_checkpoint
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.storage import Folder

WEIGHTS_FILE = "backbone.safetensors"  # of an Embedder: weights and buffers alone
BACKBONE = "backbone"  # parts of a checkpoint: with the optimizer's state
DIGEST = "weights_sha256"  # in an Embedder's provenance
Which = Literal["trained", "ema"]


@dataclass(frozen=True)
class Stored:
    """A checkpoint, and the engine's state in it."""

    checkpoint: Checkpoint
    state: dict[str, Tensor]

    def weights(self, which: Which) -> dict[str, Tensor]:
        """Weights and buffers by their name in the backbone.

        Args:
            which: as they were trained, or their moving average.

        Raises:
            UserError: there is no average.
        """
        tensors = [(*name.partition("."), tensor) for name, tensor in self.state.items()]
        weights = {name: tensor for kind, _, name, tensor in tensors if kind in ("weight", "buffer")}
        if which == "trained":
            return weights
        average = {name: tensor for kind, _, name, tensor in tensors if kind == "ema" and name in weights}
        if not average:
            raise UserError(
                f"'{self.checkpoint.folder}' has no moving average of the weights: train with engine.ema_decay above "
                "0, or take the trained weights"
            )
        return weights | average


def find(place: Folder, on_trouble: Callable[[str], None] = lambda text: None) -> Stored | None:
    """The newest checkpoint of a run that can be read, or the one that the folder is.

    Args:
        on_trouble: told of a damaged checkpoint that is passed over.
    """
    if MANIFEST in place.sizes():
        found = open_checkpoint(place)
        return Stored(found, found.parts(BACKBONE))
    states: list[dict[str, Tensor]] = []
    newest = go_on(place / CHECKPOINTS, Group(), lambda found: states.append(found.parts(BACKBONE)), on_trouble)
    return None if newest is None else Stored(newest, states[-1])


def read_weights(folder: Path, which: Which) -> dict[str, Tensor]:
    """Weights and buffers by their name in the backbone.

    Args:
        folder: a run's, a checkpoint's or an Embedder's; an Embedder's are of one kind.

    Raises:
        UserError: it is none of them, or its weights are not as they were written.
    """
    if (folder / WEIGHTS_FILE).is_file() and not (folder / MANIFEST).is_file():
        return _of_embedder(folder)
    if (found := find(Folder.at(folder))) is None:
        raise UserError(
            f"'{folder}' holds no weights to begin with: name the folder of a run, of a checkpoint, or of an embedder "
            f"with {WEIGHTS_FILE} (one that was exported before there was such a file has none: export it again)"
        )
    return found.weights(which)


def _of_embedder(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        written = json.loads((folder / "manifest.json").read_text())["provenance"][DIGEST]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != written:
            raise UserError(f"'{path}' is not as it was exported: SHA-256 {found}, written as {written}; export again")
        return dict(load_file(path))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"'{folder}' is not a whole embedder ({error}); export it again") from error


def put(weights: dict[str, Tensor], backbone: nn.Module, source: Path) -> None:
    """Load them, every one.

    Raises:
        UserError: names or shapes are another network's; nothing was changed.
    """
    own = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    for name in sorted(own.keys() | weights.keys()):
        there = tuple(weights[name].shape) if name in weights else "not there"
        if there != own.get(name):
            raise UserError(
                f"the weights in '{source}' are of another backbone: '{name}' is {there} there and "
                f"{own.get(name, 'not there')} here; set backbone.* and the data's form as they were for these weights"
            )
    backbone.load_state_dict(weights)
