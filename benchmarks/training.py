"""How fast `train` trains: images a second of the command itself, net by net, way by way. python -m benchmarks.training

    python -m benchmarks.training --models wrn-28-10 warn-28-10 --ways captured compiled eager
    python -m benchmarks.training --name processes --models warn-28-10 --processes 1 2

Each row is `python -m ar_kernels.experiments train --data random` in a process of its own, under torchrun where there
are several: reading, augmenting, bfloat16, the regulariser, the update and the log are in it; tests are not. A run's
first epoch, in which cuDNN plans and what is compiled or captured becomes so, is kept apart. Runs of all rows take
turns, --rounds of them. ratio: over the first model in the same way. scaling: over one process of the same batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .results import save

WAYS = {
    "captured": ("--capture", "--no-compile"),
    "compiled": ("--compile",),
    "captured-compiled": ("--capture", "--compile"),
    "eager": ("--no-compile",),
}


def train(model: str, way: str, processes: int, batch: int, epochs: int, more: list[str]) -> dict:
    """Trains once; the images a second of each epoch and the seconds of all of it. Raises RuntimeError."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data", "random", "--model", model, "--batch-size", str(batch * processes), "--out", folder]
        words += ["--epochs", str(epochs), "--test-batch-size", "250", *WAYS[way], *more]
        began = time.perf_counter()
        done = subprocess.run(
            [*start, "ar_kernels.experiments", "train", *words], capture_output=True, text=True, env=os.environ.copy()
        )
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(f"{model}, {way}, {processes} processes: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        speed = json.loads((Path(folder) / "speed.json").read_bytes())
    first, *others = speed["stretches"]  # from test to test
    if not others:
        raise RuntimeError(f"{model}, {way}: a rate takes two stretches between tests, got one: give no --test-every")
    return {"first": first, "others": others, "seconds": round(seconds, 1)}


def rows_of(runs: dict[tuple[str, str, int, int], list[dict]]) -> list[dict]:
    """runs: by (model, way, processes, batch of each process), in the order of asking."""
    rows, rates = [], {}
    for key, found in runs.items():
        if not found:
            continue
        model, way, processes, batch = key
        each = [rate for run in found for rate in run["others"]]
        rates[key] = statistics.median(each)
        row = {"model": model, "way": way, "processes": processes, "batch_of_each": batch}
        row |= {"images_per_second": round(rates[key], 1)}
        plain, alone = (next(iter(runs))[0], way, processes, batch), (model, way, 1, batch)
        if plain != key and plain in rates:
            row["ratio"] = round(rates[key] / rates[plain], 4)
        if alone != key and alone in rates:
            row["scaling"] = round(rates[key] / rates[alone], 4)
        row |= {"epochs": [round(rate, 1) for rate in each], "first_epochs": [round(run["first"], 1) for run in found]}
        rows.append(row | {"seconds_of_runs": [run["seconds"] for run in found]})
    return rows


def main(words: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="training", help="of the result: results/NAME-<device>.json")
    parser.add_argument("--folder", type=Path, help="where the result goes; unset: benchmarks/results")
    parser.add_argument("--models", nargs="+", default=["wrn-28-10", "warn-28-10"], help="the first is the yardstick")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["captured"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1], help="one GPU each")
    parser.add_argument("--batches", nargs="+", type=int, default=[128], help="images per step of each process")
    parser.add_argument("--epochs", type=int, default=3, help="of 50,000 images, the first kept apart")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each row")
    parser.add_argument("more", nargs="*", help="further words for train, after --")
    options = parser.parse_args(words)
    if options.epochs < 2:
        parser.error("argument --epochs: at least 2, for the first is kept apart")
    runs: dict[tuple[str, str, int, int], list[dict]] = {
        (model, way, processes, batch): []
        for way in options.ways
        for batch in options.batches
        for model in options.models
        for processes in options.processes
    }
    for _ in range(options.rounds):
        for key, found in runs.items():
            found.append(train(*key, options.epochs, options.more))
            rows = rows_of(runs)
            path = save(options.name, {"train": options.more, "rows": rows}, options.folder)  # now, should time run out
            print(key, found[-1], flush=True)
    print(*rows, path, sep="\n")
    return path


if __name__ == "__main__":
    main()
