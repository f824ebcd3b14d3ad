"""What the benchmarks stand on: the yardstick of the training comparison."""

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_weights_move_to_the_next_number_of_the_dtype(dtype):
    """Up and down, through powers of two, and not at all from 0; running statistics stay."""
    from benchmarks.parity import _moved

    value = torch.tensor([1.0, -1.0, 0.75, -3.5, 0.001, 2.0**-20, 0.0]).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    seen = set()
    for seed in range(20):
        moved = _moved({"w": value.float(), "running_mean": value.float()}, dtype, seed)
        assert torch.equal(moved["running_mean"], value.float())
        steps = moved["w"].to(dtype).view(bits).to(torch.int64) - value.view(bits).to(torch.int64)
        assert torch.equal(moved["w"].to(dtype).float(), moved["w"]), "not a number of the dtype"
        assert steps[:-1].abs().eq(1).all() and steps[-1] == 0
        seen |= set(steps[:-1].tolist())
    assert seen == {-1, 1}
