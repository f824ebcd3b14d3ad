"""Sets of colour images, augmented as the paper does: padded by 4 with their mirror image, cropped, flipped.

Every batch is a function of (seed, step) alone and comes out on the device, normalised. Sets that fit (CIFAR, digits)
lie there whole; folders of pictures are read by worker processes, and augmented on the device like the others.
"""

import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .draws import HELD_OUT, ORDER, TRAIN, below, draw

NAMES = ("cifar10", "cifar100", *data.NAMES, "random")
"""Sets known by name. digits, mnist and fashion-mnist are padded to 32×32 and repeated in three channels."""

_PADDING = 4
_SIDE = 32
_CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SPLITS = {"train": ("train",), "test": ("test", "val")}


class ImageSet:
    """What training needs of a set. rank and world: which of how many equal shares of each batch.

    held_out: how many training images are never trained on, the same ones in every run; train_count are the others.

    mean, std: [3, 1, 1], of pixels from 0 to 255, by which images are normalised.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    size: int
    train_count: int
    test_count: int
    held_out: int
    fingerprint: int

    def read_batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B / world, 3, H, W] in uint8 and labels of one step, which counts from 1, and the images' numbers
        among all that a run sees.
        """
        raise NotImplementedError

    def test_batches(self, batch_size: int = 256, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Every test image once, in order, each in one of the `world` shares."""
        raise NotImplementedError

    def held_out_batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image held out once, as test images are shown."""
        raise NotImplementedError

    def augmented(self, images: Tensor, seed: int, numbers: Tensor) -> Tensor:
        """What a net is trained on of what read_batch read: augmented and normalised, in float32."""
        return self._normalised(augmented(images, seed, numbers))

    def train_batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Images [B / world, 3, H, W] and labels of one step, as read_batch reads and augmented shows them."""
        images, labels, numbers = self.read_batch(seed, step, batch_size, rank, world)
        return self.augmented(images, seed, numbers), labels

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def check_batch_size(batch_size: int, count: int, world: int) -> None:
    """Raises ValueError for a batch that an epoch of `count` images or `world` processes cannot be cut into."""
    if not 1 <= batch_size <= count or batch_size % world:
        raise ValueError(
            f"batch_size must be from 1 to the {count} training images and divisible by {world} processes, "
            f"got {batch_size}"
        )


def parted(count: int, held_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images to train on and those held out, of `count`, both in order. Raises ValueError if none is left."""
    if not 0 <= held_out < count:
        raise ValueError(f"held_out must be at least 0 and below the {count} training images, got {held_out}")
    numbers = torch.arange(count, device=device)
    order = draw(0, HELD_OUT, numbers, 1).squeeze(1).argsort(stable=True)
    return order[held_out:].sort().values, order[:held_out].sort().values


class Order:
    """Which images a step sees: every epoch all of them in an order of its own, but for a last incomplete batch."""

    def __init__(self, images: Tensor) -> None:
        """images: the numbers of those to train on."""
        self._images, self._numbers = images, torch.arange(len(images), device=images.device)
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def of(self, seed: int, step: int, batch_size: int, rank: int, world: int) -> Tensor:
        """The indices of a rank's share of a batch. Raises ValueError for a batch that cannot be cut so."""
        count = len(self._numbers)
        check_batch_size(batch_size, count, world)
        epoch, index = divmod(step - 1, count // batch_size)
        if self._last is None or self._last[0] != (seed, epoch):
            draws = draw(seed, ORDER, self._numbers + epoch * count, 1)
            self._last = (seed, epoch), self._images[draws.squeeze(1).argsort(stable=True)]
        share = batch_size // world
        start = index * batch_size + rank * share
        return self._last[1][start : start + share]


def augmented(images: Tensor, seed: int, numbers: Tensor) -> Tensor:
    """Images [B, C, H, W] as seen through a mirrored border of 4 pixels, shifted by up to 4, half of them flipped.

    A function of the seed and of each image's number [B] alone.
    """
    draws = draw(seed, TRAIN, numbers, 3)
    height, width = images.shape[2:]
    rows, columns = (
        _mirrored(
            torch.arange(side, device=images.device)
            + below(2 * _PADDING + 1, draws[:, axis : axis + 1])
            - _PADDING,
            side,
        )
        for axis, side in enumerate((height, width))
    )  # fmt: skip
    columns = torch.where(below(2, draws[:, 2:]) == 1, columns.flip(1), columns)
    images = images.gather(2, rows[:, None, :, None].expand(*images.shape))
    return images.gather(3, columns[:, None, None, :].expand(*images.shape))


def _numbers_of(step: int, batch_size: int, rank: int, share: int, device: torch.device) -> Tensor:
    """Of the images of one rank's share of a step's batch, among all that a run sees."""
    return torch.arange(share, device=device) + (step * batch_size + rank * share)


def _mirrored(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index.abs()).abs()


@dataclass
class Pictures(ImageSet):
    """A set that lies on one device whole: images [M, 3, H, W] in uint8, labels [M] in int64."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    held_out: int = 0

    def __post_init__(self) -> None:
        images, self.num_classes = self.train[0], len(self.classes)
        kept, self._held_out = parted(len(images), self.held_out, images.device)
        self.size, self.train_count, self.test_count = images.shape[2], len(kept), len(self.test[0])
        self._order = Order(kept)
        levels = torch.arange(256, dtype=torch.float64)
        seen = images[kept] if self.held_out else images
        counts = torch.stack([torch.bincount(seen[:, c].flatten(), minlength=256).cpu() for c in range(3)])
        share = counts / counts.sum(dim=1, keepdim=True)
        mean = (share * levels).sum(dim=1)
        std = ((share * levels**2).sum(dim=1) - mean**2).clamp(min=1).sqrt()
        self.mean, self.std = (value.float().view(3, 1, 1).to(images.device) for value in (mean, std))

    @property
    def fingerprint(self) -> int:
        value = 0
        for tensor in (*self.train, *self.test):
            value = zlib.crc32(tensor.cpu().numpy().tobytes(), value)
        return value

    def read_batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = self.train
        index = self._order.of(seed, step, batch_size, rank, world)
        return images[index], labels[index], _numbers_of(step, batch_size, rank, len(index), images.device)

    def test_batches(self, batch_size: int = 256, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (values[rank::world] for values in self.test)
        for pictures, wanted in zip(images.split(batch_size), labels.split(batch_size)):
            yield self._normalised(pictures), wanted

    def held_out_batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.train
        for index in self._held_out.split(batch_size):
            yield self._normalised(images[index]), labels[index]


class Folders(ImageSet):
    """Pictures in folders by class, as torchvision's ImageFolder reads them: root/train/CLASS/*, root/test (or val).

    size: pictures are resized to this shorter side and cut out in the middle. workers: processes that read.
    """

    def __init__(self, root: Path, size: int, device: torch.device, workers: int = 8, held_out: int = 0) -> None:
        datasets, transforms = imported("torchvision.datasets"), imported("torchvision.transforms")
        self.name, self.size, self._device, self._workers = str(root), size, device, workers
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
        self._splits = {}
        for split, names in _SPLITS.items():
            folder = next((root / name for name in names if (root / name).is_dir()), None)
            if folder is None:
                raise FileNotFoundError(
                    f"{root / names[0]} is missing: a folder of pictures holds train/CLASS/* and test/CLASS/* (or val)"
                )
            self._splits[split] = datasets.ImageFolder(str(folder), transforms.Compose(steps))
        self.classes = tuple(self._splits["train"].classes)
        if tuple(self._splits["test"].classes) != self.classes:
            raise ValueError(f"{root} must have the same classes to train on and to test on")
        self.num_classes = len(self.classes)
        kept, self._held_out = parted(len(self._splits["train"]), held_out, torch.device("cpu"))
        self.train_count, self.test_count, self.held_out = len(kept), len(self._splits["test"]), held_out
        self._order = Order(kept)
        self.mean, self.std = (255 * torch.tensor(value, device=device).view(3, 1, 1) for value in _IMAGENET)
        self._reading = None

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the names and lengths of all files."""
        value = 0
        for split in self._splits.values():
            for path, label in split.samples:
                name = f"{Path(path).relative_to(split.root)} {label} {Path(path).stat().st_size}\n"
                value = zlib.crc32(name.encode(), value)
        return value

    def read_batch(
        self, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        which = seed, batch_size, rank, world
        if self._reading is None or self._reading[:2] != (which, step):
            check_batch_size(batch_size, self.train_count, world)  # here rather than in the loader
            loader = self._loader("train", _From(self._order, step, which))
            self._reading = which, step, iter(loader)
        images, labels = next(self._reading[2])
        self._reading = which, step + 1, self._reading[2]
        images, labels = self._on_device(images, labels)
        return images, labels, _numbers_of(step, batch_size, rank, len(images), images.device)

    def test_batches(self, batch_size: int = 256, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        return self._shown("test", torch.arange(rank, self.test_count, world), batch_size)

    def held_out_batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        return self._shown("train", self._held_out, batch_size)

    def _shown(self, split: str, numbers: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader(split, [chunk.tolist() for chunk in numbers.split(batch_size)]):
            images, labels = self._on_device(images, labels)
            yield self._normalised(images), labels

    def _loader(self, split: str, batches: object) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self._splits[split],
            batch_sampler=batches,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )

    def _on_device(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.to(self._device, non_blocking=True) for value in values)


class _From:
    """The batches of all steps from one on."""

    def __init__(self, order: Order, step: int, which: tuple[int, int, int, int]) -> None:
        self.order, self.step, self.which = order, step, which

    def __iter__(self) -> Iterator[list[int]]:
        seed, step = self.which[0], self.step
        while True:
            yield self.order.of(seed, step, *self.which[1:]).tolist()
            step += 1


# ---------------------------------------------------------------------------------------------- loading


def load(
    name: str,
    device: torch.device,
    *,
    download: bool = False,
    root: str | Path = "data",
    size: int = 224,
    workers: int = 8,
    held_out: int = 0,
) -> ImageSet:
    """The set that --data names: one of NAMES, a folder of idx files, or a folder with train/CLASS/* and test/CLASS/*.

    download: lets torchvision download it into `root` first. size, workers: of a folder of pictures. held_out: as
        ImageSet has it.
    "random" has CIFAR-100's shape, noise for images and chance for labels: to measure speed with, and nothing else.
    Raises FileNotFoundError saying how to get what is missing, ValueError for a download that is none, and what
    data.load raises.
    """
    if download and (name == "random" or name not in NAMES):
        raise ValueError(f"only sets known by name can be downloaded, got {name!r}")
    if name == "random":
        return random_set(50_000, 10_000, device, held_out=held_out)
    if name in _CIFAR:
        return _cifar(name, device, Path(root), download, held_out)
    if name not in data.NAMES and any((Path(name) / split).is_dir() for split in ("train", "test", "val")):
        return Folders(Path(name), size, device, workers, held_out)
    if name not in data.NAMES and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{name} is neither a folder nor one of {', '.join(NAMES)}: a folder holds train/CLASS/* and test/CLASS/*, "
            "or the four idx files of a set like MNIST"
        )
    source = data.load(name, download=download, root=root)
    train, test = (
        (_in_colour(split.images).to(device), split.labels.to(device)) for split in (source.train, source.test)
    )
    return Pictures(source.name, _numbers(source.num_classes), train, test, held_out)


def imported(module: str) -> ModuleType:
    """A part of torchvision or timm. Raises ModuleNotFoundError, and OSError where it was built for another torch."""
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        raise OSError(
            f"{module} cannot be imported beside torch {torch.__version__}, it was built for another ({error})"
        ) from None


def random_set(train: int, test: int, device: torch.device, num_classes: int = 100, held_out: int = 0) -> Pictures:
    """Noise of CIFAR's shape, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(256, (count, 3, _SIDE, _SIDE), dtype=torch.uint8, generator=generator)
        return images.to(device), torch.randint(num_classes, (count,), generator=generator).to(device)

    return Pictures("random", _numbers(num_classes), split(train), split(test), held_out)


def _cifar(name: str, device: torch.device, root: Path, download: bool, held_out: int) -> Pictures:
    datasets = imported("torchvision.datasets")
    kind, folder = _CIFAR[name]
    splits = []
    try:
        for train in (True, False):
            found = getattr(datasets, kind)(str(root), train=train, download=download)
            images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
            splits.append((images.to(device), torch.tensor(found.targets, device=device)))
    except (RuntimeError, OSError) as error:
        how = f"the download failed ({error})" if download else f"--data {name} --download fetches it"
        raise FileNotFoundError(
            f"{root / folder} is missing or damaged: {how}; or unpack {kind}'s archive there"
        ) from None
    return Pictures(name, tuple(found.classes), *splits, held_out)


def _in_colour(images: Tensor) -> Tensor:
    """Grey images [M, s, s] → [M, 3, 32, 32], padded with black (larger ones stay as large)."""
    missing = max(0, _SIDE - images.shape[1])
    sides = (missing // 2, missing - missing // 2) * 2
    return F.pad(images, sides).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))
