"""What calls of the Triton operators do, repeated by csrc/plans.cpp without Python: when, and else why not.

The first call with tensors of some shapes, strides and dtypes goes the ordinary way and is watched. If nothing happened
but allocations, launches of kernels, matrix products and conversions, the native library keeps that as a plan and
repeats it from then on.

The environment variable AR_KERNELS_PLANS=0, read at import, turns them off.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native

NAMESPACE = "ar_kernels_plans"
DRIVER = "libcuda.so.1"

wanted = os.environ.get("AR_KERNELS_PLANS", "1") != "0"

_library: torch.library.Library | None = None


def why_not() -> str | None:
    """What stops plans from being used at all; None if nothing does."""
    return _cannot() if wanted else "AR_KERNELS_PLANS=0 turns them off"


@functools.cache
def _cannot() -> str | None:
    """Opens the driver."""
    if torch.version.hip is not None:
        return "they are for NVIDIA's driver"
    reason = native.why_not("cpu")
    if reason is None and not hasattr(torch.ops.ar_kernels_plans, "replay"):
        reason = "the native library was built from an older csrc"
    return reason or open_driver(DRIVER) or None


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
    operator = torch.ops.ar_kernels_plans.replay.default
    return getattr(operator, "_op", operator)  # without a Python function in between


def _bits(key: str) -> int:
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key)).raw_repr()


_ODD = functools.reduce(
    int.__or__, map(_bits, ("Negative", "Conjugate", "ZeroTensor", "Python", "Batched", "FuncTorchBatched"))
)
"""Of tensors whose memory does not hold their values, or that have to see every operator: is_grads_batched's too."""


def nobody_looks_on(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an eager call with these tensors, the first of which is its data, may do without operators of its own."""
    return (
        type(tensors[0]) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not any([sees_operators(value) for value in tensors if value is not None])
    )


def sees_operators(tensor: Tensor) -> bool:
    """Or its memory does not hold its values."""
    is_subclass = type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter  # which may see functions
    return is_subclass or bool(torch._C._dispatch_keys(tensor).raw_repr() & _ODD)


def are_used(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call with these tensors, the first of which is its data, may go by a plan."""
    data = tensors[0]
    return wanted and data is not None and data.is_cuda and nobody_looks_on(tensors) and why_not() is None


def run(
    name: str,
    launch: Callable[..., Any],
    kernels: Any,
    tensors: Sequence[Tensor | None],
    options: Sequence[int | str | None],
) -> Any:
    """launch(*tensors, *options), a tensor or several, by a plan if there is one.

    name: of what launch does. kernels: the module launch of ar_kernels.kernels.
    """
    if kernels.is_watched():
        return launch(*tensors, *options)
    numbers = [option if isinstance(option, int) else number_of(option) for option in options]
    key = [number_of(name), len(options), torch.are_deterministic_algorithms_enabled(), *numbers]
    if tensors[0].dtype == torch.float32:  # type: ignore[union-attr]
        key.append(torch.backends.cuda.matmul.fp32_precision == "tf32")
    outputs = _replay()(tensors, key)
    if len(outputs) > 1:
        return tuple(outputs)
    if len(outputs) == 1:
        return launch(*tensors, *options) if outputs[0] is None else outputs[0]
    with kernels.Recorder(tensors) as recorder:
        made = launch(*tensors, *options)
    returned = [made] if isinstance(made, Tensor) else made
    torch.ops.ar_kernels_plans.record(tensors, key, *recorder.plan(returned))
    return made


_numbers: dict[str | None, int] = {}
_counter = itertools.count(1)  # of which no two threads get the same


def number_of(word: str | None) -> int:
    """Plans are found by numbers."""
    return _numbers.get(word) or _numbers.setdefault(word, next(_counter))
