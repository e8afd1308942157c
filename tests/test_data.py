"""Datasets, splits, batches and augmentation, and the errors for data that cannot be used."""

import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import threading
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy
import pytest
import torch
from conftest import ROOT
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from PIL import EpsImagePlugin, Image
from processes import Python
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import mobilenetv2
from data import Batches, DataError, load_data

sys.path.insert(0, str(ROOT / "experiments"))
import split_photos  # noqa: E402


def sizes(dataset):
    return {split: len(labels) for split, (_, labels) in dataset.splits.items()}


def epoch(dataset, seed=0):
    """The images and labels of a training epoch."""
    torch.manual_seed(seed)
    return [torch.cat(parts) for parts in zip(*dataset.batches("train", augmented=True))]


# ------------------------------------------------------------------------------- glyphs and digits


@pytest.fixture(scope="module")
def glyphs():
    return load_data("glyphs", batch_size=64)


def test_glyphs_have_37_classes_and_every_split_has_its_own_fonts(glyphs):
    assert "".join(glyphs.classes) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    fonts = [set(data.GLYPH_FONTS[split]) for split in ("train", "val", "test")]
    assert [len(names) for names in fonts] == [16, 2, 3]
    assert not (fonts[0] & fonts[1] or fonts[0] & fonts[2] or fonts[1] & fonts[2])
    assert sizes(glyphs) == {"train": 16 * 37, "val": 32 * 2 * 37, "test": 32 * 3 * 37}
    for _, labels in glyphs.splits.values():
        counts = torch.bincount(labels)
        assert len(counts) == 37 and len(counts.unique()) == 1


def test_glyphs_are_drawn_completely_and_differ(glyphs):
    images = glyphs.splits["train"][0].float()
    assert images.shape[1:] == (1, 64, 64)
    assert (images.amax(dim=(1, 2, 3)) > 200).all()
    sides = images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]
    assert torch.cat(sides, dim=-1).max() == 0
    in_one_font = images[:37].flatten(1)
    distances = torch.cdist(in_one_font, in_one_font) + torch.eye(37) * 1e9
    assert distances.min() > 500


def test_validation_and_test_glyphs_are_always_the_same(glyphs, monkeypatch):
    monkeypatch.setitem(data.DATASETS["glyphs"], "load", data.load_glyphs)  # draws them again
    torch.manual_seed(5)
    again = load_data("glyphs", seed=5)
    assert torch.initial_seed() == 5  # the global generator continues as before
    for split in ("val", "test"):
        assert torch.equal(glyphs.splits[split][0], again.splits[split][0])
        assert glyphs.splits[split][0].shape[2:] == (32, 32)


def test_new_limits_of_distortion_change_only_training(glyphs, monkeypatch):
    def train_once():
        torch.manual_seed(0)
        return next(iter(glyphs.batches("train", augmented=True)))[0]

    before = train_once()
    for name in data.DISTORTION:
        monkeypatch.setitem(data.DISTORTION, name, 0.01)
    _, splits = data.load_glyphs(32)
    for split in ("val", "test"):
        assert torch.equal(splits[split][0], glyphs.splits[split][0])
    assert not torch.equal(train_once(), before)


def test_digits_are_split_like_the_readme_says():
    dataset = load_data("digits")
    assert sizes(dataset) == {"train": 714, "val": 184, "test": 899}
    assert dataset.classes == [str(digit) for digit in range(10)]
    with numpy.load(ROOT / "digits.npz", allow_pickle=False) as file:
        assert file["images"].shape == (1797, 8, 8) and file["images"].max() == 16
        labels = torch.from_numpy(file["labels"]).long()
    (images, train), (_, val), (_, test) = dataset.splits.values()
    assert torch.equal(test, labels[898:])  # the second half, in the same order
    counts = torch.bincount(labels[:898])
    assert torch.equal(torch.bincount(val), counts.add(4) // 5)
    assert torch.equal(torch.bincount(train), counts - counts.add(4) // 5)
    assert images.max() == 255 and images.dtype == torch.uint8


def test_per_class_keeps_few_training_images_and_the_epoch_size():
    dataset = load_data("digits", per_class=10)
    assert torch.bincount(dataset.splits["train"][1]).tolist() == [10] * 10
    assert sizes(dataset) == {"train": 100, "val": 184, "test": 899}
    assert dataset.repeats == 7 and len(epoch(dataset)[1]) == 640  # 5 batches of 128
    same, other = (load_data("digits", per_class=10, seed=seed) for seed in (0, 1))
    assert torch.equal(dataset.splits["train"][0], same.splits["train"][0])
    assert not torch.equal(dataset.splits["train"][0], other.splits["train"][0])
    with pytest.raises(DataError, match="--per-class 100: a class has 6. images; use fewer"):
        load_data("digits", per_class=100)


# ---------------------------------------------------------------------------------------- batches


def test_batches_are_normalised_and_in_order():
    dataset = load_data("digits", batch_size=100)
    pixels, expected_labels = dataset.splits["val"]
    images, labels = zip(*dataset.batches("val"))
    assert [len(batch) for batch in images] == [100, 84]
    images = torch.cat(images)
    assert images.shape == (184, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(torch.cat(labels), expected_labels)
    mean, std = (dataset.preprocessing[key][0] for key in ("mean", "std"))
    expected = ((pixels.float() / 255 - mean) / std).expand(-1, 3, -1, -1)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    some, labels = next(iter(dataset.batches("val", indices=torch.tensor([7, 3]))))
    assert torch.equal(some, images[[7, 3]]) and torch.equal(labels, expected_labels[[7, 3]])


def test_an_epoch_shows_every_image_once_and_depends_on_the_global_seed():
    dataset = load_data("digits", batch_size=102)  # 714 = 7 · 102
    dataset.splits["train"] = dataset.splits["train"][0], torch.arange(714)
    images, order = zip(*(epoch(dataset, seed) for seed in (3, 3, 4)))
    for labels in order:
        assert torch.equal(labels.sort().values, torch.arange(714))
    assert torch.equal(images[0], images[1]) and torch.equal(order[0], order[1])
    assert not torch.equal(order[0], order[2])
    by_label = [x[labels.argsort()] for x, labels in zip(images, order)]
    assert not torch.equal(by_label[0], by_label[2])  # other augmentations, too


def test_an_incomplete_batch_is_only_dropped_in_training():
    dataset = load_data("digits", batch_size=64)
    assert [len(labels) for _, labels in dataset.batches("train", augmented=True)] == [64] * 11
    assert [len(labels) for _, labels in dataset.batches("train")] == [64] * 11 + [10]
    dataset.batch_size = 1000
    assert len(epoch(dataset)[1]) == 714  # the only batch stays


def test_glyph_epochs_repeat_every_letter_in_new_shapes(glyphs):
    batches = glyphs.batches("train", augmented=True)
    assert len(batches) == 592 * 32 // 64
    images = torch.cat([images for _, (images, _) in zip(range(3), batches)])
    assert len(images.flatten(1).unique(dim=0)) == 3 * 64


@pytest.mark.parametrize("count", (1, 6, 7, 8, 20))
@pytest.mark.parametrize("repeats", (1, 3))
def test_batches_have_the_length_that_they_tell(count, repeats):
    inputs = torch.rand(count, 2)
    in_order = Batches(inputs, torch.arange(count), batch_size=7)
    assert len(in_order) == len(list(in_order)) == -(-count // 7)
    assert torch.equal(torch.cat([batch for batch, _ in in_order]), inputs)
    shuffled = Batches(
        inputs, torch.arange(count), batch_size=7, shuffle=True, repeats=repeats
    )
    lengths = [len(labels) for _, labels in shuffled]
    whole, rest = divmod(repeats * count, 7)
    assert lengths == ([7] * whole or [rest])  # the only batch stays, complete or not
    assert len(shuffled) == len(lengths)


def test_shuffled_batches_show_every_item_once_per_pass():
    inputs = torch.rand(10, 2)
    batches = Batches(inputs, torch.arange(10), batch_size=5, shuffle=True, repeats=3)
    pictures, labels = (torch.cat(parts) for parts in zip(*batches))
    assert torch.equal(pictures, inputs[labels])
    passes = labels.view(3, 10)
    assert (passes.sort(dim=1).values == torch.arange(10)).all()
    assert len(passes.unique(dim=0)) == 3
    assert not torch.equal(torch.cat([labels for _, labels in batches]), labels)  # a new order


def test_batches_transform_each_batch_as_a_whole():
    seen = []

    def double(inputs):
        seen.append(len(inputs))
        return 2 * inputs

    inputs = torch.rand(10, 2)
    batches = Batches(inputs, torch.zeros(10), batch_size=4, transform=double)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), 2 * inputs)
    assert seen == [4, 4, 2]


def test_without_torchrun_there_is_one_process(monkeypatch):
    """Only a group of processes counts: the variables alone may be those of another program."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert data.process_rank() == (0, 1)


def test_processes_of_torchrun_share_each_split(monkeypatch):
    dataset = load_data("digits", batch_size=64)
    shares = {"train": [], "test": []}
    for rank in range(4):
        monkeypatch.setattr(data, "process_rank", lambda rank=rank: (rank, 4))
        for split, labels in shares.items():
            batches = [y for _, y in dataset.batches(split)]
            assert len(batches[0]) == 16  # the batch size is that of all processes
            labels.append(torch.cat(batches))
    assert [len(labels) for labels in shares["train"]] == [178] * 4  # equal, of 714
    assert [len(labels) for labels in shares["test"]] == [225, 225, 225, 224]
    for rank, labels in enumerate(shares["test"]):
        assert torch.equal(labels, dataset.splits["test"][1][rank::4])


def test_too_few_images_for_all_processes_are_refused(monkeypatch):
    dataset = load_data("digits", batch_size=7)
    monkeypatch.setattr(data, "process_rank", lambda: (0, 4))
    with pytest.raises(
        DataError, match="too few images .*; use fewer processes, or raise --batch-size"
    ):
        dataset.batches("train")


def test_distortion_keeps_range_and_size_and_changes_each_image_separately():
    images = torch.zeros(64, 1, 48, 48, dtype=torch.uint8)
    images[:, :, 12:36, 20:28] = 255
    out = data.distort(images, 32)
    assert out.shape == (64, 1, 32, 32)
    assert out.min() >= 0 and out.max() <= 255
    assert out.amax(dim=(1, 2, 3)).min() > 127  # every letter stays visible
    assert len(out.flatten(1).unique(dim=0)) == 64


def test_each_limit_of_distortion_changes_images_and_zero_keeps_them():
    images = torch.zeros(8, 1, 32, 32)
    images[:, :, 6:26, 12:20] = 255
    none = dict.fromkeys(data.DISTORTION, 0)
    torch.testing.assert_close(data.distort(images, 32, none), images, rtol=0, atol=0.01)
    for name, limit in data.DISTORTION.items():
        changed = data.distort(images, 32, {**none, name: limit}) - images
        assert (changed.abs().amax(dim=(1, 2, 3)) > 1).sum() >= 6, name


def test_shift_and_flip_shifts_and_mirrors_each_image_separately():
    """An image has 9 × 9 shifts, each also mirrored: every result is one of them."""
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, [4] * 4)[0]
    possible = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            possible[window.numpy().tobytes()] = (top, left, False)
            possible[window.flip(2).numpy().tobytes()] = (top, left, True)
    out = data.shift_and_flip(image.repeat(400, 1, 1, 1), 32)
    found = [possible[picture.byte().numpy().tobytes()] for picture in out]
    assert out.dtype == torch.float32
    assert [len(set(kind)) for kind in zip(*found)] == [9, 9, 2] and len(set(found)) > 80
    assert 150 < sum(mirrored for _, _, mirrored in found) < 250
    assert data.shift_and_flip(image[:, :1, :28, :28], 32).shape == (1, 1, 32, 32)


def test_letters_and_digits_are_never_mirrored(glyphs):
    """Their augmentation is `distort`: a mirrored 3 or S would be another character."""
    assert load_data("digits").augment is glyphs.augment is data.distort
    assert data.DATASETS["mnist"]["augment"] is data.distort
    assert data.DATASETS["fashion-mnist"]["augment"].func is data.shift_and_flip
    assert data.DATASETS["cifar10"]["augment"] is data.shift_and_flip
    image = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    image[:, :, 4:28, 6:10] = 255  # two sides of a frame
    image[:, :, 4:8, 6:26] = 255
    out = data.distort(image, 32)
    left = out[..., :16].sum(dim=(1, 2, 3))
    right = out[..., 16:].sum(dim=(1, 2, 3))
    assert (left > right).float().mean() > 0.9


# ---------------------------------------------------------------------------------------- folders


def write_image(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def open_image(path, size, channels=3):
    return data.open_image(path, {"image_size": size, "channels": channels})


def list_readable(folder):
    """List the images below a folder that evaluate.py uses: sorted paths."""
    paths = numpy.array(data.list_images(folder, Counter()), dtype=object)
    splits = {"test": (paths, torch.zeros(len(paths)))}
    dataset = data.Data([], data.SMALL_IMAGE, splits, kind="photos")
    dataset.keep_readable("test")
    paths, labels = dataset.splits["test"]
    assert len(paths) == len(labels)
    return [Path(path) for path in paths]


def transform(image, size, augmented=False):
    """Crop and resize an image like PhotoDataset does: uint8 (3, size, size)."""
    if augmented:
        return pil_to_tensor(data.augment_photo(image, size))
    return pil_to_tensor(data.fit_photo(image, {**data.PHOTO, "image_size": size}))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for number in range(10):
        write_image(root / "red" / f"{number}.jpg", (200, 10 * number, 0))
        write_image(root / "鬱金香" / "more" / f"{number}.PNG", (0, 10 * number, 200))
    write_image(root / "red" / ".hidden.jpg", (0, 0, 0))
    (root / "red" / "notes.txt").write_text("not an image")
    (root / ".thumbnails").mkdir()
    return root


def test_a_folder_of_class_folders_is_split_80_20_in_each_class(folder, capsys):
    dataset = load_data(folder, {"image_size": 16})
    assert dataset.classes == ["red", "鬱金香"] and set(dataset.splits) == {"train", "val"}
    train, train_labels = dataset.splits["train"]
    val, val_labels = dataset.splits["val"]
    assert dataset.kind == "photos"
    assert torch.bincount(train_labels).tolist() == [8, 8]
    assert torch.bincount(val_labels).tolist() == [2, 2]
    assert len({*train} | {*val}) == 20 and capsys.readouterr().err == ""
    for paths, labels in dataset.splits.values():
        names = [Path(path).relative_to(folder).parts[0] for path in paths]
        assert names == [dataset.classes[label] for label in labels]


class Reversed:
    """Replace os.scandir, which os.walk also uses: list a folder in the reversed order."""

    def __init__(self, folder, scan=os.scandir):
        with scan(folder) as entries:
            self.entries = reversed(list(entries))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_the_split_does_not_depend_on_the_listing_the_place_or_the_seed(folder, monkeypatch):
    validation = [os.path.relpath(path, folder) for path in load_data(folder).splits["val"][0]]
    moved = folder.rename(folder.with_name("moved"))
    names = os.listdir(moved / "red")
    with monkeypatch.context() as context:
        context.setattr(os, "scandir", Reversed)
        assert next(os.walk(moved / "red"))[2] == names[::-1]
        again = load_data(moved, seed=9).splits["val"][0]
    assert [os.path.relpath(path, moved) for path in again] == validation
    write_image(moved / "red" / "new.jpg", (1, 2, 3))
    train = {os.path.relpath(path, moved) for path in load_data(moved).splits["train"][0]}
    assert len(train & set(validation)) <= 1  # a new file moves at most one to the other split


@pytest.mark.parametrize("val", ("val", "valid", "validation"))
def test_train_val_and_test_folders_stay_as_they_are(tmp_path, val):
    for split, count in (("train", 3), (val, 2), ("test", 1)):
        for name in ("a", "b"):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number}.png", (number, 0, 0))
    dataset = load_data(tmp_path, {"image_size": 8})
    assert list(sizes(dataset).items()) == [("train", 6), ("val", 4), ("test", 2)]
    for split, name in (("train", "train"), ("val", val), ("test", "test")):
        assert {Path(path).parts[-3] for path in dataset.splits[split][0]} == {name}
    write_image(tmp_path / val / "c" / "x.png", 0, mode="L")
    with pytest.raises(DataError, match="train' has no images of c; add images, or remove"):
        load_data(tmp_path)


def test_a_class_has_one_name_in_every_encoding(folder):
    (folder / "red").rename(folder / "cafe\u0301")  # e and an accent, as macOS writes it
    assert load_data(folder).classes == ["caf\u00e9", "鬱金香"]


def test_photos_of_every_mode_and_size_become_batches(tmp_path):
    modes = {"L": 100, "RGBA": (100, 100, 100, 255), "P": 0, "CMYK": (0, 0, 0, 155), "1": 1}
    for mode, colour in modes.items():
        suffix = "jpg" if mode == "CMYK" else "png"
        for name, size in (("a", (50, 20)), ("b", (3, 90))):
            for number in range(5):
                write_image(tmp_path / name / f"{mode}{number}.{suffix}", colour, size, mode)
    dataset = load_data(tmp_path, {"image_size": 24}, batch_size=16)
    assert sizes(dataset) == {"train": 40, "val": 10}
    for augmented in (False, True):
        for images, _ in dataset.batches("train", augmented):
            assert images.shape[1:] == (3, 24, 24) and images.isfinite().all()


def test_a_photo_is_normalised_with_imagenet_statistics(folder):
    for entry in (data.DATASETS["flowers"], data.FOLDER):
        assert entry["preprocessing"] == {**mobilenetv2.IMAGENET_PREPROCESSING, "crop": 0.875}
    dataset = load_data(folder, {"image_size": 16}, batch_size=32)
    images, _ = next(iter(dataset.batches("val")))
    pixel = torch.tensor(Image.open(dataset.splits["val"][0][0]).getpixel((20, 15))) / 255
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    expected = (pixel - mean) / std
    torch.testing.assert_close(images[0, :, 8, 8], expected, rtol=0.02, atol=0.02)


def test_photos_become_grayscale_for_one_channel(folder):
    preprocessing = {"image_size": 16, "channels": 1, "mean": [0.5] * 3, "std": [0.5] * 3}
    images, _ = next(iter(load_data(folder, preprocessing).batches("val")))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("workers", (0, 2))
def test_photo_epochs_depend_on_the_global_seed(folder, workers):
    dataset = load_data(folder, {"image_size": 16}, batch_size=8, workers=workers)
    first, same, other = (epoch(dataset, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("repeats", (1, 3))
def test_photo_epochs_show_every_photo_once_per_pass(folder, repeats):
    dataset = load_data(folder, {"image_size": 8}, batch_size=6)
    dataset.repeats = repeats
    dataset.splits["train"] = dataset.splits["train"][0], torch.arange(16)
    order = epoch(dataset)[1]
    complete = repeats * 16 // 6 * 6
    assert len(order) == complete
    assert len(dataset.batches("train", augmented=True)) == complete // 6
    counts = torch.bincount(order, minlength=16)
    assert counts.max() <= repeats and counts.sum() == complete
    dataset.batch_size = 100
    assert torch.equal(torch.bincount(epoch(dataset)[1]), torch.full((16,), repeats))


# --------------------------------------------------------------------------------------- bad input


def test_an_unknown_name_ends_in_one_line(call):
    code, _, error = call(data, "--data", "letters")
    names = "glyphs, digits, mnist, fashion-mnist, cifar10, flowers"
    expected = f"'letters': no such folder or dataset ({names})"
    assert code == 2 and error == f"data.py: {expected}\n"
    for name in ("Digits", "digit", "photos/cats", Path("letters"), "mnist/"):
        with pytest.raises(DataError, match=r"no such folder or dataset \(glyphs, digits, "):
            load_data(name)


DAMAGES = (lambda file: file[: len(file) // 2], lambda _: b"hello", lambda _: b"")


@pytest.mark.parametrize("suffix", (".jpg", ".png", ".bmp", ".webp", ".gif"))
def test_unreadable_images_are_skipped_with_a_line_each(tmp_path, suffix, capsys):
    pixels = numpy.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}{suffix}")
    complete = (tmp_path / "a" / f"0{suffix}").read_bytes()
    for number, damage in enumerate(DAMAGES):
        (tmp_path / "a" / f"{number}{suffix}").write_bytes(damage(complete))

    def assert_named():
        error = capsys.readouterr().err
        assert error.count("unreadable photo ") == error.count("\n") == 3
        assert all(f"{number}{suffix}': cannot read this" in error for number in range(3))

    dataset = load_data(tmp_path, {"image_size": 16})
    assert sum(sizes(dataset).values()) == 12
    for split, count in sizes(dataset).items():  # the next photo takes the place of a bad one
        assert sum(len(labels) for _, labels in dataset.batches(split)) == count
        list(dataset.batches(split))  # in a second epoch, none is named again
    assert_named()
    dataset = load_data(tmp_path, {"image_size": 16})
    for split in dataset.splits:
        dataset.keep_readable(split)
    assert_named()
    assert sum(sizes(dataset).values()) == 9
    for split, count in sizes(dataset).items():
        assert sum(len(labels) for _, labels in dataset.batches(split)) == count
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", (0, 1))
def test_a_photo_that_is_deleted_later_is_named_and_replaced(folder, workers, capfd):
    dataset = load_data(folder, {"image_size": 16}, workers=workers)
    counts = sizes(dataset)
    (folder / "red" / "3.jpg").unlink()
    for split, count in counts.items():
        for _ in range(2):
            assert sum(len(labels) for _, labels in dataset.batches(split)) == count
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("unreadable photo 1, left out: ")
    assert "3.jpg': cannot read this image" in error and error.endswith("; remove it\n")


def make_a_mistake(images, size):
    return images + None  # a TypeError


@pytest.mark.parametrize("workers", (0, 1))
def test_a_mistake_in_an_augmentation_is_not_a_damaged_photo(folder, workers, call):
    dataset = load_data(folder, {"image_size": 16}, workers=workers)
    dataset.augment = make_a_mistake

    def main():
        try:
            list(dataset.batches("train", augmented=True))
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # as above
            raise

    with pytest.raises(TypeError, match="unsupported operand"):
        call(SimpleNamespace(__name__="train", main=main))


def test_a_mistake_in_an_augmentation_of_small_images_is_not_hidden(call):
    dataset = load_data("digits")
    dataset.augment = make_a_mistake
    main = partial(next, iter(dataset.batches("train", augmented=True)))
    with pytest.raises(TypeError, match="unsupported operand"):
        call(SimpleNamespace(__name__="train", main=main))


def test_a_mistake_while_an_image_is_prepared_is_not_a_damaged_photo(folder, monkeypatch):
    """The decoder's exceptions mean a damaged file. Those of the steps after it do not."""

    def convert(image, mode):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(TypeError, match="a mistake of ours"):
        open_image(folder / "red" / "3.jpg", 16)
    dataset = load_data(folder)
    with pytest.raises(TypeError, match="a mistake of ours"):
        list(dataset.batches("train"))
    with pytest.raises(TypeError, match="a mistake of ours"):
        dataset.keep_readable("train")


def test_a_jpeg_with_data_after_its_end_is_readable(folder):
    path = folder / "red" / "3.jpg"
    path.write_bytes(path.read_bytes() + b"a video of two seconds")
    assert open_image(path, 30).size == (40, 30) and path in list_readable(folder)


def test_a_jpeg_with_damage_inside_is_skipped(folder, capsys):
    path = folder / "red" / "3.jpg"
    path.write_bytes(b"\xff\xd8 begins and ends like a JPEG \xff\xd9")
    assert path not in list_readable(folder) and "3.jpg" in capsys.readouterr().err


def test_a_photo_with_several_pictures_is_readable(folder, capsys):
    """Cameras and phones store a preview or a depth map after the photo: MPO, but named .jpg."""
    path = folder / "red" / "3.jpg"
    photo = Image.new("RGB", (40, 30), "red")
    preview = Image.new("RGB", (8, 8), "blue")
    photo.save(path, format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    image = open_image(path, 30)
    assert image.size == (40, 30) and image.getpixel((9, 9)) == (254, 0, 0)  # JPEG rounds
    assert path in list_readable(folder) and capsys.readouterr().err == ""


EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
%%EOF
"""


@pytest.mark.skipif(os.name == "nt", reason="the fake Ghostscript is a shell script")
def test_postscript_named_jpg_starts_no_ghostscript(folder, tmp_path, monkeypatch, capsys):
    program = tmp_path / "bin" / "gs"
    marker = tmp_path / "started"
    path = folder / "red" / "x.jpg"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n: > '{marker}'\n")
    program.chmod(0o755)
    path.write_text(EPS)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # PIL has not looked for it yet
    dataset = load_data(folder, {"image_size": 16})
    assert sum(sizes(dataset).values()) == 21
    for split in dataset.splits:
        list(dataset.batches(split))
        dataset.keep_readable(split)
    error = capsys.readouterr().err
    assert sum(sizes(dataset).values()) == 20 and not marker.exists()
    assert error.startswith("unreadable photo 1") and error.count("\n") == 2
    assert "x.jpg" in error and error.count("cannot identify image file") == 2
    with suppress(OSError):  # PIL alone starts it, which writes no image
        Image.open(path).load()
    assert marker.exists()


@pytest.mark.filterwarnings("ignore")  # PIL warns about the damage
def test_damaged_exif_data_do_not_harm_the_pixels(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation
    exif[0x010F] = "Maker"
    image.save(tmp_path / "photo.jpg", exif=exif)
    contents = (tmp_path / "photo.jpg").read_bytes()
    damaged = tmp_path / "damaged.jpg"
    opened = 0
    for position in range(12, contents.index(b"Maker") + 5):  # EXIF data, without their header
        for value in (b"\0", b"\xff"):
            damaged.write_bytes(contents[:position] + value + contents[position + 1 :])
            try:
                Image.open(damaged).load()
            except OSError:
                continue  # PIL cannot read the file at all
            assert sorted(open_image(damaged, 20).size) == [20, 40]
            opened += 1
    assert opened > 50


def test_every_orientation_of_a_camera_becomes_upright(tmp_path):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    upright.paste("blue", (16, 8, 32, 16))
    # Orientation in EXIF: the transposition that a viewer reverts
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    for orientation, turn in stored.items():
        image = upright.copy() if turn is None else upright.transpose(Image.Transpose(turn))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / "photo.png", exif=exif)
        shown = open_image(tmp_path / "photo.png", 16)
        assert shown.size == (32, 16) and shown.tobytes() == upright.tobytes(), orientation
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert image.size == (16, 32) and open_image(tmp_path / "photo.jpg", 16).size == (32, 16)


UNUSUAL = (b"\xfe.jpg", b"1\n.jpg")


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unreadable_photo_with_an_unusual_name_takes_one_line(name, folder, capfd):
    try:
        (folder / "red" / "0.jpg").rename(folder / "red" / os.fsdecode(b"\xff.jpg"))
        (folder / "red" / os.fsdecode(name)).write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("this file system refuses such names")
    dataset = load_data(folder)
    for split in dataset.splits:
        dataset.keep_readable(split)
    assert sum(sizes(dataset).values()) == 20
    error = capfd.readouterr().err
    assert "red/" in error and error.startswith("unreadable photo 1, left out: ")
    assert error.count("\n") == 1


def test_sixteen_bits_and_transparency(tmp_path):
    pixels = numpy.full((8, 8), 32768, dtype=numpy.uint16)
    Image.fromarray(pixels).save(tmp_path / "gray16.png")
    for channels in (1, 3):
        image = open_image(tmp_path / "gray16.png", 8, channels)
        assert image.getpixel((0, 0)) == (128, 128, 128)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "clear.gif", transparency=1)
    for name in ("clear.png", "clear.gif"):
        assert open_image(tmp_path / name, 8).getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moves.gif", 8).getpixel((0, 0)) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    rows, columns = numpy.mgrid[0:1600, 0:2000]
    pixels = numpy.stack([rows // 8, columns // 8, (rows + columns) // 16], axis=2)
    Image.fromarray(pixels.astype(numpy.uint8)).save(tmp_path / "large.jpg", quality=95)
    small, large = (open_image(tmp_path / "large.jpg", size) for size in (200, 1600))
    assert small.size == (500, 400) and large.size == (2000, 1600)
    views = [transform(image, 200).float() for image in (small, large)]
    assert (views[0] - views[1]).abs().max() <= 4


def test_training_photos_are_rotated_cropped_mirrored_and_change_brightness():
    """The image has a red left and a blue right half. Each change happens, but not always."""
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    image.paste((0, 0, 200), (32, 0, 64, 64))
    pictures = torch.stack([transform(image, 32, augmented=True) for _ in range(60)]).int()
    red = pictures[:, 0]
    blue = pictures[:, 2]
    mirrored = blue[:, :, :8].sum(dim=(1, 2)) > red[:, :, :8].sum(dim=(1, 2))
    assert 15 < mirrored.sum() < 45
    border = (red > blue).sum(dim=2)  # end of red in each row
    rotated = (border.amax(dim=1) - border.amin(dim=1)) > 1
    assert rotated.sum() > 15
    assert len(border[:, 16].unique()) > 5  # crops at many places
    brightest = pictures.amax(dim=(1, 2, 3))
    assert brightest.min() < 185 and brightest.max() > 215


def test_an_image_of_one_column_is_usable():
    image = Image.new("RGB", (1, 500), "white")
    for augmented in (False, True):
        assert transform(image, 32, augmented).shape == (3, 32, 32)


def test_photos_are_cropped_to_their_centre():
    image = Image.new("RGB", (256, 384))
    image.paste("white", (16, 80, 240, 304))  # 224 × 224 pixels in the middle
    assert (transform(image, 224) == 255).all()


# ------------------------------------------------------------- MNIST, Fashion-MNIST and CIFAR-10


def idx(array):
    """Convert an array to LeCun's format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(numpy.uint8).tobytes()


def write_all(folder, files):
    for name, contents in files.items():
        (folder / name).write_bytes(contents)


def pack(contents):
    return gzip.compress(contents, mtime=0)  # the same bytes, and checksum, every time


@pytest.fixture
def idx_files(monkeypatch):
    """{name: contents} of 100 training and 20 test images. Their gray depends on the label."""
    files = {}
    for part, count in (("train", 100), ("t10k", 20)):
        labels = numpy.arange(count) % 10
        gray = 25 * labels[:, None, None] + (part == "t10k")
        files[f"{part}-images-idx3-ubyte"] = idx(numpy.ones((count, 28, 28)) * gray)
        files[f"{part}-labels-idx1-ubyte"] = idx(labels)
    checksums = [(f"{name}.gz", hashlib.md5(pack(files[name])).hexdigest()) for name in files]
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(kind, "resources", checksums)
    return files


RAW = "FashionMNIST/raw/{}"
LAYOUTS = ("{}", "{}.gz", RAW, f"{RAW}.gz", "kaggle", "kaggle.gz")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_idx_files_are_found_in_every_layout(tmp_path, idx_files, layout):
    for name, contents in idx_files.items():
        path = tmp_path / layout.replace("kaggle", name.replace("-idx", ".idx")).format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(contents) if path.suffix == ".gz" else contents)
    dataset = load_data("fashion-mnist", data_dir=tmp_path, batch_size=30)
    assert dataset.classes[0] == "T-shirt/top" and len(dataset.classes) == 10
    assert dataset.preprocessing["mean"] == [0.2860] * 3
    assert dataset.preprocessing["std"] == [0.3530] * 3
    assert sizes(dataset) == {"train": 90, "val": 10, "test": 20}
    assert torch.equal(dataset.splits["val"][1], torch.arange(90, 100) % 10)
    for split, (images, labels) in dataset.splits.items():
        assert torch.equal(images[:, 0, 5, 5].long(), labels * 25 + (split == "test"))
    for augmented in (False, True):
        images, _ = next(iter(dataset.batches("train", augmented)))
        assert images.shape == (30, 3, 32, 32)


def test_large_sizes_are_resized_batch_by_batch(tmp_path, idx_files):
    write_all(tmp_path, idx_files)
    dataset = load_data("fashion-mnist", {"image_size": 96}, data_dir=tmp_path, batch_size=30)
    assert dataset.splits["train"][0].shape[2:] == (28, 28)
    for augmented in (False, True):
        assert next(iter(dataset.batches("train", augmented)))[0].shape == (30, 3, 96, 96)


def test_mnist_has_the_classes_of_digits(tmp_path, idx_files):
    write_all(tmp_path, idx_files)
    dataset = load_data("mnist", data_dir=tmp_path)
    assert dataset.classes == load_data("digits").classes
    assert dataset.preprocessing["mean"] == [0.1307] * 3


@pytest.mark.parametrize("damage", ("short", "text", "gzip"))
def test_damaged_idx_files_are_named(tmp_path, idx_files, damage):
    write_all(tmp_path, idx_files)
    path = tmp_path / "train-images-idx3-ubyte"
    if damage == "gzip":
        path = path.rename(tmp_path / f"{path.name}.gz")
        path.write_bytes(pack(idx_files["train-images-idx3-ubyte"])[:-20])
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "short" else b"hello")
    with pytest.raises(DataError, match=f"{path.name}' is damaged .*; download it again"):
        load_data("mnist", data_dir=tmp_path)


@pytest.fixture
def mirror(tmp_path, idx_files, monkeypatch):
    """A folder that a server on this computer offers as torchvision's MNIST."""
    folder = tmp_path / "server"
    folder.mkdir()
    write_all(folder, {f"{name}.gz": pack(contents) for name, contents in idx_files.items()})
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        yield folder
        server.shutdown()


def test_mnist_is_downloaded_once(tmp_path, mirror):
    expected = {"train": 90, "val": 10, "test": 20}
    assert sizes(load_data("mnist", data_dir=tmp_path / "here")) == expected
    for path in mirror.iterdir():
        path.unlink()
    assert sizes(load_data("mnist", data_dir=tmp_path / "here")) == expected


def test_a_download_with_an_incorrect_checksum_is_refused(tmp_path, mirror):
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(pack(b"something else"))
    with pytest.raises(DataError, match="(?s)--data mnist: no files.*; download the"):
        load_data("mnist", data_dir=tmp_path / "here")


SOURCES = {
    "mnist": "http.*mnist",
    "fashion-mnist": "http.*fashion-mnist",
    "cifar10": "https://www.cs.toronto.edu",
    "flowers": "https://storage.googleapis.com",
}


@pytest.mark.parametrize("name", SOURCES)
def test_without_network_and_files_the_error_names_the_source(tmp_path, name):
    source = f"(?s)--data {name}: no .*; .*download .*{SOURCES[name]}"
    with pytest.raises(DataError, match=source) as caught:
        load_data(name, data_dir=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)


def test_cifar10_in_torchvision_layout(tmp_path, monkeypatch):
    """Ten images in each of its six files: pickles, whose checksums torchvision verifies."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    classes = ["airplane", "automobile", "bird", "cat", "deer"]
    classes += ["dog", "frog", "horse", "ship", "truck"]
    pixels = numpy.repeat(numpy.arange(10, dtype=numpy.uint8), 3072).reshape(10, 3072)
    pixels[:, 5] = 255  # red, first row, column 5
    batch = pickle.dumps({"data": pixels, "labels": [*range(10)]})
    files = {f"data_batch_{number}": batch for number in range(1, 6)}
    files["test_batch"] = batch
    files["batches.meta"] = pickle.dumps({"label_names": classes})
    write_all(folder, files)
    sums = [[name, hashlib.md5(contents).hexdigest()] for name, contents in files.items()]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    dataset = load_data("cifar10", data_dir=tmp_path)
    assert dataset.classes == classes
    assert sizes(dataset) == {"train": 45, "val": 5, "test": 10}
    images, labels = dataset.splits["test"]
    assert torch.equal(images[:, 1, 9, 9].long(), labels)
    assert (images[:, 0, 0, 5] == 255).all() and (images[:, 0, 5, 0] < 10).all()
    assert epoch(dataset)[0].shape == (45, 3, 32, 32)


# ---------------------------------------------------------------------------------------- flowers


def make_archive(path, members):
    """Write a .tgz with files {name: contents}, or links {name: target}. Returns its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(contents, str):
                member.type = tarfile.SYMTYPE
                member.linkname = contents
                contents = b""
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def garden(tmp_path, monkeypatch):
    """A flower archive on a server (a folder): returns (archive, data_dir)."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "JPEG")
    names = [f"flower_photos/{kind}/{n}.jpg" for kind in ("daisy", "tulips") for n in range(5)]
    archive = tmp_path / "server.tgz"
    members = dict.fromkeys(names, buffer.getvalue())
    members["flower_photos/LICENSE.txt"] = b"CC BY"
    monkeypatch.setattr(data, "FLOWERS_SHA256", make_archive(archive, members))
    monkeypatch.setattr(data, "FLOWERS", archive.as_uri())
    return archive, tmp_path / "here"


def test_flowers_are_downloaded_and_unpacked_once(garden):
    archive, data_dir = garden
    dataset = load_data("flowers", {"image_size": 16}, data_dir=data_dir)
    assert dataset.classes == ["daisy", "tulips"] and sizes(dataset) == {"train": 8, "val": 2}
    assert {path.name for path in data_dir.iterdir()} == {"flower_photos", "flower_photos.tgz"}
    archive.unlink()
    (data_dir / "flower_photos.tgz").unlink()
    assert sizes(load_data("flowers", data_dir=data_dir)) == {"train": 8, "val": 2}


def test_an_archive_in_the_data_folder_is_used(garden):
    archive, data_dir = garden
    data_dir.mkdir()
    archive.rename(data_dir / "flower_photos.tgz")
    assert sizes(load_data("flowers", data_dir=data_dir)) == {"train": 8, "val": 2}


def test_an_incomplete_archive_is_refused(garden):
    archive, data_dir = garden
    half = archive.read_bytes()[:100]
    archive.write_bytes(half)  # an interrupted download
    with pytest.raises(DataError, match="no photos .*invalid hash.*download file:.* to"):
        load_data("flowers", data_dir=data_dir)
    assert list(data_dir.iterdir()) == []
    (data_dir / "flower_photos.tgz").write_bytes(half)  # another program's download
    with pytest.raises(DataError, match="no photos .*; download .* to '.*flower_photos.tgz'"):
        load_data("flowers", data_dir=data_dir)
    assert [path.name for path in data_dir.iterdir()] == ["flower_photos.tgz"]


EVIL = ("../evil.txt", "flower_photos/../../evil.txt", "/tmp/evil-flower.txt")


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_cannot_write_outside_the_folder(garden, name, monkeypatch):
    archive, data_dir = garden
    digest = make_archive(archive, {"flower_photos/a/1.jpg": b"", name: b"evil"})
    monkeypatch.setattr(data, "FLOWERS_SHA256", digest)
    # An absolute name is unpacked in the folder, and is no class.
    with pytest.raises(DataError):
        load_data("flowers", data_dir=data_dir)
    assert not list(archive.parent.rglob("evil*")) and not os.path.exists(EVIL[2])


def test_a_link_in_an_archive_is_refused(garden, monkeypatch, tmp_path):
    archive, data_dir = garden
    (tmp_path / "outside").mkdir()
    members = {"flower_photos/a": str(tmp_path / "outside"), "flower_photos/a/1.jpg": b"evil"}
    monkeypatch.setattr(data, "FLOWERS_SHA256", make_archive(archive, members))
    with pytest.raises(DataError, match="link"):
        load_data("flowers", data_dir=data_dir)
    assert list((tmp_path / "outside").iterdir()) == []


# ------------------------------------------------------------------------------- python data.py


def read_description(text):
    """Read the output of data.py: {split: {class: images}}."""
    counts = {}
    for line in text.splitlines():
        if header := re.fullmatch(r"(\w+): (\d+) images", line):
            split, total = header.groups()
            counts[split] = {"total": int(total)}
        elif entry := re.fullmatch(r" {4,}(\d+)  (.+)", line):
            counts[split][entry[2]] = int(entry[1])
    return counts


@pytest.mark.parametrize("name", ("digits", "folder"))
def test_the_script_describes_a_dataset_and_draws_it(
    name, folder, tmp_path, call, monkeypatch
):
    grids = []
    source = folder if name == "folder" else name
    save = lambda figure, path, dpi: grids.append((path, figure))  # noqa: E731
    monkeypatch.setattr(data.Figure, "savefig", save)
    options = ("--image-size", 24, "--out", tmp_path / "out", "--workers", 0)
    code, text, _ = call(data, "--data", source, *options)
    dataset = load_data(source, {"image_size": 24})
    assert code == 0 and f"{source}: {len(dataset.classes)} classes\n" in text
    expected = {}
    for split, (_, labels) in dataset.splits.items():
        counts = torch.bincount(labels, minlength=len(dataset.classes)).tolist()
        expected[split] = {"total": len(labels), **dict(zip(dataset.classes, counts))}
    assert read_description(text) == expected
    (samples, grid), (augmented, ten) = grids
    assert samples == tmp_path / "out" / "samples.png"
    assert augmented == tmp_path / "out" / "augmented.png"
    titles = [axes.get_title() for axes in grid.axes if axes.get_title()]
    assert len(titles) == min(32, sizes(dataset)["train"])
    assert set(titles) <= set(dataset.classes)
    shown = [axes.images[0].get_array().tobytes() for axes in ten.axes]
    assert len(shown) == len(set(shown)) == 10
    assert [axes.get_title() for axes in ten.axes].count("augmented") == 9


# ------------------------------------------------------------- python experiments/split_photos.py


def tree(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root): path.read_bytes() for path in files}


def test_split_photos_copies_every_image_to_one_split(folder, tmp_path, call):
    before = tree(folder)
    target = tmp_path / "new" / "split"
    code, text, _ = call(split_photos, folder, target, "--val", 0.2, "--test", 0.1)
    assert code == 0 and "14 to train, 4 to val, 2 to test" in text
    assert tree(folder) == before
    splits = {split: tree(target / split) for split in ("train", "val", "test")}
    for split, count in (("train", 7), ("val", 2), ("test", 1)):
        classes = [path.parts[0] for path in splits[split]]
        assert sorted(classes) == ["red"] * count + ["鬱金香"] * count
    together = splits["train"] | splits["val"] | splits["test"]
    seen = [path for path in before if not path.name.startswith(".")]
    images = [path for path in seen if path.suffix in (".jpg", ".PNG")]
    assert together == {path: before[path] for path in images}
    assert sizes(load_data(target)) == {"train": 14, "val": 4, "test": 2}
    assert [path.name for path in target.parent.iterdir()] == ["split"]


def test_split_photos_depends_on_the_seed_only(folder, tmp_path, call):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(split_photos, folder, tmp_path / name, "--seed", seed)[0] == 0
    first, second, third = (set(tree(tmp_path / name)) for name in "abc")
    assert first == second and first != third


def test_split_photos_without_a_test_split(folder, tmp_path, call):
    assert call(split_photos, folder, tmp_path / "out", "--test", 0)[0] == 0
    assert sizes(load_data(tmp_path / "out")) == {"train": 16, "val": 4}
    assert not (tmp_path / "out" / "test").exists()


def test_split_photos_refuses_to_harm_folders(folder, tmp_path, call, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    write_image(tmp_path / "few" / "a" / "1.png", (0, 0, 0))
    write_image(tmp_path / "few" / "b" / "1.png", (0, 0, 0))
    before = tree(tmp_path)
    out = tmp_path / "out"
    for arguments, reason in (
        ((folder, tmp_path / "mine"), "use a new folder"),
        ((folder, folder / "split"), "use a new folder"),
        ((folder, folder), "use a new folder"),
        ((folder, out, "--val", 0.9), "--val"),
        ((tmp_path / "few", out), "too few"),
        ((tmp_path / "nowhere", out), "no such folder"),
    ):
        code, _, error = call(split_photos, *arguments)
        assert code == 2 and reason in error and error.count("\n") == 1

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(split_photos.shutil, "copy2", full_disk)
    code, _, error = call(split_photos, folder, out)
    assert code == 2 and "No space left" in error
    assert tree(tmp_path) == before and not out.exists()


# ------------------------------------------------------------------------------------ class names


def make_font(path, family, letters):
    """Copy DejaVu Sans with another name, and with more letters, all of which look like an A."""
    font = TTFont(font_manager.findfont("DejaVu Sans"))
    for record in font["name"].names:
        if record.nameID in (1, 4):  # family, full name
            record.string = family
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap.update(dict.fromkeys(map(ord, letters), "A"))
    font.save(path)


def test_chinese_class_names_are_drawn_with_an_installed_font(tmp_path, monkeypatch):
    make_font(tmp_path / "font.ttf", "Noto Sans CJK SC", "鬱金香")
    fonts = font_manager.fontManager
    others = [font for font in fonts.ttflist if font.name not in data.CJK_FONTS]
    monkeypatch.setattr(fonts, "ttflist", others)

    def plot():
        names = ["鬱金香", "Füße naïve"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns about letters that no font has
            data.plot_grid(tmp_path / "grid.png", "rose", torch.zeros(2, 3, 8, 8), names)

    with data.picture_style():
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans"]
    with pytest.raises(UserWarning, match="Glyph .* missing from font"):
        plot()
    fonts.addfont(tmp_path / "font.ttf")
    with data.picture_style():
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "Noto Sans CJK SC"]
    plot()


def test_class_names_that_look_like_formulas_are_drawn(tmp_path):
    names = ["$5$", "a_b^", "$x^$"]
    data.plot_grid(tmp_path / "grid.png", "$", torch.zeros(3, 3, 8, 8), names)
    assert Image.open(tmp_path / "grid.png").size[0] > 500


# ------------------------------------------------------------------------ settings of libraries


def test_pictures_ignore_the_settings_of_the_user_and_keep_them(tmp_path):
    def draw(name):
        data.plot_grid(tmp_path / name, "title", torch.zeros(3, 3, 8, 8), ["a", "b", "c"])
        return (tmp_path / name).read_bytes()

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        usual = draw("usual.png")
        changes = {"font.size": 30, "figure.facecolor": "red", "font.family": "serif"}
        matplotlib.rcParams.update(changes)
        before = dict(matplotlib.rcParams)
        assert draw("same.png") == usual
        assert dict(matplotlib.rcParams) == before


def test_importing_data_changes_no_settings_of_other_libraries(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    spec = importlib.util.spec_from_file_location("data_again", data.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "data_again", module)  # dataclasses look for it
    with matplotlib.rc_context({"font.size": 30, "text.parse_math": True}):
        settings = dict(matplotlib.rcParams)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            spec.loader.exec_module(module)
            assert warnings.filters == []
        assert dict(matplotlib.rcParams) == settings
    assert Image.MAX_IMAGE_PIXELS == 12345


# ----------------------------------------------------------------------------------------- memory

MEASURE = r"""
import re, sys
import torch, torchvision.datasets, matplotlib.figure
import data
def memory(kind):
    return int(re.search(rf"{kind}:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
held = memory("VmRSS")
for _ in data.load_data("mnist", data_dir=sys.argv[1]).batches("train"):
    pass
print(memory("VmHWM") - held)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_60000_images_take_less_than_400_megabytes(tmp_path):
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = numpy.zeros((count, 28, 28), dtype=numpy.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(numpy.arange(count) % 10))
    code, out, error = Python(MEASURE, tmp_path, output=tmp_path / "output").wait()
    assert code == 0, error
    assert float(out) < 400


# ------------------------------------------------------------------------ unusual folders and files


def test_a_failed_download_names_the_problem_in_one_line(tmp_path, call):
    code, _, error = call(data, "--data", "mnist", "--data-dir", tmp_path)
    assert code == 2 and error.count("\n") == 1
    assert error.startswith("data.py: --data mnist: no files, and no download (")


def test_two_spellings_of_one_class_name_are_one_class(folder):
    for name in ("caf\u00e9", "cafe\u0301"):
        for number in range(2):
            write_image(folder / name / f"{number}.png", 0, mode="L")
    dataset = load_data(folder)
    assert dataset.classes == ["caf\u00e9", "red", "鬱金香"]
    assert sum(sizes(dataset).values()) == 24


def test_folders_beside_idx_files_are_ignored(tmp_path, idx_files):
    for name, contents in idx_files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(contents)
        (tmp_path / name.replace("-idx", ".idx")).write_bytes(contents)
    assert sizes(load_data("mnist", data_dir=tmp_path)) == {"train": 90, "val": 10, "test": 20}


def test_images_and_labels_that_do_not_match_are_refused(tmp_path, idx_files):
    write_all(tmp_path, idx_files)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_files["t10k-labels-idx1-ubyte"])
    with pytest.raises(DataError, match="train has .* images, .* labels: replace it"):
        load_data("mnist", data_dir=tmp_path)


def test_a_narrow_image_takes_little_memory(monkeypatch):
    pixels = []
    resize = Image.Image.resize

    def measure(self, size, *arguments, **options):
        pixels.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", measure)
    transform(Image.new("RGB", (1, 2000)), 32)
    assert max(pixels) < 10_000


def test_a_console_without_chinese_letters_does_not_stop_the_script(folder, tmp_path):
    command = (ROOT / "data.py", "--data", folder, "--out", tmp_path / "out")
    code, out, error = Python(*command, output=tmp_path / "output", encoding="ascii").wait()
    assert code == 0, error.splitlines()[-1]
    assert "\\u9b31\\u91d1\\u9999" in out
