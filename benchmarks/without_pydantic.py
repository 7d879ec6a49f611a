"""Lets the head be measured on a machine that has torch and numpy alone: just enough of pydantic to *define* the
configuration classes and fill in their defaults. Nothing is validated. Used only where pydantic is not installed."""

import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any


class _Default:
    def __init__(self, value: Any) -> None:
        self.value, self.default = value, value


def _field(default: Any = ..., **constraints: Any) -> Any:
    factory = constraints.get("default_factory")
    return _Default(factory() if factory else default)


class _Model:
    def __init__(self, **values: Any) -> None:
        for owner in reversed(type(self).__mro__):
            for name in inspect.get_annotations(owner):
                default = owner.__dict__.get(name, ...)
                self.__dict__[name] = default.value if isinstance(default, _Default) else default
        self.__dict__.update(values)

    def model_copy(self, update: dict[str, Any] | None = None) -> Any:
        copy = type(self)()
        copy.__dict__.update(self.__dict__ | (update or {}))
        return copy


def _keep(*arguments: Any, **options: Any) -> Any:
    return lambda function: function


def provide() -> None:
    """Put stand-ins for pydantic and yaml in their places, if they are missing."""
    if importlib.util.find_spec("pydantic") is None:
        module = ModuleType("pydantic")
        contents = {
            "BaseModel": _Model,
            "Field": _field,
            "PrivateAttr": _field,
            "ConfigDict": dict,
            "ValidationError": ValueError,
            "Discriminator": _field,
            "Tag": _field,
            "field_validator": _keep,
            "model_validator": _keep,
        }
        module.__dict__.update(contents)
        sys.modules["pydantic"] = module
    if importlib.util.find_spec("yaml") is None:
        sys.modules["yaml"] = ModuleType("yaml")
