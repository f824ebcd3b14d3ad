"""The library built from csrc/: finds it, loads it when it is first needed, and says why where it is not used.

It is built by `pip install` where there is a C++ compiler (setup.py) and needed by nothing: every other implementation
runs without it. It holds kernels for the operators that ops.py defines in the namespace ar_kernels_native.
"""

import ctypes
import functools
from pathlib import Path

import torch

NAMESPACE = "ar_kernels_native"
PATH = Path(__file__).with_name("_native.so")

NOTE = PATH.with_suffix(".txt")
"""What setup.py has to say about the library: for what it was built, or why it was not."""

_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


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
    key = _KEYS.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key)


def why_not(device_type: str) -> str | None:
    """What stops the library's kernels from running on a type of device ("cpu", "cuda"); None if nothing does."""
    reason = _load()
    if reason is None and not has_kernels(device_type):
        reason = f"the native library has no kernels for {device_type}"
    return reason


# Dynamo need not trace how a library is loaded: torch.compiler.assume_constant_result without importing all of it.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def target() -> str:
    """The instructions that the CPU kernels use here: avx512, avx2 or portable; the library must be loaded."""
    name = ctypes.CDLL(str(PATH)).ar_kernels_target
    name.restype = ctypes.c_char_p
    return name().decode()
