"""A bucket in a real S3 server, for what is written to and read from addresses."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """The address of an empty bucket; who is started in the block finds the server in the environment."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Buckets belong to the process, not to its server: what an earlier one has left goes.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=30).close()
    with pytest.MonkeyPatch.context() as patch:
        settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "annie", "SECRET_ACCESS_KEY": "s3cret"}
        for key, value in ({"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"} | settings).items():
            patch.setenv(f"AWS_{key}", value)
        files = fsspec.filesystem("s3")
        files.clear_instance_cache()
        files = fsspec.filesystem("s3")
        files.mkdir(name)
        try:
            yield f"s3://{name}"
        finally:
            files.clear_instance_cache()
            server.stop()


def environment() -> dict[str, str]:
    """What a process needs to find the server, and this code."""
    import sys

    return os.environ | {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
