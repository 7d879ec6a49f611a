"""A decoder process that dies over one image."""

import os
import signal

from trainer.data import decode, image

_load = image.load_image


def _load_or_die(data: bytes, *arguments: object, **settings: object) -> object:
    if data == b"deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return _load(data, *arguments, **settings)


image.load_image = _load_or_die
decode.main()
