"""Bad inputs of attend, attention_module and rectify, one by one: the error names the argument, what was expected and
what was given, and is the same under torch.compile without fullgraph.
"""

import re

import pytest
import torch

import ar_kernels

N, C, H, W, K, L = 2, 6, 3, 4, 5, 7


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


ATTEND = {"feature_map": zeros(N, C, H, W), "mask_weight": zeros(K, C), "mask_bias": zeros(K)}
MODULE = ATTEND | {
    "output_weight": zeros(L, K * C),
    "output_bias": zeros(K, L),
    "gate_weight": zeros(K, C),
    "gate_bias": zeros(K),
    "global_mask_weight": zeros(3, C),
    "global_gate_weight": zeros(3, C),
}
RECTIFY = {"hypotheses": zeros(N, 3, L), "scores": zeros(N, 3)}

RANKS = "feature_map must be [N, C, H, W] or [N, C, S], got "
SIZES = "feature_map must have at least one channel and position, got "
MASKS = "mask_weight must be [K, C] or [K, C, 3, 3] with K of at least 1 and C = 6 to match feature_map, got "
FLOATS = " must be float16, bfloat16, float32 or float64, got "
HYPOTHESES = "hypotheses must be [N, D+1, L] with D+1 and L of at least 1, got "
OUTPUTS = "output_weight must be [L, K·C] or [K, L, C] with L of at least 1 and K·C = 30 to match mask_weight, got "
HALF = torch.float16

OF_ATTEND = [
    ({"feature_map": None}, TypeError, "feature_map must be a torch.Tensor, got NoneType"),
    ({"feature_map": [[1.0]]}, TypeError, "feature_map must be a torch.Tensor, got list"),
    ({"feature_map": zeros(N, C, H, W, dtype=torch.int64)}, TypeError, f"feature_map{FLOATS}torch.int64"),
    ({"feature_map": zeros(N, C, H, W, dtype=torch.bool)}, TypeError, f"feature_map{FLOATS}torch.bool"),
    ({"feature_map": zeros(N, C, H, W, dtype=torch.complex64)}, TypeError, f"feature_map{FLOATS}torch.complex64"),
    ({"feature_map": zeros(N, C)}, ValueError, f"{RANKS}[2, 6]"),
    ({"feature_map": zeros(N, C, 1, H, W)}, ValueError, f"{RANKS}[2, 6, 1, 3, 4]"),
    ({"feature_map": zeros()}, ValueError, f"{RANKS}[]"),
    ({"feature_map": zeros(N, 0, H, W)}, ValueError, f"{SIZES}[2, 0, 3, 4]"),
    ({"feature_map": zeros(N, C, 0)}, ValueError, f"{SIZES}[2, 6, 0]"),
    ({"mask_weight": 1.0}, TypeError, "mask_weight must be a torch.Tensor, got float"),
    ({"mask_weight": zeros(K, C + 1)}, ValueError, f"{MASKS}[5, 7]"),
    ({"mask_weight": zeros(0, C)}, ValueError, f"{MASKS}[0, 6]"),
    ({"mask_weight": zeros(C)}, ValueError, f"{MASKS}[6]"),
    ({"mask_weight": zeros(K, C, 5, 5)}, ValueError, f"{MASKS}[5, 6, 5, 5]"),
    ({"mask_weight": zeros(K, C, 1, 1)}, ValueError, f"{MASKS}[5, 6, 1, 1]"),
    (
        {"feature_map": zeros(N, C, H), "mask_weight": zeros(K, C, 3, 3)},
        ValueError,
        "feature_map must be [N, C, H, W] for a mask_weight of 3×3 heads, got [2, 6, 3]",
    ),
    (
        {"mask_weight": zeros(K, C, dtype=torch.float64)},
        TypeError,
        "mask_weight must be torch.float32 to go with feature_map, got torch.float64",
    ),
    (
        {"feature_map": zeros(N, C, H, W, dtype=HALF), "mask_weight": zeros(K, C, dtype=torch.bfloat16)},
        TypeError,
        "mask_weight must be torch.float16 or torch.float32 to go with feature_map, got torch.bfloat16",
    ),
    (
        {"mask_weight": zeros(K, C, device="meta")},
        ValueError,
        "mask_weight must be on cpu like feature_map, got meta",
    ),
    ({"mask_bias": 0}, TypeError, "mask_bias must be a torch.Tensor, got int"),
    ({"mask_bias": zeros(K + 1)}, ValueError, "mask_bias must be [5], got [6]"),
    ({"mask_bias": zeros(1, K)}, ValueError, "mask_bias must be [5], got [1, 5]"),
    (
        {"mask_bias": zeros(K, dtype=torch.int32)},
        TypeError,
        "mask_bias must be torch.float32 to go with feature_map, got torch.int32",
    ),
    ({"mask_bias": zeros(K, device="meta")}, ValueError, "mask_bias must be on cpu like feature_map, got meta"),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be one of triton, native, eager, reference or None, got 'cuda'",
    ),
]
OF_MODULE = [
    ({"output_weight": None}, TypeError, "output_weight must be a torch.Tensor, got NoneType"),
    ({"output_weight": zeros(L, C)}, ValueError, f"{OUTPUTS}[7, 6]"),
    ({"output_weight": zeros(0, K * C)}, ValueError, f"{OUTPUTS}[0, 30]"),
    ({"output_weight": zeros(L, K, C)}, ValueError, f"{OUTPUTS}[7, 5, 6]"),
    (
        {name: zeros(K, C, 3, 3) for name in ("mask_weight", "gate_weight")},
        ValueError,
        "output_weight must be [L, K·C·9] or [K, L, C, 3, 3] with L of at least 1 and K·C·9 = 270 to match "
        "mask_weight, got [7, 30]",
    ),
    (
        {"output_weight": zeros(L, K * C, dtype=HALF)},
        TypeError,
        "output_weight must be torch.float32 to go with feature_map, got torch.float16",
    ),
    ({"output_bias": zeros(L)}, ValueError, "output_bias must be [5, 7], got [7]"),
    ({"output_bias": zeros(L, K)}, ValueError, "output_bias must be [5, 7], got [7, 5]"),
    ({"gate_weight": zeros(K)}, ValueError, "gate_weight must be [5, 6], got [5]"),
    ({"gate_weight": zeros(K, C, 3, 3)}, ValueError, "gate_weight must be [5, 6], got [5, 6, 3, 3]"),
    ({"gate_weight": "sigmoid"}, TypeError, "gate_weight must be a torch.Tensor, got str"),
    ({"gate_bias": zeros(K, 1)}, ValueError, "gate_bias must be [5], got [5, 1]"),
    ({"gate_weight": None}, ValueError, "gate_bias must come with gate_weight, got gate_weight=None"),
    (
        {"global_gate_weight": None},
        ValueError,
        "global_mask_weight and global_gate_weight must come together, got global_gate_weight=None",
    ),
    (
        {"global_mask_weight": None},
        ValueError,
        "global_mask_weight and global_gate_weight must come together, got global_mask_weight=None",
    ),
    ({"global_mask_weight": zeros(3, C + 1)}, ValueError, "global_mask_weight must be [3, 6], got [3, 7]"),
    ({"global_mask_weight": zeros(0, C)}, ValueError, "global_mask_weight must be [1, 6], got [0, 6]"),
    ({"global_mask_weight": zeros()}, ValueError, "global_mask_weight must be [1, 6], got []"),
    ({"global_gate_weight": zeros(4, C)}, ValueError, "global_gate_weight must be [3, 6], got [4, 6]"),
    (
        {"global_gate_weight": zeros(3, C, dtype=torch.float64)},
        TypeError,
        "global_gate_weight must be torch.float32 to go with feature_map, got torch.float64",
    ),
]
OF_RECTIFY = [
    ({"hypotheses": zeros(N, L)}, ValueError, f"{HYPOTHESES}[2, 7]"),
    ({"hypotheses": zeros(N, 0, L), "scores": zeros(N, 0)}, ValueError, f"{HYPOTHESES}[2, 0, 7]"),
    ({"hypotheses": zeros(N, 3, 0)}, ValueError, f"{HYPOTHESES}[2, 3, 0]"),
    ({"hypotheses": zeros(N, 3, L, dtype=torch.int64)}, TypeError, f"hypotheses{FLOATS}torch.int64"),
    ({"hypotheses": []}, ValueError, "hypotheses must hold at least one tensor [N, L], got none"),
    (
        {"hypotheses": [zeros(N, L), zeros(N, L + 1)]},
        ValueError,
        "hypotheses[1] must be [2, 7] on cpu like the first, got [2, 8] on cpu",
    ),
    ({"hypotheses": [zeros(N, L), None]}, TypeError, "hypotheses[1] must be a torch.Tensor, got NoneType"),
    ({"hypotheses": [zeros(L)]}, ValueError, "hypotheses[0] must be [N, L], got [7]"),
    (
        {"hypotheses": [zeros(N, L), zeros(N, L, device="meta")]},
        ValueError,
        "hypotheses[1] must be [2, 7] on cpu like the first, got [2, 7] on meta",
    ),
    ({"hypotheses": 5}, TypeError, "hypotheses must be a tensor or a list or tuple of tensors, got int"),
    ({"scores": None}, TypeError, "scores must be a torch.Tensor, got NoneType"),
    ({"scores": zeros(N, 3, dtype=torch.int32)}, TypeError, f"scores{FLOATS}torch.int32"),
    (
        {"scores": zeros(N, 4)},
        ValueError,
        "scores must be [N, D+1] to match hypotheses [N, D+1, L] = [2, 3, 7], got [2, 4]",
    ),
    (
        {"scores": zeros(N, 3, 1)},
        ValueError,
        "scores must be [N, D+1] to match hypotheses [N, D+1, L] = [2, 3, 7], got [2, 3, 1]",
    ),
    ({"scores": zeros(N, 3, device="meta")}, ValueError, "scores must be on cpu like hypotheses, got meta"),
    ({"mix": "mean"}, ValueError, "mix must be one of logit, log, prob, got 'mean'"),
    ({"gating": "tanh"}, ValueError, "gating must be 'softmax', 'sigmoid' or None, got 'tanh'"),
    (
        {"implementation": ""},
        ValueError,
        "implementation must be one of triton, native, eager, reference or None, got ''",
    ),
]
CASES = (
    [(ar_kernels.attend, ATTEND, *case) for case in OF_ATTEND]
    + [(ar_kernels.attention_module, MODULE, *case) for case in OF_ATTEND + OF_MODULE]
    + [(ar_kernels.rectify, RECTIFY, *case) for case in OF_RECTIFY]
)


def name_of(value: object) -> str | None:
    return value.__name__ if callable(value) else value if isinstance(value, str) else ""


def moved(arguments: dict, device: torch.device) -> dict:
    """Arguments on the device; what is on meta stays there."""

    def move(value: object) -> object:
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    return {name: move(value) for name, value in arguments.items()}


def on(device: torch.device, message: str) -> str:
    """The message as it reads where the tensors that cases make on the CPU were moved to `device`."""
    name = str(torch.zeros(0, device=device).device)
    return re.sub(r"\bon cpu\b", f"on {name}", message)


def test_the_arguments_that_cases_start_from_are_good(device):
    for function, arguments in ((ar_kernels.attend, ATTEND), (ar_kernels.attention_module, MODULE)):
        function(**moved(arguments, device))
    assert not ar_kernels.rectify(**moved(RECTIFY, device)).any()


@pytest.mark.parametrize(("function", "good", "change", "error", "message"), CASES, ids=name_of)
def test_eager(function, good, change, error, message, device):
    with pytest.raises(error) as raised:
        function(**moved(good | change, device))
    assert type(raised.value) is error
    assert str(raised.value) == on(device, message)


@pytest.mark.parametrize(
    ("function", "good", "cases"),
    [
        (ar_kernels.attend, ATTEND, OF_ATTEND),
        (ar_kernels.attention_module, MODULE, OF_MODULE),
        (ar_kernels.rectify, RECTIFY, OF_RECTIFY),
    ],
    ids=name_of,
)
def test_compiled_without_fullgraph(function, good, cases, device):
    compiled = torch.compile(lambda arguments: function(**arguments), backend="aot_eager")
    for change, error, message in cases:
        torch._dynamo.reset()
        with pytest.raises(error) as raised:
            compiled(moved(good | change, device))
        assert type(raised.value) is error
        assert str(raised.value) == on(device, message)
