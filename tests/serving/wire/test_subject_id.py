import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import ApiError
from serving.wire.parsing import PATTERN, enrollable, known


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "Ålesund 7",
        "a.b@c:d",
        "名前",
        "x" * 128,
        "...",
        "a+b&c=d?e#f",
        "Ω",
        "0",
        "\u0418\u0432\u0430\u043d\u043e\u0432 A. 2B",
        "\u03b1-particle",
        "\U00017000\U00017001",
    ],
)
def test_names_that_people_use(name):
    assert enrollable(name) == name
    assert re.search(PATTERN, name)


@pytest.mark.parametrize(
    "name",
    [
        ".", "..", "", " a", "a ", "a/b", "a\\b", "a\nb", "\x7f", "x" * 129, "\ufffd",
        "A\u030alesund",  # Å as A with a ring behind it
        "\uff21lice",  # full-width A
        "\ufb01n",  # a ligature
        "a\u200bb", "a\u202eb", "\u2066a", "a\ufeff", "a\u00adb",  # unseen, or turning the direction
        "\u0430lice", "Alic\u0435", "\u039fslo", "a  b",  # Cyrillic and Greek letters among Latin ones
        "a\ue000", "a\u0085b", "\U000e0041a",
        "a\u034f", "a\ufe0f", "\u1160", "a\u2800", "a\u17b4b", "a\U000e0100",  # marks, letters and symbols not seen
    ],
)  # fmt: skip
def test_names_that_look_like_others(name):
    with pytest.raises(ApiError) as refused:
        enrollable(name)
    assert refused.value.status == 422
    assert len(refused.value.message) < 400


def test_the_refusal_names_the_form_to_send():
    with pytest.raises(ApiError, match="'Alice'"):
        enrollable("\uff21lice")


@pytest.mark.parametrize("name", [".", "A\u030a", "a\u200bb"])
def test_what_an_older_version_enrolled_can_still_be_named(name):
    assert known(name) == name


@given(st.text(max_size=140))
def test_what_is_enrolled_has_one_spelling_and_shows(name):
    try:
        enrollable(name)
    except ApiError:
        return
    assert unicodedata.normalize("NFKC", name) == name
    assert re.search(PATTERN, name), "the documentation forbids what the service allows"
    assert not {unicodedata.category(character) for character in name} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
