"""Data sets: what is loaded, how it is shared, and what a user is told when it is missing."""

import mmap
import os
import pickle
import subprocess
import sys
import threading
from itertools import count, repeat
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from easgd_local import data, hardware

SIDES = (16, 16)


def picture(seed: int, size: tuple[int, int] = SIDES, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; 11 + 6 training and 2 + 3 test pictures, PNG and JPEG."""
    for split, name, pictures in (("train", "cat", 11), ("train", "dog", 6), ("test", "cat", 2), ("test", "dog", 3)):
        directory = tmp_path / split / name
        directory.mkdir(parents=True)
        for i in range(pictures):
            picture(i + 100 * pictures).save(directory / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return tmp_path


def streamed(folder: Path) -> data.Dataset:
    return data.load("imagefolder", str(folder), memory_budget_bytes=0)


def test_digits_are_scikit_learns_pictures_in_a_stratified_split():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.shape == digits.test.shape == digits.input_shape == (1, 8, 8)
    pixels = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (int(pixels.sum()), pixels.min(), pixels.max()) == (561718, 0, 16)
    assert np.abs(np.bincount(digits.test.labels) - np.bincount(labels) * 360 / 1797).max() < 1
    assert len(np.unique(pixels.reshape(1797, 64), axis=0)) == 1797      # so no picture is in both splits
    assert (digits.scale, digits.crop, digits.flip, len(digits.classes)) == (1 / 16, None, False, 10)


def test_synthetic_pictures_depend_on_the_seed_alone():
    first, again, other = (data.load("synthetic", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.train.images, again.train.images)
    assert np.array_equal(first.test.labels, again.test.labels)
    assert not np.array_equal(first.train.images, other.train.images)
    assert first.train.images.shape == (4096, 3, 32, 32) and len(first.test) == 1024


def test_synthetic_pictures_can_be_told_apart_by_the_mean_of_their_class():
    made = data.make_synthetic(0, shape=(1, 13, 11), classes=3, train_samples=301, test_samples=100)
    means = np.stack([made.train.images[made.train.labels == label].mean(axis=0) for label in range(3)])
    distances = ((made.test.images[:, None].astype(float) - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == made.test.labels).mean() > 0.7      # by chance: 1/3 ± 0.05


def test_an_image_folder_has_the_classes_and_files_of_torchvision(folder):
    from torchvision.datasets import ImageFolder

    theirs, ours = ImageFolder(str(folder / "train")), streamed(folder).train
    assert [os.path.join(ours.root, path) for path in ours.paths] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets and streamed(folder).classes == tuple(theirs.classes)


def test_a_picture_of_the_stored_size_is_read_unchanged(folder):
    dataset = data.load("imagefolder", str(folder))
    png = np.asarray(Image.open(folder / "train" / "cat" / "01.png")).transpose(2, 0, 1)
    assert np.array_equal(dataset.train.images[1], png)
    assert (dataset.train.shape, dataset.crop, dataset.flip, dataset.scale) == ((3, 16, 16), 14, True, 1 / 255)


def test_streaming_equals_memory(folder):
    order = [np.array([16, 0, 3]), np.arange(17), np.array([], int), np.array([5, 5])]
    in_memory, from_files = data.load("imagefolder", str(folder)).train, streamed(folder).train.with_threads(3)
    assert isinstance(in_memory, data.MemorySplit) and isinstance(from_files, data.FolderSplit)
    batches = list(zip(in_memory.stream(order), from_files.stream(order), strict=True))
    assert [len(images) for (images, _), _ in batches] == [3, 17, 0, 2]
    for (images, labels), (decoded, their_labels) in batches:
        assert np.array_equal(images, decoded) and np.array_equal(labels, their_labels)


def test_the_budget_decides_between_memory_and_files(folder):
    needed = (17 + 5) * 3 * 16 * 16
    fits = data.load("imagefolder", str(folder), memory_budget_bytes=needed)
    assert isinstance(fits.train, data.MemorySplit) and isinstance(fits.test, data.MemorySplit)
    assert isinstance(data.load("imagefolder", str(folder), memory_budget_bytes=needed - 1).train, data.FolderSplit)


def test_streaming_looks_a_bounded_number_of_batches_ahead_and_closes_its_threads(folder):
    asked = count()
    stream = streamed(folder).train.with_threads(2).stream(np.array([next(asked) % 17]) for _ in repeat(None))
    next(stream), next(stream)
    assert next(asked) == 4             # two handed out and two ahead
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_pictures_of_several_sizes_and_modes_become_central_squares(folder):
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))        # the central third is blue
    wide.save(folder / "train" / "cat" / "0.png")        # first by name
    picture(0, (20, 33), "L").save(folder / "train" / "dog" / "grey.png")
    dataset = data.load("imagefolder", str(folder), size=10)
    blue = dataset.train.images[0][:, :, 1:-1]      # the resampling mixes the outermost columns
    assert np.array_equal(np.unique(blue.reshape(3, -1), axis=1).ravel(), [0, 0, 255])
    grey = dataset.train.images[-1]
    assert np.array_equal(grey[0], grey[1]) and np.array_equal(grey[0], grey[2])
    assert dataset.crop == 8


def test_unlike_sizes_are_stored_at_256_with_crops_of_224(folder):
    picture(0, (20, 33)).save(folder / "train" / "dog" / "00.jpg")
    dataset = streamed(folder)
    assert (dataset.train.shape, dataset.crop, dataset.input_shape) == ((3, 256, 256), 224, (3, 224, 224))


def test_val_may_stand_for_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(data.load("imagefolder", str(folder)).test) == 5


def test_an_unreadable_picture_is_named(folder):
    broken = folder / "train" / "dog" / "05.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"dog/05.png: not a readable picture.*replace or remove it"):
        data.load("imagefolder", str(folder))
    with pytest.raises(ValueError, match=r"dog/05.png"):
        list(streamed(folder).train.stream([np.arange(17)]))


@pytest.mark.parametrize("source, target, sentence", [
    ("train", "other", "no folder train/.*create it"),
    ("test", "other", "no folder test/ or val/.*create it"),
    ("test/dog", "test/wolf", "differ in dog, wolf.*same class folders"),
])
def test_a_folder_of_another_shape_is_refused_with_the_remedy(folder, source, target, sentence):
    (folder / source).rename(folder / target)
    with pytest.raises(ValueError, match=sentence):
        data.load("imagefolder", str(folder))


def test_a_split_without_classes_and_a_class_without_pictures_are_refused(folder):
    for split in ("train", "test"):
        (folder / split / "eel").mkdir()
    with pytest.raises(ValueError, match=r"train: .*eel.*every class needs at least one picture"):
        data.load("imagefolder", str(folder))
    (folder / "test").rename(folder / "old")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match="test: it holds no class folder"):
        data.load("imagefolder", str(folder))


@pytest.mark.parametrize("arguments, sentence", [
    (("cifar100",), "data 'cifar100' is not known.*digits, cifar10, imagefolder, synthetic"),
    (("imagefolder",), "data_dir=None.*train/ and test/"),
    (("imagefolder", "/no/such/folder"), "data_dir=/no/such/folder: there is no such folder"),
    (("digits", "/tmp"), "data_dir=/tmp: digits is read from no folder"),
])
def test_a_wrong_name_or_folder_is_refused_with_the_remedy(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.load(*arguments)


def test_a_size_is_refused_where_pictures_have_one():
    with pytest.raises(ValueError, match="size=16: the pictures of synthetic have a fixed size"):
        data.load("synthetic", size=16)


class FakeCIFAR10:
    base_folder, url = "cifar-10-batches-py", "https://example.org/cifar.tar.gz"

    def __init__(self, root, train, download=False):
        pictures = 6 if train else 4
        self.data = np.arange(pictures * 32 * 32 * 3, dtype=np.uint8).reshape(pictures, 32, 32, 3)
        self.targets, self.classes = list(range(pictures)), ["a", "b", "c", "d", "e", "f"]


def test_cifar10_pictures_have_their_channels_first(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    cifar = data.load("cifar10", "/nowhere")
    assert np.array_equal(cifar.train.images[5, 2], FakeCIFAR10("", True).data[5, :, :, 2])
    assert (cifar.input_shape, cifar.flip, len(cifar.test)) == ((3, 28, 28), True, 4)
    assert cifar.train.images.flags.c_contiguous and cifar.classes == tuple("abcdef")


def test_a_failed_download_tells_where_to_put_the_pictures(monkeypatch):
    class Unreachable(FakeCIFAR10):
        def __init__(self, *args, **kwargs):
            raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*by hand into /nowhere.*--data imagefolder"):
        data.load("cifar10", "/nowhere")


def test_a_data_set_survives_the_memfd_unchanged_and_read_only():
    made = data.make_synthetic(0, shape=(3, 5, 7), classes=3, train_samples=31, test_samples=9)
    fd, description = data.to_memfd(made)
    copy = data.from_memfd(fd, pickle.loads(pickle.dumps(description)))
    os.close(fd)                # the mapping lives on
    for name in ("train", "test"):
        mine, theirs = getattr(made, name), getattr(copy, name)
        assert np.array_equal(mine.images, theirs.images) and np.array_equal(mine.labels, theirs.labels)
        assert not theirs.images.flags.writeable and not theirs.labels.flags.writeable
    for name in ("name", "classes", "scale", "crop", "flip"):
        assert getattr(copy, name) == getattr(made, name)
    images, labels = copy.train.read(np.array([30, 2]))
    images[:], labels[:] = 0, 0         # a batch belongs to the reader


def test_two_mappings_are_one_memory_that_cannot_change_its_size():
    made = data.make_synthetic(0, shape=(1, 4, 4), train_samples=11, test_samples=10)
    fd, description = data.to_memfd(made)
    first, second = data.from_memfd(fd, description), data.from_memfd(fd, description)
    with mmap.mmap(fd, description["size_bytes"]) as writable:
        writable[0] ^= 255
    assert first.train.images[0, 0, 0, 0] == second.train.images[0, 0, 0, 0] == made.train.images[0, 0, 0, 0] ^ 255
    for size_bytes in (0, 2 * description["size_bytes"]):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    os.close(fd)


def test_a_streamed_data_set_travels_as_names_alone(folder):
    dataset = streamed(folder)
    fd, description = data.to_memfd(dataset)
    copy = data.from_memfd(fd, pickle.loads(pickle.dumps(description)), threads=5)
    assert fd is None and copy.train.threads == 5
    for mine, theirs in zip(dataset.train.read(np.arange(17)), copy.train.read(np.arange(17)), strict=True):
        assert np.array_equal(mine, theirs)


def test_lack_of_room_is_one_sentence_before_anything_is_claimed(monkeypatch):
    made = data.make_synthetic(0, shape=(1, 4, 4), train_samples=11, test_samples=10)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 100)
    with pytest.raises(MemoryError, match=r"synthetic takes .* GiB of shared memory.*are available.*imagefolder"):
        data.to_memfd(made)


def test_a_refused_claim_closes_the_descriptor(monkeypatch):
    def refuse(fd, offset, size_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MemoryError, match="No space left on device"):
        data.to_memfd(data.make_synthetic(0, shape=(1, 4, 4), train_samples=11, test_samples=10))
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("images, labels, sentence", [
    (np.zeros((3, 8, 8), np.uint8), np.zeros(3), "uint8\\[3, 8, 8\\]: .*add the channel axis"),
    (np.zeros((3, 1, 8, 8), np.float32), np.zeros(3), "float32\\[3, 1, 8, 8\\]"),
    (np.zeros((3, 1, 8, 8), np.uint8), np.zeros(2), "labels have shape \\[2\\] for 3 images"),
])
def test_arrays_of_the_wrong_kind_are_refused(images, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.MemorySplit(images, labels)


@pytest.mark.parametrize("side, crop, sentence", [(9, None, "one shape"), (8, 9, "crop=9 of pictures of \\(8, 8\\)")])
def test_a_data_set_that_no_network_could_take_is_refused(side, crop, sentence):
    train, test = (data.MemorySplit(np.zeros((2, 1, n, n), np.uint8), np.zeros(2)) for n in (8, side))
    with pytest.raises(ValueError, match=sentence):
        data.Dataset("mine", train, test, ("a", "b"), scale=1.0, crop=crop, flip=False)


def test_the_package_is_imported_without_torch():
    code = "import sys, easgd_local.data; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
