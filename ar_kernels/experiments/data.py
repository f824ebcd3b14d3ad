"""Cluttered, translated digits: a digit somewhere on a 40×40 canvas, among patches cut from other digits.

Every image is a function of (seed, its number) alone, drawn and composed on the device (draws.py): a run that was
broken off goes on exactly, a GPU sees the same images as a CPU, and a captured step composes its own batch.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.digits import IMAGE_SIZE
from .draws import TEST, TRAIN, below, draw

NAMES = ("digits", "mnist", "fashion-mnist")
"""Data sets known by name: scikit-learn's bundled digits, and two that torchvision can download."""

_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BUNDLED_SIZE = 24  # 8×8 digits without a margin, enlarged to about the height that MNIST's have
_TEST_SEED = 2018  # of the test set's clutter, the same for every run


@dataclass(frozen=True)
class Digits:
    """Images [M, s, s] in uint8 and their labels [M] in int64, on one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dim() != 3 or images.shape[1] != images.shape[2] or not 0 < images.shape[1] <= IMAGE_SIZE:
            raise ValueError(f"images must be [M, s, s] with s up to {IMAGE_SIZE}, got {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be [M] with M = {images.shape[0]} to match images, got {list(labels.shape)}")
        if len(images) < 2:
            raise ValueError(f"images must be at least 2 (distractors come from other digits), got {len(images)}")

    def to(self, device: torch.device | str) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Source:
    """A data set split into digits to train on and digits to test on, none in both."""

    name: str
    train: Digits
    test: Digits

    @property
    def num_classes(self) -> int:
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1

    @property
    def fingerprint(self) -> int:
        """CRC-32 of all images and labels: tells a resumed run whether it sees the data it began with."""
        value = 0
        for digits in (self.train, self.test):
            for tensor in (digits.images, digits.labels):
                value = zlib.crc32(tensor.cpu().numpy().tobytes(), value)
        return value


# ---------------------------------------------------------------------------------------------- loading


def load(data: str, *, download: bool = False, root: str | Path = "data") -> Source:
    """The digits that --data names.

    data: "digits", scikit-learn's 1,797 bundled ones; "mnist" or "fashion-mnist", under `root` where torchvision keeps
        them; or a folder that holds the four idx files of such a set, gzipped or plain.
    download: lets torchvision download "mnist" or "fashion-mnist" into `root` first.

    Raises FileNotFoundError naming the file that is missing and how to get it, ValueError for a malformed file or a
    download that no name goes with, OSError where the download fails, ModuleNotFoundError where scikit-learn or
    torchvision is needed and missing.
    """
    if download and data not in _TORCHVISION:
        raise ValueError(f"only {' and '.join(_TORCHVISION)} can be downloaded, got {data!r}")
    if data == "digits":
        return bundled()
    if data not in _TORCHVISION:
        return read_folder(data)
    name = _TORCHVISION[data]
    if download:
        _download(name, root)
    return read_folder(Path(root) / name / "raw", name=data)


def _download(name: str, root: str | Path) -> None:
    try:
        from torchvision import datasets

        for train in (True, False):
            getattr(datasets, name)(str(root), train=train, download=True)
    except (RuntimeError, OSError) as error:  # also a torchvision that does not match torch
        files = ", ".join(file for files in _FILES.values() for file in files)
        where = Path(root) / name / "raw"
        raise OSError(f"torchvision could not download {name} ({error}). Or put {files} into {where}") from None


def bundled() -> Source:
    """scikit-learn's 8×8 digits, enlarged to 24×24. Of every class each fifth digit is for the test, always the same.

    The digits lie in the order of their writers, so each writer has some in both parts.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    size = (_BUNDLED_SIZE, _BUNDLED_SIZE)
    images = F.interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    images = (images.squeeze(1) * 255).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero().flatten()[4::5]] = True
    return Source("digits", Digits(images[~is_test], labels[~is_test]), Digits(images[is_test], labels[is_test]))


def read_folder(folder: str | Path, name: str | None = None) -> Source:
    """MNIST, Fashion-MNIST or any set of small square images from a folder of its four idx files, plain or .gz."""
    folder = Path(folder)
    splits = {}
    for split, files in _FILES.items():
        images, labels = (torch.from_numpy(read_idx(_find(folder, file, name))) for file in files)
        try:
            splits[split] = Digits(images, labels.long())
        except ValueError as error:
            raise ValueError(f"{folder}, {split} files: {error}") from None
    return Source(name or str(folder), splits["train"], splits["test"])


def _find(folder: Path, file: str, name: str | None) -> Path:
    candidates = [folder / file, folder / f"{file}.gz"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    how = f"--data {name} --download fetches it" if name else "see --help for what --data takes"
    files = ", ".join(file for files in _FILES.values() for file in files)
    raise FileNotFoundError(f"{candidates[0]} is missing (plain or .gz): a data folder holds {files}; {how}")


def read_idx(path: str | Path) -> np.ndarray:
    """A file in MNIST's idx format, bytes only (plain or gzipped, told by its content) → uint8 array of its shape.

    Raises ValueError saying what is wrong with the file.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] == 0:
        raise ValueError(f"{path} is not an idx file of bytes: it begins with {content[:4].hex() or 'nothing'}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes for {list(shape)}, got {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


# ---------------------------------------------------------------------------------------------- composing


@dataclass(frozen=True)
class Clutter:
    """Cluttered, translated digits: one digit anywhere on the canvas, and patches of others of the same split.

    distractors: how many patches. patch: their height and width in pixels.
    """

    digits: Digits
    distractors: int = 8
    patch: int = 9

    def __post_init__(self) -> None:
        if self.distractors < 0:
            raise ValueError(f"distractors must be at least 0, got {self.distractors}")
        size = self.digits.images.shape[1]
        if not 1 <= self.patch <= size:
            raise ValueError(f"patch must be from 1 to the digits' size {size}, got {self.patch}")

    def train_batch(self, seed: int, step: int | Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Images [B, 1, 40, 40] in [0, 1] and labels [B] of one training step, digits drawn with replacement.

        step: a number, or a tensor of one on the digits' device: then nothing waits for the device.
        """
        numbers = torch.arange(batch_size, device=self.digits.images.device) + step * batch_size
        draws = draw(seed, TRAIN, numbers, self._columns)
        return self._compose(below(len(self.digits.images), draws[:, 0]), draws)

    def test_batches(self, batch_size: int = 256, repeats: int = 1, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every digit in order, `repeats` times, each time elsewhere and in other clutter: the same at every call.

        first: which of the clutters comes first. Whatever batch_size, and a digit's place, and the distractors it has
        in common with a smaller number of them, do not depend on how many there are.
        """
        count = len(self.digits.images)
        numbers = torch.arange(first * count, (first + repeats) * count, device=self.digits.images.device)
        for chunk in numbers.split(batch_size):
            yield self._compose(chunk % count, draw(_TEST_SEED, TEST, chunk, self._columns))

    @property
    def _columns(self) -> int:
        """Draws per image: which digit, its place, and of each distractor which, its corner and its spot."""
        return 3 + 5 * self.distractors

    def _compose(self, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        digits, size, count = self.digits, self.digits.images.shape[1], len(self.digits.images)
        place = below(IMAGE_SIZE - size + 1, draws[:, None, 1:3])
        patches = draws[:, 3:].unflatten(1, (self.distractors, 5))
        others = (targets.unsqueeze(1) + 1 + below(count - 1, patches[..., 0])) % count  # never the digit itself
        corner = below(size - self.patch + 1, patches[..., 1:3])
        spot = below(IMAGE_SIZE - self.patch + 1, patches[..., 3:5])

        device = digits.images.device
        canvas = torch.zeros(len(targets), IMAGE_SIZE**2, dtype=torch.uint8, device=device)
        _paste(canvas, digits.images, others, corner, spot, self.patch)
        _paste(canvas, digits.images, targets.unsqueeze(1), torch.zeros_like(place), place, size)
        white = torch.full((), 255.0, device=device)  # by a number a GPU would not divide, but multiply by 1/255
        images = canvas.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE).float() / white
        return images, digits.labels[targets]


def _paste(canvas: Tensor, images: Tensor, index: Tensor, corner: Tensor, spot: Tensor, side: int) -> None:
    """Cuts side×side squares at `corner` [B, P, 2] out of images[index [B, P]] and lays them on canvas [B, 40²] at
    `spot` [B, P, 2]. Where squares overlap the brighter pixel shows, so their order does not matter.
    """
    within = torch.arange(side, device=canvas.device)
    y, x = (corner[..., axis, None] + within for axis in (0, 1))  # [B, P, side]
    squares = images[index[..., None, None], y.unsqueeze(3), x.unsqueeze(2)]  # [B, P, side, side]
    y, x = (spot[..., axis, None] + within for axis in (0, 1))
    pixels = y.unsqueeze(3) * IMAGE_SIZE + x.unsqueeze(2)
    canvas.scatter_reduce_(1, pixels.flatten(1), squares.flatten(1), reduce="amax")
