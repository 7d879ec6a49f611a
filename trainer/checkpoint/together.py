"""Work of which each rank does its part, and which succeeds or fails on all of them."""

import json
from collections.abc import Callable
from pathlib import Path

from trainer.atomic import full, is_full
from trainer.checkpoint.files import Damaged
from trainer.distributed import Group
from trainer.errors import Diverged, UserError
from trainer.storage import Folder

_KINDS: dict[str, type[UserError]] = {"Damaged": Damaged, "Diverged": Diverged}


def on_all(group: Group, folder: Folder, work: Callable[[], str | None]) -> list[str]:
    """What `work` returns on each rank. Where it fails on one of them, all raise that error, so that none waits.

    Args:
        folder: what the work is on, for messages.

    Raises:
        UserError: Damaged or Diverged, where that is what failed.
    """
    try:
        answer = {"done": work() or ""}
    except OSError as error:  # first: DiskFull is a UserError too, of one file; what matters is the checkpoint
        told = f"'{error.filename or folder}' cannot be used: {error.strerror}; mend that, and --resume"
        answer = {"failed": full(Path(str(folder))) if is_full(error) else told}
    except UserError as error:
        answer = {"failed": str(error), "kind": type(error).__name__}
    answers = [json.loads(text) for text in group.gather_text(json.dumps(answer))]
    failed = [(rank, one) for rank, one in enumerate(answers) if "failed" in one]
    if failed:
        rank, first = failed[0]
        alike = len(failed) == group.size and len({one["failed"] for _, one in failed}) == 1
        raise _KINDS.get(first.get("kind", ""), UserError)(first["failed"] + ("" if alike else f" (worker {rank})"))
    return [one["done"] for one in answers]
