"""torch.library operators around the Triton and the native kernels, and the autograd.Functions in front of them.

The operators are opaque and functional: schemas, fakes, no autograd of their own. The namespace ar_kernels has them in
Triton, ar_kernels_native as the library built from csrc/ implements them; nothing else differs. The Functions carry the
derivatives; a backward is a Function too, whose own backward differentiates the eager formulas, so double backward
works. Kernels are imported or loaded when an operator first runs, so importing this file needs no Triton, no library.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, are_deterministic_algorithms_enabled
from torch.autograd import forward_ad

from . import eager, native, node, plans
from .reference import accumulator_dtype

try:  # what Function.apply itself goes by, in torch 2.11 to 2.13
    from torch._C import _are_functorch_transforms_active as _functorch_is_active
    from torch._C._functorch import unwrap_if_dead as _unwrap_if_dead
    from torch._functorch.utils import unwrap_dead_wrappers as _unwrap_dead_wrappers
except ImportError:  # another torch: every call goes through Function.apply
    _functorch_is_active = _unwrap_if_dead = _unwrap_dead_wrappers = None  # type: ignore[assignment]

_triton_library = torch.library.Library("ar_kernels", "DEF")
_launchers: dict[str, Callable[..., Any]] = {}
"""What the Triton operators do, by name."""

_native_library = torch.library.Library(native.NAMESPACE, "DEF")


def _define(
    schema: str,
    implementation: Callable[..., Any] | None,
    fake: Callable[..., Any],
    extra: str = "",
    in_native: bool = True,
) -> None:
    """One operator, in the namespaces that have it. implementation: the Triton one, or None; in_native: whether the
    library has one. extra: what the Triton one takes more.

    Its kernels read any strides, so Inductor need not copy inputs into the layout it traced.
    """
    name = schema.split("(")[0]
    stand_in = functools.partial(_load_native, name) if in_native else None
    planned = None
    if implementation is not None:
        _launchers[name] = implementation
        planned = functools.partial(_run_operator, name, schema.split("->")[0].count("Tensor"))
    for library, python in ((_triton_library, planned), (_native_library, stand_in)):
        if python is None:
            continue
        whole = schema.replace(") ->", f", {extra}) ->") if extra and library is _triton_library else schema
        library.define(whole, tags=(torch.Tag.flexible_layout,))
        library.impl(name, python, "CompositeExplicitAutograd")
        operator = getattr(getattr(torch.ops, library.ns), name).default
        for kind in ("cpu", "cuda"):
            library.impl(name, functools.partial(_without_autocast, operator, kind), f"Autocast{kind.upper()}")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def _run_operator(name: str, count: int, *arguments: Any) -> Any:
    """A Triton operator, called by the dispatcher, of a compiled graph for instance; so many tensors come first."""
    with torch.no_grad():  # PyTorch's products within are no part of anybody's graph
        if plans.are_used(arguments[:1]):  # the dispatcher saw to the others
            _hand_over()
            made = _run_by_plan(name, arguments[:count], arguments[count:])
        else:
            made = _launchers[name](*arguments)
    if isinstance(made, Tensor):
        return made
    return tuple([arguments[0].new_empty(0) if output is None else output for output in made])


def _hand_over() -> None:
    """Once there are plans, csrc/node takes the operators' calls: without Python where one is known."""
    with _handing_over:
        _hand_over_once()


_handing_over = threading.Lock()


@functools.cache
def _hand_over_once() -> None:
    module: Any = node.module()
    if module is None:
        return
    numbers = {word: plans.number_of(word) for word in (*MIXES, *GATINGS)}
    replay = native.address("ar_kernels_replay")
    for name in _launchers:
        module.take_operator("ar_kernels", name, "CUDA", replay, plans.number_of(name), numbers)


def _run_by_plan(name: str, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
    return plans.run(name, _launchers[name], _import_kernels().launch, tensors, options)


def _without_autocast(operator: Any, kind: str, *arguments: Any) -> Any:
    """An operator called under autocast, which would round what it has PyTorch multiply."""
    with _AutocastOff(kind):
        return operator(*arguments)


def _load_native(name: str, *arguments: Any) -> Any:
    """Stands in for a native operator until the library is loaded, whose kernels then come before this."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    kind = tensors[0].device.type
    reason = native.why_not(kind)
    if reason is None and not native.has_kernels(kind, name):
        reason = f"the native library has no {name} for {kind}"
    odd = next((t for t in tensors if t.device.type != kind or t.layout != torch.strided), None)
    if reason is None and odd is not None:  # the dispatcher would come back here
        reason = f"tensors must all be dense and on {kind}, got a {odd.layout} one on {odd.device.type}"
    if reason is not None:
        raise RuntimeError(f"{native.NAMESPACE}::{name} cannot run: {reason}")
    return getattr(_operators("native"), name).default(*arguments)


def _operators(implementation: str) -> Any:
    return torch.ops.ar_kernels_native if implementation == "native" else torch.ops.ar_kernels


def _dispatch(implementation: str, name: str, tensors: list[Tensor | None], options: list[Any], *extra: Any) -> Any:
    """What the operator of this name does. extra: options that the Triton one alone takes."""
    if implementation == "triton" and plans.are_used(tensors) and not is_transformed():
        return _run_by_plan(name, tensors, (*options, *extra))  # without the dispatcher
    operator = getattr(_operators(implementation), name).default
    return operator(*tensors, *options, *(extra if implementation == "triton" else ()))


_define("product(Tensor a, Tensor b) -> Tensor", None, lambda a, b: a.new_empty(a.shape[0], b.shape[1]))


def _product_of(implementation: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies the matrices of a call with W_O where they are no part of `layer`. The library's product keeps a
    few rows, those of a batch, in registers: on a CPU with AVX-512 it takes less than half as long as PyTorch's in
    float32, in half precision a tenth where it is small."""
    is_native = implementation == "native" and dtype != torch.float64
    return torch.ops.ar_kernels_native.product.default if is_native else torch.mm


def _launch(name: str, tensors: list[Tensor | None], options: list[Any], *extra: Any) -> Any:
    """What the Triton operator of this name does, without the dispatcher."""
    return _launchers[name](*tensors, *options, *extra)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments) without its inspect.signature, which takes longer than the rest of it.

    Where nothing records, the forward alone. What torch.compile and functorch see is function.apply itself, but not
    both at once: Dynamo keeps a Function only where a tensor requires_grad, and functorch's tensors do not. It would
    trace the forward, and the derivative would be zero.
    """
    if torch.compiler.is_compiling():
        if _functorch_is_active is not None and is_transformed():
            torch._dynamo.graph_break("ar_kernels: torch.compile would lose derivatives of torch.func and forward mode")
            return torch._dynamo.disable(function.apply)(*arguments)
        return function.apply(*arguments)
    if _functorch_is_active is None or _functorch_is_active():
        return function.apply(*arguments)
    arguments = _unwrap_dead_wrappers(arguments)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return function.forward(*arguments)


@functools.cache  # an import statement takes longer, even of what is imported
def _import_kernels() -> ModuleType:
    try:
        from . import kernels
        from .kernels import attend3x3, attend_backward, attend_forward, masks, products, rectify  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"the operators of ar_kernels cannot run: {error}; {_WITHOUT_TRITON}") from error
    return kernels


_WITHOUT_TRITON = "what was exported under use_implementation('eager') or ('native') runs without Triton"


def _kernels(data: Tensor) -> ModuleType:
    """The launchers, for data; an exported graph gets here with what functional.py never saw."""
    if not data.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        where = f"inputs are on {data.device.type}, Triton kernels run on a CUDA GPU"
        raise RuntimeError(f"the operators of ar_kernels cannot run: {where}; {_WITHOUT_TRITON}")
    return _import_kernels()


_NOTHING = nullcontext()


class _AutocastOff:
    """torch.autocast(kind, enabled=False) inside another one, at a tenth of its host time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self._kind, True)


def autocast_off(data: Tensor) -> AbstractContextManager[Any]:
    """The computation runs in its input's dtype; outside autocast there is nothing to switch, and no time to lose."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return _NOTHING
    kind = data.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta knows no autocast and would raise
        return _NOTHING
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _AutocastOff(kind)


# ---------------------------------------------------------------------------------------------- gated_attend


class GatedAttended(NamedTuple):
    """What gated_attend returns. Fields that were not asked for are None."""

    pooled: Tensor  # [N, K, C] or [N, K, C, 9], accumulator's dtype, as all but features, hypothesis and feature_map
    lse: Tensor  # [N, K]
    logits: Tensor | None  # [N, K, S]
    scores: Tensor | None  # [N, K]
    gates: Tensor | None  # [N, K'], of the first K' = gated_heads heads
    features: Tensor | None  # [N, K'·C], g ⊙ P in the map's dtype
    mean: Tensor | None  # [N, C]
    hypothesis: Tensor | None  # [N, L], features times output_w, in the map's dtype
    feature_map: Tensor  # the tapped map, or z itself


def _allocate(
    z: Tensor, w: Tensor, gated_heads: int, wants_logits: bool, wants_mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, channels = z.shape[:2]
    heads, taps = w.shape[0], w.shape[2:].numel()
    gated = gated_heads > 0
    pooled = z.new_empty(
        (images, heads, channels) if w.dim() == 2 else (images, taps, heads, channels), dtype=accumulator_dtype(z.dtype)
    )
    return (
        pooled if w.dim() == 2 else pooled.movedim(1, 3),
        pooled.new_empty(images, heads),
        pooled.new_empty(images, heads, math.prod(z.shape[2:])) if wants_logits else pooled.new_empty(0),
        pooled.new_empty(images, heads) if gated else pooled.new_empty(0),
        pooled.new_empty(images, gated_heads) if gated else pooled.new_empty(0),
        z.new_empty(images, gated_heads * channels * taps) if gated else z.new_empty(0),
        pooled.new_empty(images, channels) if wants_mean else pooled.new_empty(0),
    )


def _gated_attend(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    gated_heads: int,
    wants_logits: bool,
    wants_mean: bool,
    alike: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """alike: an image is cut up the same in whatever batch it comes, so that its results have the same bits."""
    outputs = _allocate(z, w, gated_heads, wants_logits, wants_mean)
    if z.shape[0] > 0:
        pooled, lse, logits, scores, gates, features, mean = outputs
        gated = gated_heads > 0
        with torch.cuda.device_of(z):
            _kernels(z).attend_forward.attend_forward(
                z,
                w.contiguous(),
                _contiguous(b),
                _contiguous(score_w),
                _contiguous(score_b),
                pooled,
                lse,
                logits if wants_logits else None,
                mean if wants_mean else None,
                scores if gated else None,
                gates if gated else None,
                features if gated else None,
                alike,
            )
    return outputs


def _gated_attend_fake(z, w, b, score_w, score_b, gated_heads, wants_logits, wants_mean, alike=False):
    return _allocate(z, w, gated_heads, wants_logits, wants_mean)


_define(
    "gated_attend(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor? score_b, SymInt gated_heads, "
    "bool wants_logits, bool wants_mean, bool alike=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_attend,
    _gated_attend_fake,
)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _is_channels_last(z: Tensor) -> bool:
    return z.stride(1) < z.stride(-1)


def _gradient_strides(z: Tensor, channels_last: bool) -> tuple[int, ...]:
    channels, positions = z.shape[1], math.prod(z.shape[2:])
    step = channels if channels_last else 1
    rows = () if z.dim() == 3 else (step * z.shape[3],)
    return channels * positions, 1 if channels_last else positions, *rows, step


def _allocate_gradients(
    z: Tensor,
    w: Tensor,
    score_w: Tensor | None,
    lse: Tensor,
    needs_z: bool,
    needs_w: bool,
    needs_score: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scored = needs_score and score_w is not None
    return (
        z.new_empty_strided(z.shape, _gradient_strides(z, channels_last)) if needs_z else z.new_empty(0),
        w.new_empty(w.shape) if needs_w else w.new_empty(0),
        w.new_empty(0) if score_w is None or not scored else score_w.new_empty(w.shape),
        lse.new_empty(w.shape[0] if scored else 0),
    )


def _gated_attend_backward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    scores: Tensor | None,
    gates: Tensor | None,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    grad_features: Tensor | None,
    grad_mean: Tensor | None,
    upstream: Tensor | None,
    needs_z: bool,
    needs_w: bool,
    needs_score: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _allocate_gradients(z, w, score_w, lse, needs_z, needs_w, needs_score, channels_last)
    dz, dw, dscore_w, dscore_b = gradients
    if z.shape[0] == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    scored = needs_score and score_w is not None
    with torch.cuda.device_of(z):
        _kernels(z).attend_backward.attend_backward(
            z,
            w.contiguous(),
            _contiguous(b),
            _contiguous(score_w),
            pooled.contiguous(),  # saved tensors come back as the user's hooks unpack them
            lse.contiguous(),
            _contiguous(scores),
            _contiguous(gates),
            _contiguous(grad_pooled),
            _contiguous(grad_lse),
            _contiguous(grad_logits),
            _contiguous(grad_scores),
            _contiguous(grad_gates),
            _contiguous(grad_features),
            _contiguous(grad_mean),
            upstream,
            dz if needs_z else None,
            dw if needs_w else None,
            dscore_w if scored else None,
            dscore_b if scored else None,
            are_deterministic_algorithms_enabled(),
        )
    return gradients


def _gated_attend_backward_fake(z, w, b, score_w, pooled, lse, *arguments):
    return _allocate_gradients(z, w, score_w, lse, *arguments[-4:])


_define(
    "gated_attend_backward(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor pooled, Tensor lse, Tensor? scores, "
    "Tensor? gates, Tensor? grad_pooled, Tensor? grad_lse, Tensor? grad_logits, Tensor? grad_scores, "
    "Tensor? grad_gates, Tensor? grad_features, Tensor? grad_mean, Tensor? upstream, bool needs_z, bool needs_w, "
    "bool needs_score, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_attend_backward,
    _gated_attend_backward_fake,
)


# 3×3 heads w, score_w [K, C, 3, 3]. The same, but that pooled is [N, K, C, 9], features [N, K'·C·9], and the logits are
# always written: the backward takes them, not to read the map a third time.


def _gated_attend3x3(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    gated_heads: int,
    wants_mean: bool,
    alike: bool = False,
    taps_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """taps_first: features are [N, K'·9·C], as an output weight has them that lies channels last."""
    outputs = _allocate(z, w, gated_heads, True, wants_mean)
    if z.shape[0] > 0:
        pooled, lse, logits, scores, gates, features, mean = outputs
        gated = gated_heads > 0
        with torch.cuda.device_of(z):
            _kernels(z).attend3x3.attend3x3_forward(
                z,
                w,
                _contiguous(b),
                score_w,
                _contiguous(score_b),
                pooled.movedim(3, 1),
                lse,
                logits,
                mean if wants_mean else None,
                scores if gated else None,
                gates if gated else None,
                features if gated else None,
                alike,
                taps_first,
            )
    return outputs


def _gated_attend3x3_fake(z, w, b, score_w, score_b, gated_heads, wants_mean, alike=False, taps_first=False):
    return _allocate(z, w, gated_heads, True, wants_mean)


_define(
    "gated_attend3x3(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor? score_b, SymInt gated_heads, "
    "bool wants_mean, bool alike=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_attend3x3,
    _gated_attend3x3_fake,
    "bool taps_first=False",
)


def _gated_attend3x3_backward(
    z: Tensor,
    w: Tensor,
    score_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor,
    scores: Tensor | None,
    gates: Tensor | None,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    grad_features: Tensor | None,
    grad_mean: Tensor | None,
    upstream: Tensor | None,
    needs_z: bool,
    needs_w: bool,
    needs_score: bool,
    channels_last: bool,
    taps_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if z.shape[0] == 0:
        gradients = _allocate_gradients(z, w, score_w, lse, needs_z, needs_w, needs_score, channels_last)
        for gradient in gradients:
            gradient.zero_()
        return gradients
    # dz comes from the launcher, which allocates it after its scratch is gone.
    _, dw, dscore_w, dscore_b = _allocate_gradients(z, w, score_w, lse, False, needs_w, needs_score, channels_last)
    scored = needs_score and score_w is not None
    with torch.cuda.device_of(z):
        dz = _kernels(z).attend3x3.attend3x3_backward(
            z,
            w,
            score_w,
            pooled.movedim(3, 1).contiguous(),  # saved tensors come back as the user's hooks unpack them
            lse.contiguous(),
            logits.contiguous(),
            _contiguous(scores),
            _contiguous(gates),
            grad_pooled,
            _contiguous(grad_lse),
            _contiguous(grad_logits),
            _contiguous(grad_scores),
            _contiguous(grad_gates),
            _contiguous(grad_features),
            _contiguous(grad_mean),
            upstream,
            _gradient_strides(z, channels_last) if needs_z else None,
            dw if needs_w else None,
            dscore_w if scored else None,
            dscore_b if scored else None,
            taps_first,
            are_deterministic_algorithms_enabled(),
        )
    return z.new_empty(0) if dz is None else dz, dw, dscore_w, dscore_b


def _gated_attend3x3_backward_fake(z, w, score_w, pooled, lse, *arguments):
    return _allocate_gradients(z, w, score_w, lse, *arguments[11:15])


_define(
    "gated_attend3x3_backward(Tensor z, Tensor w, Tensor? score_w, Tensor pooled, Tensor lse, Tensor logits, "
    "Tensor? scores, Tensor? gates, Tensor? grad_pooled, Tensor? grad_lse, Tensor? grad_logits, Tensor? grad_scores, "
    "Tensor? grad_gates, Tensor? grad_features, Tensor? grad_mean, Tensor? upstream, bool needs_z, bool needs_w, "
    "bool needs_score, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_attend3x3_backward,
    _gated_attend3x3_backward_fake,
    "bool taps_first=False",
)


# A batch's products with W_O, where they are small.


def _hypothesis(features: Tensor, output_w: Tensor) -> Tensor:
    hypothesis = _hypothesis_fake(features, output_w)
    if hypothesis.shape[0] > 0:
        with torch.cuda.device_of(features):
            _kernels(features).products.hypothesis(features.contiguous(), output_w, hypothesis)
    return hypothesis


def _hypothesis_fake(features, output_w):
    return features.new_empty(features.shape[0], output_w.shape[0])


def _hypothesis_backward(
    grad: Tensor, features: Tensor, output_w: Tensor, needs_features: bool, needs_output_w: bool
) -> tuple[Tensor, Tensor]:
    gradients = _hypothesis_backward_fake(grad, features, output_w, needs_features, needs_output_w)
    dfeatures, doutput_w = gradients
    if grad.shape[0] == 0:
        doutput_w.zero_()
    elif needs_features or needs_output_w:
        with torch.cuda.device_of(grad):
            _kernels(grad).products.hypothesis_backward(
                grad,
                features.contiguous(),  # saved tensors come back as the user's hooks unpack them
                output_w,
                dfeatures if needs_features else None,
                doutput_w if needs_output_w else None,
            )
    return gradients


def _hypothesis_backward_fake(grad, features, output_w, needs_features, needs_output_w):
    dfeatures = features.new_empty(features.shape) if needs_features else features.new_empty(0)
    return dfeatures, output_w.new_empty(output_w.shape) if needs_output_w else output_w.new_empty(0)


_define("hypothesis(Tensor features, Tensor output_w) -> Tensor", _hypothesis, _hypothesis_fake, in_native=False)
_define(
    "hypothesis_backward(Tensor grad, Tensor features, Tensor output_w, bool needs_features, bool needs_output_w) "
    "-> (Tensor, Tensor)",
    _hypothesis_backward, _hypothesis_backward_fake, in_native=False,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- their Functions


def _mask_bias_gradient(lse: Tensor, b: Tensor, grad_lse: Tensor | None, grad_logits: Tensor | None) -> Tensor:
    db = lse.new_zeros(lse.shape[1])
    if grad_lse is not None:
        db = db + grad_lse.sum(dim=0)
    if grad_logits is not None:
        db = db + grad_logits.sum(dim=(0, 2))
    return db.to(b.dtype)


def _forward(
    run: Callable[..., Any],
    multiply: Callable[[Tensor, Tensor], Tensor] | None,
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    output_w: Tensor | None,
    gated_heads: int,
    wants_logits: bool,
    wants_mean: bool,
    alike: bool,
    taps_first: bool,
) -> tuple[Tensor | None, ...]:
    """The operator's outputs and the hypothesis, None for those that were not asked for. run: _dispatch with an
    implementation, or _launch. multiply: matrices, None for the operators hypothesis and hypothesis_backward."""
    tensors = [z, w, b, score_w, score_b]
    if w.dim() == 2:
        outputs = run("gated_attend", tensors, [gated_heads, wants_logits, wants_mean, alike])
    else:
        outputs = run("gated_attend3x3", tensors, [gated_heads, wants_mean, alike], taps_first)
    hypothesis = None
    if output_w is not None:
        features = outputs[5]
        if multiply is None:
            hypothesis = run("hypothesis", [features, output_w], [])
        else:
            hypothesis = multiply(features, _in_dtype(output_w, features.dtype).t())
    return _only(_asked(w, output_w, gated_heads, wants_logits, wants_mean), (*outputs, hypothesis))


def _asked(w: Tensor, output_w: Tensor | None, gated_heads: int, wants_logits: bool, wants_mean: bool) -> list[bool]:
    """Which are asked for of pooled, lse, logits, scores, gates, features, mean and hypothesis."""
    gated = gated_heads > 0
    return [True, True, wants_logits or w.dim() == 4, gated, gated, gated, wants_mean, output_w is not None]


def _only(asked: Sequence[bool], outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """None in place of what was not asked for."""
    return tuple([output if is_asked else None for output, is_asked in zip(outputs, asked)])


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


class _GatedAttend(torch.autograd.Function):
    """Outputs: the operator's, None for those not asked for, then the hypothesis and the tapped map, None likewise."""

    @staticmethod
    def forward(
        z, w, b, score_w, score_b, output_w, gated_heads, wants_logits, wants_mean, tap, implementation, taps_first
    ):
        alike = are_deterministic_algorithms_enabled()
        outputs = _forward(
            functools.partial(_dispatch, implementation), _product_of(implementation, z.dtype),
            z, w, b, score_w, score_b, output_w, gated_heads, wants_logits, wants_mean, alike, taps_first,
        )  # fmt: skip
        return *outputs, z.view_as(z) if tap else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, w, b, score_w, score_b, output_w, ctx.gated_heads, _, ctx.wants_mean, _, *ctx.by = inputs
        pooled, lse, logits, scores, gates, features, *_ = output
        logits = logits if w.dim() == 4 else None
        ctx.channels_last = _is_channels_last(z)  # here: strides read in backward make Dynamo copy every gradient
        ctx.save_for_backward(z, w, b, score_w, score_b, output_w, pooled, lse, logits, scores, gates, features)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx, grad_pooled, grad_lse, grad_logits, grad_scores, grad_gates, grad_features, grad_mean, grad_hypothesis,
        upstream,
    ):  # fmt: skip
        z, w, b, score_w, score_b, output_w, pooled, lse, logits, scores, gates, features = ctx.saved_tensors
        needs_z, needs_w, needs_b, needs_score_w, needs_score_b, needs_output_w = ctx.needs_input_grad[:6]
        needs_score = needs_score_w or needs_score_b
        dz = dw = db = dscore_w = doutput_w = None
        dscore_b: Any = None
        if grad_hypothesis is not None:  # differentiable once more: features is this Function's own output
            with autocast_off(z):
                if needs_output_w:
                    doutput_w = (grad_hypothesis.t() @ features).to(output_w.dtype)
                if needs_z or needs_w or needs_score:
                    weighted = grad_hypothesis @ output_w.to(z.dtype)
                    grad_features = weighted if grad_features is None else grad_features + weighted
        grads = grad_pooled, grad_lse, grad_logits, grad_scores, grad_gates, grad_features, grad_mean
        if all(grad is None for grad in grads):  # nothing but the tap was used, or nothing but W_O is trained
            return upstream, None, None, None, None, doutput_w, *[None] * 6
        if needs_z or needs_w or needs_score:
            dz, dw, dscore_w, dscore_b = _apply(
                _GatedAttendBackward, z, w, b, score_w, score_b, pooled, lse, logits, scores, gates, *grads, upstream,
                ctx.gated_heads, ctx.wants_mean, needs_z, needs_w, needs_score, ctx.channels_last, *ctx.by,
            )  # fmt: skip
        if needs_b:  # the bias cancels in the masks: only lse and the logits know it
            db = _mask_bias_gradient(lse, b, grad_lse, grad_logits)
        return (
            dz if needs_z else None,
            dw if needs_w else None,
            db,
            dscore_w if needs_score_w else None,
            dscore_b.to(score_b.dtype) if needs_score_b else None,
            doutput_w,
            *[None] * 6,
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_GatedAttend, info, in_dims, arguments)


def _backward(
    run: Callable[..., Any],
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    scores: Tensor | None,
    gates: Tensor | None,
    received: Sequence[Tensor | None],
    options: list[Any],
    taps_first: bool,
) -> Any:
    """The backward operator's outputs, of which those that were not asked for are empty; run as in _forward. received:
    gradients of the forward operator's outputs, then of the tapped map."""
    if w.dim() == 2:
        return run("gated_attend_backward", [z, w, b, score_w, pooled, lse, scores, gates, *received], options)
    tensors = [z, w, score_w, pooled, lse, logits, scores, gates, *received]
    return run("gated_attend3x3_backward", tensors, options, taps_first)


class _GatedAttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        z, w, b, score_w, score_b, pooled, lse, logits, scores, gates,
        grad_pooled, grad_lse, grad_logits, grad_scores, grad_gates, grad_features, grad_mean, upstream,
        gated_heads, wants_mean, needs_z, needs_w, needs_score, channels_last, implementation, taps_first,
    ):  # fmt: skip
        received = grad_pooled, grad_lse, grad_logits, grad_scores, grad_gates, grad_features, grad_mean, upstream
        return _backward(
            functools.partial(_dispatch, implementation), z, w, b, score_w, pooled, lse, logits, scores, gates,
            received, [needs_z, needs_w, needs_score, channels_last], taps_first,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], *inputs[10:18])
        (ctx.gated_heads, ctx.wants_mean), ctx.taps_first = inputs[18:20], inputs[25]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        tensors = ctx.saved_tensors
        inputs, grads, upstream = tensors[:5], tensors[5:12], tensors[12]

        def forward(z, w, b, score_w, score_b):
            *outputs, features, mean = eager.gated_attend(z, w, b, score_w, score_b, ctx.gated_heads, ctx.wants_mean)
            features = features.mT if ctx.taps_first else features  # [N, K', C, 9]
            return (*outputs, features.flatten(1), mean, z)

        received = _double_backward(forward, inputs, (0, 1, 3, 4), (*grads, upstream), second)
        return *received[:5], *[None] * 5, *received[5:], *[None] * 8

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_GatedAttendBackward, info, in_dims, arguments)


# ---------------------------------------------------------------------------------------------- layer

# All of a direction of a layer, with output_w's products: what a call that nothing transforms takes.


def _product_in_triton(z: Tensor, output_w: Tensor | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What multiplies with output_w in a Triton layer; None: hypothesis and hypothesis_backward, for small ones."""
    is_asked = output_w is not None and z.shape[0] > 0
    return None if is_asked and _kernels(z).products.are_for_us(z, output_w) else torch.mm


def _layer(z: Tensor, w: Tensor, b: Any, score_w: Any, score_b: Any, output_w: Any, *options: Any) -> Any:
    return _forward(_launch, _product_in_triton(z, output_w), z, w, b, score_w, score_b, output_w, *options)


def _layer_fake(z, w, b, score_w, score_b, output_w, gated_heads, wants_logits, wants_mean, alike, taps_first):
    asked = _asked(w, output_w, gated_heads, wants_logits, wants_mean)
    hypothesis = None if output_w is None else _hypothesis_fake(z, output_w)
    made = _only(asked, (*_allocate(z, w, gated_heads, asked[2], wants_mean), hypothesis))
    return tuple(z.new_empty(0) if output is None else output for output in made)


_define(
    "layer(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor? score_b, Tensor? output_w, SymInt gated_heads, "
    "bool wants_logits, bool wants_mean, bool alike, bool taps_first) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer,
    _layer_fake,
)


def _layer_backward(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    output_w: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    scores: Tensor | None,
    gates: Tensor | None,
    features: Tensor | None,
    grad_pooled: Tensor | None,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    grad_scores: Tensor | None,
    grad_gates: Tensor | None,
    grad_features: Tensor | None,
    grad_mean: Tensor | None,
    grad_hypothesis: Tensor | None,
    upstream: Tensor | None,
    needs_z: bool,
    needs_w: bool,
    needs_score_w: bool,
    needs_score_b: bool,
    needs_output_w: bool,
    channels_last: bool,
    taps_first: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of z, w, score_w, score_b (in lse's dtype) and output_w, None where they are not needed. At least one
    of the outputs, the tapped map aside, has a gradient."""
    dz = dw = dscore_w = dscore_b = doutput_w = None
    needs_score = needs_score_w or needs_score_b
    needs_attention = needs_z or needs_w or needs_score
    if grad_hypothesis is not None and features is not None and output_w is not None:
        multiply = _product_in_triton(z, output_w)
        weighted, doutput_w = _hypothesis_gradients(
            multiply, grad_hypothesis, features, output_w, needs_attention, needs_output_w
        )
        if weighted is not None:
            grad_features = weighted if grad_features is None else grad_features + weighted
    grads = grad_pooled, grad_lse, grad_logits, grad_scores, grad_gates, grad_features, grad_mean
    if needs_attention and any(grad is not None for grad in grads):
        dz, dw, dscore_w, dscore_b = _backward(
            _launch, z, w, b, score_w, pooled, lse, logits, scores, gates,
            (*grads, upstream), [needs_z, needs_w, needs_score, channels_last], taps_first,
        )  # fmt: skip
    return (
        dz if needs_z else None,
        dw if needs_w else None,
        dscore_w if needs_score_w else None,
        dscore_b if needs_score_b else None,
        doutput_w,
    )


def _hypothesis_gradients(
    multiply: Callable[[Tensor, Tensor], Tensor] | None,
    grad: Tensor,
    features: Tensor,
    output_w: Tensor,
    needs_features: bool,
    needs_output_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of features and output_w, None where they are not needed; multiply as in _forward."""
    if multiply is not None:
        dfeatures = multiply(grad, _in_dtype(output_w, features.dtype)) if needs_features else None
        return dfeatures, _in_dtype(multiply(grad.t(), features), output_w.dtype) if needs_output_w else None
    found = _launch("hypothesis_backward", [grad, features, output_w], [needs_features, needs_output_w])
    return found[0] if needs_features else None, found[1] if needs_output_w else None


def _layer_backward_fake(z, w, b, score_w, output_w, pooled, lse, *arguments):
    *_, grad_hypothesis, _ = arguments[:13]
    needs_z, needs_w, needs_score_w, needs_score_b, needs_output_w, channels_last, _ = arguments[13:]
    needs_score = needs_score_w or needs_score_b
    gradients = _allocate_gradients(z, w, score_w, lse, needs_z, needs_w, needs_score, channels_last)
    doutput_w = None if output_w is None else output_w.new_empty(output_w.shape)
    needs = needs_z, needs_w, needs_score_w, needs_score_b, needs_output_w and grad_hypothesis is not None
    return tuple(z.new_empty(0) if gradient is None else gradient for gradient in _only(needs, (*gradients, doutput_w)))


_define(
    "layer_backward(Tensor z, Tensor w, Tensor? b, Tensor? score_w, Tensor? output_w, Tensor pooled, Tensor lse, "
    "Tensor? logits, Tensor? scores, Tensor? gates, Tensor? features, Tensor? grad_pooled, Tensor? grad_lse, "
    "Tensor? grad_logits, Tensor? grad_scores, Tensor? grad_gates, Tensor? grad_features, Tensor? grad_mean, "
    "Tensor? grad_hypothesis, Tensor? upstream, bool needs_z, bool needs_w, bool needs_score_w, bool needs_score_b, "
    "bool needs_output_w, bool channels_last, bool taps_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_backward,
    _layer_backward_fake,
)


_How = tuple[int, bool, bool, bool, str, bool]
"""gated_heads, wants_logits, wants_mean, whether the map is tapped, implementation, taps_first: a call but for its
tensors, as csrc/node takes it too. A NamedTuple would cost every call its making.

What of the operator's outputs is *asked* for follows of it and the tensors; *wanted* are the indices of those of
_GatedAttend's outputs, the operator's and the tapped map, that the caller will use."""


def _made(inputs: Sequence[Any], how: _How, recorded: tuple[int, ...] | None = None) -> tuple[Tensor | None, ...]:
    """What layer makes, None for what was not asked for. recorded: the outputs of an eager call that is recorded; what
    its backward will launch is then compiled beside the forward's own kernels."""
    implementation, expecting = how[4], _NOTHING
    if recorded is not None and implementation == "triton" and inputs[0].is_cuda:
        expecting = _import_kernels().launch.expecting(lambda: _rehearse_backward(inputs, how, recorded))
    with expecting:
        made = _dispatch(implementation, "layer", [*inputs], _layer_options(how))
    return _only(_asked_by(inputs, how), made)


def _layer_options(how: _How) -> list[Any]:
    gated_heads, wants_logits, wants_mean, _, _, taps_first = how
    return [gated_heads, wants_logits, wants_mean, are_deterministic_algorithms_enabled(), taps_first]


def _asked_by(inputs: Sequence[Any], how: _How) -> list[bool]:
    return _asked(inputs[1], inputs[5], *how[:3])


def _rehearse_backward(inputs: Sequence[Any], how: _How, recorded: tuple[int, ...]) -> None:
    """What the backward of such a call launches, on stand-ins.

    Which outputs will have gradients is not known yet. A guess: all that were asked for but lse, and gates without a
    bias of theirs, which comes with the output's, that they are multiplied with; lse where there are logits, of which
    masks are made. Where that is wrong, the backward compiles what it needs itself.
    """
    if any([plans.sees_operators(value) for value in inputs if value is not None]):
        return
    stand_in = _import_kernels().launch.StandIn
    needs = [value is not None and value.requires_grad for value in inputs]
    inputs = [value if value is None else stand_in(value) for value in inputs]
    made = _only(_asked_by(inputs, how), _layer_fake(*inputs, *_layer_options(how)))
    outputs = _outputs(inputs[0], made, recorded)
    seldom = {1} if 2 not in recorded else set()
    seldom |= {4} if inputs[4] is None else set()
    grads = [None if i in seldom else output for i, output in zip(recorded, outputs)]
    if any(needs) and any([grad is not None for grad in grads]):
        received, channels_last = _received(recorded, grads), _is_channels_last(inputs[0])
        tensors, options = _of_backward(_to_save(inputs, made), received, needs, channels_last, how[5])
        _layer_backward(*tensors, *options)


def _to_save(inputs: Sequence[Any], made: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """What a backward needs of inputs and of what `_made` made."""
    pooled, lse, logits, scores, gates, features, _, _ = made
    return [*inputs, pooled, lse, None if inputs[1].dim() == 2 else logits, scores, gates, features]


def _outputs(z: Tensor, made: tuple[Tensor | None, ...], wanted: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """Those of _GatedAttend's outputs that are wanted."""
    return tuple([made[i] if i < 8 else z.view_as(z) for i in wanted])


def _gradients(
    saved: Sequence[Any],
    how: _How,
    wanted: tuple[int, ...],
    needs: Sequence[bool],
    channels_last: bool,
    grads: Sequence[Tensor | None],
    traced: bool = False,
) -> Sequence[Tensor | None]:
    """Gradients of z, w, b, score_w, score_b and output_w, None where they are not needed. saved: as _to_save has it.
    grads: of the outputs that are wanted."""
    z, _, b, _, score_b, _, _, lse, *_ = saved
    if not traced and (torch.is_grad_enabled() or _functorch_is_active()):
        return _differentiated(tuple(saved[:6]), how, wanted, needs, grads)
    received = _received(wanted, grads)
    tensors, options = _of_backward(saved, received, needs, channels_last, how[5])
    needs_z, needs_w, needs_b, needs_score_w, needs_score_b, needs_output_w = needs
    if all([grad is None for grad in received[:8]]):  # nothing but the tap was used
        return received[8], None, None, None, None, None
    with autocast_off(z):
        dz, dw, dscore_w, dscore_b, doutput_w = _dispatch(how[4], "layer_backward", tensors, options)
    return (
        dz if needs_z else None,
        dw if needs_w else None,
        _mask_bias_gradient(lse, b, received[1], received[2]) if needs_b else None,
        dscore_w if needs_score_w else None,
        dscore_b.to(score_b.dtype) if needs_score_b else None,
        doutput_w if needs_output_w and received[7] is not None else None,
    )


def _received(wanted: tuple[int, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of all of _GatedAttend's outputs, of those of the outputs that are wanted."""
    received: list[Tensor | None] = [None] * 9
    for i, grad in zip(wanted, grads):
        received[i] = grad
    return received


def _of_backward(
    saved: Sequence[Any], received: Sequence[Any], needs: Sequence[bool], channels_last: bool, taps_first: bool
) -> tuple[list[Any], list[Any]]:
    """layer_backward's tensors and options."""
    z, w, b, score_w, _, output_w, *made = saved
    needs_z, needs_w, _, needs_score_w, needs_score_b, needs_output_w = needs
    options = [needs_z, needs_w, needs_score_w, needs_score_b, needs_output_w, channels_last, taps_first]
    return [z, w, b, score_w, output_w, *made, *received], options


class _WantedGatedAttend(torch.autograd.Function):
    """_GatedAttend where nothing transforms it: what was not asked for is saved without being an output, so that a
    compiled graph makes no zeros for its gradient, and a direction of an eager call is one plan or operator, products
    with output_w included. A backward that is itself recorded or transformed differentiates _GatedAttend. csrc/node
    has the same in C++."""

    @staticmethod
    def forward(ctx, z, w, b, score_w, score_b, output_w, wanted, how):
        inputs = z, w, b, score_w, score_b, output_w
        ctx.traced = torch.compiler.is_compiling()  # not asked in backward, which compiled autograd traces too
        made = _made(inputs, how, None if ctx.traced else wanted)
        ctx.save_for_backward(*_to_save(inputs, made))
        ctx.set_materialize_grads(False)
        ctx.how, ctx.wanted = how, wanted
        ctx.channels_last = _is_channels_last(z)  # here: strides read in backward make Dynamo copy every gradient
        return _outputs(z, made, wanted)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[:6]
        found = _gradients(ctx.saved_tensors, ctx.how, ctx.wanted, needs, ctx.channels_last, grads, ctx.traced)
        return *found, None, None


node.python = _made, _gradients, _run_operator


def fits(*tensors: Any) -> bool:
    """Whether csrc/node, in a tenth of the time that Python takes, finds a layer's feature_map, mask_weight, mask_bias,
    gate_weight, gate_bias, output_weight and output_bias as they should be. Where not, they may be all the same."""
    if torch.compiler.is_compiling():
        return False
    module: Any = node.module()
    return module is not None and module.fits(*tensors)


@functools.lru_cache(4096)
def _call(module: Any, how: _How, wanted: tuple[int, ...]) -> Any:
    """What csrc/node is told of a call but its tensors."""
    if how[4] == "triton":
        replay = native.address("ar_kernels_replay")
        numbers = plans.number_of("layer"), plans.number_of("layer_backward")
        return module.make_call(replay, numbers[0], replay, numbers[1], how, wanted)
    forward, backward = native.address("ar_kernels_layer"), native.address("ar_kernels_layer_backward")
    return module.make_call(forward, None, backward, None, how, wanted)


def _by_node(inputs: Sequence[Any], how: _How, wanted: tuple[int, ...]) -> Any:
    """The outputs that are wanted, by the node in C++; None where there is none or it is not for such a call."""
    implementation, data = how[4], inputs[:1]  # it looks at the other tensors itself
    if implementation == "triton":
        is_for_it = plans.are_used(data) and not _import_kernels().launch.is_watched()
    else:
        is_for_it = inputs[0].device.type == "cpu" and plans.nobody_looks_on(data) and native.has_layer()
    module: Any = node.module() if is_for_it else None
    return None if module is None else module.apply(_call(module, how, wanted), *inputs)


def _differentiated(
    inputs: tuple[Any, ...],
    how: _How,
    wanted: tuple[int, ...],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of inputs by _GatedAttend, called anew; they have a graph where one is recorded."""
    again = torch.is_grad_enabled()
    with autocast_off(inputs[0]), torch.enable_grad():
        outputs = _apply(_GatedAttend, *inputs, *how)
    used = [(outputs[i], grad) for i, grad in zip(wanted, grads) if grad is not None]
    asked = [value for value, needed in zip(inputs, needs) if needed]
    if not used:
        return [None] * len(inputs)
    results, received = zip(*used)
    found = iter(torch.autograd.grad(results, asked, received, create_graph=again, allow_unused=True))
    return [next(found, None) if needed else None for _, needed in zip(inputs, needs)]


def gated_attend(
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    score_w: Tensor | None,
    score_b: Tensor | None,
    output_w: Tensor | None,
    gated_heads: int,
    wants_logits: bool,
    wants_mean: bool,
    tap: bool,
    implementation: str,
    taps_first: bool = False,
    wants_pooled: bool = True,
    wants_scores: bool = True,
) -> GatedAttended:
    """One fused pass: K heads w [K, C] attend to z, the first gated_heads of them are gated, and output_w [L, K'·C]
    makes their hypothesis; 3×3 heads: [K, C, 3, 3], [L, K'·C·9]. implementation: "triton" or "native". taps_first, for
    "triton" and without output_w: the features of 3×3 heads are [N, K'·9·C], not [N, K'·C·9]. wants_pooled: P and lse;
    logits come with lse too. Other arguments as in eager.gated_attend. What was not asked for may be None."""
    through = tap and z.requires_grad  # a frozen map stays frozen
    how = gated_heads, wants_logits, wants_mean, through, implementation, taps_first
    inputs: Sequence[Tensor | None] = (z, w, b, score_w, score_b, output_w)
    if is_transformed():
        outputs: Any = _apply(_GatedAttend, *inputs, *how)
    else:
        asked = wants_pooled, wants_logits, wants_scores, gated_heads > 0, output_w is not None, wants_mean, through
        wanted = _wanted(*asked) if torch.compiler.is_compiling() else _known_wanted(*asked)
        outputs = [None] * 9
        for i, output in zip(wanted, _wanted_outputs(inputs, how, wanted)):
            outputs[i] = output
    return GatedAttended(*(outputs if through else (*outputs[:-1], z)))


def _wanted_outputs(inputs: Sequence[Any], how: _How, wanted: tuple[int, ...]) -> Any:
    """Those of _GatedAttend's outputs, recorded where something records."""
    if torch.compiler.is_compiling():
        apply = _WantedGatedAttend.apply
    else:
        found = _by_node(inputs, how, wanted)
        if found is not None:
            return found
        apply = super(torch.autograd.Function, _WantedGatedAttend).apply
        inputs = [value if value is None else _unwrap_if_dead(value) for value in inputs]
    if torch.is_grad_enabled():
        return apply(*inputs, wanted, how)
    return _outputs(inputs[0], _made(inputs, how), wanted)


def _wanted(
    pooled: bool, logits: bool, scores: bool, gated: bool, hypothesis: bool, mean: bool, tap: bool
) -> tuple[int, ...]:
    """Which of _GatedAttend's outputs are."""
    asked = (
        pooled, pooled or logits, logits, gated and scores, gated, gated and not hypothesis, mean, hypothesis, tap
    )  # fmt: skip
    return tuple(i for i, is_asked in enumerate(asked) if is_asked)


_known_wanted = functools.cache(_wanted)  # Dynamo knows no caches


def is_transformed() -> bool:
    """Whether functorch or forward mode looks on."""
    return _functorch_is_active is None or _functorch_is_active() or forward_ad._current_level >= 0


# ---------------------------------------------------------------------------------------------- head_hypotheses


class _HeadHypotheses(torch.autograd.Function):
    """(features [N, K, F], weight [K, L, F], rows) → [K, N, L]: a batched product whose gradients lie in memory as the
    inputs do. Autograd's own would lie transposed, and the weight's would be copied when it is added to .grad. rows:
    the weight in the features' dtype, not differentiated, or None where that is its own; then its gradient is not
    rounded to that dtype on a GPU, where products can be stored in float32.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features, weight, rows):
        return torch.bmm(features.transpose(0, 1), (weight if rows is None else rows).mT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        features, weight, rows = ctx.saved_tensors
        needs_features, needs_weight, _ = ctx.needs_input_grad
        dfeatures = dweight = None
        with autocast_off(grad):
            if needs_features:
                again = torch.is_grad_enabled()  # differentiated once more: rows as a function of the weight
                rows = weight.to(grad.dtype) if rows is None or again else rows
                dfeatures = torch.bmm(grad, rows).transpose(0, 1)
            if needs_weight:
                dweight = _head_products(grad.mT, features.transpose(0, 1), weight.dtype)
        return dfeatures, dweight, None


class _GatedHypothesis(torch.autograd.Function):
    """(features g ⊙ P [N, K·F], weight [K, L, F], rows [L, K·F]) → Σ_k features_k weight_kᵀ [N, L]: one product over
    all heads. rows: the weight in the features' dtype and label by label, not differentiated. The weight's gradient is
    made head by head, and where products can be stored in float32, on a GPU, not rounded to the features' dtype.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features, weight, rows):
        return features @ rows.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        features, weight, rows = ctx.saved_tensors
        dfeatures = dweight = None
        with autocast_off(grad):
            if ctx.needs_input_grad[0]:
                if torch.is_grad_enabled():  # differentiated once more: rows as a function of the weight
                    rows = weight.transpose(0, 1).flatten(1).to(grad.dtype)
                dfeatures = grad @ rows
            if ctx.needs_input_grad[1]:
                factors = grad.t().expand(weight.shape[0], -1, -1), features.unflatten(1, (weight.shape[0], -1))
                dweight = _head_products(factors[0], factors[1].transpose(0, 1), weight.dtype)
        return dfeatures, dweight, None


def _head_products(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.bmm in dtype, of which a GPU rounds nothing to the factors' dtype on the way to float32."""
    if dtype == torch.float32 != left.dtype and left.is_cuda and not torch.is_grad_enabled():
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right).to(dtype)


def is_taps_first(output_weight: Tensor) -> bool:
    """Whether an output weight of 3×3 heads, head by head [K, L, C, 3, 3], lies in memory with channels last."""
    return output_weight.dim() == 5 and output_weight.stride(2) < output_weight.stride(4)


def head_hypotheses(features: Tensor, output_weight: Tensor) -> Tensor:
    """One product for each head, of features [N, K, C] or [N, K, C, 9] with its output_weight [K, L, C] or
    [K, L, C, 3, 3], rounded to their dtype → [N, K, L]. Where the weight has channels last in memory, it is the
    features, which are small, that are put in its order.
    """
    weight = _head_rows(output_weight)
    features = features.mT if is_taps_first(output_weight) else features
    rows = None if weight.dtype == features.dtype else weight.detach().to(features.dtype)
    return _apply(_HeadHypotheses, features.flatten(2), weight, rows).transpose(0, 1)


def _head_rows(output_weight: Tensor) -> Tensor:
    """[K, L, C] as it is, [K, L, C, 3, 3] as [K, L, C·9] or, with channels last in memory, [K, L, 9·C]: a view."""
    if output_weight.dim() == 5:
        return (output_weight.permute(0, 1, 3, 4, 2) if is_taps_first(output_weight) else output_weight).flatten(2)
    return output_weight


def gated_hypothesis(features: Tensor, output_weight: Tensor) -> Tensor:
    """Σ_k W_O[k] (g ⊙ P)_k, [N, L]; features: [N, K·F] in the order that output_weight, head by head, has in memory
    (is_taps_first). A weight of another dtype is rounded to that of features, and put label by label on the way, for
    one product over all heads; else each head has a product of its own, so that no weight is rearranged.
    """
    weight = _head_rows(output_weight)
    if weight.dtype == features.dtype:
        products = _apply(_HeadHypotheses, features.unflatten(1, (weight.shape[0], -1)), weight, None)
        return products.sum(dim=0)  # which PyTorch adds up in float32
    rows = weight.detach().transpose(0, 1).to(features.dtype, memory_format=torch.contiguous_format).flatten(1)
    return _apply(_GatedHypothesis, features, weight, rows)


# ---------------------------------------------------------------------------------------------- rectify

MIXES = ("logit", "log", "prob")
GATINGS = ("softmax", "sigmoid", None)


def _rectify(hypotheses: Tensor, scores: Tensor, mix: str, gating: str | None) -> tuple[Tensor, Tensor]:
    outputs = _rectify_fake(hypotheses, scores, mix, gating)
    if hypotheses.shape[0] > 0:
        with torch.cuda.device_of(hypotheses):
            _kernels(hypotheses).rectify.rectify_forward(
                hypotheses.contiguous(), scores.contiguous(), mix, gating, *outputs
            )
    return outputs


def _rectify_fake(hypotheses, scores, mix, gating):
    images, count, labels = hypotheses.shape
    dtype = accumulator_dtype(hypotheses.dtype)
    lse = hypotheses.new_empty((0,) if mix == "logit" else (images, count), dtype=dtype)
    return hypotheses.new_empty((images, labels), dtype=dtype), lse


def _rectify_backward(
    grad: Tensor, hypotheses: Tensor, scores: Tensor, output: Tensor, lse: Tensor, mix: str, gating: str | None
) -> tuple[Tensor, Tensor]:
    gradients = _rectify_backward_fake(grad, hypotheses, scores, output, lse, mix, gating)
    if hypotheses.shape[0] > 0:
        with torch.cuda.device_of(hypotheses):
            _kernels(hypotheses).rectify.rectify_backward(
                *(value.contiguous() for value in (grad, hypotheses, scores, output, lse)), mix, gating, *gradients
            )
    return gradients


def _rectify_backward_fake(grad, hypotheses, scores, output, lse, mix, gating):
    """The hypotheses' gradient is [D+1, N, L]: each one's is contiguous, as plans of the layers' backwards want it, and
    begins at a multiple of 16 bytes where N·L values are one."""
    images, count, labels = hypotheses.shape
    return hypotheses.new_empty(count, images, labels), scores.new_empty(scores.shape)


_define("rectify(Tensor hypotheses, Tensor scores, str mix, str? gating) -> (Tensor, Tensor)", _rectify, _rectify_fake)
_define(
    "rectify_backward(Tensor grad, Tensor hypotheses, Tensor scores, Tensor output, Tensor lse, str mix, str? gating) "
    "-> (Tensor, Tensor)",
    _rectify_backward,
    _rectify_backward_fake,
)


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(hypotheses, scores, mix, gating, implementation):
        return _dispatch(implementation, "rectify", [hypotheses, scores], [mix, gating])

    @staticmethod
    def setup_context(ctx, inputs, output):
        hypotheses, scores, ctx.mix, ctx.gating, ctx.implementation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hypotheses, scores, *output)

    @staticmethod
    def backward(ctx, grad, _):
        dh, ds = _apply(_RectifyBackward, grad, *ctx.saved_tensors, ctx.mix, ctx.gating, ctx.implementation)
        return dh, ds, None, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_Rectify, info, in_dims, arguments)


class _RectifyBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, hypotheses, scores, output, lse, mix, gating, implementation):
        tensors = [grad, hypotheses, scores, output, lse]
        dh, dscores = _dispatch(implementation, "rectify_backward", tensors, [mix, gating])
        return dh.transpose(0, 1), dscores

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.mix, ctx.gating = inputs[5:7]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        grad, hypotheses, scores = ctx.saved_tensors

        def forward(hypotheses, scores):
            return (eager.rectify(hypotheses, scores, ctx.mix, ctx.gating),)

        dh, ds, dgrad = _double_backward(forward, (hypotheses, scores), (0, 1), (grad,), second)
        return dgrad, dh, ds, *[None] * 5

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_RectifyBackward, info, in_dims, arguments)


def rectify(hypotheses: Tensor, scores: Tensor, mix: str, gating: str | None, implementation: str) -> Tensor:
    """The fused rectified output [N, L]; implementation as in gated_attend, other arguments as in eager.rectify."""
    return _apply(_Rectify, hypotheses, scores, mix, gating, implementation)[0]


# ---------------------------------------------------------------------------------------------- masks


def _attention_masks(logits: Tensor, lse: Tensor, heads: int) -> Tensor:
    masks = _attention_masks_fake(logits, lse, heads)
    if masks.numel() > 0:
        with torch.cuda.device_of(logits):
            _kernels(logits).masks.softmax_forward(logits.contiguous(), lse.contiguous(), masks)
    return masks


def _attention_masks_fake(logits, lse, heads):
    return logits.new_empty(logits.shape[0], heads, logits.shape[2])


def _attention_masks_backward(grad: Tensor, masks: Tensor, every: int) -> tuple[Tensor, Tensor]:
    gradients = _attention_masks_backward_fake(grad, masks, every)
    if masks.numel() > 0:
        with torch.cuda.device_of(masks):
            _kernels(masks).masks.softmax_backward(grad.contiguous(), masks.contiguous(), *gradients)
    return gradients


def _attention_masks_backward_fake(grad, masks, every):
    images, _, positions = masks.shape
    return masks.new_empty(images, every, positions), masks.new_empty(images, every)


_define(
    "attention_masks(Tensor logits, Tensor lse, SymInt heads) -> Tensor",
    _attention_masks, _attention_masks_fake, in_native=False,
)  # fmt: skip
_define(
    "attention_masks_backward(Tensor grad, Tensor masks, SymInt every) -> (Tensor, Tensor)",
    _attention_masks_backward, _attention_masks_backward_fake, in_native=False,
)  # fmt: skip


class _AttentionMasks(torch.autograd.Function):
    @staticmethod
    def forward(logits, lse, heads):
        return (_dispatch("triton", "attention_masks", [logits, lse], [heads]),)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, lse, ctx.heads = inputs
        ctx.save_for_backward(logits, lse, *output)

    @staticmethod
    def backward(ctx, grad):
        dlogits, dlse = _apply(_AttentionMasksBackward, grad, *ctx.saved_tensors, ctx.heads)
        return dlogits, dlse, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_AttentionMasks, info, in_dims, arguments)


class _AttentionMasksBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, logits, lse, masks, heads):
        return _dispatch("triton", "attention_masks_backward", [grad, masks], [logits.shape[1]])

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, logits, lse, _, ctx.heads = inputs
        ctx.save_for_backward(grad, logits, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        grad, logits, lse = ctx.saved_tensors

        def forward(logits, lse):
            return (eager.attention_masks(logits[:, : ctx.heads], lse[:, : ctx.heads]),)

        dlogits, dlse, dgrad = _double_backward(forward, (logits, lse), (0, 1), (grad,), second)
        return dgrad, dlogits, dlse, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_AttentionMasksBackward, info, in_dims, arguments)


def attention_masks(logits: Tensor, lse: Tensor, heads: int) -> Tensor:
    """A = exp(ℓ - lse) of the first `heads` of logits [N, K, S], lse [N, K], by Triton kernels: [N, heads, S]."""
    return _apply(_AttentionMasks, logits, lse, heads)[0]


def _mask_overlap(masks: Tensor) -> tuple[Tensor, Tensor]:
    parts, gram = _mask_overlap_fake(masks)
    if masks.numel() > 0:
        with torch.cuda.device_of(masks):
            _kernels(masks).masks.overlap_forward(masks.contiguous(), gram, parts)
    return parts, gram


def _mask_overlap_fake(masks):
    images, heads = masks.shape[:2]
    return masks.new_empty(images, heads), masks.new_empty(images, heads, heads)


def _mask_overlap_backward(factor: Tensor, masks: Tensor, gram: Tensor) -> Tensor:
    dmasks = _mask_overlap_backward_fake(factor, masks, gram)
    if masks.numel() > 0:
        with torch.cuda.device_of(masks):
            _kernels(masks).masks.overlap_backward(factor.contiguous(), masks.contiguous(), gram.contiguous(), dmasks)
    return dmasks


def _mask_overlap_backward_fake(factor, masks, gram):
    return masks.new_empty(masks.shape)


_define("mask_overlap(Tensor masks) -> (Tensor, Tensor)", _mask_overlap, _mask_overlap_fake, in_native=False)
_define(
    "mask_overlap_backward(Tensor factor, Tensor masks, Tensor gram) -> Tensor",
    _mask_overlap_backward, _mask_overlap_backward_fake, in_native=False,
)  # fmt: skip


class _MaskPenalty(torch.autograd.Function):
    """(A [N, K, H, W], w) → w Σ E² / (N·K·K), then E [N, K, K], not differentiable (losses.mask_regulariser)."""

    @staticmethod
    def forward(masks, weight):
        parts, gram = _dispatch("triton", "mask_overlap", [masks], [])
        return parts.mean() * (weight / masks.shape[1]), gram

    @staticmethod
    def setup_context(ctx, inputs, output):
        masks, weight = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(masks, output[1])
        ctx.factor = weight / max(output[1].numel(), 1)

    @staticmethod
    def backward(ctx, grad, _):
        return _apply(_MaskPenaltyBackward, grad * ctx.factor, *ctx.saved_tensors)[0], None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_MaskPenalty, info, in_dims, arguments)


class _MaskPenaltyBackward(torch.autograd.Function):
    @staticmethod
    def forward(factor, masks, gram):
        return (_dispatch("triton", "mask_overlap_backward", [factor, masks, gram], []),)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, *second):
        factor, masks = ctx.saved_tensors

        def forward(masks):
            gram = eager.off_diagonal_gram(eager.pooled_masks(masks))
            return ((gram * gram).sum(),)

        dmasks, dfactor = _double_backward(forward, (masks,), (0,), (factor,), second)
        return dfactor, dmasks, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _map_samples(_MaskPenaltyBackward, info, in_dims, arguments)


def mask_penalty(masks: Tensor, weight: float) -> Tensor:
    """weight times losses.mask_regulariser of masks [N, K, H, W] in float32 or float64, by Triton kernels."""
    return _apply(_MaskPenalty, masks, weight)[0]


# ---------------------------------------------------------------------------------------------- shared by the Functions


def _double_backward(
    forward: Callable[..., Any],
    inputs: tuple[Tensor | None, ...],
    differentiated: tuple[int, ...],
    grads: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of a backward: its outputs were the vector-Jacobian products of `forward` (eager formulas) with grads.

    differentiated: which inputs the backward's outputs belong to, in order; second: the gradients of those outputs.
    Returns the gradients of inputs, then of grads; None where an argument is None. Made of torch.func.vjp alone, so
    it can be differentiated again.
    """
    if all(grad is None for grad in second):
        return [None] * (len(inputs) + len(grads))
    given = [i for i, value in enumerate(inputs) if value is not None]
    used = [i for i, grad in enumerate(grads) if grad is not None]

    def first_order(*values: Tensor) -> tuple[Tensor, ...]:
        present, cotangents = values[: len(given)], values[len(given) :]

        def outputs(*present: Tensor) -> tuple[Tensor, ...]:
            arguments: list[Any] = [None] * len(inputs)
            for i, value in zip(given, present):
                arguments[i] = value
            results = forward(*arguments)
            return tuple(results[i] for i in used)

        products = dict(zip(given, torch.func.vjp(outputs, *present)[1](cotangents)))
        return tuple(products[i] for i, grad in zip(differentiated, second) if grad is not None and i in products)

    cotangents = tuple(g for i, g in zip(differentiated, second) if g is not None and i in given)
    values: list[Any] = [inputs[i] for i in given] + [grads[i] for i in used]
    with autocast_off(values[0]):
        results = torch.func.vjp(first_order, *values)[1](cotangents)
    received: list[Tensor | None] = [None] * (len(inputs) + len(grads))
    for i, result in zip(given + [len(inputs) + i for i in used], results):
        received[i] = result
    return received


def _map_samples(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The vmap rule of every Function: one call for each sample, results stacked."""
    if info.batch_size == 0:  # all is as of one sample, but empty
        one = [value if dim is None else value.sum(dim, keepdim=True) for value, dim in zip(arguments, in_dims)]
        outputs, dims = _map_samples(function, info._replace(batch_size=1), in_dims, tuple(one))
        return tuple(None if output is None else output[:0] for output in outputs), dims
    samples = []
    for index in range(info.batch_size):
        sample = [argument if dim is None else argument.select(dim, index) for argument, dim in zip(arguments, in_dims)]
        samples.append(function.apply(*sample))
    outputs = tuple(None if values[0] is None else torch.stack(values) for values in zip(*samples))
    return outputs, tuple(None if output is None else 0 for output in outputs)
