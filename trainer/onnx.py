"""ONNX Runtime: models are opened here and nowhere else, from bytes and on the CPU."""

from typing import TypeAlias

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

VERSION: str = onnxruntime.__version__
# ONNX Runtime's exceptions have no common base but Exception.
RUNTIME_ERRORS = (
    *(state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoModel),
    *(state.NotImplemented, state.RuntimeException),
)
Session: TypeAlias = onnxruntime.InferenceSession


def open_session(onnx: bytes, threads: int) -> Session:
    """The model in ONNX Runtime; raises one of `RUNTIME_ERRORS` where it cannot run it.

    From bytes, not from a path: a graph that points to weights in other files, which the digest does not cover, then
    does not load.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they come as exceptions too
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def first_line(error: Exception) -> str:
    """What went wrong, without the trace that ONNX Runtime adds."""
    return str(error).strip().partition("\n")[0][:300]
