"""Compiles for GPUs that are not here exactly what the launchers would launch, and reads registers, spills and
shared memory from the result. Run as a process of its own, without TRITON_INTERPRET."""

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ar_kernels import ops
from ar_kernels.kernels import attend3x3, attend_backward, attend_forward, float_products, masks, products, rectify
from ar_kernels.kernels.heuristics import Chip


class Target(NamedTuple):
    """A GPU to compile for."""

    gpu: GPUTarget
    chip: Chip
    every: int  # of so many pairs of a layer and a dtype one is compiled, unless all are asked for; no multiple of 3


def _nvidia(capability, kilobytes, processors, every):
    return Target(GPUTarget("cuda", capability, 32), Chip(processors, capability // 10, kilobytes * 1024), every)


TARGETS = {
    "sm_80": _nvidia(80, 163, 108, every=4),
    "sm_86": _nvidia(86, 99, 84, every=7),
    "sm_89": _nvidia(89, 99, 128, every=7),
    "sm_90": _nvidia(90, 227, 132, every=2),
    "sm_100": _nvidia(100, 227, 148, every=4),
    "sm_120": _nvidia(120, 99, 170, every=7),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Chip(304, 0, 64 * 1024), every=7),
}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Recorder:
    """Stands in for a jitted kernel and keeps what it would have been launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def recording(chip, by_products=False):
    """Every launch inside the block is recorded instead of run, as if on that chip. by_products: of float32 sweeps that
    PyTorch's products make, which run."""
    launches = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(ops, "_kernels", lambda data: ops._import_kernels())
        )  # data is on the CPU
        stack.enter_context(mock.patch.object(float_products, "are_faster", lambda *arguments: by_products))
        for module in (attend_forward, attend_backward, attend3x3, float_products, masks, products, rectify):
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, Recorder(value, launches)))
            if hasattr(module, "chip"):
                stack.enter_context(mock.patch.object(module, "chip", lambda index: chip))
            for name, value in vars(module).items():  # plans hold kernels, and there are other plans for other chips
                if name.endswith("_plan"):
                    value.cache_clear()
                    stack.callback(value.cache_clear)
        yield launches


def compile_launch(kernel, args, kwargs, gpu):
    """Compiles one recorded launch for a GPUTarget; returns its registers, spills and shared memory."""
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in options}
    if gpu.backend == "hip":
        options.pop("maxnreg", None)  # as Launch does there
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # as PyTorch allocates
        elif isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr:
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    figures = _amd_figures(compiled.asm["amdgcn"]) if gpu.backend == "hip" else _nvidia_figures(compiled.asm["cubin"])
    return figures | {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


def _nvidia_figures(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        sass = ""
        if stack > 0:  # where spills go; to disassemble takes as long as to compile
            sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": registers, "stack": stack, "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass))}


def _amd_figures(assembly):
    found = dict(re.findall(r"\.(\w+_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return {
        "registers": int(found["vgpr_count"]),
        "stack": int(found["private_segment_fixed_size"]),
        "spills": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
    }


def record_layer(
    chip, dtype, channels, side, heads, channels_last, mean=False, tf32=False, images=128, by_products=False
):
    """The launches of a whole layer, forward and backward, of one shape: tapped, its logits with a gradient."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty(images, channels, side, side, dtype=dtype, device="cpu", memory_format=layout)
    w = torch.empty(heads, channels, dtype=dtype)
    with recording(chip, by_products) as launches:
        for maps in (z[:1], z):  # one image alone is split, and its parts are merged
            outputs = ops._gated_attend(maps, w, None, w, None, heads, mean, mean)
        pooled, lse, logits, scores, gates, features, average = outputs
        ops._gated_attend_backward(
            z, w, None, w, pooled, lse, scores, gates, None, None, logits if mean else None, None, None, features,
            average if mean else None, z, True, True, True, channels_last,
        )  # fmt: skip
    return launches


def record_layer3x3(chip, dtype, channels, side, heads, channels_last, tf32=False):
    """The launches of 3×3 heads with a mean, forward and backward, tapped."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty(256, channels, side, side, dtype=dtype, device="cpu", memory_format=layout)
    w = torch.empty(heads, channels, 3, 3, dtype=dtype)
    with recording(chip) as launches:
        outputs = ops._gated_attend3x3(z, w, None, w, None, heads, True)
        pooled, lse, logits, scores, gates, features, mean = outputs
        ops._gated_attend3x3_backward(
            z, w, w, pooled, lse, logits, scores, gates, None, None, None, None, None, features, mean, z,
            True, True, True, channels_last,
        )  # fmt: skip
    return launches


def record_rectify(chip, dtype, mix):
    hypotheses, scores = torch.empty(128, 4, 1000, dtype=dtype), torch.empty(128, 4)
    with recording(chip) as launches:
        y, lse = ops._rectify(hypotheses, scores, mix, "softmax")
        ops._rectify_backward(y, hypotheses, scores, y, lse, mix, "softmax")
    return launches


def record_products(chip, dtype, labels):
    """A batch's products with W_O: a float32 weight, as under autocast, one of the features' dtype, an odd number of
    columns, a gradient that is one number."""
    features, output_w = torch.empty(128, 2560, dtype=dtype), torch.empty(labels, 2560)
    with recording(chip) as launches:
        hypothesis = ops._hypothesis(features, output_w)
        ops._hypothesis_backward(hypothesis, features, output_w, True, True)
        ops._hypothesis_backward(hypothesis, features, output_w.to(dtype), True, True)
        odd = features[:, :255].contiguous(), output_w[:, :255].to(dtype).contiguous()
        ops._hypothesis_backward(ops._hypothesis(*odd), *odd, True, True)
        ops._hypothesis_backward(hypothesis[:1, :1].expand(hypothesis.shape), features, output_w.to(dtype), True, True)
    return launches


def record_masks(chip, dtype):
    """Masks beside global heads, and their regulariser, forward and backward."""
    logits, lse = torch.empty(128, 8, 1024, dtype=dtype), torch.empty(128, 8, dtype=dtype)
    with recording(chip) as launches:
        found = ops._attention_masks(logits, lse, 4)
        ops._attention_masks_backward(found, found, 8)
        maps = found.unflatten(2, (32, 32))
        parts, gram = ops._mask_overlap(maps)
        ops._mask_overlap_backward(parts[0, 0], maps, gram)
    return launches


LAYERS = [
    # channels, side, heads, channels_last, mean
    (160, 32, 4, True, False),
    (256, 56, 4, False, False),
    (256, 56, 4, True, False),
    (512, 28, 4, True, True),
    (512, 28, 4, False, False),
    (512, 14, 4, False, True),
    (640, 8, 4, True, True),
    (640, 16, 4, True, False),
    (1024, 14, 4, True, False),
    (1024, 14, 4, False, False),
    (2048, 7, 4, True, True),
    (384, 14, 8, True, True),
    (640, 8, 8, True, True),
    (640, 8, 8, False, True),
    (512, 28, 16, True, False),
    (1024, 14, 8, True, True),
    (160, 32, 32, True, False),
    (2048, 7, 4, False, False),
    (320, 16, 16, True, False),
    (256, 14, 64, True, False),
    (512, 7, 4, False, True),
    (256, 13, 4, False, False),
    (96, 14, 64, True, True),
]
LAYERS3X3 = [
    # channels, side, heads, channels_last
    (160, 32, 4, True),
    (1024, 14, 4, False),
    (320, 16, 8, True),
    (384, 14, 16, False),
    (256, 56, 4, True),
    (96, 56, 16, True),
    (2048, 7, 4, True),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fault(figures, limit):
    """What is wrong with the figures of a compiled kernel, or None; limit: of shared memory, in bytes."""
    if figures["spills"]:
        return f"{figures['spills']} spills"
    if figures["shared"] > limit:
        return f"{figures['shared']} bytes of shared memory, the limit is {limit}"
    return None


class Compiled(NamedTuple):
    """One launch, compiled."""

    target: str
    case: list
    kernel: str  # file.kernel
    figures: dict
    fault: str | None


def check(task):
    """Compiles every launch of one task."""
    record, name, *case = task
    target = TARGETS[name]
    results = []
    for kernel, args, kwargs in record(target.chip, *case):
        figures = compile_launch(kernel, args, kwargs, target.gpu)
        kernel_name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.__name__}"
        results.append(Compiled(name, case, kernel_name, figures, fault(figures, target.chip.shared)))
    return results


def tasks_of(target, everything):
    """What is compiled for a target: every layer in every dtype, or one of so many of these pairs."""
    every = 1 if everything else TARGETS[target].every
    for record, layers in ((record_layer, LAYERS), (record_layer3x3, LAYERS3X3)):
        yield from ((record, target, dtype, *case) for case, dtype in list(itertools.product(layers, DTYPES))[::every])
    yield from ((record_layer, target, torch.float32, *case, True) for case in LAYERS[:2])
    yield from ((record_layer3x3, target, torch.float32, *case, True) for case in LAYERS3X3[::every])
    if TARGETS[target].gpu.backend == "cuda":  # elsewhere they are PyTorch's
        yield from ((record_products, target, dtype, labels) for dtype in DTYPES[:2] for labels in (100, 200))
    for channels_last in (True, False):
        yield record_layer, target, torch.float32, 96, 14, 16, channels_last, channels_last, False, 2, True
    yield record_masks, target, torch.float32
    yield from ((record_rectify, target, torch.bfloat16, mix) for mix in ("logit", "prob"))


def table(compiled):
    """Markdown: for each kernel and target the most registers of a thread and bytes of shared memory of a program."""
    targets = list(dict.fromkeys(result.target for result in compiled))
    most = {}
    for result in compiled:
        pair = most.get((result.kernel, result.target), (0, 0))
        most[result.kernel, result.target] = tuple(map(max, pair, map(result.figures.get, ("registers", "shared"))))
    yield f"| Triton {triton.__version__} | {' | '.join(targets)} |"
    yield "|---" * (len(targets) + 1) + "|"
    for kernel in dict.fromkeys(result.kernel for result in compiled):
        cells = (most.get((kernel, target)) for target in targets)
        yield f"| {kernel} | {' | '.join('' if cell is None else f'{cell[0]}, {cell[1]}' for cell in cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="every layer in every dtype, not a share of them")
    parser.add_argument("--table", action="store_true", help="end with the table of docs/kernels.md")
    arguments = parser.parse_args()
    tasks = [task for target in arguments.targets for task in tasks_of(target, arguments.all)]
    compiled = []
    with ProcessPoolExecutor() as pool:
        for result in itertools.chain.from_iterable(pool.map(check, tasks)):
            compiled.append(result)
            verdict = "ok" if result.fault is None else f"FAULT {result.fault}:"
            print(verdict, result.target, result.case, result.kernel, result.figures, flush=True)
    faults = sum(result.fault is not None for result in compiled)
    print(*(table(compiled) if arguments.table else ()), f"{faults} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
