"""Launching the same kernel again and again, at a fraction of JITFunction's host time.

kernel[grid](...) binds its arguments by name, works out how each one specialises the kernel, and looks the compiled
kernel up, at every call: for 40 arguments that takes longer than the small kernels run. A Launch has all of a call but
its tensors settled once. Its first call goes the ordinary way and keeps the compiled kernel; later ones hand it the
addresses. What is compiled, and what runs, is the same.
"""

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .. import native

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
        self._compiled: dict[tuple, Callable] = {}
        self._kernels: dict[tuple, CompiledKernel] = {}
        # Triton's interpreter compiles nothing. On ROCm a kernel is specialised by its tensors' sizes too.
        self._direct = isinstance(kernel, triton.JITFunction) and torch.version.hip is None
        self._prepared: set[tuple[torch.dtype | None, ...]] = set()

    def __call__(self, *tensors: Tensor | None) -> None:
        if _recording.recorder is None:
            self.launch(tensors)
        else:
            _recording.recorder.hold(self, tensors)

    def launch(self, tensors: tuple[Tensor | None, ...]) -> CompiledKernel | None:
        """None: a launch that cannot be repeated without Triton."""
        if not self._direct or self.kernel.pre_run_hooks:
            self._ordinary(tensors)
            return None
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if functools.reduce(operator.or_, addresses) % _ALIGNMENT:
            self._ordinary(tensors)
            return None
        # With sizes and constants, all that a kernel is specialised by.
        dtypes = _dtypes(tensors)
        kinds = (driver.active.get_current_device(), *dtypes)
        run = self._compiled.get(kinds)
        if run is None:
            self._compile(kinds, tensors)
            self._prepared.add(dtypes)
        else:
            run(*addresses, *self._tail)
        return self._kernels.get(kinds)

    def is_prepared(self, tensors: Sequence[Tensor | torch.dtype | None]) -> bool:
        """Whether a call with such tensors has nothing to compile that could be compiled beside others."""
        return not self._direct or _dtypes(tensors) in self._prepared

    def build(self, device: int, tensors: Sequence[Tensor | torch.dtype | None]) -> Any:
        """Compiles what a call with such tensors will need, in any thread; loads and launches nothing."""
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*tensors, *self.sizes, grid=self.grid, **self.constants)
            if isinstance(compiled, CompiledKernel):  # some versions build a launcher, which load() finds on the disk
                driver.active.launcher_cls(compiled.src, compiled.metadata)
        return compiled

    def load(self, compiled: Any, tensors: Sequence[Tensor | torch.dtype | None]) -> None:
        """Loads what was built for such tensors, in one thread at a time: launchers of Triton 3.6 are modules of one
        name, and one that is loaded again takes another's place there until its caller has looked."""
        if isinstance(compiled, CompiledKernel):
            compiled[self.grid]
        self._prepared.add(_dtypes(tensors))

    def _ordinary(self, tensors: tuple[Tensor | None, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *self.sizes, **self.constants)

    def _compile(self, kinds: tuple, tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self._ordinary(tensors)
        constexprs = self.kernel.arg_names[len(tensors) + len(self.sizes) :]
        if isinstance(compiled, CompiledKernel) and self.constants.keys() >= set(constexprs):
            # A compiled kernel takes every parameter by position. Its launcher calls hooks of profilers too.
            self._tail = (*self.sizes, *[self.constants[name] for name in constexprs])
            self._kernels[kinds] = compiled  # before another thread finds the launcher
            self._compiled[kinds] = compiled[self.grid]
            if not any(hooks is self.kernel.pre_run_hooks for hooks in _hooked):
                _hooked.append(self.kernel.pre_run_hooks)
        else:  # a Triton that works in another way
            self._direct = False


Call = tuple[Any, Sequence[Tensor | None]]
"""A Launch, or another function, and its tensors."""

_Build = tuple[Launch, Sequence[Tensor | torch.dtype | None]]
"""A dtype for an aligned tensor of it, where it is only to be compiled."""


def _dtypes(tensors: Sequence[Tensor | torch.dtype | None]) -> tuple[torch.dtype | None, ...]:
    return tuple([getattr(tensor, "dtype", tensor) for tensor in tensors])


def run(calls: Sequence[Call], besides: Sequence[Call] = ()) -> None:
    """Makes the calls, one after another. Kernels that they, or those besides, need compiled are compiled first."""
    prepare([call for call in (*calls, *besides) if isinstance(call[0], Launch)])
    for act, tensors in calls:
        act(*tensors)


def prepare(calls: Sequence[_Build]) -> None:
    """Before the first of these calls: compiles side by side what they need, and what else a recorder holds.

    Triton holds Python's lock only while it reads a kernel's source: its passes run at once, and so do the assembler
    and, in some versions, a C compiler, which are processes.
    """
    if _recording.recorder is None:
        _prepare(calls)
    else:
        _recording.recorder.prepare(calls)


def _prepare(calls: Sequence[_Build]) -> None:
    fresh = {launch: tensors for launch, tensors in calls if not launch.is_prepared(tensors)}
    if not fresh:
        return
    device = driver.active.get_current_device()
    with ThreadPoolExecutor(32) as pool:
        built = {launch: pool.submit(launch.build, device, tensors) for launch, tensors in fresh.items()}
        expected = [] if _recording.expected is None else _rehearsed(pool, _recording.expected)
        guesses = [
            (launch, dtypes, pool.submit(launch.build, device, dtypes))
            for launch, dtypes in expected
            if launch not in fresh and not launch.is_prepared(dtypes) and not launch.kernel.pre_run_hooks
        ]
    for launch, future in built.items():
        launch.load(future.result(), fresh[launch])
    for launch, dtypes, future in guesses:
        with contextlib.suppress(Exception):  # who comes to need it compiles it, and is told
            launch.load(future.result(), dtypes)


# ---------------------------------------------------------------------------------------------- recording


_hooked: list[list] = []
"""The lists of functions that want to see a kernel's every launch, of all kernels launched."""


_knobs = triton.knobs.runtime


def is_watched() -> bool:
    """Whether somebody wants to see every launch: then none may happen behind Triton's back."""
    enter, leave = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    return bool(
        any(_hooked)
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


class _Recording(threading.local):
    def __init__(self) -> None:
        self.recorder: Recorder | _Rehearsal | None = None
        self.expected: Callable[[], Any] | None = None


_recording = _Recording()

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


operators: list[Any] = []
"""Of csrc/cuda, in the order in which csrc/plans.cpp has them; none where the library has none."""


class Recorder(TorchDispatchMode):
    """What a call with `tensors` allocates and launches within the block, for csrc/plans.cpp to repeat.

    That is possible if nothing else happens but PyTorch's matrix products and conversions and `operators`, and every
    kernel takes pointers and integers alone. Launches whose kernels are not compiled yet, and those behind them, are
    held back until something reads a tensor, or the block ends: then all are compiled side by side.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        given = [(i, tensor.data_ptr()) for i, tensor in enumerate(tensors) if tensor is not None]
        self._slots = {address: i for i, address in reversed(given) if address != 0}  # of two in one place the first
        self.possible = all(address % _ALIGNMENT == 0 for address in self._slots)
        self._given = len(tensors)
        self._tensors = tensors
        self._allocated: list[Tensor] = []  # on no device: sizes and strides
        self._places: dict[int, int] = {}  # by address: the last of _allocated there
        self._steps: list[int] = []
        self._used: set[int] = set()
        self._held: list[_Build] = []
        self._coming: list[_Build] = []  # to be compiled beside them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks every mode, and would import Dynamo, for a second, to keep it out of __torch_dispatch__. What
        Dynamo traces has no plans; should it look on all the same, it may trace this too."""
        return False

    def __enter__(self) -> "Recorder":
        _recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        _recording.recorder = None
        super().__exit__(*error)
        if error[0] is None:
            self._flush()

    def prepare(self, calls: Sequence[_Build]) -> None:
        self._coming += calls

    def hold(self, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
        """A launch, at once or with others."""
        self._held.append((launch, tensors))
        if all([one.is_prepared(given) for one, given in self._held]):
            self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, []
        with torch.cuda.device_of(self._tensors[0]):
            _prepare([*self._coming, *held])
            self._coming = []
            for launch, tensors in held:
                self.add(launch, launch.launch(tensors), tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._held and not func.is_view and func not in _ALLOCATIONS:
            if any([isinstance(value, Tensor) for value in tree_leaves((args, kwargs))]):
                self._flush()
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            if result.numel() > 0:
                self._place(result)
        elif func is torch.ops.aten.mm.default:
            self._step(1, args, result)
        elif func in operators:
            self._operator(operators.index(func), args)
        elif func is torch.ops.aten._to_copy.default and kwargs == {"dtype": result.dtype}:
            self._step(2, args, result)
        elif func.namespace == native.NAMESPACE and isinstance(result, int):
            pass  # how the library cuts maps of such sizes, asked once
        elif not (func.is_view and isinstance(result, Tensor) and _share_memory(result, args[0])):
            self.possible = False
        return result

    def _place(self, tensor: Tensor) -> int:
        place = self._places[tensor.data_ptr()] = len(self._allocated)
        self._allocated.append(_like(tensor))
        return place

    def _step(self, kind: int, tensors: Sequence[Tensor], result: Tensor) -> None:
        """PyTorch's product of two matrices (1), or a conversion (2)."""
        step = [kind]
        for tensor in tensors:
            slot = self._slot(tensor)
            if slot is None or tensor.numel() == 0:
                self.possible = False
                return
            whole = self._whole(slot)
            turned = whole.t() if whole.dim() == 2 else whole
            fits = [_layout(tensor) == _layout(value) for value in (whole, turned)]
            if not any(fits) or (kind == 2 and not fits[0]):
                self.possible = False
                return
            step += [slot, int(not fits[0])] if kind == 1 else [slot]
        place = self._place(result)
        self._used.add(place)
        self._steps += [*step, place]

    def _operator(self, number: int, tensors: Sequence[Tensor | None]) -> None:
        """One of `operators` (3)."""
        step = [3, number]
        for tensor in tensors:
            slot = -1 if tensor is None else self._slot(tensor)
            if tensor is not None and (slot is None or slot < 0 or _layout(tensor) != _layout(self._whole(slot))):
                self.possible = False
                return
            step.append(-1 if slot is None else slot)
        self._steps += step

    def _whole(self, slot: int) -> Tensor:
        tensor = self._tensors[slot] if slot < self._given else self._allocated[slot - self._given]
        assert tensor is not None
        return tensor

    def add(self, launch: Launch, kernel: CompiledKernel | None, tensors: Sequence[Tensor | None]) -> None:
        parameters = None if kernel is None else self._parameters(launch, kernel, tensors)
        if kernel is None or parameters is None:
            self.possible = False
            return
        own = kernel.metadata
        head = [0, kernel.function, *launch.grid, own.num_warps, own.shared, len(parameters) // 2]
        self._steps += [*head, *parameters]

    def _parameters(self, launch: Launch, kernel: CompiledKernel, tensors: Sequence[Tensor | None]) -> list[int] | None:
        """Slot and value of each, in the order of the kernel's own, which has no constants."""
        own = kernel.metadata
        unusual = own.launch_cooperative_grid, own.launch_pdl, own.global_scratch_size, own.profile_scratch_size
        if any(unusual) or own.num_ctas != 1:
            return None
        found: list[int] = []
        values = (*tensors, *launch.sizes)
        for kind, value in zip(kernel.src.signature.values(), values):
            if kind == "constexpr":
                continue
            if kind[0] == "*":
                slot = self._slot(value)
                if slot is None:
                    return None
                found += [slot, 0]
            elif kind[0] in "iu":
                found += [-1, value]
            else:
                return None
        return found

    def _slot(self, tensor: Tensor) -> int | None:
        """The slot that begins where the tensor does; -1 for an empty tensor, None for a part of something."""
        address = tensor.data_ptr()
        if address == 0:
            return -1
        if address in self._places:
            self._used.add(self._places[address])
            return self._given + self._places[address]
        return self._slots.get(address)

    def plan(self, outputs: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int], list[int]]:
        """record's last arguments; without steps where no plan is possible."""
        self.possible &= self._used == set(range(len(self._allocated)))
        places = []
        for output in outputs:
            place = -1
            if output is not None and output.numel() == 0:
                place = len(self._allocated)
                self._allocated.append(_like(output))
            elif output is not None:
                place = self._places.get(output.data_ptr(), -1)
                self.possible &= place >= 0 and output.numel() == self._allocated[place].numel()
                if self.possible:
                    self._allocated[place] = _like(output)
            places.append(place)
        made = [place for place in places if place >= 0]
        if not self.possible or len(made) > len(set(made)):
            return [], [], []
        return self._allocated, places, self._steps


def _share_memory(one: Tensor, other: Tensor) -> bool:  # a contiguous tensor's copy is itself, another's is not
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


# ---------------------------------------------------------------------------------------------- rehearsing


class StandIn(Tensor):
    """All of a tensor on the GPU of that index but its memory. What is computed of it is again one; the library's
    `operators` do nothing."""

    is_cuda = True  # type: ignore[assignment]
    index: int

    @staticmethod
    def __new__(cls, like: Tensor) -> "StandIn":
        stand_in = _like(like).as_subclass(cls)
        stand_in.index = like.get_device()
        return stand_in

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # With __torch_dispatch__, and for products and sums of what has no memory, PyTorch would import SymPy; and for
        # empty_like and zeros_like, which launchers therefore do without.
        if func in operators:
            return None
        if func is Tensor.add_:
            return args[0]
        if func in (torch.mm, torch.bmm):
            out = (kwargs or {}).get("out")
            return args[0].new_empty(args[0].shape[0], args[1].shape[1]) if out is None else out
        made = super().__torch_function__(func, types, args, kwargs or {})
        index = next(value.index for value in tree_leaves((args, kwargs)) if isinstance(value, cls))
        for value in tree_leaves(made):
            if isinstance(value, cls):
                value.index = index
        return made


class _Rehearsal:
    """Takes launches in place of a Recorder: none happens."""

    def __init__(self) -> None:
        self.calls: dict[Launch, tuple[torch.dtype | None, ...]] = {}

    def prepare(self, calls: Sequence[_Build]) -> None:
        for launch, tensors in calls:
            self.hold(launch, tensors)

    def hold(self, launch: Launch, tensors: Sequence[Any]) -> None:
        self.calls[launch] = _dtypes(tensors)


def _rehearse(act: Callable[[], Any]) -> dict[Launch, tuple[torch.dtype | None, ...]]:
    """What act launches, without doing it, in a thread that does nothing else."""
    rehearsal = _recording.recorder = _Rehearsal()
    try:
        with torch.no_grad():
            act()
    finally:
        _recording.recorder = None
    return rehearsal.calls


def _rehearsed(pool: ThreadPoolExecutor, act: Callable[[], Any]) -> list[_Build]:
    """What act launches, found out in a thread of its own, where no mode looks on; nothing if it raises, as it will
    when it is called for what it does."""
    rehearsal = pool.submit(_rehearse, act)
    return [] if rehearsal.exception() is not None else list(rehearsal.result().items())


class expecting:
    """Where something is compiled within the block, so is what act would launch. act: works on StandIns alone."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act

    def __enter__(self) -> None:
        self._before, _recording.expected = _recording.expected, self._act

    def __exit__(self, *error: object) -> None:
        _recording.expected = self._before
