"""Launching the same kernel again and again, at a fraction of JITFunction's host time.

kernel[grid](...) binds its arguments by name, works out how each one specialises the kernel, and looks the compiled
kernel up, at every call: for 40 arguments that takes longer than the small kernels run. A Launch has all of a call but
its tensors settled once. Its first call goes the ordinary way and keeps the compiled kernel; later ones hand it the
addresses. What is compiled, and what runs, is the same.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

_ALIGNMENT = 16
"""Triton compiles a kernel of its own for pointers that are no multiple of this many bytes."""


class Launch:
    """kernel[grid](*tensors, *sizes, **constants), to be called with the tensors on the device that is current.

    kernel: its parameters are pointers, then `sizes` integers, then constexprs, in this order. constants: the
    constexprs by name, and compile options (num_warps, ...). tensors: one for each pointer, or None.

    Tensors may change dtype, alignment, device or None-ness from call to call: each combination compiles its own
    kernel, as it would without this class, and one with an unaligned pointer always goes the ordinary way. Compile
    options that come from Triton's environment (debug, instrumentation) are those of the first call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], sizes: tuple[int, ...], **constants: Any) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.sizes = sizes
        # Registers have no limit to name on AMD.
        self.constants = {k: v for k, v in constants.items() if k != "maxnreg" or torch.version.hip is None}
        self.prepared = False
        self._compiled: dict[tuple, Callable] = {}
        # Triton's interpreter compiles nothing. On ROCm a kernel is specialised by its tensors' sizes too.
        self._direct = isinstance(kernel, triton.JITFunction) and torch.version.hip is None

    def __call__(self, *tensors: Tensor | None) -> None:
        if not self._direct or self.kernel.pre_run_hooks:
            self._ordinary(tensors)
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if functools.reduce(operator.or_, addresses) % _ALIGNMENT:
            self._ordinary(tensors)
            return
        # With sizes and constants, all that a kernel is specialised by.
        kinds = (driver.active.get_current_device(), *[None if tensor is None else tensor.dtype for tensor in tensors])
        run = self._compiled.get(kinds)
        if run is None:
            self._compile(kinds, tensors)
        else:
            run(*addresses, *self._tail)

    def prepare(self, *tensors: Tensor | None) -> None:
        """Compiles what a call with such tensors will need, once; launches nothing."""
        if self._direct and not self.prepared:
            self.kernel.warmup(*tensors, *self.sizes, grid=self.grid, **self.constants)
        self.prepared = True

    def _ordinary(self, tensors: tuple[Tensor | None, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *self.sizes, **self.constants)

    def _compile(self, kinds: tuple, tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self._ordinary(tensors)
        constexprs = self.kernel.arg_names[len(tensors) + len(self.sizes) :]
        if isinstance(compiled, CompiledKernel) and self.constants.keys() >= set(constexprs):
            # A compiled kernel takes every parameter by position. Its launcher calls hooks of profilers too.
            self._tail = (*self.sizes, *[self.constants[name] for name in constexprs])
            self._compiled[kinds] = compiled[self.grid]
        else:  # a Triton that works in another way
            self._direct = False
