"""What the service answers when it cannot do what was asked."""

from dataclasses import dataclass, field


@dataclass
class ApiError(Exception):
    """A refusal: HTTP status, a code for programs, a sentence for people, and facts.

    Messages say what was wrong, what is allowed, and what to do; they never repeat images or embeddings.
    """

    status: int
    code: str
    message: str
    details: dict[str, object] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, request_id: str) -> dict[str, object]:
        """The one shape of every error that the service sends."""
        error = {"code": self.code, "message": self.message, "details": self.details}
        return {"error": error, "request_id": request_id}
