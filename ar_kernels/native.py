"""The library built from csrc/: finds it, loads it when it is first needed, and says why where it is not used.

It is built by `pip install` where there is a C++ compiler (setup.py) and needed by nothing: every other implementation
runs without it. It holds kernels for the operators that ops.py defines in the namespace ar_kernels_native.
"""

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

NAMESPACE = "ar_kernels_native"
PATH = Path(__file__).with_name("_native.so")

NOTE = PATH.with_suffix(".txt")
"""What setup.py has to say about the library: for what it was built, or why it was not."""

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

SWEEPS_FLOAT32 = True
"""Whether csrc/cuda's sweeps of float32 maps are used where they can be, and so preferred to eager."""


@functools.cache
def _load() -> str | None:
    """Loads the library, once; None, or why that failed."""
    if not PATH.exists():
        return f"the native library is {build_note()}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the native library cannot be loaded: {error}"
    return None


def build_note() -> str:
    """'built for ...' or 'not built: ...', as setup.py left it."""
    try:
        return NOTE.read_text(encoding="utf-8").strip()
    except OSError:
        return "built, nothing says for what" if PATH.exists() else "not built: ar_kernels was not installed from csrc"


def has_kernels(device_type: str, operator: str = "gated_attend") -> bool:
    """Whether the library, which must be loaded, holds this operator for this type of device."""
    key, name = _KEYS.get(device_type), f"{NAMESPACE}::{operator}"
    if key is None or not torch._C._dispatch_has_kernel(name):  # asking for a key raises where there is no operator
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def why_not(device_type: str) -> str | None:
    """What stops the library's kernels from running on a type of device ("cpu", "cuda"); None if nothing does."""
    reason = _load()
    if reason is None and not has_kernels(device_type):
        reason = f"the native library has no layer for {device_type}"
        if has_kernels(device_type, "sweep_forward_"):
            reason += '; its sweeps for Hopper serve "triton"'
    return reason


# Dynamo need not trace how a library is loaded: torch.compiler.assume_constant_result without importing all of it.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_sweeps() -> bool:
    """Whether the library is there and has Hopper's sweeps."""
    return _load() is None and has_kernels("cuda", "sweep_forward_")


has_sweeps._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sweeps_float32(feature_map: Tensor, heads: int) -> bool:
    """Whether csrc/cuda has sweeps for a float32 map of such sizes and strides, and for its gradient, on Hopper.

    Where it does not begin at a multiple of 16 bytes, which a traced graph cannot ask, Triton's kernels will run after
    all."""
    if not SWEEPS_FLOAT32 or feature_map.dtype != torch.float32 or heads > 4 or not has_sweeps():
        return False
    channels, sizes, strides = feature_map.shape[1], feature_map.shape, feature_map.stride()
    positions = math.prod(sizes[2:])
    if positions > 1 and strides[1] == 1:  # dense channels_last
        dense = strides[-1] == channels and (len(sizes) == 3 or strides[2] == channels * sizes[3])
        return dense and channels % 4 == 0 and channels <= 2560 and strides[0] > 0 and strides[0] % 4 == 0
    rows = strides[-1] == 1 and (len(sizes) == 3 or strides[2] == sizes[3])
    if not rows or strides[0] < 1 or strides[0] % 4 != 0:
        return False
    if channels % 8 == 0 and channels <= 1024 and positions % 4 == 0 and strides[1] % 4 == 0:
        return True
    return channels % 32 == 0 and channels <= 2048 and positions <= 256 and strides[1] == positions


@functools.cache
def has_layer() -> bool:
    """Whether the library is there and has a layer's operators for the CPU."""
    return _load() is None and has_kernels("cpu", "layer")


@functools.cache
def _functions() -> ctypes.CDLL:
    """Of the library, which must be loaded."""
    return ctypes.CDLL(str(PATH))


def address(name: str) -> int:
    """Of a function of the library, which must be loaded, that csrc/node calls."""
    return ctypes.cast(getattr(_functions(), name), ctypes.c_void_p).value or 0


def sources() -> str:
    """A number of what the library, which must be loaded, was built of; "" of an older one."""
    function = getattr(_functions(), "ar_kernels_sources", None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return function().decode()


def target() -> str:
    """The instructions that the CPU kernels use here: avx512, avx2 or portable; the library must be loaded."""
    name = _functions().ar_kernels_target
    name.restype = ctypes.c_char_p
    return name().decode()
