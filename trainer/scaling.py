"""How many workers Ray starts, on what, and what is done when they fail."""

from typing import Any

from pydantic import Field, field_validator

from trainer.strict import Strict


class ScalingConfig(Strict):
    """What Ray starts."""

    workers: int | tuple[int, int] = Field(
        2, description="how many; [least, most]: as many as there is room for, of the numbers that divide the batch"
    )
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    address: str | None = Field(None, description="Ray cluster to join; null: $RAY_ADDRESS, else one started here")
    max_failures: int = Field(3, ge=0, description="faults that are mended before the run comes a step further")
    stall_s: float = Field(600, ge=0, description="seconds until workers that do not move are started again; 0: never")
    wait_s: float = Field(1800, gt=0, description="seconds that the run waits for nodes with room for the workers")
    grow_s: float = Field(60, gt=0, description="seconds between looks whether there is room for more workers")

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> int | tuple[int, int]:
        numbers = value if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
        if not whole or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError(f"{value!r} is neither a number of workers, such as 8, nor [least, most], such as [4, 8]")
        return (numbers[0], numbers[1]) if isinstance(value, list | tuple) else int(value)

    @property
    def least(self) -> int:
        """Workers without which nothing is trained."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that are wanted."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
