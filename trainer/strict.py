"""The base of everything that is read from JSON or YAML: frozen, and strict about its keys."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A record whose unknown keys are errors and which never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
