"""What a run's start leaves out, and how ranks find each other. Runs over several machines are in tests/cluster."""

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from trainer.rendezvous import _interface

_LEFT_OUT = {
    "what Ray's controller imports": ("import trainer.board, trainer.rendezvous, trainer.supervision", "torch"),
    "DeepSpeed": ("from trainer.engine import import_deepspeed; import_deepspeed('cpu')", "mlflow"),
    "the check of a backbone": (
        "import torch; from trainer.backbones import build; from trainer.config import BackboneConfig; "
        "from trainer.run import Unfilled\n"
        "with torch.device('meta'), Unfilled(): build(BackboneConfig(), 3, 112, 112)",
        "torch._dynamo",
    ),
}


@pytest.mark.parametrize("what", _LEFT_OUT)
def test_what_takes_seconds_to_import_and_is_not_needed_is_left_out(what: str, tmp_path: Path) -> None:
    code, absent = _LEFT_OUT[what]
    words = [sys.executable, "-c", f"import sys\n{code}\nprint({absent!r} in sys.modules)"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines()[-1] == "False"


def test_the_interface_is_that_of_the_nodes_address() -> None:
    assert _interface("127.0.0.1") == next(
        name
        for name, own in psutil.net_if_addrs().items()
        if ("127.0.0.1", socket.AF_INET) in [(one.address, one.family) for one in own]
    )
    assert _interface("203.0.113.1") is None
