"""Calls of the Triton operators that csrc/plans.cpp repeats without Python: when, and where not, why.

The first eager call with tensors of some shapes, strides and dtypes goes the ordinary way and is watched; if nothing but
allocations and launches of kernels happened, the native library keeps that as a plan and repeats it from then on.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native

NAMESPACE = "ar_kernels_plans"
DRIVER = "libcuda.so.1"

_CODES = {None: 0, "logit": 1, "log": 2, "prob": 3, "softmax": 4, "sigmoid": 5}
"""Options that are no numbers, as numbers."""

_library: torch.library.Library | None = None


@functools.cache
def why_not() -> str | None:
    """What stops plans from being used at all; None if nothing does. Opens the driver, once."""
    if torch.version.hip is not None:
        return "they are for NVIDIA's driver"
    reason = native.why_not("cpu")
    if reason is not None:
        return reason
    return open_driver(DRIVER) or None


def open_driver(path: str) -> str:
    """Makes the library use this driver; "" or why it cannot."""
    global _library
    if _library is None:
        _library = torch.library.Library(NAMESPACE, "IMPL")
        _library.impl("replay", torch.library.fallthrough_kernel, "Autograd")
        _library.impl("record", torch.library.fallthrough_kernel, "Autograd")
    return torch.ops.ar_kernels_plans.open_driver(path)


@functools.cache
def _replay() -> Any:
    return torch.ops.ar_kernels_plans.replay.default


def are_used(data: Tensor) -> bool:
    """Whether a call with data may go by a plan: nobody looks on who has to see every operator."""
    return data.is_cuda and type(data) is Tensor and torch._C._len_torch_dispatch_stack() == 0 and why_not() is None


def run(
    number: int, launch: Callable[..., Sequence[Tensor]], kernels: Any, tensors: list[Tensor | None], options: list[Any]
) -> Sequence[Tensor | None]:
    """launch(*tensors, *options), by a plan if there is one; what is empty of the result may then be None.

    number: of the operator, each its own. kernels: the module launch of ar_kernels.kernels.
    """
    z = tensors[0]
    assert z is not None
    key = [number, *[_CODES[option] if option is None or isinstance(option, str) else option for option in options]]
    if z.dtype == torch.float32:
        key.append(torch.backends.cuda.matmul.fp32_precision == "tf32")
    if not kernels.is_watched():
        outputs = _replay()(tensors, key)
        if len(outputs) > 1:
            return outputs
        if not outputs:
            return _record(launch, kernels, tensors, options, key)
    return launch(*tensors, *options)


def _record(
    launch: Callable[..., Sequence[Tensor]], kernels: Any, tensors: list[Tensor | None], options: list[Any], key: list[int]
) -> Sequence[Tensor]:
    with kernels.Recorder(tensors) as recorder:
        outputs = launch(*tensors, *options)
    torch.ops.ar_kernels_plans.record(tensors, key, *recorder.plan(outputs))
    return outputs
