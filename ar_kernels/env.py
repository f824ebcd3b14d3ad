"""python -m ar_kernels.env [--json]: versions, what is built, for what, and what would run where: for a bug report."""

import argparse
import importlib.metadata
import json
import os
import platform

import torch

from . import __version__, functional, native, node, plans

_VARIABLES = ("AR_KERNELS_", "TRITON_INTERPRET", "OMP_", "CUDA_VISIBLE_DEVICES")


def report() -> dict[str, object]:
    """Everything that `python -m ar_kernels.env` prints, as values that JSON knows."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    reasons = {kind: native.why_not(kind) for kind in ("cpu", "cuda")}
    return {
        "ar_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "native": {
            "library": str(native.PATH) if native.PATH.exists() else None,
            "note": native.build_note(),
            "cpu": reasons["cpu"] or _target(),
            "cuda": reasons["cuda"] or "can run",
            "plans": plans.why_not() or "are used: calls of the Triton operators repeat without Python",
            "node": node.why_not() or "is used on a CPU, and where plans are: layers' backwards need no Python",
        },
        "runs": {device: _runs(device) for device in devices},
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _target() -> str:
    name = native.target()
    return f"can run ({name})" if name else "raises: AR_KERNELS_TARGET names nothing that runs here"


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


def _runs(device: str) -> dict[str, str | None]:
    """The implementation that would run by default, for each kind of heads and dtype; or what is wrong with the
    environment variable that chooses."""
    chosen: dict[str, str | None] = {}
    for heads, size in (("1x1", ()), ("3x3", (3, 3))):
        for dtype in (torch.float32, torch.bfloat16):
            feature_map = torch.empty(1, 8, 4, 4, dtype=dtype, device=device)
            weight = torch.empty(2, 8, *size, dtype=dtype, device=device)
            name = f"{heads} heads, {str(dtype).removeprefix('torch.')}"
            try:
                chosen[name] = functional.explain(feature_map, weight).chosen
            except ValueError as error:
                chosen[name] = str(error)
    return chosen


def _lines(values: dict[str, object], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if value and isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            text = ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {'none' if text in (None, '', {}) else text}")
    return lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ar_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON")
    values = report()
    print(json.dumps(values, indent=2) if parser.parse_args(words).json else "\n".join(_lines(values)))


if __name__ == "__main__":
    main()
