"""Compiles for GPUs that are not here exactly what the launchers would launch, and reads registers, spills and
shared memory from the result. Run as a process of its own, without TRITON_INTERPRET."""

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ar_kernels import ops
from ar_kernels.kernels import attend3x3, attend_backward, attend_forward, rectify
from ar_kernels.kernels.heuristics import Chip

# Shared memory that one block may ask for, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Recorder:
    """Stands in for a jitted kernel and keeps what it would have been launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextlib.contextmanager
def recording(capability):
    """Every launch inside the block is recorded instead of run, as if on a GPU of 132 multiprocessors."""
    chip = Chip(132, capability // 10)
    launches = []
    with contextlib.ExitStack() as stack:
        for module in (attend_forward, attend_backward, attend3x3, rectify):
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


def compile_launch(kernel, args, kwargs, capability):
    """Compiles one recorded launch for sm_<capability>; returns its registers, spills and shared memory."""
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "maxnreg")}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in options}
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
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "mma": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", sass)),
    }


def record_layer(capability, dtype, channels, side, heads, channels_last, mean=False, tf32=False):
    """The launches of a whole layer, forward and backward, of one shape: tapped, its logits with a gradient."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty(128, channels, side, side, dtype=dtype, device="cpu").to(memory_format=layout)
    w = torch.empty(heads, channels, dtype=dtype)
    with recording(capability) as launches:
        outputs = ops._gated_attend(z, w, None, w, None, heads, mean, mean)
        pooled, lse, logits, scores, gates, features, average = outputs
        ops._gated_attend_backward(
            z, w, None, w, pooled, lse, scores, gates, None, None, logits if mean else None, None, None, features,
            average if mean else None, z, True, True, True, channels_last,
        )  # fmt: skip
    return launches


def record_layer3x3(capability, dtype, channels, side, heads, channels_last, tf32=False):
    """The launches of 3×3 heads with a mean, forward and backward, tapped."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    z = torch.empty(128, channels, side, side, dtype=dtype, device="cpu").to(memory_format=layout)
    w = torch.empty(heads, channels, 3, 3, dtype=dtype)
    with recording(capability) as launches:
        outputs = ops._gated_attend3x3(z, w, None, w, None, heads, True)
        pooled, lse, logits, scores, gates, features, mean = outputs
        ops._gated_attend3x3_backward(
            z, w, w, pooled, lse, logits, scores, gates, None, None, None, None, None, features, mean, z,
            True, True, True, channels_last,
        )  # fmt: skip
    return launches


def record_rectify(capability, dtype, mix):
    hypotheses, scores = torch.empty(128, 4, 1000, dtype=dtype), torch.empty(128, 4)
    with recording(capability) as launches:
        y, lse = ops._rectify(hypotheses, scores, mix, "softmax")
        ops._rectify_backward(y, hypotheses, scores, y, lse, mix, "softmax")
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
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fault(figures, capability):
    """What is wrong with the figures of a compiled kernel, or None."""
    if figures["spills"]:
        return f"{figures['spills']} spills"
    if figures["shared"] > SHARED_LIMIT[capability]:
        return f"{figures['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[capability]}"
    return None


def check(task):
    """Compiles every launch of one task; returns (name, figures, fault or None) of each."""
    record, capability, *case = task
    results = []
    for kernel, args, kwargs in record(capability, *case):
        figures = compile_launch(kernel, args, kwargs, capability)
        results.append((f"sm_{capability} {case} {kernel.__name__}", figures, fault(figures, capability)))
    return results


def main(capabilities):
    tasks = [(record_layer, c, d, *case) for d, case, c in itertools.product(DTYPES, LAYERS, capabilities)]
    tasks += [(record_layer, c, torch.float32, *case, True) for case, c in itertools.product(LAYERS[:2], capabilities)]
    tasks += [(record_layer3x3, c, d, *case) for d, case, c in itertools.product(DTYPES, LAYERS3X3, capabilities)]
    tasks += [
        (record_layer3x3, c, torch.float32, *case, True) for case, c in itertools.product(LAYERS3X3, capabilities)
    ]
    tasks += [(record_rectify, c, torch.bfloat16, mix) for mix, c in itertools.product(("logit", "prob"), capabilities)]
    faults = 0
    with ProcessPoolExecutor() as pool:
        for name, figures, wrong in itertools.chain.from_iterable(pool.map(check, tasks)):
            faults += wrong is not None
            print(f"FAULT {wrong}:" if wrong else "ok", name, figures, flush=True)
    print(f"{faults} faults")
    return faults


if __name__ == "__main__":
    sys.exit(1 if main([int(name.removeprefix("sm_")) for name in sys.argv[1:]] or [80, 90, 100]) else 0)
