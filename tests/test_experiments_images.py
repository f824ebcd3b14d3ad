"""Colour image sets: their augmentation, order and shares, and where they are read from."""

import importlib
import pickle

import numpy as np
import pytest
import torch
from test_experiments_data import write_folder

from ar_kernels.experiments import data, images
from ar_kernels.experiments.draws import TRAIN, _mix, below, draw


@pytest.fixture
def torchvision():
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        importlib.import_module("torchvision_on_cpu_torch")
        return importlib.import_module("torchvision")


# ---------------------------------------------------------------------------------------------- draws


def test_draws_are_splitmix64():
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    numbers = torch.randint(-(2**63), 2**63 - 1, (500,))
    assert [value % 2**64 for value in _mix(numbers).tolist()] == [mix(value % 2**64) for value in numbers.tolist()]


def test_draws_are_uniform_and_apart(device):
    numbers = torch.arange(100_000, device=device)
    draws = draw(3, TRAIN, numbers, 3)
    assert torch.equal(draws[70:90, :2].cpu(), draw(3, TRAIN, torch.arange(70, 90), 2))
    unit = draws.double().cpu() / 2**31
    every = torch.cat([unit.T, draw(4, TRAIN, numbers, 1).double().cpu().T / 2**31, unit[:, :1].roll(1, 0).T])
    limit = 5 / 100_000**0.5  # five standard deviations of a correlation of nothing
    assert (torch.corrcoef(every) - torch.eye(5)).abs().max() < limit
    counts = below(10, draws[:, 0]).bincount(minlength=10)
    assert len(counts) == 10 and (counts - 10_000).abs().max() < 5 * (10_000 * 0.9) ** 0.5


# ---------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_a_crop_of_the_mirrored_image_half_of_them_flipped():
    one = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    padded = torch.nn.functional.pad(one.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[0, :, y : y + 16, x : x + 16]
            for flip in (False, True):
                crops[(crop.flip(2) if flip else crop).contiguous().numpy().tobytes()] = y, x, flip
    assert len(crops) == 162
    found = [
        crops[image.numpy().tobytes()]
        for image in images.augmented(one.expand(4000, -1, -1, -1), 0, torch.arange(4000))
    ]
    assert len(set(found)) == 162 and abs(sum(flip for *_, flip in found) - 2000) < 5 * 1000**0.5


def small_set(device: torch.device) -> images.Pictures:
    return images.random_set(20, 7, device, num_classes=3)


def test_a_step_is_a_function_of_seed_and_step_in_any_number_of_shares(device):
    pictures = small_set(device)
    first, labels = pictures.train_batch(1, 3, 8)
    pictures.train_batch(1, 9, 8)
    for world in (1, 2, 4):
        shares = [pictures.train_batch(1, 3, 8, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([share[0] for share in shares]), first)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    assert not torch.equal(pictures.train_batch(2, 3, 8)[0], first)
    assert first.shape == (8, 3, 32, 32) and abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1
    with pytest.raises(ValueError, match="from 1 to the 20 training images and divisible by 3 processes, got 8"):
        pictures.train_batch(0, 1, 8, 0, 3)


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order():
    order = images.Order(torch.arange(20))
    epochs = [torch.cat([order.of(0, step, 5, 0, 1) for step in range(start, start + 4)]) for start in (1, 5)]
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_test_images_are_seen_once_in_any_number_of_shares():
    pictures = small_set(torch.device("cpu"))
    whole = torch.cat([batch for batch, _ in pictures.test_batches(3)])
    shares = [torch.cat([batch for batch, _ in pictures.test_batches(3, rank, 2)]) for rank in range(2)]
    assert torch.equal(whole[0::2], shares[0]) and torch.equal(whole[1::2], shares[1])


def test_images_held_out_are_never_trained_on():
    cpu = torch.device("cpu")
    kept, held_out = images.parted(20, 5, cpu)
    assert len(held_out) == 5 and sorted([*kept.tolist(), *held_out.tolist()]) == list(range(20))
    assert held_out.tolist() != list(range(5)) and held_out.tolist() != list(range(15, 20))
    order = images.Order(kept)
    for epoch in range(3):
        seen = torch.cat([order.of(0, 3 * epoch + step, 5, 0, 1) for step in (1, 2, 3)])
        assert sorted(seen.tolist()) == kept.tolist()
    whole, pictures = small_set(cpu), images.random_set(20, 7, cpu, num_classes=3, held_out=5)
    assert pictures.train_count == 15 and pictures.fingerprint == whole.fingerprint
    assert not torch.equal(pictures.mean, whole.mean)
    shown = torch.cat([batch for batch, _ in pictures.held_out_batches(2)])
    torch.testing.assert_close(shown * pictures.std + pictures.mean, whole.train[0][held_out].float())
    assert torch.equal(torch.cat([labels for _, labels in pictures.held_out_batches(2)]), whole.train[1][held_out])
    with pytest.raises(ValueError, match="held_out must be at least 0 and below the 20 training images, got 20"):
        images.random_set(20, 7, cpu, held_out=20)


# ---------------------------------------------------------------------------------------------- where they come from


def test_grey_digits_are_padded_to_cifars_shape(tmp_path):
    write_folder(tmp_path, size=14)
    pictures = images.load(str(tmp_path), torch.device("cpu"))
    assert pictures.train[0].shape == (30, 3, 32, 32) and pictures.size == 32 and pictures.num_classes == 10
    expected = data.load(str(tmp_path)).train.images
    assert torch.equal(pictures.train[0][:, 1, 9:23, 9:23], expected)
    assert pictures.train[0].sum() == 3 * expected.sum(dtype=torch.int64)


def test_cifar_is_read_from_its_own_files(tmp_path, torchvision, monkeypatch):
    cifar = torchvision.datasets.CIFAR10
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py is missing.*--data cifar10 --download fetches it"):
        images.load("cifar10", torch.device("cpu"), root=tmp_path)
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    generator, kept = np.random.default_rng(0), []
    for name, _ in (*cifar.train_list, *cifar.test_list):
        kept.append(generator.integers(0, 256, (3, 3072), dtype=np.uint8))
        (folder / name).write_bytes(pickle.dumps({"data": kept[-1], "labels": [0, 1, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in range(10)]}))
    monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": None})
    pictures = images.load("cifar10", torch.device("cpu"), root=tmp_path)
    assert pictures.num_classes == 10 and pictures.test_count == 3
    expected = torch.from_numpy(np.concatenate(kept[:-1])).view(15, 3, 32, 32)
    assert torch.equal(pictures.train[0], expected) and pictures.train[1].tolist() == [0, 1, 9] * 5


def test_folders_of_pictures(tmp_path, torchvision):
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    cpu = torch.device("cpu")
    pictures = images.load(str(tmp_path), cpu, size=16, workers=0)
    assert (pictures.num_classes, pictures.train_count, pictures.test_count) == (2, 12, 4)
    steps = [pictures.train_batch(0, step, 4) for step in range(1, 7)]
    again = images.load(str(tmp_path), cpu, size=16, workers=0)
    resumed = again.train_batch(0, 5, 4)
    assert torch.equal(resumed[0], steps[4][0]) and torch.equal(resumed[1], steps[4][1])
    assert sum(labels.sum() for _, labels in steps[:3]) == 6  # an epoch has all of them
    assert steps[0][0].shape == (4, 3, 16, 16) and [len(labels) for _, labels in pictures.test_batches(3)] == [3, 1]
    assert again.fingerprint == pictures.fingerprint
    parted = images.load(str(tmp_path), cpu, size=16, workers=0, held_out=5)
    shown = [image for batch, _ in parted.held_out_batches(2) for image in batch]
    every = [image for batch, _ in pictures._shown("train", torch.arange(12), 4) for image in batch]
    assert parted.train_count == 7 and len(shown) == 5
    assert all(sum(torch.equal(image, other) for other in every) == 1 for image in shown)
    with pytest.raises(FileNotFoundError, match=r"test is missing: a folder of pictures holds train/CLASS/\*"):
        (tmp_path / "val").rename(tmp_path / "other")
        images.load(str(tmp_path), cpu)


def test_a_torchvision_for_another_torch_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    (tmp_path / "train").mkdir()
    monkeypatch.setattr(images.importlib, "import_module", fail)
    for name in ("cifar10", str(tmp_path)):
        with pytest.raises(OSError, match=r"torchvision.datasets cannot be imported beside torch .*nms does not exist"):
            images.load(name, torch.device("cpu"))


def test_an_unknown_name_is_told_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor one of cifar10, cifar100"):
        images.load("nowhere", torch.device("cpu"))
