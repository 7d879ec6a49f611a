"""Export: ONNX Runtime equals torch, the folder is whole or absent, and a change after export is noticed."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from trainer.backbones import build, networks
from trainer.config import BackboneConfig
from trainer.data.image import Preprocessing
from trainer.embedder import MANIFEST_FILE, MODEL_FILE, Embedder, write_manifest
from trainer.errors import UserError
from trainer.export import export

GREY = Preprocessing(mode="L", height=28, width=28)
OMNIGLOT = Path(
    os.environ.get("OMNIGLOT_ZIP")
    or Path(__file__).parents[3] / "shared" / "data" / "omniglot" / "images_background.zip"
)


def drawings(count: int, preprocessing: Preprocessing = GREY) -> torch.Tensor:
    """Images [count, C, H, W] of letters, each at a place of its own."""
    images = []
    for index in range(count):
        image = Image.new(preprocessing.mode, (preprocessing.width, preprocessing.height), "white")
        ImageDraw.Draw(image).text((index % 7 + 2, index % 5 + 2), "ABCDEFGH"[index % 8], fill="black")
        images.append(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images))


def trained(name: str, preprocessing: Preprocessing = GREY, dimension: int = 16) -> nn.Module:
    """A backbone whose running statistics are those of real activations, as after training."""
    torch.manual_seed(0)
    backbone = build(
        BackboneConfig(name=name, dimension=dimension, width=8),
        preprocessing.channels,
        preprocessing.height,
        preprocessing.width,
    )
    with torch.no_grad():
        for _ in range(20):
            backbone(drawings(16, preprocessing).float() / 127.5 - 1)
    return backbone


class Flat(nn.Module):
    """A backbone that exports in no time, for the tests that are not about the network."""

    def __init__(self, dimension: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(28 * 28, dimension)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BD: torch.Tensor = self.linear(images_BCHW.flatten(1))
        return x_BD


@pytest.mark.parametrize(
    ("name", "mode"),
    [("convnet", "L"), ("convnet", "RGB"), ("mobilefacenet", "L"), ("iresnet18", "L"), ("resnet14", "L"), ("vit", "L")],
)
def test_onnx_equals_torch_at_any_batch_size(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "VIT_DEPTH", 2)  # ten more blocks of the same kind would only take longer
    preprocessing = Preprocessing(mode=mode, height=28, width=36)
    backbone = trained(name, preprocessing)
    manifest = export(backbone, preprocessing, tmp_path / "embedder", drawings(8, preprocessing), {"step": "7"})
    assert manifest == Embedder.open(tmp_path / "embedder").manifest
    assert manifest.dimension == 16
    assert manifest.provenance == {"step": "7"}
    session = onnxruntime.InferenceSession(tmp_path / "embedder" / MODEL_FILE, providers=["CPUExecutionProvider"])
    backbone.eval()
    for count in (1, 2, 5, 19):
        images_BCHW = drawings(count, preprocessing)
        with torch.no_grad():
            wanted_BD = F.normalize(backbone(images_BCHW.float() / 127.5 - 1), dim=1).numpy()
        (got_BD,) = session.run(["embeddings"], {"images": images_BCHW.numpy()})
        assert got_BD.dtype == np.float32
        np.testing.assert_allclose(got_BD, wanted_BD, atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(got_BD, axis=1), 1, atol=1e-5)
        assert count == 1 or np.abs(got_BD - got_BD[0]).max() > 1e-3  # the images matter


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason=f"no Omniglot at {OMNIGLOT}; set OMNIGLOT_ZIP")
def test_onnx_equals_torch_on_real_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(OMNIGLOT) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][::500]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("L").resize((28, 28)) for name in names]
    images_BCHW = torch.from_numpy(np.stack([np.asarray(image)[None] for image in images]))
    export(trained("convnet"), GREY, tmp_path / "embedder", images_BCHW, {})
    assert Embedder.open(tmp_path / "embedder").manifest.preprocessing == GREY


def test_the_caller_keeps_a_bf16_backbone_in_training_mode(tmp_path: Path) -> None:
    backbone = Flat().bfloat16().train()
    export(backbone, GREY, tmp_path / "embedder", drawings(2), {})
    assert backbone.training
    assert backbone.linear.weight.dtype == torch.bfloat16


def test_same_weights_same_digest_other_weights_or_preprocessing_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = Flat(), Flat()
    first = export(one, GREY, tmp_path / "first", drawings(2), {})
    again = export(one, GREY, tmp_path / "again", drawings(3), {"step": "1"})
    third = export(other, GREY, tmp_path / "third", drawings(2), {})
    assert first.model_id == again.model_id
    assert first.model_id != third.model_id


def test_the_file_says_nothing_about_the_machine(tmp_path: Path) -> None:
    export(trained("convnet"), GREY, tmp_path / "embedder", drawings(2), {})
    content = (tmp_path / "embedder" / MODEL_FILE).read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert b"export.py" not in content
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)


def test_a_change_after_export_is_noticed(tmp_path: Path) -> None:
    export(Flat(), GREY, tmp_path / "embedder", drawings(2), {})
    file = tmp_path / "embedder" / MODEL_FILE
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="changed after export"):
        Embedder.open(tmp_path / "embedder")


def test_a_difference_from_torch_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.export.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"differs from torch by \d"):
        export(Flat(), GREY, tmp_path / "embedder", drawings(2), {})
    assert list(tmp_path.iterdir()) == []


def test_nan_is_a_difference(tmp_path: Path) -> None:
    backbone = Flat()
    nn.init.constant_(backbone.linear.weight, float("nan"))
    with pytest.raises(RuntimeError, match="differs from torch by nan"):
        export(backbone, GREY, tmp_path / "embedder", drawings(2), {})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    first = export(Flat(), GREY, tmp_path / "embedder", drawings(2), {})
    with pytest.raises(UserError, match="is an embedder already"):
        export(Flat(), GREY, tmp_path / "embedder", drawings(2), {})
    assert Embedder.open(tmp_path / "embedder").manifest == first
    second = export(Flat(8), GREY, tmp_path / "embedder", drawings(2), {}, overwrite=True)
    assert Embedder.open(tmp_path / "embedder").manifest == second
    assert [path.name for path in tmp_path.iterdir()] == ["embedder"]


def test_overwriting_spares_a_folder_that_is_no_embedder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not an embedder"):
        export(Flat(), GREY, tmp_path, drawings(2), {}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    before = export(Flat(), GREY, tmp_path / "embedder", drawings(2), {}) if existing else None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.export.write_manifest", full)
        with pytest.raises(UserError, match=f"the disk of '{tmp_path}' is full, so that 'embedder' was not written"):
            export(Flat(), GREY, tmp_path / "embedder", drawings(2), {}, overwrite=True)
    if before is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["embedder"]
        assert Embedder.open(tmp_path / "embedder").manifest == before
        assert {path.name for path in (tmp_path / "embedder").iterdir()} == {MODEL_FILE, MANIFEST_FILE}


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"or more, uint8 \[B, 1, 28, 28\]"):
        export(Flat(), GREY, tmp_path / "embedder", drawings(2).float(), {})
    with pytest.raises(UserError, match=r"shape \(2, 1, 27, 28\)"):
        export(Flat(), GREY, tmp_path / "embedder", drawings(2)[:, :, 1:], {})
    with pytest.raises(UserError, match=r"shape \(0, 1, 28, 28\); give one real sample or more"):
        export(Flat(), GREY, tmp_path / "embedder", drawings(2)[:0], {})


def test_the_length_of_the_vectors_is_given_where_it_tells_quality(tmp_path: Path) -> None:
    backbone = Flat()
    manifest = export(backbone, GREY, tmp_path / "with", drawings(4), {}, norms="magface")
    plain = export(backbone, GREY, tmp_path / "without", drawings(4), {})
    assert (manifest.norms, plain.norms) == ("magface", None)
    images_BCHW = drawings(5)
    with torch.no_grad():
        wanted_B = backbone(images_BCHW.float() / 127.5 - 1).norm(dim=1).numpy()
    x_BD, norms_B = Embedder.open(tmp_path / "with", batch_size=2).embed_measured(images_BCHW.numpy())
    np.testing.assert_allclose(norms_B, wanted_B, rtol=1e-4)
    assert wanted_B.std() > 0
    again_BD, nothing = Embedder.open(tmp_path / "without").embed_measured(images_BCHW.numpy())
    assert nothing is None
    np.testing.assert_allclose(x_BD, again_BD, atol=1e-6)


def test_a_manifest_that_promises_lengths_which_the_model_does_not_give_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    manifest = export(Flat(), GREY, folder, drawings(4), {})
    write_manifest(folder, manifest.model_copy(update={"norms": "magface"}))
    with pytest.raises(UserError, match="gives float32 'embeddings' and 'norms'"):
        Embedder.open(folder)
