"""An identity need not be an image: made-up voices, as vectors and as spectrograms, from an import to an answer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.answering.collections import Collection
from serving.answering.deciding import asked, embed
from serving.answering.enrolling import enrol
from serving.cli import embedder as commands
from serving.cli.evaluate import evaluate
from serving.errors import ApiError
from serving.service import Service
from serving.settings import from_values
from serving.wire.parsing import Sent
from tests.ranks import run_on_ranks
from trainer.assess import embed_split
from trainer.config import Config, load
from trainer.data.arrays import ArrayForm
from trainer.data.curate.clean import clean
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.preview import preview
from trainer.data.stream import Stream
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.run import check
from trainer.train import Record, run

VOICES, SAMPLES = 80, 5
SHAPES = {"vector": (12,), "spectrogram": (18, 20)}
# What differs between the two runs is what could treat samples that are no images otherwise.
RUNS = {
    "vector": ["backbone.name=mlp", "backbone.width=32", "data.decode_processes=1", "data.cache=none"],
    "spectrogram": ["backbone.name=convnet", "backbone.width=8", "data.identities_per_batch=8", "engine.bf16=true"],
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of each content; half of the voices are held out."""
    folder = tmp_path_factory.mktemp("sets")
    labels = np.repeat(np.arange(VOICES), SAMPLES)
    np.save(folder / "labels.npy", labels)
    for content, shape in SHAPES.items():
        random = np.random.default_rng(0)
        values = random.normal(size=(VOICES, *shape))[labels] + 0.2 * random.normal(size=(len(labels), *shape))
        np.save(folder / f"{content}.npy", (100 + 10 * values).astype(np.float16))
        options = ImportOptions(labels=str(folder / "labels.npy"), holdout_share=0.5, samples_per_shard=60)
        run_import("arrays", folder / f"{content}.npy", folder / content, options)
    return folder


def config(sets: Path, content: str, *overrides: str) -> Config:
    common = [f"data.path={sets / content}", f"run.out={sets / content}-run", "data.batch_size=40", "scaling.workers=1"]
    common += ["backbone.dimension=16", "run.epochs=8", "run.collapse=true", "run.eval_every=4", "run.log_every=1"]
    common += ["tracking.enabled=false", "loss.scale=16", "loss.margin=0.2", "head.optimizer.lr=2"]
    return load(None, [*common, *RUNS[content], *overrides])


def train(rank: int, sets: Path) -> None:
    for content in SHAPES:
        records: list[Record] = []
        run(config(sets, content), resume=False, report=records.append)
        measured = [record.values for record in records if record.kind == "metrics"][-1]
        assert measured["val/rank1"] > 0.5, measured  # chance: 1 / 40
        assert 0 < measured["neural_collapse/within_between"] < 10
        assert records[-1].values.keys() >= {"val/rank1"}


@pytest.fixture(scope="module")
def embedders(sets: Path) -> Callable[[str], Path]:
    """The folder of a trained, exported and calibrated Embedder by content."""
    run_on_ranks(1, train, sets)
    for content in SHAPES:
        check(config(sets, content))
        commands.export(run=sets / f"{content}-run", register=False)
        data, embedder = sets / content, sets / f"{content}-run" / "embedder"
        evaluate(embedder=embedder, data=data)
        commands.calibrate(embedder=embedder, data=data, fpir=0.2, fmr=0.01)
    return lambda content: sets / f"{content}-run" / "embedder"


@pytest.mark.parametrize("content", SHAPES)
def test_an_embedder_says_what_it_takes_and_tells_voices_apart(
    content: str, sets: Path, embedders: Callable[[str], Path]
) -> None:
    manifest = json.loads((embedders(content) / "manifest.json").read_text())
    assert manifest["preprocessing"] == {"content": content, "shape": list(SHAPES[content])}
    assert manifest["calibration"]["verify"]["source"].startswith("arrays, split 'val'")
    report = json.loads((embedders(content) / "evaluation" / "report.json").read_text())
    assert report["one_shot"]["rank1"] > 0.5


@pytest.mark.parametrize("content", SHAPES)
def test_batches_hold_the_values_as_they_were_given(content: str, sets: Path) -> None:
    given = np.load(sets / f"{content}.npy").astype(np.float32)
    data = config(sets, content).data
    batch = Stream(
        Manifest.read(sets / content), "train", data.model_copy(update={"identities_per_batch": None})
    ).batch(0, 0)
    assert batch.images_BCHW.shape == (40, *((12, 1, 1) if content == "vector" else (1, 18, 20)))
    flat = {row.tobytes() for row in given.reshape(len(given), -1)}
    got = batch.images_BCHW.numpy().reshape(40, -1)
    assert got.dtype == np.float32
    assert all(row.tobytes() in flat for row in got)
    assert len({row.tobytes() for row in got}) == 40


@pytest.fixture
def collection(embedders: Callable[[str], Path], tmp_path: Path) -> Iterator[Collection]:
    service = Service(from_values({"embedder": embedders("vector"), "store": tmp_path / "gallery.db"}))
    collection = service.collections.get("default")
    collection.gallery.load(stopping=lambda: False)
    yield collection
    service.close()


def test_a_service_takes_embeddings_of_vectors_and_no_images(
    collection: Collection, sets: Path, embedders: Callable[[str], Path]
) -> None:
    x_ND, labels_N = embed_split(Embedder.open(embedders("vector")), Manifest.read(sets / "vector").split("val"))
    one, another = x_ND[labels_N == 3][:2].tolist()
    enrol(collection, "ada", Sent(document=json.dumps({"embeddings": [one]}).encode()), None, "r")
    sent = Sent(document=json.dumps({"embedding": another, "below_threshold": True}).encode())
    found = collection.gallery.submit(asked(collection, sent).probes[0]).result()
    assert found.candidates[0].subject_id == "ada"
    with pytest.raises(ApiError, match="reads vectors") as refused:
        embed(collection, Sent(files={"images": [b"a picture"]}))
    assert (refused.value.status, refused.value.code) == (415, "no_images")
    assert refused.value.message.startswith("the model of this service reads vectors of shape [12], not images; send")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        (folder / "people" / f"p{number // 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / "people" / f"p{number // 2}" / f"{number}.png")
    run_import("folder", folder / "people", folder / "set", ImportOptions(holdout_share=0.5))
    return folder / "set"


def test_samples_and_what_reads_them_have_to_fit(
    sets: Path, images: Path, embedders: Callable[[str], Path], tmp_path: Path
) -> None:
    vectors = Embedder.open(embedders("vector"))
    for other, holds in ((images, "images"), (sets / "spectrogram", r"spectrograms of shape \[18, 20\]")):
        with pytest.raises(UserError, match=rf"holds {holds}, and vectors of shape \[12\] are read here"):
            embed_split(vectors, Manifest.read(other).split("val"))
    mix = f"data.mix=[{{path: {sets / 'vector'}}}, {{path: {images}}}]"
    with pytest.raises(UserError, match=r"holds images, and vectors of shape \[12\] are read here; choose another set"):
        Stream(Manifest.read(sets / "vector"), "train", config(sets, "vector", mix).data)
    with pytest.raises(UserError, match=rf"does not read the spectrograms of shape \[18, 20\] at '{sets}/spectrogram'"):
        commands.export(run=sets / "vector-run", to=tmp_path / "e", data=sets / "spectrogram", register=False)
    with pytest.raises(UserError, match=r"samples of shape \(2, 12\) .* takes float32 \[B, 12, 1, 1\]"):
        vectors.embed(np.zeros((2, 12), np.float32))


@pytest.mark.parametrize(
    ("content", "override", "words"),
    [
        (
            "vector",
            "augment.flip=true",
            r"augment\.flip changes images, but the data set holds vectors of shape \[12\]",
        ),
        ("spectrogram", "augment.erase=0.1", r"augment\.erase changes images, but"),
        (
            "vector",
            "backbone.name=convnet",
            r"samples of 1 x 1 are too small for backbone\.name=convnet.* take the mlp",
        ),
    ],
)
def test_what_is_for_images_is_refused_before_a_run_starts(sets: Path, content: str, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(config(sets, content, override, f"run.out={sets}/none"))


def test_a_preview_shows_images_only(sets: Path) -> None:
    found = config(sets, "vector")
    with pytest.raises(UserError, match=r"holds vectors of shape \[12\], and previews show images"):
        preview(found.data, found.augment, 0)


def test_vectors_are_cleaned_without_sheets(sets: Path, embedders: Callable[[str], Path], tmp_path: Path) -> None:
    opened = Embedder.open(embedders("vector"))
    clean(sets / "vector", tmp_path / "clean", lambda split: embed_split(opened, split), split="val")
    assert (tmp_path / "clean" / "suspects.csv").is_file()
    assert not list((tmp_path / "clean").glob("*.png"))


def test_a_form_has_the_shape_of_its_content() -> None:
    assert ArrayForm(content="spectrogram", shape=(4, 5)).shape_CHW == (1, 4, 5)
    with pytest.raises(ValueError, match=r"shape is \[4, 5\], but content is vector"):
        ArrayForm(content="vector", shape=(4, 5))
