"""Kernels of csrc/cuda on a CPU, thread for thread: emulator.h says what is modelled.

    kernels = emulator.build("csrc/cuda/attend_backward.cu", wrapper='''
        #include "attend_backward.h"
        AR_EXPORT int run(const float* x, float* y, int64_t size, double scale) {
          return ar_kernels::scaled(x, y, static_cast<int>(size), static_cast<float>(scale), nullptr);
        }''')
    kernels.run(x, y, x.numel(), 2.0)

Arguments are tensors (or None) for pointers, ints for int64_t, floats for double; a result other than 0 is raised.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
COMPILERS = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
COMPILER = next((name for name in COMPILERS if shutil.which(name)), None)

OPTIONS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DAR_EMULATOR", f"-I{FOLDER}", f"-I{ROOT / 'csrc' / 'cuda'}"]
OPTIONS += ["-U_FORTIFY_SOURCE"]  # which takes a jump from one stack to another for a fault
KERNEL_OPTIONS = ["-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
KERNEL_OPTIONS += [
    "-fsanitize=alignment,bounds,shift-exponent,signed-integer-overflow",
    "-fsanitize-undefined-trap-on-error",
]


class EmulatorError(RuntimeError):
    """What the emulator found, and where."""


@dataclass
class Calls:
    """Of one place in the source: by how many warps a function was called there, over all blocks."""

    file: str
    line: int
    name: str
    calls: int
    matrices: int
    """Of ldmatrix and stmatrix: each takes one wavefront where its eight rows lie in different banks."""
    wavefronts: int
    worst: int
    """Wavefronts of the worst call."""
    early: int
    """Rows that ldmatrix read while a copy to them was under way: no mistake if what was read is not looked at."""

    def __str__(self) -> str:
        text = f"{Path(self.file).name}:{self.line} {self.name}: {self.calls} calls"
        if self.matrices:
            ideal, mean = self.matrices / self.calls, self.wavefronts / self.calls
            text += f", {ideal:g} matrices each in {mean:.3g} wavefronts, at worst {self.worst}"
        if self.early:
            text += f", {self.early} rows read while a copy to them was under way"
        return text


class Library:
    """Its attributes are the wrapper's functions."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        self._library.emulator_begin.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self._library.emulator_message.restype = ctypes.c_char_p
        self._library.emulator_report.restype = ctypes.c_char_p

    def __getattr__(self, name: str):
        return functools.partial(self.call, name)

    def call(
        self, function: str, *arguments, seed: int | None = None, strict: bool | None = None, processors: int = 132
    ) -> None:
        """Calls `function` of the wrapper. Raises EmulatorError with what was found.

        `seed` 0, the default, lets the threads take turns; any other value is a random order. `strict` also sees what
        is written through pointers, and so whether it is fenced before the copy engine comes, and not written under a
        copy; that takes ten times as long. Where they are not given, AR_EMULATOR_SEED and AR_EMULATOR_STRICT say."""
        seed = int(os.environ.get("AR_EMULATOR_SEED", 0)) if seed is None else seed
        strict = os.environ.get("AR_EMULATOR_STRICT") == "1" if strict is None else strict
        self._library.emulator_begin(seed, processors, strict)
        result = getattr(self._library, function)(*map(_converted, arguments))
        if result != 0:
            message = self._library.emulator_message().decode() or f"{function} returned {result}"
            raise EmulatorError(re.sub(r"<(\d+)>", lambda match: self._line(int(match[1])), message))

    def _line(self, address: int) -> str:
        """Of the source, where binutils can tell."""
        if shutil.which("addr2line"):
            command = ["addr2line", "-e", self._library._name, hex(address)]
            line = subprocess.run(command, capture_output=True, text=True).stdout.split(" ")[0].strip()
            if "?" not in line:
                return line.rpartition("/")[2]
        return f"instruction {address:#x}"

    def report(self) -> list[Calls]:
        """What the last call did, by place in the source."""
        lines = self._library.emulator_report().decode().splitlines()
        parts = [line.split("\t") for line in lines]
        return [Calls(file, int(line), name, *map(int, counts)) for file, line, name, *counts in parts]


class OnGpu:
    """The same library compiled by nvcc: what the emulator says is checked against what a GPU does."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)

    def __getattr__(self, name: str):
        return functools.partial(self.call, name)

    def call(self, function: str, *arguments, **_) -> None:
        """Tensors of int64 are read by the wrapper itself, and stay; others go to the GPU and come back."""
        import torch

        there = [a.cuda() if torch.is_tensor(a) and a.dtype != torch.int64 else a for a in arguments]
        result = getattr(self._library, function)(*map(_converted, there))
        torch.cuda.synchronize()
        if result != 0:
            raise RuntimeError(f"{function} returned {result}")
        for argument, on_gpu in zip(arguments, there):
            if argument is not on_gpu:
                argument.copy_(on_gpu)


def build_for_gpu(source: Path) -> OnGpu:
    library = Path(_folder().name) / f"{source.stem}-gpu.so"
    options = ["-std=c++17", "-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc' / 'cuda'}"]
    _run(["nvcc", *options, "-o", str(library), str(source)])
    return OnGpu(library)


def _converted(value):
    if value is None:
        return ctypes.c_void_p()
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def why_not() -> str | None:
    """What is missing to build and run kernels, or None."""
    if sys.platform != "linux":
        return "the emulator runs on Linux"
    return None if COMPILER else "there is no C++ compiler"


@functools.cache
def build(*sources: str | Path, wrapper: str = "", options: tuple[str, ...] = ()) -> Library:
    """Compiles files of the repository and a wrapper around them; the same ones once in a process."""
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    written = folder / "wrapper.cpp"
    written.write_text(wrapper, encoding="utf-8")
    objects = [_emulator()]
    for i, source in enumerate([*(ROOT / source for source in sources), written]):
        objects.append(_compiled(source, folder / f"{i}.o", [*KERNEL_OPTIONS, *options]))
    library = folder / "library.so"
    _run([str(COMPILER), "-shared", *map(str, objects), "-o", str(library), "-ldl"])
    return Library(library)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ar_kernels_emulator_")


@functools.cache
def _emulator() -> Path:
    return _compiled(
        FOLDER / "emulator.cpp", Path(_folder().name, "emulator.o"), ["-O2", "-Wall", "-Wextra", "-Werror"]
    )


def _compiled(source: Path, output: Path, options: list[str]) -> Path:
    _run([str(COMPILER), *OPTIONS, *options, "-x", "c++", "-c", str(source), "-o", str(output)])
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
