"""The OpenAPI document against the one that was agreed on: `docs/openapi.json`."""

import json
import os
from pathlib import Path

import pytest

from serving.api import create_app
from serving.settings import from_values

AGREED = Path(__file__).resolve().parents[3] / "docs" / "openapi.json"
RENEW = "RENEW_OPENAPI=1 pytest tests/serving/wire/test_openapi.py"


@pytest.fixture
def document(embedder, tmp_path):
    app = create_app(from_values({"embedder": embedder, "store": tmp_path / "gallery.db"}))
    yield app.openapi()
    app.state.service.close()


def _agreed(document):
    """What clients rest on: without the version, and without what is there for every collection alike."""
    paths = {path: told for path, told in document["paths"].items() if "{collection}/" not in path}
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"] = {
                status: answer for status, answer in operation["responses"].items() if status < "4" or status == "412"
            }
    return document | {"paths": paths, "info": {"title": document["info"]["title"]}}


def test_the_document_is_the_one_that_was_agreed_on(document):
    found = json.dumps(_agreed(document), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("RENEW_OPENAPI"):
        AGREED.write_text(found)
    assert found == AGREED.read_text(), f"the API has changed; if it should have, renew its document with {RENEW}"


def test_every_path_is_there_for_every_collection_alike(document):
    for path, told in document["paths"].items():
        below = path.replace("/v1/", "/v1/collections/{collection}/", 1)
        if path.startswith("/v1/") and below in document["paths"]:
            for method, operation in document["paths"][below].items():
                collection, *parameters = operation.pop("parameters")
                assert collection["name"] == "collection"
                assert parameters == told[method].get("parameters", [])
                assert operation.pop("operationId") == f"{told[method]['operationId']}_in_collection"
                expected = {
                    name: value for name, value in told[method].items() if name not in ("parameters", "operationId")
                }
                expected["summary"] = operation["summary"]
                assert operation == expected
