"""Which checkpoint a run goes on from: the newest that all ranks can read."""

import hashlib
from collections.abc import Callable

from trainer.checkpoint.files import MANIFEST, Checkpoint, Damaged, open_checkpoint
from trainer.checkpoint.keep import Shelf, place
from trainer.checkpoint.together import on_all
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.locks import within
from trainer.storage import Folder

_PATIENCE_S = 10  # until a file that another machine wrote is seen here, too


def go_on(
    folder: Folder, group: Group, load: Callable[[Checkpoint], None], tell: Callable[[str], None]
) -> Checkpoint | None:
    """Load the newest checkpoint; where it is damaged on one rank, the one before it on all. A collective.

    Args:
        folder: of the run's checkpoints.
        load: reads what this rank needs, all of it anew at each call; never a collective itself.
        tell: takes one sentence for each checkpoint that was passed over.

    Returns:
        the one that was loaded on every rank; None where no rank sees any.

    Raises:
        UserError: on every rank, what `load` raises on one of them; or none of the checkpoints can be read.
    """
    seen = group.gather_text(",".join(map(str, Shelf.of(folder).whole)))
    steps = sorted({int(step) for text in seen for step in text.split(",") if step}, reverse=True)
    reasons = []
    for step in steps:
        inside = place(folder, step)
        try:
            return _loaded(inside, group, load)
        except Damaged as error:
            reasons.append(str(error))
            tell(f"{error}: '{inside}' is passed over")
    if reasons:
        raise UserError(f"no checkpoint in '{folder}' can be read: {reasons[0]}; start a new run in another run.out")
    return None


def _loaded(inside: Folder, group: Group, load: Callable[[Checkpoint], None]) -> Checkpoint:
    def seen() -> str:
        within(_PATIENCE_S if group.size > 1 else 0, lambda: MANIFEST in inside.sizes())
        try:
            return hashlib.sha256(inside.read(MANIFEST)).hexdigest()
        except OSError as error:
            raise Damaged(f"'{inside}' is not a checkpoint: cannot read {MANIFEST} ({error.strerror})") from error

    digests = on_all(group, inside, seen)
    if len(set(digests)) > 1:
        raise UserError(
            f"the {group.size} workers see different checkpoints in '{inside}'; "
            "name a run.out that is one folder, shared by all of them"
        )
    found = open_checkpoint(inside)
    on_all(group, inside, lambda: load(found))
    return found
