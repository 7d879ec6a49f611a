"""What a training run sees: a sheet of samples, as they are read and as they are augmented, as a PNG file."""

import numpy as np
import torch
from PIL import Image

from trainer.data.augment import Augment, AugmentConfig, to_float
from trainer.data.curate.sheet import CELL, Row, draw
from trainer.data.manifest import Manifest
from trainer.data.remote import shown
from trainer.data.stream import DataConfig, Stream
from trainer.errors import UserError


def preview(config: DataConfig, augment: AugmentConfig, seed: int, *, samples: int = 8, versions: int = 8) -> bytes:
    """Draw the first samples of a run: in each row one of them, first without changes, then `versions` times changed.

    Raises:
        UserError: the data set cannot be read, or holds no images.
    """
    alone = {"batch_size": samples, "identities_per_batch": None, "cache": "none"}
    manifest = Manifest.read(config.path, config.remote_cache)
    if manifest.content != "image":
        raise UserError(f"'{shown(config.path)}' holds {manifest.holds}, and previews show images; choose another set")
    stream = Stream(manifest, config.train_split, config.model_copy(update=alone), seed=seed)
    batch = stream.batch(0, 0)
    change = Augment(augment, seed, stream.split.identities)
    columns = [to_float(batch.images_BCHW), *(change(batch, epoch, 0, samples)[0] for epoch in range(versions))]
    names = [stream.split.classes[label] if label >= 0 else "padding" for label in batch.labels_B.tolist()]
    texts = [f"{name}   (sample {key})" for name, key in zip(names, batch.keys, strict=True)]
    rows = [Row(text, [_cell(images[i]) for images in columns]) for i, text in enumerate(texts)]
    return draw(f"{shown(config.path)}, split '{config.train_split}': as read, then {versions} times augmented", rows)


def _cell(image_CHW: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Float pixels in -1..1 to a picture of the sheet, its sides in their ratio."""
    pixels = ((image_CHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.repeat(3, 2) if pixels.shape[2] == 1 else pixels)
    scale = CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
