"""Constants that check themselves, with Python alone: frozen dataclasses whose numbers carry their bounds.

Where a config is read from YAML, pydantic takes the same bounds from the same annotations: they are written once, and
a loss or the head can be used where pydantic is not installed.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, dataclass_transform, get_args, get_origin, get_type_hints

from trainer.errors import UserError

_WORDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


@dataclass(frozen=True, kw_only=True)
class Within:
    """The bounds of a number, in `Annotated[float, Within(gt=0, le=1)]`."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    # By this name pydantic knows metadata that stands for several bounds, and then iterates over it.
    __is_annotated_types_grouped_metadata__: ClassVar[Literal[True]] = True

    def _given(self) -> dict[str, float]:
        return {name: bound for name in _WORDS if (bound := getattr(self, name)) is not None}

    def __iter__(self) -> Iterator[object]:
        import annotated_types

        return (getattr(annotated_types, name.capitalize())(bound) for name, bound in self._given().items())

    def __contains__(self, value: float) -> bool:
        return all(getattr(operator, name)(value, bound) for name, bound in self._given().items())

    def __str__(self) -> str:
        return " and ".join(f"{_WORDS[name]} {bound:g}" for name, bound in self._given().items())


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Checked:
    """The base of such constants: every subclass is a frozen dataclass, made with keywords.

    Raises:
        UserError: a value that the annotation of its field does not allow.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            if not _allowed(hint, value := getattr(self, name)):
                raise UserError(f"{type(self).__name__}: {name}={value!r} is not allowed; it must be {_words(hint)}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _allowed(hint: Any, value: object) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [one for one in arguments[1:] if isinstance(one, Within)]
        return _allowed(arguments[0], value) and all(value in one for one in bounds)
    if origin in (Union, UnionType):
        return any(_allowed(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = ", ".join(str(one) for one in arguments[1:] if isinstance(one, Within))
        return f"{_words(arguments[0])} {bounds}".strip()
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in arguments)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    words = {float: "a finite number", int: "a whole number", bool: "True or False"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
