"""Everything that decides how the service behaves, in one frozen model. The command line fills it."""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from trainer.data.image import MAX_BYTES
from trainer.errors import UserError

MiB = 2**20
Similarity = Annotated[float | None, Field(ge=-1, le=1.0001)]


def _trimmed(key: object) -> object:
    """A key read from a file often ends in a newline, which no client sends."""
    return key.strip() if isinstance(key, str) else key


def _host_patterns(text: str) -> str:
    """What Starlette compares with: names without a port, or '*' for the first label or for all."""
    for name in filter(None, map(str.strip, text.split(","))):
        if not re.fullmatch(r"\*|(\*\.)?[\w.-]+|\[?[0-9a-f]*:[0-9a-f:]*:[0-9a-f.]*\]?", name, re.ASCII | re.IGNORECASE):
            raise ValueError(f"'{name}' is no host name; give names like gallery.example.org, without port, or *")
    return text


def _addresses(text: str) -> str:
    """uvicorn takes what is no address for a name, which no client has, and says nothing."""
    for address in filter(None, map(str.strip, text.split(","))):
        if address != "*":
            ipaddress.ip_network(address)  # raises ValueError that names the address
    return text.strip()


def _named(path: Path) -> Path:
    if not path.name:
        raise ValueError(f"'{path}' is a folder; give a file in it")
    return path


def _made(store: object) -> object:
    """A path that ends with a slash means a folder, which a Path no longer tells."""
    if isinstance(store, str) and store.endswith("/"):
        try:
            Path(store).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the folder '{store}' cannot be made: {error.strerror}") from error
    return store


def _several(embedders: object) -> object:
    return (embedders,) if isinstance(embedders, str | Path) else embedders


class Settings(BaseModel):
    """Options of `hypersphere serve`. `from_values` makes one with readable errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    embedder: Annotated[tuple[Path, ...], BeforeValidator(_several)] = Field(
        min_length=1, description="folder that `export` wrote; several may be served, each with collections of its own"
    )
    store: Annotated[Path, BeforeValidator(_made), AfterValidator(_named)] = Field(
        description="SQLite file of the gallery, or folder/ of collections, NAME.db each; made if missing"
    )
    detector: Path | None = Field(
        None, description="folder of a detector: images are photographs, whose faces are found and aligned; null: crops"
    )
    min_quality: str = Field(
        "", description="least quality of an image, as size=60,yaw=40; manifest for what embedder and detector ask for"
    )
    restored: bool = Field(False, description="the store comes from a backup: take it as it is")
    verify_threshold: Similarity = Field(None, description="from which two images are a match; null: as calibrated")
    identify_threshold: Similarity = Field(None, description="from which a candidate is a match; null: as calibrated")
    api_key: Annotated[SecretStr | None, BeforeValidator(_trimmed)] = Field(
        None,
        min_length=16,
        max_length=256,
        description="key that requests must carry, better given as the variable; null: only this machine is served",
    )
    keys: Path | None = Field(
        None, description="file of keys that `hypersphere keys` made; null: STORE-keys, where there is one"
    )
    audit: Path | None = Field(None, description="folder of the audit log; null: none is kept")
    audit_file_bytes: int = Field(64 * MiB, ge=4096, description="of a file of the audit log; then the next begins")
    tls_cert: Path | None = Field(
        None, description="certificate and those of its issuers, PEM; null: HTTP without encryption"
    )
    tls_key: Path | None = Field(None, description="key of the certificate, PEM; null: it is in the same file")
    anonymous: bool = Field(False, description="serve every network without a key")
    allowed_hosts: Annotated[str, AfterValidator(_host_patterns)] = Field(
        "", description="host names that clients call the service by, by commas; * for any"
    )
    trusted_proxies: Annotated[str, AfterValidator(_addresses)] = Field(
        "", description="addresses or networks whose X-Forwarded-For is believed, by commas"
    )
    template: Literal["maximum", "mean", "weighted"] = Field(
        "maximum", description="what of a subject is searched: its best sample, their mean, or weighted by quality"
    )
    below_threshold: Literal["never", "on_request", "always"] = Field(
        "on_request", description="when identify shows candidates that are no match"
    )
    rate_limit: float | None = Field(None, gt=0, description="requests a second from one address; null: no limit")
    rate_burst: int = Field(20, ge=1, description="requests that may come at once before the limit counts")
    wrong_keys_a_minute: int = Field(10, ge=1, description="wrong keys from one address before it has to wait")

    log_format: Literal["line", "json"] = Field(
        "line", description="json: an object a line, and one for each request; neither names subjects"
    )
    traces: str = Field(
        "", description="URL of an OpenTelemetry collector (OTLP over HTTP) that gets spans; empty: none"
    )

    workers: int = Field(2, ge=1, le=256, description="requests that compute at the same time")
    threads: int = Field(1, ge=1, le=256, description="cores that one of them uses")
    index: Literal["exact", "fp16", "int8"] = Field(
        "exact",
        description="what a search reads of each vector: fp32, or half or a quarter of it, with the same result",
    )
    max_requests: int = Field(64, ge=1, description="requests under way at the same time; more get a 503")
    max_connections: int = Field(512, ge=8, description="open connections; the longest idle makes room for a new one")
    max_body_bytes: int = Field(32 * MiB, ge=1024, description="of a request")
    max_buffered_bytes: int = Field(256 * MiB, ge=1024, description="of all bodies in memory; more get a 503")
    max_image_bytes: int = Field(MAX_BYTES, ge=1024, le=MAX_BYTES, description="of one image file")
    max_images: int = Field(32, ge=1, le=1000, description="images or embeddings in one request")
    max_faces: int = Field(16, ge=1, le=100, description="of one photograph that are looked at, the largest first")
    max_probes: int = Field(256, ge=1, le=10_000, description="embeddings, as bytes, in one batch of identifications")
    max_pixels: int = Field(16_000_000, ge=1, description="in all images of one request")
    max_collections: int = Field(64, ge=1, le=10_000, description="in a folder; each keeps some ten files open")
    encryption_key_file: Path | None = Field(
        None,
        description="file of the key that stores are encrypted under, which `gallery key` makes; null: they are not",
    )
    keep_images: bool = Field(False, description="keep the images that samples are made of, to be read and moved")
    max_samples: int = Field(100, ge=1, le=10_000, description="of one subject")
    decode_cpu_s: float = Field(1.8, gt=0, le=3600, description="seconds of CPU to decode the images of a request")
    detect_cpu_s: float = Field(1, gt=0, le=3600, description="seconds of CPU to find the faces of one image")
    head_timeout_s: float = Field(10, gt=0, le=3600, description="a request's head must have arrived whole by then")
    body_timeout_s: float = Field(30, gt=0, le=3600, description="its body must have arrived whole by then")
    keep_alive_s: int = Field(75, ge=1, le=86_400, description="an idle connection is kept open for the next request")
    drain_seconds: int = Field(
        0, ge=0, le=3600, description="after SIGTERM /readyz says 503 for so long before connections are closed"
    )
    shutdown_s: int = Field(30, ge=3, le=86_400, description="after SIGTERM the service has ended by then")
    idempotency_hours: float = Field(24, gt=0, le=8784, description="how long an Idempotency-Key is remembered")

    @model_validator(mode="after")
    def _drains_in_time(self) -> "Settings":
        if self.drain_seconds and self.drain_seconds > self.shutdown_s - 3:
            told = f"a drain of {self.drain_seconds} s leaves less than 3 of shutdown_s={self.shutdown_s} to finish"
            raise ValueError(f"{told}; raise --shutdown-s, and what the supervisor waits for")
        return self

    @model_validator(mode="after")
    def _thresholds_of_one_model(self) -> "Settings":
        if len(self.embedder) > 1 and not self.verify_threshold is self.identify_threshold is None:
            raise ValueError(
                "a threshold given by hand is one model's, and several embedders are served; calibrate each of them"
            )
        return self


def read_file(path: Path, known: Sequence[str]) -> dict[str, object]:
    """The settings of a YAML or TOML file: names as in `known`, values not yet checked. Messages show no values.

    Raises:
        UserError: it cannot be read, or something in it is no setting.
    """
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # as text it shows the line, which may be the key
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"the settings '{path}' cannot be read: line {line}: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the settings '{path}' cannot be read: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"the settings '{path}' are no names with values; write lines like 'max_images: 8'")
    for name, value in found.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name).replace("-", "_"), known, 1)
            told = f"; the nearest is '{nearest[0]}'" if nearest else ""
            raise UserError(f"'{str(name)[:100]}' in '{path}' is no setting{told}")
        several = name == "embedder" and isinstance(value, list)
        if not all(isinstance(one, str | int | float) for one in (value if several else [value])):
            raise UserError(f"'{name}' in '{path}' is neither a text nor a number nor true or false")
    return found


def from_values(values: dict[str, object]) -> Settings:
    """Check values and fill the rest with defaults.

    Raises:
        UserError: one line per fault, with the option and what is allowed; the value is left out where it is secret.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"serve: {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        # A secret counts as a collection of its characters.
        lines = [
            line.replace(" items", " characters") if line.startswith("serve: api_key:") else line for line in lines
        ]
        raise UserError("\n".join(lines)) from error
