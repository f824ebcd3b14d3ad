"""Experiments with the gated attention of "Attend and Rectify"."""

import argparse
import importlib
import sys
from collections.abc import Callable

import torch

import ar_kernels

_ON_OFF = argparse.BooleanOptionalAction

_VARIANTS = (
    "baseline", "ad1-aw1", "ad2-aw1", "ad3-aw1", "ad4-aw1", "ad4-aw2", "ad4-aw4", "sigmoid", "no-gates",
    "no-regulariser",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ar_kernels.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in (_demo, _train, _ablate, _clutter, _visualize, _early_exit, _report):
        add_command(commands)
    return parser


_COUNTS = (
    "steps", "epochs", "batch_size", "test_batch_size", "checkpoint_every", "test_every", "log_every", "seeds", "draws",
    "at_once", "count", "repeats",
)  # fmt: skip
"""Options that must be at least 1."""


def _settle(options: argparse.Namespace) -> None:
    """Checks what is alike in all commands, and picks the device where none was given. Raises ValueError."""
    for name in _COUNTS:
        if getattr(options, name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if hasattr(options, "device"):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda was given and torch sees no CUDA device")
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def _command(commands: argparse._SubParsersAction, name: str, help: str, description: str) -> Callable:
    return commands.add_parser(name, help=help, description=description, formatter_class=_Help).add_argument


def _add_digits(add: Callable, default: str) -> None:
    add(
        "--data", default=default, metavar="NAME|DIR",
        help="digits: scikit-learn's bundled ones; mnist or fashion-mnist: under --data-root; or a folder that holds "
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain "
        "or .gz",
    )  # fmt: skip
    add("--download", action="store_true", help="let torchvision download mnist or fashion-mnist into --data-root")
    add("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data sets")


def _add_device(add: Callable) -> None:
    add("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")


def _demo(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "demo",
        "train a small attentive network on cluttered digits and show where it looks",
        "Trains the paper's digit net with attention on cluttered, translated digits (40×40 pixels, 8 "
        "distractor patches cut from other digits), compares its first steps with the reference implementation, prints "
        "the test accuracy, and writes metrics.jsonl, checkpoint.pt and attention.png.",
    )
    _add_digits(add, "digits")
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
    _add_device(add)


def _train(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "train",
        "train WRN, WARN or any torchvision or timm backbone on CIFAR or a folder of pictures",
        "Trains a network by the paper's recipe: SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128, a "
        "learning rate of 0.1 that falls to a fifth after 30, 60 and 80 % of the epochs (60, 120, 160 of 200), images "
        "padded by 4 with their mirror image, cropped and flipped. Tests after each epoch and reports the last "
        "accuracy as well as the best: the paper reports the best on the test set. Writes metrics.jsonl, "
        "checkpoint.pt and speed.json. On several GPUs: torchrun --nproc-per-node 2 -m ar_kernels.experiments train "
        "...; each process takes its share of every batch, and batch normalisation sees that share.",
    )
    add(
        "--model", default="warn-28-10", metavar="NAME",
        help="wrn-DEPTH-WIDTH, warn-DEPTH-WIDTH, torchvision/NAME or timm/NAME; the last two attend to --layers",
    )  # fmt: skip
    add("--layers", default="", metavar="A,B", help="of a backbone: the layers to attend to; none: the plain backbone")
    add("--attention-depth", type=int, default=3, help="of warn: attended maps, counted from the last")
    add("--attention-width", type=int, default=4, help="heads per attended map")
    add("--mix", choices=("logit", "prob", "log"), default="logit", help="how hypotheses are mixed; sets the loss too")
    add("--gating", choices=("softmax", "sigmoid", "none"), default="softmax", help="of the global gates")
    add("--head-gates", action=_ON_OFF, default=True, help="gates over the heads of a layer")
    add("--kernel-size", type=int, choices=(1, 3), default=1, help="of the attention heads; the official code has 3")
    add("--regulariser", type=_weight, default=0.001, metavar="W", help="weight of the masks' regulariser")
    add(
        "--layer-loss", type=_weight, default=0.0, metavar="W",
        help="weight of a cross-entropy of each attended layer alone, so that it can answer alone (early-exit)",
    )  # fmt: skip
    add("--dropout", type=float, default=0.0, help="of wrn and warn, between the convolutions of a block")
    add("--pretrained", action="store_true", help="start a backbone from its ImageNet weights")
    add("--weights", metavar="FILE", help="start from a state_dict or a run's checkpoint, where names and shapes fit")
    add(
        "--data", default="cifar10", metavar="NAME|DIR",
        help="cifar10, cifar100; mnist, fashion-mnist or digits, padded to 32×32; a folder with train/CLASS/* and "
        "test/CLASS/*; or random, noise of CIFAR's shape, to measure speed with",
    )  # fmt: skip
    add("--download", action="store_true", help="let torchvision download a set known by name into --data-root")
    add("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data sets")
    add(
        "--held-out", type=int, default=0, metavar="N",
        help="training images, picked at random, that are not trained on: early-exit sets its thresholds by them",
    )  # fmt: skip
    add("--image-size", type=int, default=224, help="of a folder's pictures, in pixels")
    add("--workers", type=int, default=8, help="processes that read a folder's pictures")
    add("--out", default="runs/train", metavar="DIR", help="where the results go; an earlier run's are replaced")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--epochs", type=int, default=200, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step, of all processes together")
    add("--test-batch-size", type=int, default=256, help="images per step of a test")
    add("--learning-rate", type=float, default=0.1, help="of the first epochs")
    add("--weight-decay", type=_weight, default=5e-4, help="on all weights")
    add("--seed", type=int, default=0, help="of the first weights, the order of images and their augmentation")
    add("--test-every", type=int, default=1, metavar="EPOCHS", help="how often the accuracy is measured")
    add("--log-every", type=int, default=10, metavar="STEPS", help="how often the loss is written down")
    add("--bf16", action=_ON_OFF, default=None, help="bfloat16 autocast, on a GPU alone; unset: on")
    add("--channels-last", action=_ON_OFF, default=None, help="memory layout; unset: on on a GPU")
    add("--compile", action=_ON_OFF, default=None, help="torch.compile; unset: on on a GPU")
    add(
        "--bucket", type=float, default=25.0, metavar="MB",
        help="of several processes: gradients added up at once; more: fewer and later sums",
    )  # fmt: skip
    add("--capture", action="store_true", help="take whole steps as one CUDA graph, for hosts that do not keep up")
    _add_device(add)


def _weight(text: str) -> float:
    """Of a term of the loss."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def _ablate(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "ablate",
        "the paper's Figure 4: depth, width, gates and the regulariser on cluttered digits",
        "Trains the paper's digit net on cluttered, translated digits without attention and with it, at attention "
        "depth 1 to 4 and width 1, 2 and 4, with sigmoid gates, without gates and without the regulariser, each with "
        "several seeds; draws the four panels beside the paper's numbers (figure4.png, figure4.json) and says of each "
        "ordering that the paper finds whether it holds, fails or is undecided, by paired 95 % intervals over seeds "
        "and draws of the test set's clutter. Recipe: SGD with momentum 0.9, weight decay 1e-5, batches of 100, a "
        "learning rate of 0.1, a tenth of it after 30 % of the epochs (60 of 200). On a GPU whole steps are captured "
        "as CUDA graphs, of several runs side by side. torchrun --nproc-per-node 2 -m ar_kernels.experiments ablate "
        "... shares the runs among GPUs.",
    )
    add("--only", nargs="+", metavar="NAME", choices=_VARIANTS, help=f"some of the variants: {', '.join(_VARIANTS)}")
    add("--out", default="runs/ablate", metavar="DIR", help="where runs and figures go, each run in VARIANT/seed-N")
    add("--resume", action="store_true", help="keep finished runs in --out, and go on with the one that broke off")
    _add_ablation(add)


def _clutter(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "clutter",
        "the paper's Figure 4e: the test error against the number of distractors",
        "Tests the ablation's nets without attention and with it (depth 4, width 4), trained with 8 distractors, with "
        "up to 64 of them; draws figure4e.png, writes figure4e.json, and says by a paired 95 % interval whether the "
        "error grows less with attention. Nets that ablate left in --runs with the same settings are taken from there; "
        "the others are trained.",
    )
    add("--runs", default="runs/ablate", metavar="DIR", help="where ablate keeps its runs")
    add("--out", default="runs/clutter", metavar="DIR", help="where the errors and the figure go")
    add("--resume", action="store_true", help="keep the errors in --out that were measured before")
    add("--distractors", type=int, nargs="+", default=[0, 4, 8, 16, 32, 64], metavar="N", help="how many to test with")
    _add_ablation(add)


def _add_ablation(add: Callable) -> None:
    _add_digits(add, "mnist")
    add("--seeds", type=int, default=3, help="runs of each variant, from seed 0")
    add("--draws", type=int, default=10, help="draws of clutter that the test digits are seen in")
    add("--epochs", type=int, default=40, help="as many images as there are training digits, so often; the paper: 200")
    add("--batch-size", type=int, default=100, help="images per step")
    add("--learning-rate", type=float, default=0.1, help="of the first epochs")
    add("--regulariser", type=_weight, default=0.001, metavar="W", help="weight of the masks' regulariser")
    add("--mix", choices=("logit", "prob", "log"), default="logit", help="how hypotheses are mixed; sets the loss too")
    add("--bf16", action=_ON_OFF, default=None, help="bfloat16 autocast, on a GPU alone; unset: on")
    add("--capture", action=_ON_OFF, default=None, help="take whole steps as a CUDA graph; unset: on a GPU")
    add("--at-once", type=int, default=5, metavar="RUNS", help="captured runs that take their steps side by side")
    _add_device(add)


def _visualize(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "visualize",
        "see where each head looks, on the test set or on images of your own",
        "Lays the masks of each head and depth over the input (the paper's Figure 6), with the gates' values and what "
        "each depth would have predicted: a contact sheet, attention.png, and a page, attention.html, that opens "
        "without a server. For networks that train, ablate or demo left behind; ar_kernels.experiments.visualize has "
        "write_attention for any model that returns details.",
    )
    add("--run", required=True, metavar="DIR", help="the folder of a run: it holds checkpoint.pt")
    add("--images", nargs="+", metavar="FILE|DIR", help="your own; unset: the first of the run's test set")
    add("--count", type=int, default=8, help="how many images")
    add("--distractors", type=int, default=8, help="in the test set's cluttered digits")
    add("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data sets")
    add("--out", default="runs/visualize", metavar="DIR", help="where the sheet and the page go")
    _add_device(add)


def _early_exit(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "early-exit",
        "answer from an attended layer where it is sure, and skip the rest of the network",
        "Tests a run's network so that images leave it at the first attended layer whose hypothesis, mixed with those "
        "before it by the gates' means over training images, is surer than a threshold; only the others go on. Of a "
        "run that was trained with --held-out, thresholds are set on the images held out, such that no more than "
        "--allow of the answers are lost there; of others, and with --thresholds, a curve of thresholds is shown, and "
        "one picked by it is picked on the test set. For each: accuracy, where images left, operations saved, and "
        "time. Writes early-exit.json and early-exit.png.",
    )
    add("--run", required=True, metavar="DIR", help="the folder of a run of an attentive network")
    add(
        "--allow", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0], metavar="PERCENT",
        help="of the images held out, whose right answers may be lost",
    )  # fmt: skip
    add("--thresholds", type=float, nargs="+", metavar="P", help="probabilities, instead; above 1: never")
    add("--batch-size", type=int, default=256, help="images that enter together")
    add("--repeats", type=int, default=3, help="how often each threshold is timed; the median counts")
    add("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data sets")
    add("--out", default="runs/early-exit", metavar="DIR", help="where the table and the curve go")
    _add_device(add)


def _report(commands: argparse._SubParsersAction) -> None:
    add = _command(
        commands,
        "report",
        "collect runs into one page with tables and figures",
        "Looks through folders for what the other commands left there: Figure 4 and 4e with their verdicts, early "
        "exits, training runs with their last and best accuracy beside the paper's, and pictures of attention; "
        "writes one HTML page that opens without a server.",
    )
    add("folders", nargs="*", default=["runs"], metavar="DIR", help="where to look")
    add("--out", default="runs/report.html", metavar="FILE", help="the page")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit status. Mistakes of the user come back as one line, not as a traceback."""
    options = _parser().parse_args(arguments)
    try:
        _settle(options)
        importlib.import_module(f".{options.command.replace('-', '_')}", __package__).run(options)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'ar_kernels[experiments]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, FloatingPointError, ar_kernels.ImplementationUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = f" The same command with --resume goes on from the last checkpoint in {options.out}."
        print(f"\nStopped.{goes_on if hasattr(options, 'resume') else ''}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
