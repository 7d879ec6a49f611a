"""Constants that check themselves: what they refuse is what a config refuses, and the message says what is allowed."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Annotated, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.checked import Checked, Within
from trainer.errors import UserError
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import LOSSES

VALUES = (-1, 0, 1, 3, 2000, -0.5, 0.5, 1.5, 1e9 + 0.5, math.nan, math.inf, "nonsense")


class Sample(Checked):
    share: Annotated[float, Within(gt=0, le=1)] = 0.5
    count: Annotated[int, Within(ge=1)] | None = None
    kind: Literal["a", "b"] | Literal["auto"] = "a"
    on: bool = True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 0.0}, "Sample: share=0.0 is not allowed; it must be a finite number more than 0 and at most 1"),
        ({"share": math.nan}, "share=nan is not allowed"),
        ({"share": True}, "share=True is not allowed"),
        ({"count": 0}, "count=0 is not allowed; it must be a whole number at least 1 or None"),
        ({"count": 1.0}, "count=1.0 is not allowed"),
        ({"kind": "c"}, "kind='c' is not allowed; it must be 'a' or 'b' or 'auto'"),
        ({"on": 1}, "on=1 is not allowed; it must be True or False"),
    ],
)
def test_what_is_refused_and_what_the_message_says(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        Sample(**changes)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_frozen_and_checked_again_when_replaced() -> None:
    sample = Sample(share=1, count=3, kind="auto")
    with pytest.raises(FrozenInstanceError):
        sample.share = 0.2  # type: ignore[misc]
    with pytest.raises(UserError):
        replace(sample, share=2.0)
    with pytest.raises(TypeError):
        Sample(0.5)  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Sample, HeadConfig, HeadOptimizerConfig, *LOSSES], ids=lambda kind: kind.__name__)
def test_a_config_refuses_the_same_values(kind: type[Checked]) -> None:
    """Field by field, both accept and give the same object, or both refuse."""
    config = TypeAdapter(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        for value in VALUES:
            if isinstance(value, int) and field.type is bool:
                continue  # YAML's 0 and 1 are taken for truth values
            try:
                alone: Checked | None = kind(**{field.name: value})
            except UserError:
                alone = None
            if alone is None:
                with pytest.raises(ValidationError):
                    config.validate_python({field.name: value})
            elif alone is not None and value == value:
                assert config.validate_python({field.name: value}) == alone
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        config.validate_python({"no_such_key": 1})
