"""The service's log: lines for people, or objects for machines; few of a kind, whatever clients do."""

import contextvars
import json
import logging
import time
from typing import Any, Literal

LINES_A_MINUTE = 20  # of one kind
ACCESS = "hypersphere.access"
REQUEST: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "request", default=None
)  # the id of the one at work
_access = logging.getLogger(ACCESS)


class Sparing(logging.Filter):
    """Lets through a few lines of a kind a minute, so that no client fills the disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        since, count = self._kinds.get(kind := f"{record.name}:{record.msg}"[:200], (record.created, 0))
        if record.created - since >= 60:
            since, count = record.created, 0
        if len(self._kinds) > 1000:
            self._kinds.clear()
        self._kinds[kind] = since, count + 1
        if count == LINES_A_MINUTE:
            until = time.strftime("%H:%M:%S", time.localtime(since + 60))
            record.msg, record.args = f"{record.getMessage()} (more lines like this are left out until {until})", None
        return count <= LINES_A_MINUTE


class Json(logging.Formatter):
    """A line of JSON for a record: time (UTC), level, message, request id, and what the record carries as `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname}
        told |= {"logger": record.name, "message": record.getMessage(), "request_id": REQUEST.get()}
        told |= getattr(record, "facts", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in told.items() if value is not None}, default=str)


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """A line for a request, where the log is for machines. The route is a template, which names no subject."""
    if _access.isEnabledFor(logging.INFO):
        facts = {"method": method, "route": route, "status": status, "milliseconds": round(seconds * 1000, 2)}
        _access.info("answered", extra={"facts": facts})


def config(kind: Literal["line", "json"]) -> dict[str, Any]:
    """For `logging.config.dictConfig`."""
    levels = {"uvicorn": "INFO", "hypersphere": "INFO", "asyncio": "WARNING", "opentelemetry": "WARNING"}
    stderr = {"class": "logging.StreamHandler", "formatter": kind}
    loggers = {name: {"handlers": ["sparing"], "level": level, "propagate": False} for name, level in levels.items()}
    access = {"handlers": ["all"], "level": "INFO" if kind == "json" else "CRITICAL", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}, "json": {"()": Json}},
        "filters": {"sparing": {"()": Sparing}},
        "handlers": {"sparing": stderr | {"filters": ["sparing"]}, "all": stderr},
        "loggers": loggers | {ACCESS: access},
    }
