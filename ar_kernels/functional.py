"""The contracts: attend, attention_module and rectify. Validates, picks an implementation, documents shapes and errors.

Nothing here imports Triton, so `import ar_kernels` works with no GPU, no Triton, no compiler and no driver.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, native, ops, reference

IMPLEMENTATIONS = ("triton", "native", "eager", "reference")
"""Every implementation, the one preferred by default first."""

MAX_FUSED_HEADS = 64
"""The most attention heads that the Triton kernels take (global masks come on top)."""

MAX_FUSED_3X3_HEADS = 28
"""The same of 3×3 heads, nine rows each in a tile of 256."""

_FUSED = ("triton", "native")
"""Implementations behind the operators of ops.py."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MIXES, _GATINGS = ops.MIXES, ops.GATINGS
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run these inputs here; the message says why."""


class Attended(NamedTuple):
    """What attend returns. Fields that were not asked for are None."""

    pooled: Tensor
    """P_k = Σ_s A_ks Z_s: [N, K, C], for 3×3 heads [N, K, C, 9]; float32 for half maps, else the map's dtype."""
    lse: Tensor
    """Log-sum-exp over positions of each head's mask logits, bias included: [N, K], dtype as pooled."""
    logits: Tensor | None = None
    """Mask logits ℓ: [N, K, H, W] or [N, K, S], dtype as pooled."""
    masks: Tensor | None = None
    """A = exp(ℓ - lse), 1 when summed over positions: shape and dtype as logits."""
    mean: Tensor | None = None
    """Spatial mean of the feature map: [N, C], dtype as pooled."""
    feature_map: Tensor | None = None
    """The tapped map: the input's values; let later layers read this one, not the input."""


class AttentionOutput(NamedTuple):
    """What attention_module and AttentionModule return. Fields that were not asked for are None."""

    hypothesis: Tensor
    """o = Σ_k g_k o_k: [N, L], in the feature map's dtype."""
    gates: Tensor
    """g over heads, sum 1: [N, K]; float32 for half maps, else the map's dtype."""
    masks: Tensor | None = None
    """A, 1 when summed over positions: [N, K, H, W] or [N, K, S], dtype as gates."""
    mean: Tensor | None = None
    """Spatial mean of the feature map: [N, C], dtype as gates."""
    global_scores: Tensor | None = None
    """tanh(t) of the global heads that shared the pass: [N, D+1], dtype as gates; rectify takes them."""
    feature_map: Tensor | None = None
    """The tapped map: the input's values; let later layers read this one, not the input."""


# ---------------------------------------------------------------------------------------------- choosing


class _Choice(threading.local):
    def __init__(self) -> None:  # not a class attribute: torch 2.11's Dynamo would see only that one
        self.name: str | None = os.environ.get("AR_KERNELS_IMPLEMENTATION") or None


_choice = _Choice()


@contextmanager
def use_implementation(name: str | None) -> Iterator[None]:
    """Within the block every call of this thread that names no implementation of its own runs `name`.

    name: one of IMPLEMENTATIONS, or None for the default choice. The environment variable
    AR_KERNELS_IMPLEMENTATION does the same for a whole program. Raises ValueError for another name, and the
    calls inside raise ImplementationUnavailable where `name` cannot run: nothing falls back silently.
    """
    _check_implementation(name)
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


@dataclass(frozen=True)
class Explanation:
    """Which implementation would run, and for each one why or why not; print it."""

    chosen: str | None
    """The implementation that would run; None where the named one cannot."""
    reasons: dict[str, str]
    """For every implementation, in order of preference: 'can run' or what stops it."""

    def __str__(self) -> str:
        lines = [f"{'→' if name == self.chosen else ' '} {name}: {why}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def explain(feature_map: Tensor, mask_weight: Tensor, *, implementation: str | None = None) -> Explanation:
    """Which implementation attend and attention_module would run for these inputs, and why.

    feature_map, mask_weight: as attend takes them. implementation: as attend takes it. Raises what attend raises
    for malformed inputs, but not ImplementationUnavailable.
    """
    _check_map(feature_map)
    _check_mask_weight(feature_map, mask_weight)
    name = _named(implementation)
    reasons = {}
    for candidate in IMPLEMENTATIONS:
        reasons[candidate] = _why_not(candidate, feature_map, mask_weight, candidate == name) or "can run"
    able = [candidate for candidate, why in reasons.items() if why == "can run"]
    chosen = next(iter(able)) if name is None else name if name in able else None
    return Explanation(chosen, reasons)


def _check_implementation(name: str | None, source: str = "implementation") -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)} or None, got {name!r}")


def _named(implementation: str | None) -> str | None:
    if implementation is not None:
        _check_implementation(implementation)
        return implementation
    _check_implementation(_choice.name, "AR_KERNELS_IMPLEMENTATION")
    return _choice.name


def _capability(device: torch.device) -> tuple[int, int]:
    """torch.cuda.get_device_capability, which takes long to say what never changes; Dynamo knows it, but no caches."""
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    return _known_capability(device)


_known_capability = functools.cache(torch.cuda.get_device_capability)


def _why_not(candidate: str, data: Tensor, mask_weight: Tensor | None, named: bool) -> str | None:
    """What stops `candidate` from running on data (and its attention heads, if any); None if nothing does."""
    if candidate in ("native", "triton") and not named and torch.compiler.is_compiling() and ops.is_transformed():
        return "torch.compile would lose derivatives of torch.func and forward mode"
    if candidate == "native":
        return native.why_not(data.device.type)
    if candidate != "triton":
        return None
    if not _HAS_TRITON:
        return "the triton package is not installed"
    kind = data.device.type
    if kind == "cpu":
        if not _INTERPRETED:
            return "inputs are on the CPU, Triton kernels run on a CUDA GPU (or slowly with TRITON_INTERPRET=1)"
        if not named:
            return "inputs are on the CPU; Triton's interpreter is for tests and runs only when named"
    elif kind != "cuda":
        return f"inputs are on {kind}, the kernels are tested on CUDA GPUs only"
    elif torch.version.hip is None and _capability(data.device)[0] < 8:
        return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    if mask_weight is not None and not named and data.dtype.itemsize > 2 and not _is_for_us(data, mask_weight):
        return f"{data.dtype} maps are faster in eager so far; name 'triton' to run the fused kernels all the same"
    if mask_weight is not None:
        most = MAX_FUSED_HEADS if mask_weight.dim() == 2 else MAX_FUSED_3X3_HEADS
        if mask_weight.shape[0] > most:
            return f"at most {most} {'3×3 ' * (mask_weight.dim() == 4)}heads are fused, got {mask_weight.shape[0]}"
    return None


def _is_for_us(data: Tensor, mask_weight: Tensor) -> bool:
    """Whether "triton" is faster than eager on this map of more than 2 bytes a number: on NVIDIA's GPUs, in float32
    with 1×1 heads. Not under torch.func and forward mode, for which eager has all derivatives, unless Hopper has a
    sweep."""
    if torch.version.hip is not None or data.device.type != "cuda":
        return False
    if mask_weight.dim() != 2 or data.dtype != torch.float32:
        return False
    if _capability(data.device)[0] == 9 and native.sweeps_float32(data, mask_weight.shape[0]):
        return True
    return not ops.is_transformed()


def _choose(implementation: str | None, data: Tensor, mask_weight: Tensor | None) -> str:
    name = _named(implementation)
    for candidate in IMPLEMENTATIONS if name is None else (name,):
        reason = _why_not(candidate, data, mask_weight, name is not None)
        if reason is None:
            return candidate
    raise ImplementationUnavailable(f"implementation {name!r} cannot run: {reason}")


def _masks(name: str, logits: Tensor, lse: Tensor, heads: int) -> Tensor:
    """A of the first `heads` heads, [N, heads, S]."""
    if name == "triton":
        return ops.attention_masks(logits, lse, heads)
    return eager.attention_masks(logits[:, :heads], lse[:, :heads])


# ---------------------------------------------------------------------------------------------- attend


def attend(
    feature_map: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor | None = None,
    *,
    logits: bool = False,
    masks: bool = False,
    mean: bool = False,
    tap: bool = False,
    implementation: str | None = None,
) -> Attended:
    """Attention heads over a feature map: where each head looks, and the features it pools there.

    ℓ_k = W_H[k] * Z + b_H[k],  A_k = softmax over positions of ℓ_k,  P_k = Σ_s A_ks Z_s  (a sum, not a mean).

    feature_map: Z [N, C, H, W] or [N, C, S], any strides; float16, bfloat16, float32 or float64. N may be 0.
    mask_weight: W_H [K, C], or [K, C, 3, 3] for 3×3 heads with zero padding (then Z is [N, C, H, W]); the map's
        dtype, or float32 beside a half map.
    mask_bias: b_H [K], dtype as mask_weight may have it. It cancels in the masks and in P, but not in lse and logits.
    logits, masks, mean: also return the mask logits, the masks, the spatial mean (pooled in the same pass).
    tap: also return the map, for later layers to read: the gradient they send back is then added where the
        attention writes its own, which saves a read and a write of the map. Later in-place changes of it raise.
    implementation: "triton", "native", "eager", "reference", or None for use_implementation's choice, else the fastest
        that can run.

    Returns Attended. Every field is differentiable with respect to every floating input, twice in eager mode.
    The gradient of feature_map is channels_last where the map is, else contiguous; eager's is laid out as PyTorch's
    products leave it. Autocast changes nothing: the computation runs in the map's dtype with sums in float32 (float64
    for float64).

    Raises TypeError (no tensor, not floating, dtypes that don't go together), ValueError (ranks, sizes, devices,
    unknown names), ImplementationUnavailable (a named implementation cannot run here; the message says why).
    """
    _check_map(feature_map)
    _check_mask_weight(feature_map, mask_weight)
    _check_flags(logits=logits, masks=masks, mean=mean, tap=tap)
    heads = mask_weight.shape[0]
    _check_weight("mask_bias", mask_bias, feature_map, (heads,))
    name = _choose(implementation, feature_map, mask_weight)
    wants_logits = logits or masks
    with ops.autocast_off(feature_map):
        if name in _FUSED:
            fused = ops.gated_attend(
                feature_map, mask_weight, mask_bias, None, None, None, 0, wants_logits, mean, tap, name
            )
            pooled, lse, maps, average, tapped = fused.pooled, fused.lse, fused.logits, fused.mean, fused.feature_map
        else:
            module = eager if name == "eager" else reference
            pooled, lse, maps, average = module.attend(feature_map, mask_weight, mask_bias, mean)
            tapped = feature_map
        shape = lse.shape + feature_map.shape[2:]
        attention = None
        if maps is not None and wants_logits:
            attention = _masks(name, maps, lse, heads).reshape(shape) if masks else None
            maps = maps.reshape(shape)
        return Attended(
            pooled,
            lse,
            logits=maps if logits else None,
            masks=attention,
            mean=average,
            feature_map=tapped if tap else None,
        )


# ---------------------------------------------------------------------------------------------- attention_module


def attention_module(
    feature_map: Tensor,
    mask_weight: Tensor,
    output_weight: Tensor,
    gate_weight: Tensor | None = None,
    *,
    mask_bias: Tensor | None = None,
    output_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    global_mask_weight: Tensor | None = None,
    global_gate_weight: Tensor | None = None,
    masks: bool = False,
    mean: bool = False,
    tap: bool = False,
    implementation: str | None = None,
) -> AttentionOutput:
    """One attended layer of "Attend and Rectify": K heads look at Z, make class hypotheses, gates mix them.

    o_k = W_O[k] P_k + b_O[k],  t_k = W_G[k]·P_k + b_G[k],  g = softmax over heads of tanh(t),  o = Σ_k g_k o_k,
    with P_k as attend pools it: exact, and the L labels never meet the positions.

    feature_map, mask_weight, mask_bias: as attend takes them.
    output_weight: W_O [L, K·C] as a Linear over the concatenated heads stores it; 3×3 heads: [L, K·C·9], ordered
        (k, c, tap). Or head by head, [K, L, C] (3×3: [K, L, C, 3, 3], taps or channels last in memory); neither form
        is rearranged. output_bias: b_O [K, L].
    gate_weight: W_G, the shape of mask_weight; None counts every head alike (g_k = 1/K). gate_bias: b_G [K].
    global_mask_weight, global_gate_weight: the D+1 heads of the global gates, [D+1, C] (3×3: [D+1, C, 3, 3]), to
        look at this map in the same pass; their tanh(t) comes back as global_scores.
    masks, mean, tap, implementation: as attend takes them; the masks are those of the K heads.

    Dtypes of weights: the map's, or float32 beside a half map (they are rounded inside, their gradients are float32).
    Returns AttentionOutput; raises what attend raises.
    """
    if not ops.fits(feature_map, mask_weight, mask_bias, gate_weight, gate_bias, output_weight, output_bias):
        _check_layer(feature_map, mask_weight, mask_bias, gate_weight, gate_bias, output_weight, output_bias)
    _check_flags(masks=masks, mean=mean, tap=tap)
    heads = mask_weight.shape[0]
    by_head = output_weight.dim() > 2
    labels = output_weight.shape[1 if by_head else 0]
    if (global_mask_weight is None) != (global_gate_weight is None):
        missing = "global_mask_weight" if global_mask_weight is None else "global_gate_weight"
        raise ValueError(f"global_mask_weight and global_gate_weight must come together, got {missing}=None")
    if global_mask_weight is not None:
        _check_tensor("global_mask_weight", global_mask_weight)
        shape = (global_mask_weight.shape[:1] or (1,)) + mask_weight.shape[1:]
        _check_weight("global_mask_weight", global_mask_weight, feature_map, tuple(shape))
        _check_weight("global_gate_weight", global_gate_weight, feature_map, tuple(shape))
    name = _choose(implementation, feature_map, mask_weight)
    gates: Tensor | None
    lse: Tensor | None
    logits: Tensor | None
    average: Tensor | None
    hypothesis: Tensor | None
    attention = scores = None
    taps_first = False
    with ops.autocast_off(feature_map):
        if name == "reference":
            rows = output_weight.transpose(0, 1).reshape(labels, -1) if by_head else output_weight
            hypothesis, gates, logits = reference.attention_module(
                feature_map, mask_weight, rows, gate_weight, mask_bias, output_bias, gate_bias
            )
            average = feature_map.to(gates.dtype).flatten(2).mean(dim=2) if mean else None
            tapped = feature_map
            if masks:
                attention = reference.attention_masks(logits)
            if global_mask_weight is not None and global_gate_weight is not None:
                scores = reference.global_scores(feature_map, global_mask_weight, global_gate_weight)
        else:
            weights = (mask_weight, mask_bias, gate_weight, gate_bias)
            if global_mask_weight is not None and global_gate_weight is not None:
                weights = _with_global_heads(*weights, global_mask_weight, global_gate_weight)
            arguments = (feature_map, *weights)
            if name in _FUSED:
                taps_first = name == "triton" and ops.is_taps_first(output_weight)
                fused = ops.gated_attend(
                    *arguments, None if by_head else output_weight, heads, masks, mean, tap, name, taps_first,
                    False, global_mask_weight is not None,
                )  # fmt: skip
                lse, logits, t, gates, features, average, hypothesis, tapped = fused[1:]
            else:
                _, lse, logits, t, gates, features, average = eager.gated_attend(*arguments, heads, mean, masks)
                features = features.flatten(1)
                hypothesis = None if by_head else F.linear(features, output_weight.to(feature_map.dtype))
                tapped = feature_map
            assert gates is not None  # there are gated heads
            if hypothesis is None:
                assert features is not None
                if not taps_first and ops.is_taps_first(output_weight):
                    features = features.unflatten(1, (heads, -1, 9)).mT.flatten(1)
                hypothesis = ops.gated_hypothesis(features, output_weight)
            if output_bias is not None:
                hypothesis = hypothesis + (gates @ output_bias.to(gates.dtype)).to(hypothesis.dtype)
            if masks and logits is not None and lse is not None:
                attention = _masks(name, logits, lse, heads)
            if global_mask_weight is not None and t is not None:
                scores = torch.tanh(t[:, heads:])
        if attention is not None:
            attention = attention.reshape(attention.shape[:2] + feature_map.shape[2:])
        return AttentionOutput(hypothesis, gates, attention, average, scores, tapped if tap else None)


def _with_global_heads(
    mask_weight: Tensor,
    mask_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    global_mask_weight: Tensor,
    global_gate_weight: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The first four, with those of the global heads behind."""
    gate = torch.zeros_like(mask_weight) if gate_weight is None else gate_weight
    extra = (0, global_mask_weight.shape[0])
    return (
        torch.cat([mask_weight, global_mask_weight.to(mask_weight.dtype)]),
        None if mask_bias is None else F.pad(mask_bias, extra),
        torch.cat([gate, global_gate_weight.to(gate.dtype)]),
        None if gate_bias is None else F.pad(gate_bias, extra),
    )


def head_hypotheses(pooled: Tensor, output_weight: Tensor) -> Tensor:
    """o_k = W_O[k] P_k: what each head makes of the features that attend pooled for it, without gates.

    pooled: P [N, K, C] (3×3 heads: [N, K, C, 9]). output_weight: W_O head by head, [K, L, C] (3×3: [K, L, C, 3, 3]),
        rounded to the dtype of pooled, not rearranged.
    Returns [N, K, L] in that dtype. Raises TypeError and ValueError naming the argument.
    """
    _check_float("pooled", pooled)
    _check_float("output_weight", output_weight)
    if pooled.dim() not in (3, 4) or (pooled.dim() == 4 and pooled.shape[3] != 9):
        raise ValueError(f"pooled must be [N, K, C] or [N, K, C, 9], got {_shape(pooled)}")
    kernel = (3, 3) if pooled.dim() == 4 else ()
    heads, channels = pooled.shape[1:3]
    if output_weight.dim() < 3 or tuple(output_weight.shape) != (heads, output_weight.shape[1], channels, *kernel):
        expected = ", ".join(map(str, (heads, "L", channels, *kernel)))
        raise ValueError(f"output_weight must be [{expected}] to match pooled, got {_shape(output_weight)}")
    if output_weight.device != pooled.device:
        raise ValueError(f"output_weight must be on {pooled.device} like pooled, got {output_weight.device}")
    with ops.autocast_off(pooled):
        return ops.head_hypotheses(pooled, output_weight)


# ---------------------------------------------------------------------------------------------- rectify


def rectify(
    hypotheses: Tensor | Sequence[Tensor],
    scores: Tensor,
    *,
    mix: str = "logit",
    gating: str | None = "softmax",
    implementation: str | None = None,
) -> Tensor:
    """The rectified output: D+1 hypotheses (the attended layers' and, last, the network's own), mixed by global gates.

    hypotheses: h [N, D+1, L], or a sequence of D+1 tensors [N, L].
    scores: [N, D+1], tanh(t) as GlobalGates returns it. gating makes γ of them: "softmax" over the D+1;
        "sigmoid", σ / (1e-6 + Σ σ); None, 1/(D+1) each whatever the scores.
    mix: "logit", Σ γ_i h_i, the paper's: train with CrossEntropyLoss. "prob", log Σ γ_i softmax(h_i), and "log",
        Σ γ_i log softmax(h_i), the official code's (not normalised): train with NLLLoss.

    Returns [N, L], float32 for half hypotheses. Raises TypeError and ValueError naming the argument,
    ImplementationUnavailable as attend does.
    """
    hypotheses = _gated_hypotheses(hypotheses, scores, gating)
    _check_mix(mix)
    name = _choose(implementation, hypotheses, None)
    with ops.autocast_off(hypotheses):
        if name in _FUSED:
            return ops.rectify(hypotheses, scores, mix, gating, name)
        return (eager if name == "eager" else reference).rectify(hypotheses, scores, mix, gating)


def _gated_hypotheses(hypotheses: Tensor | Sequence[Tensor], scores: Tensor, gating: str | None) -> Tensor:
    """Hypotheses as one tensor [N, D+1, L], after the checks of it, scores and gating."""
    if not isinstance(hypotheses, Tensor):
        hypotheses = _stack(hypotheses)
    _check_float("hypotheses", hypotheses)
    if hypotheses.dim() != 3 or hypotheses.shape[1] == 0 or hypotheses.shape[2] == 0:
        raise ValueError(f"hypotheses must be [N, D+1, L] with D+1 and L of at least 1, got {_shape(hypotheses)}")
    _check_float("scores", scores)
    if scores.dim() != 2 or scores.shape != hypotheses.shape[:2]:
        raise ValueError(
            f"scores must be [N, D+1] to match hypotheses [N, D+1, L] = {_shape(hypotheses)}, got {_shape(scores)}"
        )
    if scores.device != hypotheses.device:
        raise ValueError(f"scores must be on {hypotheses.device} like hypotheses, got {scores.device}")
    _check_gating(gating)
    return hypotheses


def _stack(hypotheses: Sequence[Tensor]) -> Tensor:
    if not isinstance(hypotheses, list | tuple):
        raise TypeError(f"hypotheses must be a tensor or a list or tuple of tensors, got {type(hypotheses).__name__}")
    if len(hypotheses) == 0:
        raise ValueError("hypotheses must hold at least one tensor [N, L], got none")
    for index, hypothesis in enumerate(hypotheses):
        _check_float(f"hypotheses[{index}]", hypothesis)
        if hypothesis.dim() != 2:
            raise ValueError(f"hypotheses[{index}] must be [N, L], got {_shape(hypothesis)}")
        first = hypotheses[0]
        if hypothesis.shape != first.shape or hypothesis.device != first.device:
            raise ValueError(
                f"hypotheses[{index}] must be {_shape(first)} on {first.device} like the first, "
                f"got {_shape(hypothesis)} on {hypothesis.device}"
            )
    dtype = hypotheses[0].dtype
    for hypothesis in hypotheses[1:]:
        dtype = torch.promote_types(dtype, hypothesis.dtype)
    return torch.stack([value if value.dtype == dtype else value.to(dtype) for value in hypotheses], dim=1)


# ---------------------------------------------------------------------------------------------- checking


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_float(name: str, value: Any) -> None:
    _check_tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def _check_mix(mix: object) -> None:
    if mix not in _MIXES:
        raise ValueError(f"mix must be one of {', '.join(_MIXES)}, got {mix!r}")


def _check_gating(gating: object) -> None:
    if gating not in _GATINGS:
        raise ValueError(f"gating must be 'softmax', 'sigmoid' or None, got {gating!r}")


def _check_map(feature_map: Tensor) -> None:
    _check_float("feature_map", feature_map)
    if feature_map.dim() not in (3, 4):
        raise ValueError(f"feature_map must be [N, C, H, W] or [N, C, S], got {_shape(feature_map)}")
    if 0 in feature_map.shape[1:]:
        raise ValueError(f"feature_map must have at least one channel and position, got {_shape(feature_map)}")


def _check_mask_weight(feature_map: Tensor, mask_weight: Tensor) -> None:
    _check_tensor("mask_weight", mask_weight)
    channels = feature_map.shape[1]
    pointwise = mask_weight.dim() == 2 and mask_weight.shape[1] == channels
    spatial = mask_weight.dim() == 4 and tuple(mask_weight.shape[1:]) == (channels, 3, 3)
    if not (pointwise or spatial) or mask_weight.shape[0] == 0:
        raise ValueError(
            f"mask_weight must be [K, C] or [K, C, 3, 3] with K of at least 1 and C = {channels} to match feature_map "
            f"{_shape(feature_map)}, got {_shape(mask_weight)}"
        )
    if spatial and feature_map.dim() == 3:
        raise ValueError(f"feature_map must be [N, C, H, W] for a mask_weight of 3×3 heads, got {_shape(feature_map)}")
    _check_kind("mask_weight", mask_weight, feature_map)


def _check_layer(
    feature_map: Tensor,
    mask_weight: Tensor,
    mask_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
) -> None:
    _check_map(feature_map)
    _check_mask_weight(feature_map, mask_weight)
    heads = mask_weight.shape[0]
    _check_weight("mask_bias", mask_bias, feature_map, (heads,))
    _check_weight("gate_weight", gate_weight, feature_map, tuple(mask_weight.shape))
    _check_weight("gate_bias", gate_bias, feature_map, (heads,))
    if gate_bias is not None and gate_weight is None:
        raise ValueError("gate_bias must come with gate_weight, got gate_weight=None")
    _check_output_weight(feature_map, mask_weight, output_weight)
    labels = output_weight.shape[1 if output_weight.dim() > 2 else 0]
    _check_weight("output_bias", output_bias, feature_map, (heads, labels))


def _check_output_weight(feature_map: Tensor, mask_weight: Tensor, output_weight: Tensor) -> None:
    _check_tensor("output_weight", output_weight)
    columns, shape = mask_weight.numel(), tuple(output_weight.shape)
    as_linear = len(shape) == 2 and shape[1] == columns
    by_head = len(shape) == mask_weight.dim() + 1 and shape[:1] + shape[2:] == tuple(mask_weight.shape)
    if not (as_linear or by_head) or 0 in shape:
        taps, kernel = ("·9", ", 3, 3") if mask_weight.dim() == 4 else ("", "")
        raise ValueError(
            f"output_weight must be [L, K·C{taps}] or [K, L, C{kernel}] with L of at least 1 and K·C{taps} = {columns} "
            f"to match mask_weight, got {_shape(output_weight)}"
        )
    _check_kind("output_weight", output_weight, feature_map)


def _check_weight(name: str, value: Tensor | None, feature_map: Tensor, shape: tuple[int, ...]) -> None:
    if value is None:
        return
    _check_tensor(name, value)
    if tuple(value.shape) != tuple(shape) or 0 in value.shape:
        expected = "[" + ", ".join(str(max(size, 1)) for size in shape) + "]"
        raise ValueError(f"{name} must be {expected}, got {_shape(value)}")
    _check_kind(name, value, feature_map)


def _check_kind(name: str, value: Tensor, feature_map: Tensor) -> None:
    dtype = feature_map.dtype
    if value.dtype != dtype and not (dtype.itemsize == 2 and value.dtype == torch.float32):
        alternative = " or torch.float32" if dtype.itemsize == 2 else ""
        raise TypeError(f"{name} must be {dtype}{alternative} to go with feature_map, got {value.dtype}")
    if value.device != feature_map.device:
        raise ValueError(f"{name} must be on {feature_map.device} like feature_map, got {value.device}")
