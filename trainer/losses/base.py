"""What every loss of the project says of itself: its name, its constants, where it comes from, and how it is shown."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal, Self

from trainer.checked import Checked, Within

Family = Literal["softmax", "margin", "pair", "centre"]


class LossSpec(Checked):
    """A loss as the config writes it: a name and its constants, frozen; subclasses add the mathematics.

    `weight` multiplies the loss in a weighted sum.

    Class attributes, all that tables, figures and benchmarks know of a loss:
        family, formula, source: for the table of `hypersphere losses`.
        title: the name as the literature writes it; may hold mathtext.
        demo: constants for ten classes and some hundred steps. The defaults are the papers', for many thousand classes.
        demo_in_plane: those that differ again for ten centres in the plane, where they are only 36 degrees apart.
        beside_softmax: the weight of a loss that trains no network alone; None: it does.
        unit_rows: the loss has class centres, and compares with them as unit vectors.
        learns_projection: what is evaluated is a projection of the embedding that the loss learns.
        norm_tells: the better an image, the longer its embedding; the Embedder then gives the length, too.
    """

    family: ClassVar[Family]
    formula: ClassVar[str]
    source: ClassVar[str]
    title: ClassVar[str]
    demo: ClassVar[Mapping[str, Any]] = {}
    demo_in_plane: ClassVar[Mapping[str, Any]] = {}
    beside_softmax: ClassVar[float | None] = None
    unit_rows: ClassVar[bool] = False
    learns_projection: ClassVar[bool] = False
    norm_tells: ClassVar[bool] = False

    name: str = ""
    weight: Annotated[float, Within(gt=0)] = 1.0

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The constants and the values their paper gives them."""
        return {key: value for key, value in asdict(cls()).items() if key not in ("name", "weight")}

    @classmethod
    def demo_constants(cls, dimension: int, steps: int) -> dict[str, Any]:
        """Constants with which ten classes are learned in so many dimensions and steps."""
        return {**cls.demo, **(cls.demo_in_plane if dimension == 2 else {})}

    def resolve(self, classes: int, dimension: int) -> Self:
        """The same loss with every `auto` replaced, and its constants checked against the problem's size.

        Raises:
            UserError: a constant is outside what is legal for so many classes in so many dimensions.
        """
        return self

    @property
    def on_directions(self) -> bool:
        """Whether the loss compares embeddings as unit vectors, so that their lengths do not count."""
        return True

    @property
    def trains_backbone(self) -> bool:
        """Whether the loss has a gradient for the embeddings."""
        return True
