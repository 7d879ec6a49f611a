import os
from pathlib import Path

import pytest

from trainer.data.importers import open_folder
from trainer.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_folders_are_identities_at_any_depth(tmp_path: Path):
    touch(tmp_path, "b/2.png", "b/10.png", "a/x/1.png", "a/y/1.png")
    with open_folder(tmp_path, 0, 0) as source:
        assert [(sample.identity, sample.name) for sample in source.samples] == [
            ("a/x", "a/x/1.png"),
            ("a/y", "a/y/1.png"),
            ("b", "b/10.png"),
            ("b", "b/2.png"),
        ]
        assert source.read(2) == b"b/10.png"


def test_litter_and_empty_folders_are_passed_over(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png", "a/.DS_Store", "a/Thumbs.db", ".git/config", "__MACOSX/a/1.png", "c/.hidden")
    (tmp_path / "empty").mkdir()
    with open_folder(tmp_path, 0, 0) as source:
        assert {sample.name for sample in source.samples} == {"a/1.png", "b/1.png"}


def test_links_to_folders_do_not_go_in_circles(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "a" / "1.png")
    with open_folder(tmp_path, 0, 0) as source:
        assert [sample.name for sample in source.samples] == ["a/1.png", "b/1.png", "b/2.png"]


def test_names_of_any_bytes_can_be_told(tmp_path: Path):
    touch(tmp_path, "ä/1.png", "b/1.png")
    (tmp_path / os.fsdecode(b"c\xff")).mkdir()
    (tmp_path / os.fsdecode(b"c\xff") / "1.png").write_text("x")
    with open_folder(tmp_path, 0, 0) as source:
        names = [sample.identity for sample in source.samples]
        assert sorted(names) == ["b", "c\\xff", "ä"]
        assert source.read(names.index("c\\xff")) == b"x"


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.01, 2), (0.25, 5), (1, 20)])
def test_share_held_out(tmp_path: Path, share: float, count: int):
    touch(tmp_path, *(f"{i}/1.png" for i in range(20)))
    with open_folder(tmp_path, share, 3) as source, open_folder(tmp_path, share, 3) as again:
        assert len(source.held_out) == count
        assert source.held_out == again.held_out
        assert source.held_out <= {sample.identity for sample in source.samples}


@pytest.mark.parametrize(("identities", "count"), [(2, 0), (3, 0), (4, 2), (5, 3)])
def test_neither_split_is_left_with_one_identity(tmp_path: Path, identities: int, count: int):
    touch(tmp_path, *(f"{i}/1.png" for i in range(identities)))
    with open_folder(tmp_path, 0.9, 3) as source:
        assert len(source.held_out) == count


def test_sources_that_cannot_be_used(tmp_path: Path):
    for wrong in (None, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a folder"), open_folder(wrong, 0, 0):
            pass
    with pytest.raises(UserError, match="holds no files"), open_folder(tmp_path, 0, 0):
        pass
    touch(tmp_path, "a/1.png", "loose.png")
    with pytest.raises(UserError, match=r"loose\.png' lies directly in SOURCE"), open_folder(tmp_path, 0, 0):
        pass
