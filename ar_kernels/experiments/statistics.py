"""Whether one network is better than another, from several seeds tested on several draws of the same test set."""

from typing import NamedTuple

import numpy as np
from scipy.stats import t


class Interval(NamedTuple):
    """A mean and the interval that holds the true one with the confidence asked for."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of "the difference is above 0": holds or fails where the interval lies on one side of 0, else undecided."""
        return "holds" if self.low > 0 else "fails" if self.high < 0 else "undecided"

    def as_json(self) -> dict[str, float | str | None]:
        """Of a difference, as files hold it: JSON has no infinity, None stands for an end that is not known."""
        low, high = (float(end) if np.isfinite(end) else None for end in (self.low, self.high))
        return {"difference": self.mean, "low": low, "high": high, "verdict": self.verdict}


def paired_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """Of differences [seeds, draws]: of two networks of one seed on one draw of the test set, each draw met by all.

    Seeds and draws are both chance. The variance of the mean is estimated by that of the seeds' means over their number
    plus that of the draws' means over theirs, which counts what is neither's twice and so errs on the careful side;
    degrees of freedom by Satterthwaite. With one seed or one draw nothing is known: the interval is infinite.
    Raises ValueError for another shape.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 2 or differences.size == 0:
        raise ValueError(f"differences must be [seeds, draws], got {list(differences.shape)}")
    mean = float(differences.mean())
    if min(differences.shape) < 2:
        return Interval(mean, -np.inf, np.inf)
    counts = differences.shape
    parts = [differences.mean(axis=1 - axis).var(ddof=1) / counts[axis] for axis in (0, 1)]
    variance = sum(parts)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts))
    half = float(t.ppf(0.5 + confidence / 2, freedom) * variance**0.5)
    return Interval(mean, mean - half, mean + half)
