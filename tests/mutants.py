"""Plants faults in the package, one at a time, and shows that the tests which run on a CPU kill them.

    python tests/mutants.py              goes on where tests/mutants.json ends; --limit 10: ten more
    python tests/mutants.py --list       prints every mutant
    python tests/mutants.py --rerun ID   forgets what became of some, and runs them again

HAND_MADE are faults that somebody might make; others are sampled by seed from every operator, comparison, constant,
mask and stride of kernels, autograd formulas, validation and modules. Each runs in a copy of the tracked files, first
the quickest tests that cover its file: killed (a test fails, or nothing ends in time), survived, or equivalent: listed
below with the reason why no test can tell. Native mutants are compiled first. Not part of the suite, which only checks
that every fault can be planted (test_mutants.py).
"""

import argparse
import ast
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
REPORT = Path(__file__).with_suffix(".json")
SEED, SAMPLED = 0, 60
TIMEOUT = 300, 900
"""Seconds for one test, of which the slowest takes 40, and for one group, for loops in C++ that no signal ends."""


class Mutant(NamedTuple):
    """`old`, found once in the file (a sampled one: from character `at` on), becomes `new`."""

    id: str
    file: str
    old: str
    new: str
    at: int | None = None


KERNELS, PACKAGE, CPU = "ar_kernels/kernels/", "ar_kernels/", "csrc/cpu/"
SPREAD = "csrc/cuda/attend_forward_spread.cu"
ROWS = "csrc/cuda/rows.cuh"
FORWARD_ROWS, BACKWARD_ROWS = (f"csrc/cuda/attend_{name}_rows.cu" for name in ("forward", "backward"))
FORWARD, BACKWARD, SPATIAL = (f"{KERNELS}{name}.py" for name in ("attend_forward", "attend_backward", "attend3x3"))

HAND_MADE = [
    # the forward sweep
    ("a dropped rescale", FORWARD, "before = p_sums[i] * shrink[None, :]", "before = p_sums[i]"),
    ("a dropped rescale in chunks", FORWARD, "other=0.0) * shrink[None, :]", "other=0.0)"),
    ("a denominator not rescaled", FORWARD, "d * shrink + tl.sum(p, axis=0)", "d + tl.sum(p, axis=0)"),
    ("the bias left out", FORWARD, "logit = tl.zeros([S_TILE, K_TILE], ACC) + bias[None, :]", "logit = tl.zeros([S_TILE, K_TILE], ACC)"),
    ("positions past the end count", FORWARD, "logit = tl.where(real[:, None], logit, float(\"-inf\"))", "logit = logit"),
    ("no maximum", FORWARD, "m_new = tl.maximum(m, tl.max(logit, axis=0))", "m_new = tl.maximum(m, 0.0)"),
    ("infinite logits counted from themselves", "ar_kernels/kernels/tiles.py", "return tl.where(tl.abs(m) == float(\"inf\"), 0.0, m)", "return m"),
    ("parts not rescaled", FORWARD, "return sums * tl.exp(part - start)[None, :]", "return sums"),
    ("gates of unbounded scores", FORWARD, "tl.exp(tanh(t)), 0.0)", "tl.exp(t), 0.0)"),
    ("gates over all heads", FORWARD, "e = tl.where(heads < GATED, tl.exp", "e = tl.where(heads <= GATED, tl.exp"),
    ("the score bias left out", FORWARD, "    if score_b is not None:\n        t +=", "    if False:\n        t +="),
    ("pooled rows swapped with channels", FORWARD, "    offsets = heads[None, :] * C + channels[:, None]\n    real = (channels < C)[:, None] & (heads < HEADS)[None, :]\n    tl.store(pooled", "    offsets = heads[None, :] + channels[:, None] * HEADS\n    real = (channels < C)[:, None] & (heads < HEADS)[None, :]\n    tl.store(pooled"),
    ("logits of the wrong image", FORWARD, "targets = logits + (n * HEADS + heads)[None, :] * positions", "targets = logits + (n + heads)[None, :] * positions"),
    # tiles
    ("a wrong row stride", "ar_kernels/kernels/tiles.py", "rows += positions // width * VECTOR * stride_h", "rows += positions // width * VECTOR * stride_w"),
    ("int32 offsets inside an image", "ar_kernels/kernels/tiles.py", "last >= 2**31)", "last >= 2**62)"),
    ("off by one at the end of a split", "ar_kernels/kernels/tiles.py", "    end = tl.minimum(begin + split_length, positions)\n    if UNIT", "    end = tl.minimum(begin + split_length - 1, positions)\n    if UNIT"),
    ("a column map of the wrong stride", "ar_kernels/kernels/tiles.py", "        if width == 1:\n", "        if False:\n"),
    # the backward sweep
    ("missing gate gradient", BACKWARD, "        dt += g * (dg - tl.sum(g * dg, axis=0)) * (1.0 - u * u)\n", "        dt += 0.0 * g\n"),
    ("the gate's softmax not centred", BACKWARD, "g * (dg - tl.sum(g * dg, axis=0)) * (1.0 - u * u)", "g * dg * (1.0 - u * u)"),
    ("tanh's slope left out", BACKWARD, "tl.sum(g * dg, axis=0)) * (1.0 - u * u)", "tl.sum(g * dg, axis=0))"),
    ("gradients of gates ignored", BACKWARD, "        if grad_gates is not None:\n            dg +=", "        if False:\n            dg +="),
    ("δ left out", BACKWARD, "dl = a * (da - delta[None, :])", "dl = a * da"),
    ("a gradient of lse of the wrong sign", BACKWARD, "sums -= scale * load_head_values(grad_lse", "sums += scale * load_head_values(grad_lse"),
    ("direct gradients of logits unscaled", BACKWARD, "dl += scale * tl.load(grad_logits", "dl += tl.load(grad_logits"),
    ("upstream left out", BACKWARD, "        dz_tile += tl.load(upstream + n * (up_n.to(tl.int64) * UP_VECTOR) + offsets, mask=real, other=0.0).to(\n            dz_tile.dtype\n        )\n", "        dz_tile += 0.0\n"),
    ("upstream of the first image", BACKWARD, "tl.load(upstream + n * (up_n", "tl.load(upstream + 0 * (up_n"),
    ("the mean over all positions but one", BACKWARD, "1.0 / positions.to(ACC), a)", "1.0 / (positions - 1).to(ACC), a)"),
    ("a scale not taken back", BACKWARD, "    dz_tile *= inverse\n", ""),
    ("W_H and dP swapped", BACKWARD, "logit, da = tl.split(", "da, logit = tl.split("),
    ("stale sums of another program", BACKWARD, "fresh = (row == program) & (start == begin)", "fresh = start == begin"),
    # 3×3
    ("taps mirrored", SPATIAL, "    shift = (tap // 3 - 1) * (width + 2) + tap % 3 - 1\n", "    shift = (1 - tap // 3) * (width + 2) + 1 - tap % 3\n"),
    ("rows wrap around the border", SPATIAL, "& (x + dx >= 0) & (x + dx < width)", ""),
    ("a line too few of the band above", SPATIAL, "tl.maximum(begin - width, 0), 16)", "tl.maximum(begin, 0), 16)"),
    ("NaN leaks into other channels' mean", SPATIAL, "a = tl.where((rows == sums.shape[0] - 1)[:, None], 1.0, a)", "a = tl.where((rows == sums.shape[0] - 1)[:, None] & (s < end)[None, :], 1.0, a)"),
    ("float16's scale without direct gradients", SPATIAL, "most = tl.maximum(most, tl.load(largest_direct + n))", "most = most"),
    ("δ of dP unrounded", SPATIAL, "part = _one_number(rounded.to(ACC) *", "part = _one_number(grad * factor *"),
    ("dlse left out", SPATIAL, "shift -= tl.load(grad_lse + row, mask=of_head", "shift -= 0 * tl.load(grad_lse + row, mask=of_head"),
    # rectify
    ("sigmoid gates without their slope", f"{KERNELS}rectify.py", "ds = (1.0 - sigma) * ds", "ds = 1.0 * ds"),
    ("the log mix without its softmax", f"{KERNELS}rectify.py", "slope = gates[:, None] * (dy[None, :] - tl.exp(tile - shift[:, None]) * dy_sum)", "slope = gates[:, None] * dy[None, :] + 0.0 * tile"),
    ("a softmax counted from an infinite maximum", f"{KERNELS}rectify.py", "start = origin(m_new)", "start = m_new"),
    ("an infinite log-sum-exp of a hypothesis kept", f"{KERNELS}rectify.py", "finite(origin(m) + tl.log(d))", "origin(m) + tl.log(d)"),
    ("global gates not centred", f"{KERNELS}rectify.py", "ds = dgates - gates * tl.sum(dgates, axis=0)", "ds = dgates"),
    ("hypotheses' gradients in another order", f"{KERNELS}rectify.py", "rows = i[:, None] * tl.num_programs(0).to(tl.int64) + n", "rows = n * D + i[:, None]"),
    # products with W_O
    ("the last columns of W_O left out", f"{KERNELS}products.py", "for first in range(0, inner, INNER):", "for first in range(0, inner // INNER * INNER, INNER):"),
    ("a gradient of W_O by columns", f"{KERNELS}products.py", "grad, grad_label, grad_image, features, columns, 1, doutput_w", "grad, grad_image, grad_label, features, columns, 1, doutput_w"),
    ("W_O's gradient from the first tile", f"{KERNELS}products.py", "doutput_w, tile - tiles, labels", "doutput_w, tile, labels"),
    # float32 by PyTorch's products
    ("float32 maps of any size by Triton", f"{KERNELS}float_products.py", "heads <= SMALL_HEADS and z.nbytes <= SMALL", "heads <= SMALL_HEADS"),
    ("by products where bits must not depend on the batch", f"{KERNELS}float_products.py", "z.dtype != torch.float32 or alike", "z.dtype != torch.float32"),
    ("logits without their bias", f"{KERNELS}float_products.py", "tl.store(logits + row * positions + s, logit, mask", "tl.store(logits + row * positions + s, logit - bias, mask"),
    ("the bias left in the masks' exponent", f"{KERNELS}float_products.py", "        shift -= tl.load(b + k, mask=k < HEADS, other=0.0)\n", "        pass\n"),
    ("a mean's gradient that is not divided", f"{KERNELS}float_products.py", "tl.where(k < HEADS, a, 1.0 / positions)", "tl.where(k < HEADS, a, 1.0)"),
    ("masks' weights counted from an infinite maximum", f"{KERNELS}float_products.py", "beginning = origin(m)", "beginning = m"),
    ("a delta without the gradient of lse", f"{KERNELS}float_products.py", "        delta -= tl.load(grad_lse + head, mask=k < HEADS, other=0.0)\n", "        pass\n"),
    ("an upstream gradient not added to a product", f"{KERNELS}float_products.py", "        calls.append((Tensor.add_, (dz, upstream)))\n", "        pass\n"),
    # operators and their derivatives
    ("the bias's gradient of lse alone", f"{PACKAGE}ops.py", "        db = db + grad_logits.sum(dim=(0, 2))\n", "        pass\n"),
    ("gradients in the map's layout, never its own", f"{PACKAGE}ops.py", "return z.stride(1) < z.stride(-1)", "return False"),
    ("an upstream gradient lost where nothing else is used", f"{PACKAGE}ops.py", "return upstream, None, None, None, None, doutput_w, *[None] * 6", "return None, None, None, None, None, doutput_w, *[None] * 6"),
    ("no gradients of no images", f"{PACKAGE}ops.py", "    dz, dw, dscore_w, dscore_b = gradients\n    if z.shape[0] == 0:\n        for gradient in gradients:\n            gradient.zero_()\n", "    dz, dw, dscore_w, dscore_b = gradients\n    if z.shape[0] == 0:\n"),
    ("double backward of the wrong inputs", f"{PACKAGE}ops.py", "_double_backward(forward, inputs, (0, 1, 3, 4),", "_double_backward(forward, inputs, (1, 0, 3, 4),"),
    ("double backward in autocast", f"{PACKAGE}ops.py", "    with autocast_off(values[0]):\n        results", "    with nullcontext():\n        results"),
    ("a batch of gradients mapped once", f"{PACKAGE}ops.py", "argument.select(dim, index)", "argument.select(dim, 0)"),
    ("a frozen tap that is not", f"{PACKAGE}ops.py", "through = tap and z.requires_grad", "through = tap"),
    # validation, modules, models
    ("masks of global heads returned", f"{PACKAGE}functional.py", "eager.attention_masks(logits[:, :heads], lse[:, :heads])", "eager.attention_masks(logits[:, -heads:], lse[:, -heads:])"),
    ("global heads swapped with local ones", f"{PACKAGE}functional.py", "torch.cat([mask_weight, global_mask_weight.to(mask_weight.dtype)])", "torch.cat([global_mask_weight.to(mask_weight.dtype), mask_weight])"),
    ("a silent fallback", f"{PACKAGE}functional.py", "    raise ImplementationUnavailable(f\"implementation {name!r}", "    if name == 'triton':\n        return 'eager'\n    raise ImplementationUnavailable(f\"implementation {name!r}"),
    ("a choice that outlives its block", f"{PACKAGE}functional.py", "        _choice.name = previous\n", "        pass\n"),
    ("float32 maps in forward mode", f"{PACKAGE}functional.py", "    return not ops.is_transformed()\n", "    return True\n"),
    ("any device goes", f"{PACKAGE}functional.py", "    if value.device != feature_map.device:\n", "    if False:\n"),
    ("float64 weights beside float32 maps", f"{PACKAGE}functional.py", "dtype.itemsize == 2 and value.dtype == torch.float32)", "value.dtype in _FLOATS)"),
    ("the module's gate bias unused", f"{PACKAGE}modules.py", "            gate_bias=self.gate_bias,\n", ""),
    ("a layer's gate for another", f"{PACKAGE}attend_rectify.py", "global_gates=wrapper.global_gates if index == wrapper._last else None", "global_gates=wrapper.global_gates if index == 0 else None"),
    ("channels last by proportions", f"{PACKAGE}attend_rectify.py", "return False if first_is_channels and not last_is_channels else None", "return None if first_is_channels == last_is_channels else last_is_channels"),
    ("no second run of an example", f"{PACKAGE}attend_rectify.py", "*[size + _LARGER for size in value.shape[2:]]", "*value.shape[2:]"),
    ("hooks that outlive their wrapper", f"{PACKAGE}attend_rectify.py", "        for handle in self.handles:\n            handle.remove()\n", "        pass\n"),
    ("a dry run that draws", f"{PACKAGE}attend_rectify.py", "            stack.enter_context(torch.random.fork_rng(gpus))\n", ""),
    ("hooks that stay after the dry run", f"{PACKAGE}attend_rectify.py", "        for handle in handles:\n            handle.remove()\n", ""),
    ("a checkpoint's sums unread", f"{PACKAGE}official.py", "                damaged = archive.testzip()\n", "                damaged = None\n"),
    ("code in a checkpoint runs", f"{PACKAGE}official.py", 'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'),
    ("a checkpoint half written", f"{PACKAGE}experiments/files.py", '    temporary = path.with_name(f".{path.name}.tmp")', "    temporary = path"),
    ("metrics not cut back at resume", f"{PACKAGE}experiments/training.py", "        self._log.truncate(keep)\n", ""),
    ("the loss's target off by one head", f"{PACKAGE}losses.py", "weight = (gates * grad.unsqueeze(1)).unsqueeze(2)", "weight = (gates.roll(1, 1) * grad.unsqueeze(1)).unsqueeze(2)"),
    # the native library
    ("native: a dropped rescale", f"{CPU}attend_forward.cpp", "if (start > begin && shrink != 1) scale(", "if (false) scale("),
    ("native: the tail of a tile counts", f"{CPU}attend_forward.cpp", "l[lane] = -A(INFINITY);", "l[lane] = 0;"),
    ("native: exponentials end before infinity", f"{CPU}simd.h", "x > kHighest ? all<A>(A(INFINITY)) : x == x ? scaled : x", "x == x ? scaled : x"),
    ("spread: a dropped rescale", SPREAD, "if (!is_again) pooled[j][i] *= shrink, pooled[j][2 + i] *= shrink;", ";"),
    ("spread: a denominator not rescaled", SPREAD, "d[i] *= shrink;", ";"),
    ("spread: the first maximum for good", SPREAD, "has_grown = named_any(1, kThreads, !is_less);", "has_grown = named_any(1, kThreads, false);"),
    ("spread: positions past the end count", SPREAD, "if (left <= 8) l[0][2 + i] = -INFINITY;", ""),
    ("spread: a mean of what another block has", SPREAD, "2 * column + i % 2 == kMean && i / 2 * 8 < left ? 1 : 0", "2 * column + i % 2 == kMean ? 1 : 0"),
    ("spread: blocks' sums as they are", SPREAD, "shares[lane % 8 * kHeads + of_gate] = low * scale;", "shares[lane % 8 * kHeads + of_gate] = scale;"),
    ("spread: infinite elements of another block", SPREAD, "if (first + i / kOwn < groups)", "if (true)"),
    ("spread: a stage filled while it is read", SPREAD, "      barrier_wait(used(stage), parity);\n", ""),
    ("spread: others' barriers not awaited", SPREAD, "  cluster_wait();        // their barriers are there\n", ""),
    ("spread: the last block's share taken for a whole one", SPREAD, "const int there = min(cut.own_channels, a.channels - first);", "const int there = cut.own_channels;"),
    ("rows: sums of each class where its columns begin", ROWS, "kFrame + 16 * group + row -\n                shift_of(row_class, positions);", "kFrame + 16 * group + row;"),
    ("rows: the first class's sums alone", ROWS, "each < cut.classes; ++each, of_class", "each < 1; ++each, of_class"),
    ("rows: elements of the row before added up", ROWS, "    first[0] &= begin, first[1] &= begin;\n", ""),
    ("rows: the tile before the last left out", ROWS, "    if (left == 1) {", "    if (false) {"),
    ("rows: a slot filled while the second sweep reads it", FORWARD_ROWS, "slots.release(load, cut.teams);", "slots.release(load, kWarps);"),
    ("rows: logits of this block's channels", FORWARD_ROWS, "if (others != nullptr && position < positions) logits", "if (false) logits"),
    ("rows: a maximum of a quarter of the positions", FORWARD_ROWS, "origin(maximum(maximum(of_parts.x, of_parts.y), maximum(of_parts.z, of_parts.w)))", "origin(of_parts.x)"),
    ("rows: lse of a quarter of the positions", FORWARD_ROWS, "start + __logf(sum_of(totals + head * kParts))", "start + __logf(totals[head * kParts])"),
    ("rows: gates by this block's scores", ROWS, "  if (others != nullptr) sum += others[warp].x;\n", ""),
    ("rows: dA of this block's channels", BACKWARD_ROWS, "for (int of_pair = 0; of_pair < 2; ++of_pair)", "for (int of_pair = 0; of_pair < 1; ++of_pair)"),
    ("rows: no direct gradient of logits", BACKWARD_ROWS, "      if (a.grad_logits != nullptr)\n", "      if (false)\n"),
    ("a rest that no group takes", "csrc/shares.h", "share * group + (group < rest ? group : rest)", "share * group"),
    ("native: splits merged unscaled", f"{CPU}attend_forward.cpp", "theirs = exponential(part.m[k] - origin(largest));", "theirs = 1;"),
]  # fmt: skip

SAMPLED_FROM = (
    *(
        f"{KERNELS}{name}.py"
        for name in ("attend_forward", "attend_backward", "attend3x3", "products", "rectify", "tiles")
    ),
    *(f"{PACKAGE}{name}.py" for name in ("ops", "functional", "eager", "modules", "losses", "attend_rectify")),
)

OF_1X1 = [
    ["tests/test_attend.py", "-k", "triton and float64_equals"],
    ["tests/test_attend.py", "-k", "triton and not float64_equals and not budget and not same_bits and not allocates"],
    ["tests/test_extremes.py", "-k", "classes_of_results and triton-1-torch.float32"],
    ["tests/test_attend.py", "-k", "triton and budget and contiguous and bfloat16"],
    ["tests/test_extremes.py", "-k", "triton and not triton-9 and not rectify"],
    ["tests/test_ops.py", "-k", "triton and not rectify and not compile and not inductor"],
    ["tests/test_attend.py", "-k", "triton"],
    ["tests/test_properties.py", "-k", "interpreter"],
]
OF_3X3 = [
    ["tests/test_attend3x3.py", "-k", "triton and float64_equals and not band and not many"],
    ["tests/test_attend3x3.py", "-k", "triton and (float64_equals or float16_gradients or no_images or functorch)"],
    ["tests/test_heuristics.py"],
    ["tests/test_attend3x3.py", "-k", "triton and (lines_that or both_weights or neither)"],
    ["tests/test_attend3x3.py", "-k", "apart"],
    ["tests/test_properties.py", "-k", "triton and one_position"],
    ["tests/test_extremes.py", "-k", "triton-9-torch.float32"],
    ["tests/test_attend3x3.py", "-k", "triton and budget and contiguous"],
    ["tests/test_extremes.py", "-k", "triton and 9"],
    ["tests/test_attend3x3.py", "-k", "triton"],
    ["tests/test_properties.py", "-k", "interpreter"],
]
OF_OPS = [
    ["tests/test_ops.py", "-k", "not triton and not compile and not inductor"],
    ["tests/test_attend3x3.py", "-k", "allocates"],
    ["tests/test_attend.py", "-k", "not triton"],
    ["tests/test_ops.py", "-k", "not rectify and not gradgrad"],
    ["tests/test_modules.py", "tests/test_official.py"],
    ["tests/test_ops.py", "tests/test_attend3x3.py", "-k", "not budget"],
    ["tests/test_extremes.py", "tests/test_properties.py"],
    ["tests/test_func.py", "tests/test_compile.py", "tests/test_export.py", "tests/test_attend.py"],
]
TESTS = {
    **dict.fromkeys((SPREAD, FORWARD_ROWS), [["tests/test_hopper_sweeps.py", "-k", "test_forward or finite or grow"]]),
    **dict.fromkeys(
        (ROWS, BACKWARD_ROWS, "csrc/shares.h"),
        [["tests/test_hopper_sweeps.py", "-k", "test_backward or test_forward or finite or grow"]],
    ),
    FORWARD: OF_1X1,
    BACKWARD: OF_1X1,
    SPATIAL: OF_3X3,
    f"{KERNELS}tiles.py": [["tests/test_heuristics.py"], *OF_1X1[:2], *OF_3X3[:1], ["tests/test_ops.py", "-k", "beyond"], *OF_1X1[2:], *OF_3X3[1:]],
    f"{KERNELS}rectify.py": [["tests/test_ops.py", "-k", "rectify and triton"], ["tests/test_extremes.py", "-k", "rectify or labels or hypothesis"]],
    f"{KERNELS}products.py": [["tests/test_products.py"]],
    f"{KERNELS}float_products.py": [["tests/test_attend.py", "-k", "products"]],
    f"{PACKAGE}ops.py": OF_OPS,
    f"{PACKAGE}eager.py": [["tests/test_attend.py", "-k", "eager and (float64_equals or no_copy)"], *OF_OPS],
    f"{PACKAGE}functional.py": [
        ["tests/test_errors.py", "-k", "eager"], ["tests/test_attend.py", "-k", "eager or named or explain or are_ours"],
        ["tests/test_properties.py", "-k", "cases and 0"], *OF_OPS,
    ],
    f"{PACKAGE}modules.py": [["tests/test_modules.py"], ["tests/test_errors.py", "tests/test_models.py"]],
    f"{PACKAGE}losses.py": [["tests/test_losses.py"], ["tests/test_errors.py"]],
    f"{PACKAGE}attend_rectify.py": [["tests/test_errors.py"], ["tests/test_attend_rectify.py"], ["tests/test_digits.py"]],
    f"{PACKAGE}official.py": [["tests/test_checkpoints.py"], ["tests/test_official.py"]],
    f"{PACKAGE}experiments/files.py": [["tests/test_checkpoints.py"]],
    f"{PACKAGE}experiments/training.py": [["tests/test_experiments.py", "-k", "broken"], ["tests/test_endurance.py"]],
}  # fmt: skip
OF_NATIVE = [
    ["tests/test_attend.py", "-k", "native and (float64 or infinite)"],
    ["tests/test_native.py", "-k", "several_tiles"],
    ["tests/test_extremes.py", "-k", "native"],
    ["tests/test_properties.py", "-k", "cases and not interpreter"],
]

EQUIVALENT: dict[str, str] = {
    "ar_kernels/kernels/products.py _store_product, 0.0 → 1.0: b + i[:, None] * b_inner + column * b_column, "
    "mask=(i < inner)[:, None] & (column < columns), other=0.0": "it meets zeros of the other factor, or is not stored",
}
"""By id: why no result can differ."""


# ---------------------------------------------------------------------------------------------- planting

SWAPPED = {
    "+": "-", "-": "+", "*": "+", "//": "%", "%": "//", "/": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "&": "|", "+=": "-=", "-=": "+=", "*=": "+=", "and": "or", "or": "and", "not": "",
    "True": "False", "False": "True", "is": "is not", "0.0": "1.0", "1.0": "0.0",
}  # fmt: skip


def candidates(file: str) -> list[Mutant]:
    """Every operator, comparison, number and flag of a file's functions, each swapped for its neighbour. Its id says in
    which line of which function, and no line number: an edit elsewhere changes none."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    function = {}  # by line: the innermost, which is walked last
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                for line in range(statement.lineno, statement.end_lineno + 1):
                    function[line] = None if text else node.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise | ast.AnnAssign):
            function |= dict.fromkeys(range(node.lineno, node.end_lineno + 1))
    found, seen = [], Counter()
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
        line, column = token.start
        text, old = token.string, before.string
        if function.get(line) is None or token.type not in (tokenize.OP, tokenize.NAME, tokenize.NUMBER):
            continue
        new = SWAPPED.get(text)
        first = before.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
        if text in "+-*" and (first or old in ("(", ",", "=", "[", ":", "return", "==", "<", "*", "**")):
            continue  # a sign, or an unpacking
        if (text, after.string) == ("is", "not"):
            continue  # the not itself is one
        if token.type == tokenize.NUMBER and new is None and text.isdigit():
            new = str(int(text) + 1)
        if new is not None:
            name = f"{file} {function[line]}, {text} → {new or 'nothing'}: {lines[line - 1].strip()}"
            seen[name] += 1
            name += f" ({seen[name]})" if seen[name] > 1 else ""  # twice in a line, or of one of several such lines
            found.append(Mutant(name, file, text, new, starts[line - 1] + column))
    return found


def mutants() -> list[Mutant]:
    """The hand-made, then those of all candidates whose ids hash lowest: an edit takes and brings its own lines' only."""
    pool = [mutant for file in SAMPLED_FROM for mutant in candidates(file)]
    pool.sort(key=lambda mutant: hashlib.sha256(f"{SEED} {mutant.id}".encode()).digest())
    return [Mutant(*each) for each in HAND_MADE] + pool[:SAMPLED]


def planted(source: str, mutant: Mutant) -> str:
    if mutant.at is not None:
        assert source.startswith(mutant.old, mutant.at), mutant.id
        return source[: mutant.at] + mutant.new + source[mutant.at + len(mutant.old) :]
    assert source.count(mutant.old) == 1, f"{mutant.id}: found {source.count(mutant.old)} times"
    return source.replace(mutant.old, mutant.new)


# ---------------------------------------------------------------------------------------------- running


def copy_of_tree(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in [*filter(None, names), "ar_kernels/_native.so", "ar_kernels/_native.txt"]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def outcome(mutant: Mutant, folder: Path) -> dict:
    file = folder / mutant.file
    source = file.read_text(encoding="utf-8")
    file.write_text(planted(source, mutant), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"AR_KERNELS_BUILD": "1", "AR_KERNELS_CUDA_ARCHS": ""}
    start = time.perf_counter()
    result = {"id": mutant.id, "file": mutant.file, "outcome": "survived", "by": None}
    native = mutant.file.startswith(CPU)
    groups = OF_NATIVE if native else TESTS[mutant.file]
    built = folder / "ar_kernels" / "_native.so"
    try:
        if native:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True)
        for group in groups:
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                f"--timeout={TIMEOUT[0]}",
                *group,
            ]
            try:
                run = subprocess.run(
                    command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT[1]
                )
            except subprocess.TimeoutExpired:
                result |= {"outcome": "killed", "by": f"{' '.join(group)}: no end"}
                break
            if run.returncode not in (0, 5):  # 5: no test was selected
                failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                by = failed[0].split(" - ")[0].split(" ", 1)[1] if failed else f"{' '.join(group)}: crashed"
                result |= {"outcome": "killed", "by": by}
                break
    finally:
        file.write_text(source, encoding="utf-8")
        if native and (ROOT / "ar_kernels" / "_native.so").exists():
            shutil.copy2(ROOT / "ar_kernels" / "_native.so", built)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, help="how many mutants to run")
    parser.add_argument("--list", action="store_true", help="print every mutant")
    parser.add_argument("--rerun", nargs="+", default=[], metavar="ID", help="forget these results and run them again")
    options = parser.parse_args()
    if options.list:
        print(*(mutant.id for mutant in mutants()), sep="\n")
        return
    report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {"results": []}
    results = {result["id"]: result for result in report["results"] if result["id"] not in options.rerun}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    left = [mutant for mutant in mutants() if mutant.id not in results]
    with tempfile.TemporaryDirectory() as folder:
        copy_of_tree(Path(folder))
        for mutant in left[: options.limit]:
            results[mutant.id] = outcome(mutant, Path(folder)) | {"commit": commit}
            if mutant.id in EQUIVALENT and results[mutant.id]["outcome"] == "survived":
                results[mutant.id] |= {"outcome": "equivalent", "reason": EQUIVALENT[mutant.id]}
            print(results[mutant.id], flush=True)
            write(results)
    write(results)


def write(results: dict[str, dict]) -> None:
    known = [mutant.id for mutant in mutants()]
    kept = [results[name] for name in known if name in results]
    counts = {kind: sum(r["outcome"] == kind for r in kept) for kind in ("killed", "survived", "equivalent")}
    summary = {"seed": SEED, "mutants": len(known), "not_run": len(known) - len(kept), **counts}
    REPORT.write_text(json.dumps(summary | {"results": kept}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
