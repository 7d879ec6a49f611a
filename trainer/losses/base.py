"""What every loss of the project says of itself: its name, its constants, and where it comes from."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Family = Literal["softmax", "margin", "pair", "centre"]


class LossSpec(BaseModel):
    """A loss as the config writes it: a name and its constants, frozen; subclasses add the mathematics.

    `weight` multiplies the loss in a weighted sum. The class attributes fill the table of `hypersphere losses`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    family: ClassVar[Family]
    formula: ClassVar[str]
    source: ClassVar[str]

    name: str
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The constants and the values their paper gives them."""
        return {key: field.default for key, field in cls.model_fields.items() if key not in ("name", "weight")}
