"""Random layers and the error budget: what the tests of attend, attention_module and the modules share."""

import math
from dataclasses import dataclass, field

import torch

import ar_kernels

EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-23, torch.float64: 2**-52}


@dataclass
class Layer:
    """One attended layer: sizes, what is asked of it, and its tensors in float64 rounded to `dtype`'s values."""

    n: int = 3
    c: int = 5
    h: int = 3
    w: int = 4
    k: int = 2
    labels: int = 7
    globals: int = 0
    bias: bool = True
    gated: bool = True
    mean: bool = True
    tap: bool = True
    kernel_size: int = 1
    dtype: torch.dtype = torch.float64
    weight_dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")
    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        taps = (self.kernel_size,) * 2 if self.kernel_size > 1 else ()
        fan_in = self.c * self.kernel_size**2

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(self.dtype if dtype is None else dtype).to(self.device)

        weight = self.weight_dtype or self.dtype
        t = self.tensors
        t["feature_map"] = draw(self.n, self.c, self.h, self.w)
        t["mask_weight"] = draw(self.k, self.c, *taps, scale=(2 / fan_in) ** 0.5, dtype=weight)
        t["output_weight"] = draw(self.labels, self.k * fan_in, scale=fan_in**-0.5, dtype=weight)
        if self.gated:
            t["gate_weight"] = draw(self.k, self.c, *taps, scale=(2 / fan_in) ** 0.5, dtype=weight)
        if self.bias:
            t["mask_bias"] = draw(self.k, dtype=weight)
            t["output_bias"] = draw(self.k, self.labels, dtype=weight)
            if self.gated:
                t["gate_bias"] = draw(self.k, dtype=weight)
        if self.globals:
            t["global_mask_weight"] = draw(self.globals, self.c, *taps, scale=(2 / fan_in) ** 0.5, dtype=weight)
            t["global_gate_weight"] = draw(self.globals, self.c, *taps, scale=(2 / fan_in) ** 0.5, dtype=weight)

    def run(
        self,
        implementation: str,
        exact: bool = False,
        layout=None,
        masks: bool = True,
        backward: bool = True,
        tap_layout=None,
    ) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name; exact computes in float64. layout: a function applied to the feature map;
        tap_layout: to the gradient that comes back to it where it is tapped, contiguous without."""
        tensors = {name: value.double() if exact else value for name, value in self.tensors.items()}
        if layout is not None:
            tensors["feature_map"] = layout(tensors["feature_map"])
        tensors = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        output = ar_kernels.attention_module(
            **tensors, masks=masks, mean=self.mean, tap=self.tap, implementation=implementation
        )
        asked = ("feature_map", "mask_weight", "mask_bias")
        pooled = ar_kernels.attend(
            *(tensors.get(name) for name in asked),
            logits=masks, mean=self.mean, tap=self.tap, implementation=implementation,
        )  # fmt: skip
        results = {}
        for prefix, outputs in (("module", output._asdict()), ("attend", pooled._asdict())):
            outputs = {name: value for name, value in outputs.items() if value is not None}
            results |= {f"{prefix}.{name}": value.detach() for name, value in outputs.items()}
            if not backward:
                continue
            generator = torch.Generator().manual_seed(self.seed + 1)
            loss = 0.0
            for name, value in outputs.items():
                grad = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
                if name == "feature_map" and tap_layout is not None:
                    grad = tap_layout(grad)
                loss = loss + (value.double() * grad).sum()
            names = [n for n in tensors if prefix == "module" or n in asked]
            grads = torch.autograd.grad(loss, [tensors[name] for name in names], allow_unused=True)
            results |= {f"{prefix}.d_{name}": g for name, g in zip(names, grads) if g is not None}
        return results


def assert_within_budget(draws: list[tuple[dict, dict, dict]], dtype: torch.dtype) -> None:
    """|got − exact| ≤ 2 (|eager − exact| + eps·|exact|), each the largest over all elements and draws; and the same of
    the relative RMS error, over all draws together. draws: (got, eager, exact) of the same layer with different values:
    an error is a random number, and one draw's is too small a yardstick for another, of three elements most of all.
    """
    for name in draws[0][2]:
        if name == "module.d_mask_bias":
            continue  # exactly 0: it cancels in the masks, and rounding errors have nothing to be relative to
        error = allowed = largest = rms_error = rms_allowed = 0.0
        for got, eager, exact in draws:
            assert got.keys() == exact.keys() == eager.keys()
            value, yardstick, truth = got[name].double(), eager[name].double(), exact[name]
            assert value.shape == truth.shape and value.isfinite().all(), name
            error = max(error, (value - truth).abs().max().item())
            allowed = max(allowed, (yardstick - truth).abs().max().item())
            largest = max(largest, truth.abs().max().item())
            norm = truth.norm().item() + 1e-300
            rms_error = math.hypot(rms_error, (value - truth).norm().item() / norm)
            rms_allowed = math.hypot(rms_allowed, (yardstick - truth).norm().item() / norm)
        budget = 2 * (allowed + EPS[dtype] * largest)
        assert error <= budget, f"{name}: pointwise error {error:.3e} over its budget {budget:.3e}"
        budget = 2 * (rms_allowed + EPS[dtype] * len(draws) ** 0.5)
        assert rms_error <= budget, f"{name}: relative RMS error {rms_error:.3e} over its budget {budget:.3e}"


def channels_last(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.contiguous(memory_format=torch.channels_last)


def batch_last(feature_map: torch.Tensor) -> torch.Tensor:
    """Strides in no usual order: [C, W, N, H] in memory."""
    return feature_map.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)


def slice_of_cat(feature_map: torch.Tensor) -> torch.Tensor:
    """Rows and channels with gaps between them, an offset into the storage."""
    wide = torch.cat([feature_map, feature_map, feature_map], dim=1)
    wide = torch.cat([wide, wide], dim=3)
    c, w = feature_map.shape[1], feature_map.shape[3]
    return wide[:, c : 2 * c, :, w : 2 * w]


LAYOUTS = {"contiguous": None, "channels_last": channels_last, "batch_last": batch_last, "slice": slice_of_cat}

BUDGETS = [
    ("contiguous", torch.float32),
    ("channels_last", torch.float32),
    ("channels_last", torch.float16),
    ("slice", torch.float16),
    ("contiguous", torch.bfloat16),
    ("batch_last", torch.bfloat16),
]
"""Layouts and dtypes whose errors are measured: each layout, each dtype, and vectors of either length along positions
and along channels. What else they may do together, the random cases of test_properties.py meet."""
