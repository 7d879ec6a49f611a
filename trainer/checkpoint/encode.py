"""The bytes of a safetensors file, in pieces that are the tensors' own memory.

The library's `save` copies every tensor twice while it holds the interpreter's lock, 0.1 s for 64 MiB: a training that
goes on in another thread would stand still. Hashing and writing these pieces releases the lock. Read with the library.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The header, and each tensor, which must be contiguous and on the CPU; wide types first, so that all are aligned.

    https://huggingface.co/docs/safetensors: 8 bytes with the header's length, JSON, the values one after the other.
    """
    header, values, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda one: (-one[1].itemsize, one[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        values.append(tensor.view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *values]
