"""torch.nn modules over ar_kernels.functional: AttentionModule and GlobalGates."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from .functional import (
    _FLOATS,
    AttentionOutput,
    _check_flags,
    _check_gating,
    _check_implementation,
    _check_mix,
    attend,
    attention_module,
)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object) -> int:
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value


def _check_positive(name: str, value: object) -> int:
    value = _check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check_mixing(mix: object, gating: object) -> None:
    _check_mix(mix)
    _check_gating(gating)


def _check_depth(attention_depth: object, most: int) -> None:
    if not 0 <= _check_int("attention_depth", attention_depth) <= most:
        raise ValueError(f"attention_depth must be from 0 to {most}, got {attention_depth}")


def _check_kernel_size(kernel_size: object) -> None:
    if not _is_int(kernel_size) or kernel_size not in (1, 3):
        raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size!r}")


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32, float64 or None, got {dtype!r}")


def _head_shape(heads: int, channels: int, kernel_size: int) -> tuple[int, ...]:
    return (heads, channels) if kernel_size == 1 else (heads, channels, 3, 3)


def _check_channels(feature_map: Tensor, in_channels: int) -> None:
    """In the module's own terms; what else can be wrong with a map is said by what it is given to."""
    if isinstance(feature_map, Tensor) and feature_map.dim() in (3, 4) and feature_map.shape[1] != in_channels:
        wanted = f"[N, {in_channels}, H, W] or [N, {in_channels}, S]"
        raise ValueError(f"feature_map must be {wanted} as in_channels says, got {list(feature_map.shape)}")


class AttentionModule(nn.Module):
    """One attended layer: K heads look at a feature map, make class hypotheses, and gates mix them (functional form:
    ar_kernels.attention_module, which has the formulas).

    in_channels: C of the map. num_classes: L labels. heads: K, the attention width.
    gated: False counts every head alike (g_k = 1/K) instead of softmax over heads of tanh(t).
    kernel_size: 1, or 3 for heads that see each position's neighbours (the official code's).
    bias: adds b_O [K, L] and b_G [K]. The masks need none: it would cancel in their softmax.
    implementation: as ar_kernels.attend takes it; "reference" makes this one module the paper's convolutions.

    Parameters: mask_weight [K, C], gate_weight [K, C] (3×3: [K, C, 3, 3]), output_weight [L, K·C] (3×3: [L, K·C·9]),
    with bias output_bias [K, L] and gate_bias [K]; the gate's are None where heads count alike.
    Weights start from a normal distribution of variance 2/fan-in, biases from 0.
    Raises TypeError and ValueError naming the argument.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        heads: int = 4,
        *,
        gated: bool = True,
        kernel_size: int = 1,
        bias: bool = False,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_implementation(implementation)
        self.implementation = implementation
        self.in_channels = _check_positive("in_channels", in_channels)
        self.num_classes = _check_positive("num_classes", num_classes)
        self.heads = _check_positive("heads", heads)
        _check_kernel_size(kernel_size)
        _check_dtype(dtype)
        _check_flags(gated=gated, bias=bias)
        self.gated, self.kernel_size = gated, kernel_size
        shape = _head_shape(heads, in_channels, kernel_size)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.mask_weight = parameter(*shape)
        self.output_weight = parameter(num_classes, self.mask_weight.numel())
        self.gate_weight = parameter(*shape) if gated else None
        self.output_bias = parameter(heads, num_classes) if bias else None
        self.gate_bias = parameter(heads) if bias and gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        std = (2.0 / (self.in_channels * self.kernel_size**2)) ** 0.5
        for weight in (self.mask_weight, self.output_weight, self.gate_weight):
            if weight is not None:
                nn.init.normal_(weight, std=std)
        for bias in (self.output_bias, self.gate_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        feature_map: Tensor,
        *,
        global_gates: "GlobalGates | None" = None,
        masks: bool = False,
        mean: bool = False,
        tap: bool = False,
    ) -> AttentionOutput:
        """feature_map: [N, C, H, W] or [N, C, S], any strides. global_gates: lets its heads look at the map in the
        same pass; their scores come back. masks, mean, tap: as ar_kernels.attend takes them. The hypothesis is a row
        of class scores: it goes with CrossEntropyLoss when used alone.
        """
        if global_gates is not None and not isinstance(global_gates, GlobalGates):
            raise TypeError(f"global_gates must be a GlobalGates or None, got {type(global_gates).__name__}")
        _check_channels(feature_map, self.in_channels)
        return attention_module(
            feature_map,
            self.mask_weight,
            self.output_weight,
            self.gate_weight,
            output_bias=self.output_bias,
            gate_bias=self.gate_bias,
            global_mask_weight=None if global_gates is None else global_gates.mask_weight,
            global_gate_weight=None if global_gates is None else global_gates.gate_weight,
            masks=masks,
            mean=mean,
            tap=tap,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.num_classes}, heads={self.heads}, gated={self.gated}, "
            f"kernel_size={self.kernel_size}"
        )


class GlobalGates(nn.Module):
    """The gates over a network's D+1 hypotheses, from an attention head of D+1 masks on its last attended map.

    t_i = W_γ[i]·(Σ_s A'_is Z_s); forward returns tanh(t) [N, D+1], which ar_kernels.rectify takes as scores.
    in_channels: C of that map. hypotheses: D+1, the attended layers and the network's own output. kernel_size: 1 or 3.
    implementation: as ar_kernels.attend takes it; in an AttentionModule's pass that module's counts.

    Parameters: mask_weight and gate_weight, [D+1, C] (3×3: [D+1, C, 3, 3]), drawn as AttentionModule draws its own.
    """

    def __init__(
        self,
        in_channels: int,
        hypotheses: int,
        *,
        kernel_size: int = 1,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_implementation(implementation)
        self.implementation = implementation
        self.in_channels = _check_positive("in_channels", in_channels)
        self.hypotheses = _check_positive("hypotheses", hypotheses)
        _check_kernel_size(kernel_size)
        _check_dtype(dtype)
        self.kernel_size = kernel_size
        shape = _head_shape(hypotheses, in_channels, kernel_size)
        self.mask_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.gate_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        std = (2.0 / (self.in_channels * self.kernel_size**2)) ** 0.5
        nn.init.normal_(self.mask_weight, std=std)
        nn.init.normal_(self.gate_weight, std=std)

    def forward(self, feature_map: Tensor) -> Tensor:
        """feature_map: [N, C, H, W] or [N, C, S] → tanh(t) [N, D+1], float32 for half maps."""
        _check_channels(feature_map, self.in_channels)
        pooled = attend(feature_map, self.mask_weight, implementation=self.implementation).pooled
        weight = self.gate_weight.to(pooled.dtype).reshape(pooled.shape[1:])
        return torch.tanh((pooled * weight).flatten(2).sum(dim=2))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, hypotheses={self.hypotheses}, kernel_size={self.kernel_size}"
