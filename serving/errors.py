"""What the service answers when it cannot do what was asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_NAME = 100  # characters of what a client sent that an answer repeats


@dataclass
class ApiError(Exception):
    """A refusal: HTTP status, a code for programs, a sentence for people, and facts.

    Messages say what was wrong, what is allowed, and what to do; they never repeat images or embeddings.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, request_id: str) -> dict[str, object]:
        """The one shape of every error that the service sends."""
        error = {"code": self.code, "message": self.message, "details": self.details}
        return {"error": error, "request_id": request_id}


def stopping() -> ApiError:
    """503 for what the service no longer finishes."""
    headers = {"retry-after": "5", "connection": "close"}
    return ApiError(503, "stopping", "the service is stopping; ask again", headers=headers)


def invalid(*faults: tuple[str, str]) -> ApiError:
    """422 for values that are not allowed: (where, what is wrong). The first ten are told."""
    listed = [{"where": place[:MAX_NAME], "problem": text} for place, text in faults[:10]]
    where, problem = faults[0]
    message = f"{where[:MAX_NAME] or 'the request'}: {problem}; see /docs"
    return ApiError(422, "invalid", message, {"faults": listed, "count": len(faults)})
