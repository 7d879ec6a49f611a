"""A data set in a real S3 server: batches as from a folder; no credentials, no bucket."""

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer

from trainer.data.manifest import Manifest
from trainer.data.stream import DataConfig, Stream
from trainer.errors import UserError


@pytest.fixture(scope="module")
def bucket(data_set: Path) -> Iterator[str]:
    """The address of a copy of the data set."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "annie", "SECRET_ACCESS_KEY": "s3cret"}
        for name, value in ({"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"} | settings).items():
            patch.setenv(f"AWS_{name}", value)
        files = fsspec.filesystem("s3")
        files.mkdir("faces")
        files.put(f"{data_set}/", "s3://faces/people/", recursive=True)
        yield "s3://faces/people"
        files.clear_instance_cache()
    server.stop()


def test_batches_are_those_of_a_folder(bucket: str, data_set: Path, config: DataConfig, tmp_path: Path):
    config = config.model_copy(update={"cache": "none", "cache_dir": tmp_path / "cache"})
    far, near = (
        list(Stream(Manifest.read(address, config.remote_cache), "train", config, seed=1).batches(0))
        for address in (bucket, data_set)
    )
    assert [batch.keys for batch in far] == [batch.keys for batch in near]
    assert all(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(far, near, strict=True))


def test_a_missing_bucket_and_a_missing_set_are_told_apart(bucket: str):
    with pytest.raises(UserError, match=r"'s3://nowhere/people/manifest.json' cannot be read: the bucket is not there"):
        Manifest.read("s3://nowhere/people")
    with pytest.raises(UserError, match=r"'s3://faces/nobody/manifest.json' cannot be read: it is not there"):
        Manifest.read("s3://faces/nobody")


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot be read: there are no credentials; give credentials"):
        Manifest.read(bucket)
    fsspec.filesystem("s3").clear_instance_cache()
