"""Does WARN-28-10 train the same on the fused path? python -m benchmarks.parity [--out DIR] (CUDA GPU).

Four runs of 50 steps from the same data: the reference, the reference twice more with every first weight moved by one
ulp (up or down, drawn by a seed), and the fused path. At each step the fused loss may differ from the reference's by
at most twice what the moved references differ, the larger of the two so far (a difference of two chaotic runs crosses
zero by accident). ulp: of the dtype the layers compute in, float32 or bfloat16 (autocast).
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import ar_kernels
from ar_kernels.models import WideAttentiveResNet

from .results import save

STEPS, BATCH, LABELS = 50, 128, 100


def _first_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return WideAttentiveResNet(28, 10, LABELS, attention_depth=3, attention_width=4).state_dict()


def _moved(weights: dict[str, torch.Tensor], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Every floating weight but zeros one ulp of dtype up or down."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in weights.items():
        if value.is_floating_point() and "running" not in name:
            sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            mantissa, exponent = torch.frexp(value)
            ulp = torch.exp2(exponent.float() - 1) * torch.finfo(dtype).eps
            # Towards zero a power of two has its neighbour half as far; 0 itself stays: its own ulp moves nothing.
            ulp = torch.where((mantissa.abs() == 0.5) & (sign * value < 0), ulp / 2, ulp)
            value = torch.where(value == 0, value, value + sign * ulp)
        result[name] = value
    return result


def losses(weights: dict[str, torch.Tensor], implementation: str, dtype: torch.dtype) -> list[float]:
    model = WideAttentiveResNet(28, 10, LABELS, attention_depth=3, attention_width=4)
    model.load_state_dict(weights)
    model = model.cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator).cuda().to(memory_format=torch.channels_last)
        target = torch.randint(0, LABELS, (BATCH,), generator=generator).cuda()
        images += target.view(-1, 1, 1, 1) / LABELS - 0.5  # something to learn
        with ar_kernels.use_implementation(implementation), torch.autocast("cuda", dtype, dtype != torch.float32):
            loss = F.cross_entropy(model(images), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        results.append(loss.detach())
    return torch.stack(results).double().tolist()


def compare(dtype: torch.dtype) -> dict:
    weights = _first_weights()
    reference = losses(weights, "reference", dtype)
    again = losses(weights, "reference", dtype)
    moved = [losses(_moved(weights, dtype, seed), "reference", dtype) for seed in (1, 2)]
    fused = losses(weights, "triton", dtype)
    rows, envelope = [], 0.0
    for step in range(STEPS):
        spread = max(abs(run[step] - reference[step]) for run in moved)
        envelope = max(envelope, spread)
        difference = abs(fused[step] - reference[step])
        rows.append(
            {
                "step": step,
                "reference": reference[step],
                "fused": fused[step],
                "difference": difference,
                "moved_differ": spread,
                "moved_differ_so_far": envelope,
                "within": difference <= 2 * envelope,
                "within_at_this_step_alone": difference <= 2 * spread,
            }
        )
    return {
        "dtype": str(dtype)[6:],
        "reference_repeats_bit_for_bit": reference == again,
        "steps_within": sum(row["within"] for row in rows),
        "steps_within_alone": sum(row["within_at_this_step_alone"] for row in rows),
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    arguments = parser.parse_args()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    runs = [compare(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for run in runs:
        print({key: value for key, value in run.items() if key != "steps"})
        for row in run["steps"][:4] + run["steps"][9::10]:
            print("  ", {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
    print(save("warn-parity", {"runs": runs}, arguments.out))


if __name__ == "__main__":
    main()
