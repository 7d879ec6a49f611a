"""A store that is killed amid updates, merges, deletions of samples and changes of its key."""

import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest

from serving.storage.store import Store
from tests.serving.galleries import MODEL

LIFE = """
import sys
from pathlib import Path
import numpy as np
from serving.storage.changes import Attached
from serving.storage.store import Store
path, life, key = Path(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3]) or None
store, x = Store(path, "a" * 32, 32, key=key), np.eye(32, dtype=np.float32)
print("open", flush=True)
for number in range(100_000):
    one, other = f"{life}-{number}", f"{life}-{number}-other"
    ids = store.enrol(one, x[:2], attached=Attached({"n": number}, images=[b"i" * 5000, None])).sample_ids
    store.enrol(other, x[2:4], attached=Attached(samples=[{"of": other}, {}]))
    print("enrolled", number, flush=True)
    store.update(one, {"n": number, "updated": True})
    print("updated", number, flush=True)
    store.delete_sample(one, ids[0])
    print("deleted", number, flush=True)
    store.merge(one, other)
    print("merged", number, flush=True)
    if key:
        store.change_key(key)
"""


def _live(path, life, key, seconds):
    """The steps that were acknowledged, {number: the last one}."""
    command = [sys.executable, "-c", LIFE, path, life, key.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(seconds)
        process.kill()
        lines = process.stdout.read().splitlines()
    return {int(number): step for step, number in (line.split() for line in lines if line[-1:].isdigit())}


@pytest.mark.parametrize("key", [b"", b"k" * 32])
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path, key):
    path, rng, steps = tmp_path / "gallery.db", np.random.default_rng(), 0
    for life in "abc":
        done = _live(path, life, key, rng.uniform(0.3, 1.5))
        with closing(Store(path, MODEL, 32, key=key or None)) as store:
            store.verify()
            assert sum(len(piece.subject_ids) for piece in store.samples(settled=True)) == store.state().samples
            known = {row.subject_id: row for row in store.subjects(0, 100_000)}
            for number, step in done.items():
                row = known[f"{life}-{number}"]
                assert row.metadata["n"] == number
                assert step == "enrolled" or row.metadata.get("updated") is True
                assert step in ("enrolled", "updated") or row.samples in (1, 3)
                assert step != "merged" or (row.samples, f"{life}-{number}-other" in known) == (3, False)
                steps += 1
    assert steps > 3
