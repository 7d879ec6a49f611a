from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.cli import data as commands
from trainer.data.augment import AugmentConfig
from trainer.data.preview import preview
from trainer.data.stream import DataConfig
from trainer.errors import UserError


def cells(sheet: bytes) -> np.ndarray:
    """[rows, columns, 96, 96] of a sheet of 3 rows and 4 columns; see `curate.sheet`."""
    grey = np.asarray(Image.open(BytesIO(sheet)).convert("L"))
    tops, lefts = (22 + 12 + 22 + 124 * np.arange(3), 12 + 102 * np.arange(4))
    return np.stack([[grey[top : top + 96, left : left + 96] for left in lefts] for top in tops])


def test_first_column_is_unchanged_and_the_others_are_augmented(data_set: Path):
    config = DataConfig(path=data_set, height=12, width=12, identities_per_batch=2, batch_size=8)
    plain = cells(preview(config, AugmentConfig(), 3, samples=3, versions=3))
    changed = cells(preview(config, AugmentConfig(erase=1, flip=True), 3, samples=3, versions=3))
    assert all((row == row[0]).all() for row in plain)
    assert not (plain[0, 0] == plain[1, 0]).all()
    np.testing.assert_array_equal(plain[:, 0], changed[:, 0])
    for row in changed:
        assert len({cell.tobytes() for cell in row}) == 4


def test_the_command_writes_a_picture(data_set: Path, tmp_path: Path):
    overrides = [f"data.path={data_set}", "data.height=16", "data.width=12"]
    commands.preview(overrides, to=tmp_path / "sheet.png", samples=3, versions=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(UserError, match=r"nowhere/sheet\.png' cannot be written: No such file"):
        commands.preview(overrides, to=tmp_path / "nowhere" / "sheet.png", samples=3, versions=2)
    with pytest.raises(UserError, match="is not a data set"):
        commands.preview([f"data.path={tmp_path}"], to=tmp_path / "sheet.png", samples=3, versions=2)
