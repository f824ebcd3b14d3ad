"""python -m benchmarks.experiments NAME FILE...: files what experiments found, JSON by JSON, as one result.

    python -m benchmarks.experiments figure4 runs/ablate/figure4.json runs/ablate/speed.json runs/clutter/figure4e.json

To be run where they ran: device, versions and commit are those of this machine and checkout.
"""

import argparse
import json
from pathlib import Path

from .results import save


def main(words: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result: results/NAME-<device>.json")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that an experiment wrote")
    parser.add_argument("--folder", type=Path, help="where the result goes; unset: benchmarks/results")
    options = parser.parse_args(words)
    path = save(options.name, {file.stem: json.loads(file.read_bytes()) for file in options.files}, options.folder)
    print(path)
    return path


if __name__ == "__main__":
    main()
