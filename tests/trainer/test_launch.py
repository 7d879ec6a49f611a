"""What is refused before Ray starts anything. Runs that do start are in tests/test_end_to_end.py."""

import pytest
import ray
import torch

from trainer.config import from_tree
from trainer.errors import UserError
from trainer.launch import launch


def test_more_gpus_than_this_machine_has_are_refused_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = torch.cuda.device_count()
    workers = here + 2
    config = from_tree({"scaling": {"workers": workers, "use_gpu": True}, "data": {"batch_size": workers}})
    with pytest.raises(UserError) as raised:
        launch(config, False, lambda record: None)
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
        launch(from_tree({"scaling": {"address": address}}), False, lambda record: None)
    message = str(raised.value)
    assert message.startswith(f"cannot reach the Ray cluster '{address}': ")
    assert "start one with 'ray start --head', or leave scaling.address and RAY_ADDRESS empty" in message
    assert not ray.is_initialized()
