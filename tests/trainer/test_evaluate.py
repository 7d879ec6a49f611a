"""`hypersphere evaluate` from the command line: splits, protocols, doubts, two Embedders, the page in a browser."""

import csv
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from serving.cli import app
from serving.cli import embedder as commands
from tests.serving.conftest import onnx_model, write_embedder
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.embedder import Embedder, write_manifest
from trainer.errors import UserError
from trainer.evaluation import charts, verification
from trainer.evaluation.report import Report
from trainer.present import _names

IDENTITIES, SAMPLES = 60, 5


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "REPLICATES", 50)
    monkeypatch.setattr(charts, "MOST_MAPPED", 60)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy views of random pictures, and a list of them with attributes."""
    folder = tmp_path_factory.mktemp("images")
    with (folder / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "site", "sharpness"])
        for identity in range(IDENTITIES):
            face = np.random.default_rng(identity).integers(0, 256, (16, 16)).astype(float)
            (folder / f"p{identity:02d}").mkdir()
            for sample in range(SAMPLES):
                noise = np.random.default_rng((identity, sample)).normal(scale=20 + 30 * sample, size=face.shape)
                path = f"p{identity:02d}/{sample}.png"
                Image.fromarray((face + noise).clip(0, 255).astype(np.uint8)).save(folder / path)
                rows.writerow([path, f"p{identity:02d}", ("north", "south")[identity % 2], SAMPLES - sample])
    return folder


@pytest.fixture(scope="module")
def data(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "data"
    run_import("list", images / "list.csv", out, ImportOptions(holdout_share=0.5, seed=1))
    return out


@pytest.fixture(scope="module")
def embedders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("embedders")
    return [write_embedder(folder / name, onnx_model(seed)) for seed, name in enumerate(("first", "second"))]


def evaluate(*words: object) -> Result:
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def trained_on(embedder: Path, to: Path, digest: str) -> Path:
    """A copy of the Embedder that names what it was trained on."""
    shutil.copytree(embedder, to)
    manifest = Embedder.open(to).manifest
    write_manifest(to, manifest.model_copy(update={"provenance": {"class_digest": digest}}))
    return to


@pytest.fixture(scope="module")
def report(embedders: list[Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of everything that a split can show."""
    before, verification.REPLICATES = verification.REPLICATES, 50
    folder = tmp_path_factory.mktemp("report")
    calibrated = shutil.copytree(embedders[0], folder / "embedder")
    commands.calibrate(embedder=calibrated, data=data, fpir=0.1, fmr=0.01)
    what = ["--data", data, "--by", "site", "--quality", "sharpness"]
    evaluate("--embedder", calibrated, *what, "--report", folder)
    verification.REPLICATES = before
    return folder


def test_a_report_says_what_it_is_of(report: Path, embedders: list[Path]) -> None:
    found = Report.model_validate_json((report / "report.json").read_text())
    assert found.source == "list, split 'val'"
    assert found.model_id == Embedder.open(embedders[0]).model_id
    assert (found.identities, found.samples) == (30, 150)
    (groups,) = found.groups
    assert (groups.attribute, [group.value for group in groups.groups]) == ("site", ["north", "south"])
    assert [one.way for one in found.enrolments] == ["first", "maximum", "mean", "quality"]


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    pictures = {path.name for path in report.glob("*.png")}
    assert pictures == {
        f"{name}.png"
        for name in ("det", "roc", "scores", "cmc", "open_set", "growth", "groups_1", "map", "reliability")
    }
    assert page.count('class="chart"') == len(pictures)
    assert page.count('class="two"') == 16
    for words in ("threshold (FPIR)", "by site, at the threshold", "mAP@R", "Hardest false matches", "Model card"):
        assert words in page, words


def test_names_of_strangers_are_text_on_the_page(embedders: list[Path], images: Path, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>$\\frac$"
    for identity in range(12):
        name = f"{hostile}{identity}" if identity < 6 else f"p{identity}"
        shutil.copytree(images / f"p{identity:02d}", tmp_path / "faces" / name)
    run_import("folder", tmp_path / "faces", tmp_path / "set", ImportOptions(holdout_share=1))
    evaluate("--embedder", embedders[0], "--data", tmp_path / "set", "--report", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def show(browser: Any, page: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


SMALLEST = "return Math.min(...[...document.querySelectorAll('img.chart')].map(i => i.getBoundingClientRect().width))"
BRIGHTNESS = "return getComputedStyle(document.body)[arguments[0]].match(/[0-9.]+/g).slice(0, 3).map(Number)"


def test_the_page_is_read_in_a_browser(browser: Any, report: Path) -> None:
    """Wide and on a telephone, light and dark and printed: everything loads, fits the width, and can be told apart."""
    for width, scheme, media in ((1200, "light", "screen"), (360, "light", "screen"), (1200, "dark", "screen"),
                                 (360, "dark", "screen"), (794, "dark", "print")):  # fmt: skip
        show(browser, report / "index.html", width, scheme, media)
        loaded = browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert loaded, (width, scheme)
        assert browser.execute_script("return document.images.length") == 9 + 32
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (width, scheme)
        ink, paper = (np.mean(browser.execute_script(BRIGHTNESS, name)) for name in ("color", "backgroundColor"))
        dark = scheme == "dark" and media == "screen"
        assert (paper < 60 < 180 < ink) if dark else (ink < 60 < 180 < paper), (scheme, media, ink, paper)
        smallest = browser.execute_script(SMALLEST)
        assert smallest >= 250, (width, smallest)
    assert browser.get_log("browser") == []
    requests = [
        json.loads(entry["message"])["message"]["params"].get("request", {}).get("url", "")
        for entry in browser.get_log("performance")
    ]
    assert not [url for url in requests if url and not url.startswith(("file:", "data:"))]
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(pdf) > 50_000


def test_two_embedders_on_one_page(embedders: list[Path], data: Path, tmp_path: Path, browser: Any) -> None:
    done = evaluate("--compare", *embedders, "--data", data, "--report", tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert (found["first"], found["second"]) == ("first", "second")
    assert [one["what"] for one in found["differences"]][:3] == ["EER", "FNMR at FMR 0.01", "rank-1 error"]
    assert found["sentence"] in done.output.replace("\n", " ").replace("  ", " ")
    reports = [json.loads((tmp_path / name).read_text()) for name in ("report.json", "report_second.json")]
    assert [one["model_id"] for one in reports] == [Embedder.open(folder).model_id for folder in embedders]
    for one in found["differences"]:
        assert one["difference"] == pytest.approx(one["first"] - one["second"])
    page = (tmp_path / "index.html").read_text()
    assert found["differences"][0]["sentence"] in page
    show(browser, tmp_path / "index.html", 360)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("runs/a/embedder", "runs/b/embedder", ["a", "b"]),
        ("one", "two", ["one", "two"]),
        ("x/run/e", "y/run/e", ["x/run/e", "y/run/e"]),
        ("e", "e", ["e (A)", "e (B)"]),
    ],
)
def test_two_embedders_are_called_by_what_differs(first: str, second: str, names: list[str]) -> None:
    assert _names(Path(first), Path(second)) == names


def pairs_of(images: Path) -> list[tuple[str, str, bool]]:
    names = [f"p{identity:02d}/{sample}.png" for identity in range(20) for sample in range(2)]
    mated = [(names[2 * k], names[2 * k + 1], True) for k in range(20)]
    others = [(names[2 * k], names[(2 * k + 3) % 40], False) for k in range(20)]
    return [pair for two in zip(mated, others, strict=True) for pair in two]


def test_one_protocol_in_three_files_gives_the_same_figures(
    embedders: list[Path], images: Path, tmp_path: Path
) -> None:
    pairs = pairs_of(images)
    (tmp_path / "pairs.txt").write_text("".join(f"{a} {b} {int(same)}\n" for a, b, same in pairs))
    encoded = [(images / name).read_bytes() for a, b, _ in pairs for name in (a, b)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((encoded, [same for *_, same in pairs])))
    shutil.copytree(images, tmp_path / "beside")
    rows = "".join(f"{name},{name[:3]},{name}\n" for name in dict.fromkeys(n for a, b, _ in pairs for n in (a, b)))
    (tmp_path / "beside" / "all.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\n" + rows)
    (tmp_path / "beside" / "match.csv").write_text("".join(f"{a},{b}\n" for a, b, _ in pairs))
    (tmp_path / "beside" / "p.yaml").write_text("templates: all.csv\npairs: match.csv\n")
    found = []
    for protocol, more in (("pairs.txt", ["--images", images]), ("lfw.bin", []), ("beside/p.yaml", [])):
        evaluate("--embedder", embedders[0], "--protocol", tmp_path / protocol, *more, "--report", tmp_path / "out")
        found.append(Report.model_validate_json((tmp_path / "out" / "report.json").read_text()))
    figures = [one.verification.model_dump(exclude={"samples"}) for one in found]
    assert figures[0] == figures[1] == figures[2]
    assert found[0].verification.ten_fold is not None
    assert found[0].source == "protocol pairs.txt"
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('class="two"') == 16


def test_a_protocol_may_name_samples_of_a_set(embedders: list[Path], data: Path, tmp_path: Path) -> None:
    index = Manifest.read(data).split("val").index(0)
    rows = {label: np.flatnonzero(index.labels == label) for label in range(12)}
    lines = [f"{index.key(r[0])} {index.key(r[1])} 1\n" for r in rows.values()]
    lines += [f"{index.key(rows[k][0])} {index.key(rows[k + 1][1])} 0\n" for k in range(11)]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    evaluate("--embedder", embedders[0], "--protocol", tmp_path / "pairs.txt", "--data", data, "--report", tmp_path)
    found = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert (found.samples, found.verification.mated_pairs, found.verification.non_mated_pairs) == (24, 12, 11)
    (tmp_path / "pairs.txt").write_text("nobody 000000000 1\n")
    with pytest.raises(UserError, match="no sample of split 'val' has the key 'nobody'"):
        evaluate("--embedder", embedders[0], "--protocol", tmp_path / "pairs.txt", "--data", data)


def test_images_of_a_protocol_that_are_missing_or_damaged_are_named(embedders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("a.png b.png 1\n")
    with pytest.raises(UserError, match=r"a\.png' cannot be read: No such file"):
        evaluate("--embedder", embedders[0], "--protocol", tmp_path / "pairs.txt")
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([b"\x89PNG", b"nothing"], [True])))
    with pytest.raises(UserError, match="image 0"):
        evaluate("--embedder", embedders[0], "--protocol", tmp_path / "lfw.bin")


def test_the_training_set_itself_is_refused(embedders: list[Path], data: Path, tmp_path: Path) -> None:
    digest = Manifest.read(data).split("val").class_digest
    embedder = trained_on(embedders[0], tmp_path / "e", digest)
    with pytest.raises(UserError, match=r"was trained on the identities of split 'val' themselves"):
        evaluate("--embedder", embedder, "--data", data)


def test_identities_and_samples_of_the_training_are_told(
    embedders: list[Path], images: Path, data: Path, tmp_path: Path
) -> None:
    train = Manifest.read(data).split("train")
    embedder = trained_on(embedders[0], tmp_path / "e", train.class_digest)
    for name in [*train.classes.names()[:2], *Manifest.read(data).split("val").classes.names()[:20]]:
        shutil.copytree(images / name, tmp_path / "faces" / name)
    run_import("folder", tmp_path / "faces", tmp_path / "set", ImportOptions(holdout_share=1))
    evaluate("--embedder", embedder, "--data", tmp_path / "set", "--trained-on", data, "--report", tmp_path / "r")
    found = Report.model_validate_json((tmp_path / "r" / "report.json").read_text())
    assert (
        f"2 of 22 identities, such as '{train.classes[0]}', are names of the training split 'train'" in found.remarks[0]
    )
    assert "10 of 110 samples are in the training split 'train' byte for byte" in found.remarks[1]
    assert found.remarks[0].partition("'")[0] in (tmp_path / "r" / "index.html").read_text().replace("&#x27;", "'")
    evaluate("--embedder", embedder, "--data", data, "--report", tmp_path / "clean")
    assert Report.model_validate_json((tmp_path / "clean" / "report.json").read_text()).remarks == []


def test_calibration_tells_the_same_of_the_training(
    embedders: list[Path], images: Path, data: Path, tmp_path: Path
) -> None:
    """A threshold from identities that were trained on is too low for strangers."""
    train, val = (Manifest.read(data).split(name) for name in ("train", "val"))
    embedder = trained_on(embedders[0], tmp_path / "e", train.class_digest)
    for name in [*train.classes.names()[:2], *val.classes.names()[:20]]:
        shutil.copytree(images / name, tmp_path / "faces" / name)
    run_import("folder", tmp_path / "faces", tmp_path / "set", ImportOptions(holdout_share=1))
    options = ["--data", tmp_path / "set", "--trained-on", data, "--fpir", "0.1", "--gallery-size", "10"]
    done = CliRunner().invoke(app, ["calibrate", "--embedder", str(embedder), *map(str, options)])
    assert done.exit_code == 0, done.output
    told = "2 of 22 identities, such as"
    assert told in " ".join(done.output.split())
    calibration = Embedder.open(embedder).manifest.calibration
    assert calibration is not None
    assert told in calibration.identify.source
    itself = trained_on(embedders[0], tmp_path / "itself", val.class_digest)
    with pytest.raises(UserError, match="was trained on the identities of split 'val' themselves"):
        commands.calibrate(embedder=itself, data=data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes --embedder FOLDER, or --compare A B"),
        (["--embedder", "E"], "takes --data FOLDER, --protocol FILE, or both"),
        (["--embedder", "E", "--compare", "E", "E", "--data", "D"], "takes --embedder FOLDER, or --compare"),
        (["--embedder", "E", "--protocol", "p.txt", "--by", "site"], "leave them out with --protocol"),
        (["--compare", "E", "E", "--data", "D"], "name its folder with --report DIR"),
        (
            ["--embedder", "E", "--data", "D", "--by", "height"],
            "'height' is no attribute of the set, which has sharpness, site",
        ),
        (["--embedder", "E", "--data", "D", "--quality", "site"], "attribute 'site' is string, and numbers are wanted"),
    ],
)
def test_options_that_do_not_fit_are_told(words: list[str], message: str, embedders: list[Path], data: Path) -> None:
    names: dict[str, Path] = {"E": embedders[0], "D": data}
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(*(names.get(word, word) for word in words))


@pytest.mark.filterwarnings("default")
def test_page_and_figures_are_logged_beside_the_run(embedders: list[Path], data: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    run = client.create_run(client.create_experiment("e", artifact_location=(tmp_path / "store").as_uri())).info.run_id
    embedder = trained_on(embedders[0], tmp_path / "e", "0" * 64)
    provenance = {"mlflow_run_id": run, "tracking_uri": uri, "checkpoint_step": "7"}
    write_manifest(embedder, Embedder.open(embedder).manifest.model_copy(update={"provenance": provenance}))
    evaluate("--embedder", embedder, "--data", data, "--report", tmp_path / "r")
    assert client.get_metric_history(run, "evaluation/map_at_r")[0].step == 7
    names = {item.path for item in client.list_artifacts(run, "evaluation")}
    assert {"evaluation/index.html", "evaluation/det.png", "evaluation/report.json"} <= names
