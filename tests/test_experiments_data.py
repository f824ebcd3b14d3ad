"""Digits, idx files, and the clutter they are placed in."""

import gzip
import struct
import sys
import types

import numpy as np
import pytest
import torch

from ar_kernels.experiments import data
from ar_kernels.experiments.data import Clutter, Digits


def flat_digits(values: list[int], size: int = 12) -> Digits:
    """One digit per value, all of its pixels that value, and the value as its label."""
    labels = torch.tensor(values)
    return Digits(labels.to(torch.uint8).view(-1, 1, 1).repeat(1, size, size), labels)


def write_idx(path, values: np.ndarray) -> None:
    content = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_folder(folder, train: int = 30, test: int = 12, size: int = 14, suffix: str = "") -> None:
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, size, size), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


# ---------------------------------------------------------------------------------------------- clutter


def test_a_batch_is_a_function_of_seed_and_step(device):
    clutter = Clutter(data.bundled().train.to(device))
    first, labels = clutter.train_batch(5, 7, 16)
    clutter.train_batch(5, 8, 16), torch.rand(3)  # nothing else leaves a trace
    again, labels_again = clutter.train_batch(5, 7, 16)
    assert torch.equal(first, again) and torch.equal(labels, labels_again)
    for seed, step in ((5, 8), (6, 7)):
        assert not torch.equal(first, clutter.train_batch(seed, step, 16)[0])
    assert first.shape == (16, 1, 40, 40) and first.dtype == torch.float32 and first.device.type == device.type
    assert first.min() == 0 and 0.9 < first.max() <= 1
    on_cpu, labels_on_cpu = Clutter(data.bundled().train).train_batch(5, 7, 16)
    assert torch.equal(labels.cpu(), labels_on_cpu)
    # Draws are integers, bytes are copied, and one correctly rounded division ends it: the same bits everywhere.
    assert torch.equal(first.cpu(), on_cpu)
    on_device = clutter.train_batch(5, torch.tensor(7, device=device), 16)  # as a captured step counts
    assert torch.equal(on_device[0], first)


def test_the_test_set_is_always_the_same_and_in_every_clutter_complete():
    source = data.bundled()
    batches = list(Clutter(source.test).test_batches(batch_size=100, repeats=2))
    again = list(Clutter(source.test).test_batches(batch_size=100, repeats=2))
    assert all(torch.equal(a, b) for one, other in zip(batches, again) for a, b in zip(one, other))
    assert torch.equal(torch.cat([labels for _, labels in batches]), source.test.labels.repeat(2))
    images = torch.cat([images for images, _ in batches])
    assert not torch.equal(*images.chunk(2))
    second = Clutter(source.test).test_batches(batch_size=64, first=1)  # cut otherwise, and only the second clutter
    assert torch.equal(torch.cat([images for images, _ in second]), images[len(source.test.labels) :])


def test_more_distractors_leave_the_others_where_they_are():
    digits = data.bundled().test
    few, many = (next(Clutter(digits, count).test_batches())[0] for count in (3, 8))
    assert (many >= few).all() and (many > few).any()


def test_digits_are_whole_within_the_canvas_and_reach_everywhere():
    images, _ = Clutter(flat_digits([255, 255]), distractors=0).train_batch(0, 0, 4000)
    assert (images.flatten(1).sum(dim=1) == 12 * 12).all()
    rows, columns = images.amax(dim=(1, 3)), images.amax(dim=(1, 2))
    for lines in (rows, columns):
        firsts = lines.argmax(dim=1)
        assert set(firsts.tolist()) == set(range(40 - 12 + 1))
        assert (lines.sum(dim=1) == 12).all()


def test_distractors_are_patches_of_other_digits():
    """A dark digit and a bright one: in the dark one's picture every patch is bright, 9×9, and 8 of them at most."""
    images, labels = Clutter(flat_digits([100, 200])).train_batch(0, 0, 500)
    pixels = (images * 255).round().squeeze(1)
    dark = pixels[labels == 100]
    assert set(dark.unique().tolist()) == {0.0, 100.0, 200.0}
    for image in dark:
        where = (image == 100).nonzero()  # what the patches leave of the digit, if anything
        assert len(where) == 0 or (where.amax(dim=0) - where.amin(dim=0) < 12).all()
        assert 81 <= (image == 200).sum() <= 8 * 81


def test_patches_come_from_everywhere_in_a_digit():
    """Every pixel of a digit is seen in some patch: the digits' pixels are all different."""
    pattern = torch.arange(100, 244, dtype=torch.uint8).view(1, 12, 12)
    digits = Digits(torch.cat([pattern, torch.zeros_like(pattern)]), torch.tensor([0, 1]))
    images, labels = Clutter(digits).train_batch(0, 0, 400)
    seen = (images[labels == 1] * 255).round().unique()  # the dark digit's pictures: patches of the other alone
    assert set(seen.tolist()) == {0.0, *map(float, range(100, 244))}


def test_training_digits_never_meet_test_digits():
    source = data.bundled()
    train = {image.numpy().tobytes() for image in source.train.images}
    test = {image.numpy().tobytes() for image in source.test.images}
    assert not train & test
    assert len(source.train.labels) + len(source.test.labels) == 1797
    counts = source.test.labels.bincount()
    assert len(counts) == 10 and counts.min() >= 34
    images, _ = next(Clutter(flat_digits([200, 200])).test_batches())
    assert set((images * 255).round().unique().tolist()) == {0.0, 200.0}


def test_the_fingerprint_tells_data_apart():
    one, other = flat_digits([1, 2, 3]), flat_digits([1, 2, 4])
    assert data.Source("a", one, one).fingerprint == data.Source("b", one, one).fingerprint
    assert data.Source("a", one, one).fingerprint != data.Source("a", one, other).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flat_digits([1, 2], size=41), r"images must be \[M, s, s\] with s up to 40, got \[2, 41, 41\]"),
        (lambda: flat_digits([1]), "images must be at least 2"),
        (lambda: Digits(torch.zeros(3, 4, 4), torch.zeros(2)), r"labels must be \[M\] with M = 3"),
        (lambda: Clutter(flat_digits([1, 2]), patch=13), "patch must be from 1 to the digits' size 12, got 13"),
        (lambda: Clutter(flat_digits([1, 2]), distractors=-1), "distractors must be at least 0, got -1"),
    ],
)
def test_wrong_digits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path, suffix):
    write_folder(tmp_path, suffix=suffix)
    source = data.load(str(tmp_path))
    assert source.train.images.shape == (30, 14, 14) and source.test.images.shape == (12, 14, 14)
    assert torch.equal(source.train.labels, torch.arange(30) % 10) and source.num_classes == 10
    expected = np.random.default_rng(0).integers(0, 256, (30, 14, 14), dtype=np.uint8)
    assert np.array_equal(source.train.images.numpy(), expected)


def test_names_are_looked_for_where_torchvision_keeps_them(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    write_folder(tmp_path / "FashionMNIST" / "raw")
    assert data.load("fashion-mnist", root=tmp_path).name == "fashion-mnist"


def test_missing_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte is missing.*--data mnist --download"):
        data.load("mnist", root=tmp_path)
    write_folder(tmp_path / "own")
    (tmp_path / "own" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="own/t10k-labels-idx1-ubyte is missing.*--help"):
        data.load(str(tmp_path / "own"))
    with pytest.raises(ValueError, match="only mnist and fashion-mnist can be downloaded, got 'digits'"):
        data.load("digits", download=True)


def test_downloads_are_torchvisions(tmp_path, monkeypatch):
    calls = []

    class MNIST:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            calls.append((root, train, download))
            (tmp_path / "MNIST").mkdir(exist_ok=True)
            write_folder(tmp_path / "MNIST" / "raw")

    torchvision = types.ModuleType("torchvision")
    torchvision.datasets = types.SimpleNamespace(MNIST=MNIST)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    source = data.load("mnist", download=True, root=tmp_path)
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    assert source.name == "mnist" and len(source.train.images) == 30

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    torchvision.datasets.MNIST = fail
    with pytest.raises(OSError, match="could not download MNIST .no network.. Or put train-images-idx3-ubyte, .* into"):
        data.load("mnist", download=True, root=tmp_path)


HEADER = struct.pack(">4BI", 0, 0, 8, 1, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file of bytes: it begins with nothing"),
        (b"\x89PNG", "is not an idx file of bytes: it begins with 89504e47"),
        (struct.pack(">4BI", 0, 0, 13, 1, 0), "is not an idx file of bytes"),
        (HEADER[:6], "ends within its header"),
        (HEADER + b"1234", r"must hold 5 bytes for \[5\], got 4"),
        (HEADER + b"123456", r"must hold 5 bytes for \[5\], got 6"),
        (gzip.compress(HEADER + b"12345")[:-9], "is not a whole gzip file"),
        (gzip.compress(HEADER + b"12345")[:12], "is not a whole gzip file"),
        (gzip.compress(HEADER + b"12345")[:-8] + bytes(8), "is not a whole gzip file"),
    ],
    ids=range(9),
)
def test_malformed_idx_files(tmp_path, content, message):
    path = tmp_path / "file-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(path)


def test_files_that_do_not_go_together(tmp_path):
    write_folder(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(ValueError, match=r"train files: labels must be \[M\] with M = 30 to match images, got \[29\]"):
        data.load(str(tmp_path))
