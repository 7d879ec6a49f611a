"""What is refused before Ray starts, and who writes a run's folder. Runs that start are in tests/test_end_to_end.py."""

import threading
from pathlib import Path

import pytest
import ray
import torch

from tests.ranks import run_on_ranks
from trainer.config import from_tree
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.launch import launch, sole_writer
from trainer.storage import Folder


def test_more_gpus_than_this_machine_has_are_refused_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = torch.cuda.device_count()
    workers = here + 2
    config = from_tree({"scaling": {"workers": workers, "use_gpu": True}, "data": {"batch_size": workers}})
    with pytest.raises(UserError) as raised:
        launch(config, False, lambda record: None, threading.Event())
    assert str(raised.value) == (
        f"{workers} workers want {workers} GPUs, this machine has {here}; lower scaling.workers, set "
        "scaling.use_gpu=false, or name a cluster that has them in scaling.address"
    )
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nowhere.invalid:6379", "127.0.0.1:99999"]
)
def test_a_cluster_that_is_not_there_is_named_at_once(address: str) -> None:
    with pytest.raises(UserError) as raised:
        launch(from_tree({"scaling": {"address": address}}), False, lambda record: None, threading.Event())
    message = str(raised.value)
    assert message.startswith(f"cannot reach the Ray cluster '{address}': ")
    assert "start one with 'ray start --head', or leave scaling.address and RAY_ADDRESS empty" in message
    assert not ray.is_initialized()


def shared_by_both(rank: int, folder: Path) -> None:
    group = Group.current()
    with sole_writer(Folder(folder), "one", group):
        assert (folder / ".writer").read_text() == "one"
        other = r"another run is writing into '.*run' now; wait for its end, or choose another run\.out"
        with pytest.raises(UserError, match=other), sole_writer(Folder(folder), "two", Group(), patience_s=0.3):
            pass
        group.barrier()
    group.barrier()
    with sole_writer(Folder(folder), "three", group):  # free again
        assert (folder / ".writer").read_text() == "three"


def test_a_runs_folder_is_held_by_one_group_of_ranks(tmp_path: Path) -> None:
    run_on_ranks(2, shared_by_both, tmp_path / "run")


def one_folder_a_rank(rank: int, folder: Path) -> None:
    group = Group.current()
    own = folder / f"node{rank}" / "run"
    (own).mkdir(parents=True)
    (own / ".writer").write_text("an earlier run's")
    if rank == 0:
        with sole_writer(Folder(own), "token", group):
            pass
    else:
        with (
            pytest.raises(UserError, match=r"^rank 1 on \S+ does not see in run\.out '.*node1/run' what rank 0 writes"),
            sole_writer(Folder(own), "token", group, patience_s=0.3),
        ):
            pass
        group.barrier()  # where rank 0 waits


def test_a_folder_that_the_nodes_do_not_share_is_noticed_before_the_first_step(tmp_path: Path) -> None:
    run_on_ranks(2, one_folder_a_rank, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = r"'.*file/run' cannot be written: Not a directory; choose a run\.out that every node can write"
    with pytest.raises(UserError, match=words), sole_writer(Folder(tmp_path / "file" / "run"), "token", Group()):
        pass


def test_without_an_address_another_ray_of_this_machine_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def init(**options: object) -> None:
        asked.update(options)
        raise RuntimeError("no further")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="no further"):
        launch(from_tree({"scaling": {"use_gpu": False}}), False, lambda record: None, threading.Event())
    assert asked["address"] == "local"
