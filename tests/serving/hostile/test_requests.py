"""One hostile request after another, at the settings that people get who set nothing."""

import unicodedata
from urllib.parse import quote

import pytest

from tests.serving.hostile.documents import DOCUMENTS, LARGE_DOCUMENTS
from tests.serving.hostile.forms import FORMS, LARGE_FORMS
from tests.serving.hostile.gallery import GALLERY, LARGE_GALLERY
from tests.serving.hostile.heads import HEADS
from tests.serving.hostile.names import NAMES
from tests.serving.hostile.site import ENROL, LONG, ROWS, listed
from tests.serving.hostile.wire import Attack

BATCH = 1 if LONG else 40  # small requests that are measured together, and together may cost no more than one


def _batches() -> dict[str, dict[str, Attack]]:
    batches = {name: {name: attack} for name, attack in (LARGE_DOCUMENTS | LARGE_FORMS | LARGE_GALLERY).items()}
    small = list((DOCUMENTS | FORMS | HEADS | NAMES | GALLERY).items())
    for start in range(0, len(small), BATCH):
        batch = dict(small[start : start + BATCH])
        batches[next(iter(batch)) + (f", and {len(batch) - 1} more" if len(batch) > 1 else "")] = batch
    return batches


BATCHES = _batches()


@pytest.mark.parametrize("title", BATCHES)
def test_a_hostile_request_costs_little_and_is_refused(site, title):
    site.attack(title, BATCHES[title])


def test_two_spellings_of_a_name_are_one_subject(site):
    """Composed or in pieces, it looks the same to whoever reads it."""
    vector = {"embeddings": [ROWS[0].tolist()]}
    with site.attacked("two spellings of a name") as outcome:
        for form in ("NFC", "NFD"):
            name = quote(unicodedata.normalize(form, "Ålesund"))
            answer = site.server.http.request(ENROL, f"/v1/subjects/{name}/samples", json=vector)
            outcome.answers.append(answer.status_code)
    found = [unicodedata.normalize("NFC", name) for name in listed(site.server)]
    assert found.count("Ålesund") == 1
    assert set(outcome.answers) <= {201, 422}
