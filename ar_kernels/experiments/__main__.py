"""Experiments with the gated attention of "Attend and Rectify"."""

import argparse
import sys

import ar_kernels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ar_kernels.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small attentive network on cluttered digits and show where it looks",
        description="Trains the paper's digit net with attention on cluttered, translated digits (40×40 pixels, 8 "
        "distractor patches cut from other digits), compares its first steps with the reference implementation, prints "
        "the test accuracy, and writes metrics.jsonl, checkpoint.pt and attention.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add(
        "--data", default="digits", metavar="NAME|DIR",
        help="digits: scikit-learn's bundled ones; mnist or fashion-mnist: under --data-root; or a folder that holds "
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain "
        "or .gz",
    )  # fmt: skip
    add("--download", action="store_true", help="let torchvision download mnist or fashion-mnist into --data-root")
    add("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data sets")
    add("--out", default="runs/demo", metavar="DIR", help="where the results go; an earlier run's are replaced")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, to the numbers of an unbroken run")
    add("--steps", type=int, default=400, help="training steps")
    add("--batch-size", type=int, default=100, help="images per step")
    add("--learning-rate", type=float, default=0.1, help="the highest of the schedule")
    add("--seed", type=int, default=0, help="of the first weights and the training images")
    add("--attention-depth", type=int, default=3, choices=range(1, 6), help="attended maps, counted from the last")
    add("--attention-width", type=int, default=4, help="heads per attended map")
    add("--compare-steps", type=int, default=8, help="first steps to repeat with the reference; 0: none")
    add("--checkpoint-every", type=int, default=50, metavar="STEPS", help="how often the checkpoint is written")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit status. Mistakes of the user come back as one line, not as a traceback."""
    options = _parser().parse_args(arguments)
    try:
        from . import demo

        demo.run(options)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'ar_kernels[experiments]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, FloatingPointError, ar_kernels.ImplementationUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. The same command with --resume goes on from the last checkpoint in {options.out}.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
