"""Everything that decides how the service behaves, in one frozen model. The command line fills it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from trainer.data.image import MAX_BYTES
from trainer.errors import UserError


class Settings(BaseModel):
    """Options of `hypersphere serve`. `from_values` makes one with readable errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    embedder: Path = Field(description="folder with model.onnx and manifest.json")
    store: Path = Field(description="SQLite file of the gallery; made if missing")
    verify_threshold: float | None = Field(
        None, ge=-1, le=1.0001, description="similarity from which two images are a match; null: from the calibration"
    )
    identify_threshold: float | None = Field(
        None, ge=-1, le=1.0001, description="similarity from which a candidate is a match; null: from the calibration"
    )
    api_key: SecretStr | None = Field(
        None, min_length=16, max_length=256, description="key that requests must carry; null: none is asked for"
    )
    workers: int = Field(2, ge=1, le=256, description="requests that compute at the same time")
    threads: int = Field(1, ge=1, le=256, description="cores that one of them uses")
    max_requests: int = Field(64, ge=1, description="requests under way at the same time; more get a 503")
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="of a request")
    max_image_bytes: int = Field(MAX_BYTES, ge=1024, le=MAX_BYTES, description="of one image file")
    max_images: int = Field(32, ge=1, le=1000, description="images or embeddings in one request")
    max_samples: int = Field(100, ge=1, le=10_000, description="of one subject")
    body_timeout_s: float = Field(30, gt=0, description="a request must have arrived whole by then")
    shutdown_s: int = Field(30, ge=1, description="requests under way may finish in this time after SIGTERM")
    rate_limit: float | None = Field(None, gt=0, description="requests a second from one address; null: no limit")
    rate_burst: int = Field(20, ge=1, description="requests that may come at once before the limit counts")
    idempotency_hours: float = Field(24, gt=0, description="how long an Idempotency-Key is remembered")
    trusted_proxies: str = Field("", description="addresses whose X-Forwarded-For is believed, by commas")


def from_values(values: dict[str, object]) -> Settings:
    """Check values and fill the rest with defaults.

    Raises:
        UserError: one line per fault, with the option and what is allowed; the value is left out where it is secret.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"serve: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError("\n".join(lines)) from error
