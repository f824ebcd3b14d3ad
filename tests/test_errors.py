"""Bad inputs, one by one: the error names the argument, what was expected and what was given, and nothing has changed
when it is raised. Those of attend, attention_module and rectify are the same under torch.compile without fullgraph.
"""

import io
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ar_kernels
from ar_kernels import functional, official
from ar_kernels.models import DigitNet, WideAttentiveResNet, WideResNet

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
MASKS = "mask_weight must be [K, C] or [K, C, 3, 3] with K of at least 1 and C = 6 to match feature_map "
MASKS += "[2, 6, 3, 4], got "
FLOATS = " must be float16, bfloat16, float32 or float64, got "
HYPOTHESES = "hypotheses must be [N, D+1, L] with D+1 and L of at least 1, got "
OUTPUTS = "output_weight must be [L, K·C] or [K, L, C] with L of at least 1 and K·C = 30 to match mask_weight, got "
HALF = torch.float16

OF_ATTEND = [
    ({"feature_map": None}, TypeError, "feature_map must be a torch.Tensor, got NoneType"),
    ({"masks": None}, TypeError, "masks must be True or False, got None"),
    ({"mean": "no"}, TypeError, "mean must be True or False, got 'no'"),
    ({"tap": 1}, TypeError, "tap must be True or False, got 1"),
    (
        {"feature_map": zeros(N, C, H).to_sparse()},
        TypeError,
        "feature_map must be a dense tensor, got one of layout torch.sparse_coo",
    ),
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


def snapshot(*values: object) -> list:
    """All that a call could change, comparable: tensors and modules among the values, and the state of the process."""
    found: list = [
        torch.get_rng_state().tolist(),
        torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
        random.getstate(),
        functional._choice.name,
        ar_kernels.attend_rectify._calls.innermost,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
    ]

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append((id(value), value._version, value.shape, value.dtype, value.device, value.requires_grad))
            if value.device.type != "meta":
                dense = value.detach().to_dense().cpu().contiguous()
                found.append(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
            if value.is_leaf:
                visit(value.grad)
        elif isinstance(value, nn.Module):
            for module in value.modules():
                for name, own in vars(module).items():  # parameters, buffers, hooks, children, the training flag
                    found.append(name)
                    visit(own)
        elif isinstance(value, dict):
            for key, item in value.items():
                found.append(key)
                visit(item)
        elif isinstance(value, list | tuple):
            found.append(len(value))
            for item in value:
                visit(item)
        else:
            found.append(id(value) if callable(value) else repr(value))

    visit(values)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: net[0].weight.data.add_(1),
        lambda net, x: net[1].running_mean.add_(1),
        lambda net, x: net[1].eval(),
        lambda net, x: net[1].register_forward_hook(print),
        lambda net, x: net[0].weight.sum().backward(),
        lambda net, x: x.mul_(2),
        lambda net, x: x.zero_(),
        lambda net, x: torch.rand(1),
        lambda net, x: setattr(functional._choice, "name", "eager"),
    ],
)
def test_a_change_would_be_seen(change, monkeypatch):
    monkeypatch.setattr(functional._choice, "name", None)
    net, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.zeros(2, 2)
    before = snapshot(net, {"x": [x]})
    assert snapshot(net, {"x": [x]}) == before
    change(net, x)
    assert snapshot(net, {"x": [x]}) != before


def test_the_arguments_that_cases_start_from_are_good(device):
    for function, arguments in ((ar_kernels.attend, ATTEND), (ar_kernels.attention_module, MODULE)):
        function(**moved(arguments, device))
    assert not ar_kernels.rectify(**moved(RECTIFY, device)).any()


@pytest.mark.parametrize(("function", "good", "change", "error", "message"), CASES, ids=name_of)
def test_eager(function, good, change, error, message, device):
    arguments = moved(good | change, device)
    before = snapshot(arguments)
    with pytest.raises(error) as raised:
        function(**arguments)
    assert snapshot(arguments) == before
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


# ---------------------------------------------------------------------------------------------- all the rest


def backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, L),
    )


HEADS, GATES = ar_kernels.AttentionModule(C, L, K), ar_kernels.GlobalGates(C, 3)
DIGITS, WARN, WRN = DigitNet(L, 1, 1), WideAttentiveResNet(10, 1, L, 0.5), WideResNet(10, 1, L)
OFFICIAL, GATE = official.AttentionModule(C, L, K, 0.1), official.Gate(C, 3)
OFFICIAL_WARN = official.WideResNetAttention(10, 1, L, 0, 3, 2)

LOSS = RECTIFY | {"target": torch.zeros(N, dtype=torch.int64)}
BINARY = RECTIFY | {"target": zeros(N, L)}
POOLED = {"pooled": zeros(N, K, C), "output_weight": zeros(K, L, C)}
SIZES_OF_HEADS = {"in_channels": C, "num_classes": L, "heads": K}
SIZES_OF_NET = {"depth": 10, "width": 1, "num_classes": L}
OFFICIAL_NET = SIZES_OF_NET | {"dropout": 0.0, "attention_depth": 3, "attention_width": 2}
AGGREGATE = {"outputs": [zeros(N, 2, L), zeros(N, L)], "gates": zeros(N, 3)}

MIXES = "mix must be one of logit, log, prob, got 'mean'"
GATINGS = "gating must be 'softmax', 'sigmoid' or None, got 'tanh'"
CLASSES = "target must hold classes from 0 to 6, got others: "
NAMES = "implementation must be one of triton, native, eager, reference or None, got "
DTYPES = "dtype must be float16, bfloat16, float32, float64 or None, got "
IMAGES = "images must be [N, 3, H, W] with H and W of at least 1, got "
WIDE = [
    ({"depth": 28.0}, TypeError, "depth must be an int, got float"),
    ({"depth": 12}, ValueError, "depth must be 6n + 4 with n of at least 1 (10, 16, 22, 28, 40, ...), got 12"),
    ({"width": 0}, ValueError, "width must be at least 1, got 0"),
    ({"num_classes": True}, TypeError, "num_classes must be an int, got bool"),
    ({"dropout": "0.3"}, TypeError, "dropout must be a number, got str"),
    ({"dropout": float("nan")}, ValueError, "dropout must be at least 0 and below 1, got nan"),
]
DEPTH_AND_WIDTH = [
    ({"attention_depth": 6}, ValueError, "attention_depth must be from 0 to {most}, got 6"),
    ({"attention_depth": None}, TypeError, "attention_depth must be an int, got NoneType"),
    ({"attention_width": 0}, ValueError, "attention_width must be at least 1, got 0"),
]
OURS = [
    ({"mix": "mean"}, ValueError, MIXES),
    ({"gating": "tanh"}, ValueError, GATINGS),
    ({"kernel_size": 5}, ValueError, "kernel_size must be 1 or 3, got 5"),
]
OF_IMAGES = [
    ({"images": None}, TypeError, "images must be a torch.Tensor, got NoneType"),
    ({"images": zeros(N, 3, 8, 8, dtype=torch.uint8)}, TypeError, f"images{FLOATS}torch.uint8"),
    ({"images": zeros(N, 8, 8, 3)}, ValueError, f"{IMAGES}[2, 8, 8, 3]"),
    ({"images": zeros(3, 8, 8)}, ValueError, f"{IMAGES}[3, 8, 8]"),
    ({"images": zeros(N, 3, 0, 8)}, ValueError, f"{IMAGES}[2, 3, 0, 8]"),
]

TABLE: list[tuple[Callable, dict, list[tuple[dict, type[Exception], str]]]] = [
    (
        ar_kernels.gated_cross_entropy,
        LOSS,
        [
            ({"hypotheses": zeros(N, 3)}, ValueError, f"{HYPOTHESES}[2, 3]"),
            ({"scores": [0.5]}, TypeError, "scores must be a torch.Tensor, got list"),
            ({"gating": "tanh"}, ValueError, GATINGS),
            ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none, got 'batchmean'"),
            ({"target": 3}, TypeError, "target must be a torch.Tensor, got int"),
            ({"target": zeros(N)}, TypeError, "target must be int64, got torch.float32"),
            (
                {"target": torch.tensor([0, L])},
                ValueError,
                f"{CLASSES}index 7 is out of bounds for dimension 2 with size 7",
            ),
            (
                {"target": torch.tensor([-1, 0])},
                ValueError,
                f"{CLASSES}index -1 is out of bounds for dimension 2 with size 7",
            ),
            (
                {"target": torch.zeros(N, L, dtype=torch.int64)},
                ValueError,
                "target must be [N] = [2] to match hypotheses, got [2, 7]",
            ),
            (
                {"target": torch.zeros(N, dtype=torch.int64, device="meta")},
                ValueError,
                "target must be on cpu like hypotheses, got meta",
            ),
        ],
    ),
    (
        ar_kernels.gated_binary_cross_entropy,
        BINARY,
        [
            ({"target": zeros(N)}, ValueError, "target must be [N, L] = [2, 7] to match hypotheses, got [2]"),
            ({"target": zeros(N, L, dtype=torch.bool)}, TypeError, f"target{FLOATS}torch.bool"),
            ({"target": zeros(N, L, device="meta")}, ValueError, "target must be on cpu like hypotheses, got meta"),
            ({"reduction": None}, ValueError, "reduction must be one of mean, sum, none, got None"),
        ],
    ),
    (
        ar_kernels.mask_regulariser,
        {"masks": zeros(N, K, H, W)},
        [
            (
                {"masks": zeros(N, K, H * W)},
                ValueError,
                "masks must be [N, K, H, W] with K, H and W of at least 1, got [2, 5, 12]",
            ),
            (
                {"masks": zeros(N, K, 0, W)},
                ValueError,
                "masks must be [N, K, H, W] with K, H and W of at least 1, got [2, 5, 0, 4]",
            ),
            ({"masks": None}, TypeError, "masks must be a torch.Tensor, got NoneType"),
        ],
    ),
    (
        functional.head_hypotheses,
        POOLED,
        [
            ({"pooled": zeros(N, K)}, ValueError, "pooled must be [N, K, C] or [N, K, C, 9], got [2, 5]"),
            ({"pooled": zeros(N, K, C, 4)}, ValueError, "pooled must be [N, K, C] or [N, K, C, 9], got [2, 5, 6, 4]"),
            (
                {"output_weight": zeros(K, C)},
                ValueError,
                "output_weight must be [5, L, 6] to match pooled, got [5, 6]",
            ),
            ({"output_weight": zeros(K, L, C, dtype=torch.int8)}, TypeError, f"output_weight{FLOATS}torch.int8"),
            (
                {"output_weight": zeros(K, L, C, device="meta")},
                ValueError,
                "output_weight must be on cpu like pooled, got meta",
            ),
        ],
    ),
    (
        ar_kernels.explain,
        {"feature_map": zeros(N, C, H, W), "mask_weight": zeros(K, C)},
        [
            ({"feature_map": zeros(N, C)}, ValueError, f"{RANKS}[2, 6]"),
            ({"mask_weight": zeros(K, C + 1)}, ValueError, f"{MASKS}[5, 7]"),
            ({"implementation": "cuda"}, ValueError, f"{NAMES}'cuda'"),
        ],
    ),
    (
        lambda name: ar_kernels.use_implementation(name).__enter__(),
        {},
        [({"name": "Triton"}, ValueError, f"{NAMES}'Triton'"), ({"name": 1}, ValueError, f"{NAMES}1")],
    ),
    (
        ar_kernels.AttentionModule,
        SIZES_OF_HEADS,
        [
            ({"in_channels": "6"}, TypeError, "in_channels must be an int, got str"),
            ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
            ({"heads": 2.0}, TypeError, "heads must be an int, got float"),
            ({"kernel_size": True}, ValueError, "kernel_size must be 1 or 3, got True"),
            ({"kernel_size": 3.0}, ValueError, "kernel_size must be 1 or 3, got 3.0"),
            ({"implementation": "cudnn"}, ValueError, f"{NAMES}'cudnn'"),
            ({"dtype": torch.int64}, TypeError, f"{DTYPES}torch.int64"),
            ({"dtype": "float32"}, TypeError, f"{DTYPES}'float32'"),
        ],
    ),
    (
        HEADS,
        {"feature_map": zeros(N, C, H, W), "global_gates": GATES},
        [
            ({"feature_map": zeros(C)}, ValueError, f"{RANKS}[6]"),
            ({"global_gates": 3}, TypeError, "global_gates must be a GlobalGates or None, got int"),
            (
                {"global_gates": ar_kernels.GlobalGates(C, 3, kernel_size=3)},
                ValueError,
                "global_mask_weight must be [3, 6], got [3, 6, 3, 3]",
            ),
        ],
    ),
    (
        ar_kernels.GlobalGates,
        {"in_channels": C, "hypotheses": 3},
        [
            ({"hypotheses": 0}, ValueError, "hypotheses must be at least 1, got 0"),
            ({"kernel_size": 2}, ValueError, "kernel_size must be 1 or 3, got 2"),
            ({"dtype": torch.complex64}, TypeError, f"{DTYPES}torch.complex64"),
        ],
    ),
    (
        GATES,
        {"feature_map": zeros(N, C, H, W)},
        [
            (
                {"feature_map": zeros(N, 5, H, W)},
                ValueError,
                "feature_map must be [N, 6, H, W] or [N, 6, S] as in_channels says, got [2, 5, 3, 4]",
            ),
            (
                {"feature_map": zeros(N, C, H, W, dtype=torch.float64)},
                TypeError,
                "mask_weight must be torch.float64 to go with feature_map, got torch.float32",
            ),
        ],
    ),
    (
        ar_kernels.AttendRectify,
        {"backbone": backbone().train(), "layers": ["0", "2"], "num_classes": L},
        [
            ({"backbone": "resnet50"}, TypeError, "backbone must be a torch.nn.Module, got str"),
            ({"layers": "0"}, TypeError, "layers must be a sequence of names, got str"),
            ({"layers": []}, ValueError, "layers must name at least one layer, got none"),
            ({"layers": [0]}, TypeError, "layers must hold names, got int"),
            ({"layers": ["0", "0"]}, ValueError, "layers must not repeat a name, got '0' 2 times"),
            (
                {"layers": ["conv"]},
                ValueError,
                "layers must name submodules of the backbone, got 'conv'; it has 0, 1, 2, 3, 4, 5, ...",
            ),
            (
                {"layers": ["4"]},
                ValueError,
                "layer '4' must return a feature map [N, C, H, W] or [N, C, S], got [2, 4]",
            ),
            ({"num_classes": "7"}, TypeError, "num_classes must be an int, got str"),
            ({"num_classes": 9}, ValueError, "backbone must return [N, num_classes] = [2, 9], got [2, 7]"),
            ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
            ({"mix": "mean"}, ValueError, MIXES),
            ({"gating": "tanh"}, ValueError, GATINGS),
            ({"kernel_size": 7}, ValueError, "kernel_size must be 1 or 3, got 7"),
            ({"channel_dim": 2}, ValueError, "channel_dim must be 1, -1 or None, got 2"),
            (
                {"backbone": nn.Linear(4, L)},
                ValueError,
                "layers must name submodules of the backbone, got '0'; it has none",
            ),
        ],
    ),
    (WideResNet, SIZES_OF_NET, WIDE),
    (WideAttentiveResNet, SIZES_OF_NET, WIDE + DEPTH_AND_WIDTH + OURS),
    (
        DigitNet,
        {"num_classes": L},
        [({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"), *DEPTH_AND_WIDTH, *OURS],
    ),
    (WRN, {"images": zeros(N, 3, 8, 8)}, OF_IMAGES),
    (WARN, {"images": zeros(N, 3, 8, 8)}, OF_IMAGES),
    (
        DIGITS,
        {"images": zeros(N, 1, 40, 40)},
        [
            ({"images": [[0.0]]}, TypeError, "images must be a torch.Tensor, got list"),
            ({"images": zeros(N, 1, 28, 28)}, ValueError, "images must be [N, 1, 40, 40], got [2, 1, 28, 28]"),
            ({"images": zeros(N, 1, 40, 40, dtype=torch.uint8)}, TypeError, f"images{FLOATS}torch.uint8"),
            (
                {"images": zeros(N, 1, 40, 40, dtype=torch.float64)},
                TypeError,
                "images must be torch.float32 like the net, got torch.float64",
            ),
        ],
    ),
    (
        official.AttentionModule,
        {"in_ch": C, "nlabels": L, "nheads": K},
        [
            ({"in_ch": 0}, ValueError, "in_ch must be at least 1, got 0"),
            ({"nlabels": 1.5}, TypeError, "nlabels must be an int, got float"),
            ({"nheads": None}, TypeError, "nheads must be an int, got NoneType"),
            ({"reg_w": "0.1"}, TypeError, "reg_w must be a number, got str"),
            ({"reg_w": float("inf")}, ValueError, "reg_w must be finite and at least 0, got inf"),
        ],
    ),
    (
        OFFICIAL,
        {"feature_map": zeros(N, C, H, W)},
        [
            (
                {"feature_map": zeros(N, C, H)},
                ValueError,
                "feature_map must be [N, C, H, W] for a mask_weight of 3×3 heads, got [2, 6, 3]",
            ),
            ({"feature_map": None}, TypeError, "feature_map must be a torch.Tensor, got NoneType"),
        ],
    ),
    (
        official.AttentionModule.aggregate,
        AGGREGATE,
        [
            ({"outputs": zeros(N, L)}, TypeError, "outputs must be a list or tuple of tensors, got Tensor"),
            ({"outputs": []}, ValueError, "outputs must be tensors [N, m, L] or [N, L], at least one, got []"),
            ({"outputs": [zeros(N, L), 1]}, TypeError, "outputs[1] must be a torch.Tensor, got int"),
            (
                {"outputs": [zeros(N, L), zeros(N, 1, C)]},
                ValueError,
                "outputs[1] must have N = 2 and L = 7 on cpu like the first, got [2, 1, 6] on cpu",
            ),
            ({"gates": "softmax"}, TypeError, "gates must be a torch.Tensor, got str"),
            (
                {"gates": zeros(N, 2)},
                ValueError,
                "gates must be [N, M] = [2, 3] on cpu to match outputs, got [2, 2] on cpu",
            ),
            ({"function": "tanh"}, ValueError, "function must be 'softmax' or 'sigmoid', got 'tanh'"),
        ],
    ),
    (
        official.Gate,
        {"in_ch": C, "ngates": 3},
        [
            ({"ngates": 0}, ValueError, "ngates must be at least 1, got 0"),
            ({"gate_depth": 3}, ValueError, "gate_depth must be 1 or 2, got 3"),
            ({"in_ch": 1, "gate_depth": 2}, ValueError, "in_ch must be at least 2 with gate_depth=2, got 1"),
        ],
    ),
    (
        GATE,
        {"features": zeros(N, C)},
        [
            ({"features": None}, TypeError, "features must be a torch.Tensor, got NoneType"),
            ({"features": zeros(N, 5)}, ValueError, "features must be [N, C] or [N, C, H, W], C = 6, got [2, 5]"),
        ],
    ),
    (
        official.WideResNetAttention,
        OFFICIAL_NET,
        [
            *WIDE,
            *DEPTH_AND_WIDTH,
            ({"reg_w": -1}, ValueError, "reg_w must be finite and at least 0, got -1"),
            (
                {"attention_type": "mean"},
                ValueError,
                "attention_type must be 'softmax', 'sigmoid' or None, got 'mean'",
            ),
        ],
    ),
    (OFFICIAL_WARN, {"images": zeros(N, 3, 8, 8)}, OF_IMAGES),
    (
        official.load_checkpoint,
        {"model": OFFICIAL_WARN},
        [
            ({"model": {}, "file": io.BytesIO()}, TypeError, "model must be a torch.nn.Module, got dict"),
            ({"file": 5}, TypeError, "file must be a path or a file opened for reading, got int"),
        ],
    ),
    (
        official.swap,
        {},
        [({"model": OFFICIAL_WARN.state_dict}, TypeError, "model must be a torch.nn.Module, got method")],
    ),
]
OTHER_CASES = [
    (call, good | change, error, message.format(most=5 if call is DigitNet else 3) if "{most}" in message else message)
    for call, good, cases in TABLE
    for change, error, message in cases
]


def test_there_are_many_cases():
    assert len(CASES) + len(OTHER_CASES) >= 200 and len(OTHER_CASES) >= 100


@pytest.mark.parametrize(
    ("call", "good"), [(call, good) for call, good, _ in TABLE if good and call is not official.load_checkpoint]
)
def test_the_rest_starts_from_good_arguments_too(call, good):
    training = [(module, module.training) for module in call.modules()] if isinstance(call, nn.Module) else []
    for module, _ in training:
        module.training = False
    assert call(**good) is not None
    for module, flag in training:
        module.training = flag


@pytest.mark.parametrize(
    ("call", "arguments", "error", "message"), OTHER_CASES, ids=[f"{index}" for index in range(len(OTHER_CASES))]
)
def test_the_rest(call, arguments, error, message):
    before = snapshot(call, arguments)
    with pytest.raises(Exception) as raised:
        call(**arguments)
    assert (type(raised.value), str(raised.value)) == (error, message)
    assert snapshot(call, arguments) == before
