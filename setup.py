"""Builds the optional native library (csrc/) into ar_kernels/_native.so, and autograd's node (csrc/node), for the torch
and the Python that are there, into ar_kernels/_node-*; everything else is in pyproject.toml.

AR_KERNELS_BUILD=0 skips it, =1 makes a failure fatal; by default one line says what was built, or why nothing was. pip
shows that line only with -v, so it is installed too: `python -m ar_kernels.env` prints it.
AR_KERNELS_CUDA_ARCHS, e.g. "80;90a", names the GPUs to compile csrc/cuda for, where there is nvcc. AR_KERNELS_STRICT=1
turns warnings into errors: for those who change csrc/. AR_KERNELS_SANITIZE=address,undefined instruments the CPU code.
CXX and CUDA_HOME are read as usual.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("AR_KERNELS_BUILD", "auto")
CSRC = Path("csrc")

TORCH_VERSION = "0x020b000000000000"
"""The oldest torch that the library loads in: 2.11."""

CUDA_ARCHS = "90a"
"""Compiled for by default: what csrc/cuda has is for Hopper alone."""

PER_TARGET = (
    "attend_forward.cpp",
    "attend_backward.cpp",
    "attend3x3_forward.cpp",
    "attend3x3_backward.cpp",
    "rectify.cpp",
    "product.cpp",
)
"""Files of csrc/cpu that are compiled once for each target; the others once."""

TARGETS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    TARGETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    TARGETS["avx512"] += ["-mprefer-vector-width=512"]


class CannotBuild(Exception):
    """What is missing."""


def find_torch() -> Path:
    """The folder of an installed torch, which is not imported; under build isolation the one outside it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    for folder in [*folders, *(Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib"))]:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    raise CannotBuild("torch is not installed")


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise CannotBuild(f"CXX names no program: {named}" if named else "there is no C++ compiler (c++, g++ or clang++)")


def version_of(torch: Path) -> str:
    """A release without what tells its builds apart, which are laid out alike; another version whole."""
    version = re.search(r"""__version__ = ['"]([^'"]+)""", (torch / "version.py").read_text(encoding="utf-8"))
    if version is None:
        raise CannotBuild(f"{torch / 'version.py'} names no version")
    return re.sub(r"^(\d+\.\d+\.\d+)\+.*", r"\1", version[1])


def number_of_sources() -> str:
    """Changes with any of them: what is built of others does not fit."""
    whole = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        whole.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


class BuildNative(build_ext):
    """One shared library, of no Python version: it uses torch's stable ABI alone. And one that does not: the node."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def run(self) -> None:
        in_place = self.inplace
        (extension,) = self.extensions
        try:
            if MODE == "0":
                raise CannotBuild("AR_KERNELS_BUILD=0")
            if sys.platform not in ("linux", "darwin"):
                raise CannotBuild(f"{sys.platform} is not supported")
            super().run()
        except (CannotBuild, OSError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            self.extensions, self.inplace = [], in_place  # nothing to copy
            earlier = Path(self.get_ext_fullpath(extension.name))
            earlier.unlink(missing_ok=True)
            forget_nodes(earlier.parent)
            self.tell(extension, f"not built: {reason(error)}")

    def tell(self, extension: Extension, line: str) -> None:
        """Prints what was built, or why not, and leaves it where ar_kernels.native looks for it."""
        print(f"ar_kernels: native library {line}", file=sys.stderr)
        note = Path(self.get_ext_fullpath(extension.name)).with_suffix(".txt")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(line + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        folder = self.get_finalized_command("build_py").get_package_dir("ar_kernels")
        built = Path(self.build_lib, "ar_kernels")
        forget_nodes(Path(folder))
        for path in (built / "_native.txt", *built.glob("_node-*")):
            shutil.copy(path, folder)

    def build_extension(self, extension: Extension) -> None:
        torch, compiler = find_torch(), find_compiler()
        library = Path(self.get_ext_fullpath(extension.name))
        objects = Path(self.build_temp)
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        sanitize = os.environ.get("AR_KERNELS_SANITIZE")
        strict = os.environ.get("AR_KERNELS_STRICT") == "1"
        include = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_VERSION}", "-std=c++17"]
        level = "-O1" if sanitize else "-O2"
        own = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        own += [f'-DAR_SOURCES="{number_of_sources()}"', *(["-Werror"] if strict else [])]
        if sanitize:
            own += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g"]
        cpu = []
        for source in [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]:
            each = TARGETS.items() if source.name in PER_TARGET else [("", [])]
            for target, flags in each:
                output = objects / f"{source.stem}{target and '-' + target}.o"
                define = [f"-DAR_TARGET={target}"] if target else []
                cpu.append([compiler, *include, level, *own, *define, *flags, "-c", str(source), "-o", str(output)])

        compile_node = node_command(compiler, torch, own, objects)

        # All at once, the CUDA sources first: the largest of them take longest.
        archs = os.environ.get("AR_KERNELS_CUDA_ARCHS", CUDA_ARCHS).replace(";", " ").split()
        cuda, why_not = cuda_commands(archs, include, objects, strict) if archs else ([], None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            of_cuda, of_node, of_cpu = (
                [pool.submit(run, command) for command in commands] for commands in (cuda, [compile_node], cpu)
            )
        for result in of_cpu:
            result.result()
        linker, commands, built = [compiler], cpu, f"CPU ({', '.join(TARGETS)})"
        try:
            for result in of_cuda:
                result.result()
        except subprocess.CalledProcessError as error:
            if MODE == "1":
                raise
            cuda, why_not = [], reason(error)
        if cuda:
            linker = [cuda[0][0], "-cudart", "static"]  # nvcc knows where its libraries are
            commands = [*cpu, *cuda]
            built += f", CUDA ({', '.join(archs)})"
        elif why_not:
            built += f"; not for CUDA: {why_not}"

        sanitizer = [f"-fsanitize={sanitize}"] if sanitize else []
        through = ["-Xcompiler"] if sanitize and cuda else []  # nvcc
        # libtorch brings libtorch_cuda where there is one, and nothing else.
        run([*linker, *linked(commands, library, torch, ["-ltorch", "-ltorch_cpu"]), *through, *sanitizer])

        node = library.with_name(f"_node-{version_of(torch)}{sysconfig.get_config_var('EXT_SUFFIX')}")
        forget_nodes(library.parent)
        try:
            for result in of_node:
                result.result()
            libraries = ["-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
            run([compiler, *linked([compile_node], node, torch, libraries), *sanitizer])
            built += f"; node for torch {version_of(torch)}"
        except subprocess.CalledProcessError as error:
            if MODE == "1":
                raise
            built += f"; no node: {reason(error)}"
        self.tell(extension, f"built for {built}")


def forget_nodes(folder: Path) -> None:
    """Of earlier builds: the library that they belong to is no more."""
    for path in folder.glob("_node-*"):
        path.unlink()


def node_command(compiler: str, torch: Path, own: list[str], objects: Path) -> list[str]:
    """How autograd's node is compiled: torch 2.14's headers need C++20."""
    include = ["-isystem", str(torch / "include"), "-isystem", sysconfig.get_path("include"), "-std=c++20"]
    unit = objects / "node.cpp"  # one for all sources: torch's headers are most of each one's time
    includes = [f'#include "{source.resolve()}"\n' for source in sorted((CSRC / "node").glob("*.cpp"))]
    unit.write_text("".join(includes), encoding="utf-8")
    return [compiler, *include, "-O2", *own, "-c", str(unit), "-o", str(objects / "node.o")]


def linked(commands: list[list[str]], library: Path, torch: Path, libraries: list[str]) -> list[str]:
    """A linker's arguments for what these commands compile."""
    link = ["-shared", *(command[-1] for command in commands), "-o", str(library), f"-L{torch / 'lib'}"]
    if sys.platform != "linux":
        return [*link, "-undefined", "dynamic_lookup"]
    link += ["-Xlinker", "--no-as-needed", *libraries]  # nvcc moves -l behind -Xlinker
    # Some compilers link libstdc++ statically: it must not mix with the one that torch has loaded.
    return [*link, "-Xlinker", "--exclude-libs", "-Xlinker", "ALL"]


def cuda_commands(
    archs: list[str], include: list[str], objects: Path, strict: bool
) -> tuple[list[list[str]], str | None]:
    """How nvcc compiles each source of csrc/cuda for every arch, and for GPUs that are not named as PTX of the oldest,
    where that is one that others understand. None of them: why not, unless there is nothing to compile."""
    sources = sorted(
        [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")], key=lambda path: -path.stat().st_size
    )
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        return [], "there is no nvcc" if sources else None
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    oldest = min(archs, key=lambda arch: int("".join(filter(str.isdigit, arch))))
    if oldest.isdigit():  # 90a's runs on 9.0 alone
        code.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    flags = ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *code]
    flags += ["-Werror", "all-warnings"] if strict else []
    commands = [
        [nvcc, *include, *flags, "-c", str(source), "-o", str(objects / f"{source.stem}-cuda.o")] for source in sources
    ]
    return commands, None


def run(command: list[str]) -> None:
    """Runs a compiler; what it says is shown, so that a failure explains itself."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.stdout:
        print(result.stdout, file=sys.stderr)
    result.check_returncode()


def reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        step = f"on {error.cmd[error.cmd.index('-c') + 1]}" if "-c" in error.cmd else "to link"
        return f"{error.cmd[0]} failed {step} (AR_KERNELS_BUILD=1 pip install -v . shows how)"
    return str(error)


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("ar_kernels._native", [str(CSRC / "cpu" / "operators.cpp")])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
