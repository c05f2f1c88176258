"""Crop, flip and scale against a loop over pictures."""

from types import SimpleNamespace

import numpy as np
import pytest

from easgd_local.data import cut, prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (31, 3, 11, 9), dtype=np.uint8)


def by_loop(images: np.ndarray, how: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    count, _, height, width = images.shape
    offsets = np.zeros((count, 2), int)
    if how.crop is not None:
        offsets = rng.integers(0, (height - how.crop + 1, width - how.crop + 1), size=(count, 2))
    flips = rng.integers(0, 2, size=count, dtype=np.uint8) if how.flip else np.zeros(count)
    pictures = []
    for image, (top, left), flip in zip(images, offsets, flips, strict=True):
        if how.crop is not None:
            image = image[:, top:top + how.crop, left:left + how.crop]
        pictures.append(image[:, :, ::-1] if flip else image)
    return np.stack(pictures).astype(np.float32) * np.float32(how.scale)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, 5, 9])
def test_training_pictures_equal_a_loop_over_them(crop, flip):
    how = SimpleNamespace(scale=1 / 7, crop=crop, flip=flip)
    inputs = prepare(IMAGES, how, np.random.default_rng(4))
    assert np.array_equal(inputs, by_loop(IMAGES, how, np.random.default_rng(4)))
    assert inputs.dtype == np.float32 and inputs.flags.c_contiguous


def test_offsets_reach_every_corner_and_both_flips_occur():
    picture = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2).repeat(200, axis=0)
    seen = cut(picture, SimpleNamespace(crop=1, flip=False), np.random.default_rng(0))
    assert set(seen.ravel()) == {0, 1, 2, 3}
    flipped = cut(picture, SimpleNamespace(crop=None, flip=True), np.random.default_rng(0))
    assert set(flipped[:, 0, 0, 0]) == {0, 1}


def test_switching_flips_off_leaves_the_crops_as_they_were():
    flipped = cut(IMAGES, SimpleNamespace(crop=5, flip=True), np.random.default_rng(4))
    straight = cut(IMAGES, SimpleNamespace(crop=5, flip=False), np.random.default_rng(4))
    assert not np.array_equal(flipped, straight)
    for a, b in zip(flipped, straight, strict=True):
        assert np.array_equal(a, b) or np.array_equal(a[..., ::-1], b)


def test_a_test_picture_is_its_central_crop_without_flips():
    inputs = prepare(IMAGES, SimpleNamespace(scale=0.5, crop=5, flip=True))
    assert np.array_equal(inputs, IMAGES[:, :, 3:8, 2:7] * np.float32(0.5))
    assert inputs.flags.c_contiguous


def test_bytes_scaled_by_1_over_255_fill_zero_to_one():
    extremes = np.array([0, 255], np.uint8).reshape(1, 1, 1, 2)
    assert prepare(extremes, SimpleNamespace(scale=1 / 255, crop=None, flip=False)).ravel().tolist() == [0.0, 1.0]


def test_the_stored_pictures_are_left_alone():
    before = IMAGES.copy()
    prepare(IMAGES, SimpleNamespace(scale=0.5, crop=None, flip=True), np.random.default_rng(1))
    assert np.array_equal(IMAGES, before)
