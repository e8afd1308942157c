"""Data sets, splits, batches, augmentation, and what is said of a folder that cannot be used."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy
import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
import mobilenetv2
from data import DataError, load_data

# ------------------------------------------------------------------------------------------ glyphs and digits


@pytest.fixture(scope="module")
def glyphs():
    return load_data("glyphs", batch_size=64)


def test_glyphs_have_37_classes_and_fonts_of_their_own_in_every_split(glyphs):
    assert "".join(glyphs.classes) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    fonts = [set(data.GLYPH_FONTS[split]) for split in ("train", "val", "test")]
    assert [len(names) for names in fonts] == [16, 2, 3]
    assert not (fonts[0] & fonts[1] or fonts[0] & fonts[2] or fonts[1] & fonts[2])
    assert len(glyphs.train) == 16 * 37
    for split in (glyphs.train, glyphs.val, glyphs.test):
        counts = torch.bincount(split.labels)
        assert len(counts) == 37 and len(counts.unique()) == 1


def test_glyphs_are_drawn_whole_and_differ(glyphs):
    images = glyphs.train.images.float()
    assert images.shape[1:] == (1, 64, 64)
    assert (images.amax(dim=(1, 2, 3)) > 200).all()
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    assert border.max() == 0
    in_one_font = images[:37].flatten(1)
    distances = torch.cdist(in_one_font, in_one_font) + torch.eye(37) * 1e9
    assert distances.min() > 500


def test_validation_and_test_glyphs_are_the_same_every_time(glyphs):
    again = load_data("glyphs", seed=5)
    for split in ("val", "test"):
        assert torch.equal(getattr(glyphs, split).images, getattr(again, split).images)
    assert glyphs.test.images.shape[2:] == (32, 32)


def test_digits_are_split_as_the_readme_says():
    dataset = load_data("digits")
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [714, 184, 899]
    assert dataset.classes == [str(digit) for digit in range(10)]
    with numpy.load(data.DIGITS_FILE, allow_pickle=False) as file:
        assert file["images"].shape == (1797, 8, 8) and file["images"].max() == 16
        labels = torch.from_numpy(file["labels"]).long()
    assert torch.equal(dataset.test.labels, labels[898:])  # the second half, unshuffled
    counts = torch.bincount(labels[:898])
    assert torch.equal(torch.bincount(dataset.val.labels), counts.add(4) // 5)
    assert torch.equal(torch.bincount(dataset.train.labels), counts - counts.add(4) // 5)
    assert dataset.train.images.max() == 255 and dataset.train.images.dtype == torch.uint8


def test_per_class_takes_so_many_of_each_and_only_from_training():
    dataset = load_data("digits", per_class=10)
    assert torch.bincount(dataset.train.labels).tolist() == [10] * 10
    assert len(dataset.val) == 184 and len(dataset.test) == 899
    other = load_data("digits", per_class=10, seed=1)
    assert not torch.equal(dataset.train.images, other.train.images)
    with pytest.raises(DataError, match="--per-class 100: '0' has 7. images to train on"):
        load_data("digits", per_class=100)


# -------------------------------------------------------------------------------------------------- batches


def test_batches_are_normalised_channels_last_and_in_order():
    dataset = load_data("digits", batch_size=100)
    images, labels = zip(*dataset.val.batches(), strict=True)
    assert [len(batch) for batch in images] == [100, 84]
    images = torch.cat(images)
    assert images.shape == (184, 3, 32, 32) and images.dtype == torch.float32
    assert next(dataset.val.batches())[0].is_contiguous(memory_format=torch.channels_last)
    assert [data.memory_format(device) for device in ("cuda:1", "mps")] == [
        torch.channels_last,
        torch.contiguous_format,
    ]
    assert torch.equal(torch.cat(labels), dataset.val.labels)
    mean, deviation = (dataset.preprocessing[key][0] for key in ("mean", "std"))
    expected = (dataset.val.images.float() / 255 - mean) / deviation
    torch.testing.assert_close(images, expected.expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    split = replace(load_data("digits", batch_size=64).train, repeats=1)
    split.images = torch.arange(len(split)).to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    orders = [torch.cat([labels for _, labels in split.batches(epoch)]) for epoch in (0, 1, 0)]
    for order in orders:
        assert torch.equal(order.sort().values, split.labels.sort().values)
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    assert split.steps() == len(list(split.batches(0))) == 12


def test_an_epoch_depends_on_the_seed_and_its_number_only():
    first, second = load_data("digits", seed=3).train, load_data("digits", seed=3).train
    list(second.batches(0)), torch.rand(5)
    for (a, b), (c, d) in zip(first.batches(7), second.batches(7), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    other = next(iter(load_data("digits", seed=4).train.batches(7)))[0]
    assert not torch.equal(other, next(iter(first.batches(7)))[0])


def test_glyph_epochs_repeat_every_letter_in_new_shapes(glyphs):
    assert glyphs.train.epoch_size() == 592 * 32
    batches = glyphs.train.batches(0)
    images = torch.cat([next(batches)[0] for _ in range(3)])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_a_last_batch_of_one_joins_the_one_before():
    assert [len(batch) for batch in data.index_batches(129, 64)] == [64, 65]
    assert [len(batch) for batch in data.index_batches(130, 64)] == [64, 64, 2]
    assert [len(batch) for batch in data.index_batches(1, 64)] == [1]


def test_distortion_keeps_range_and_size_and_treats_each_image_by_itself():
    images = torch.zeros(64, 1, 48, 48, dtype=torch.uint8)
    images[:, :, 12:36, 20:28] = 255
    out = data.distort(images, 32, torch.Generator().manual_seed(0))
    assert out.shape == (64, 1, 32, 32)
    assert out.min() >= 0 and out.max() <= 255
    assert out.amax(dim=(1, 2, 3)).min() > 127  # no picture is lost
    assert len(out.flatten(1).unique(dim=0)) == 64


def test_crop_and_flip_shifts_and_mirrors_each_image_by_itself():
    """Of one image there are 9 × 9 shifts and a mirror: every result is one of them, and all kinds come up."""
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, [4] * 4)[0]
    possible = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            possible[window.numpy().tobytes()] = (top, left, False)
            possible[window.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    out = data.crop_and_flip(image.repeat(400, 1, 1, 1), 32, torch.Generator().manual_seed(0))
    found = [possible[picture.byte().contiguous().numpy().tobytes()] for picture in out]
    assert out.dtype == torch.float32
    assert [len(set(kind)) for kind in zip(*found, strict=True)] == [9, 9, 2] and len(set(found)) > 80
    assert 150 < sum(mirrored for _, _, mirrored in found) < 250
    assert data.crop_and_flip(image[:, :1, :28, :28], 32, torch.Generator()).shape == (1, 1, 32, 32)


def test_letters_digits_and_mnist_are_never_mirrored():
    """What augments them is `distort`; a mirrored 3 and a mirrored S would be other characters."""
    assert data.PUBLISHED["mnist"][1] is data.distort and data.PUBLISHED["fashion-mnist"][1] is data.crop_and_flip
    assert load_data("digits").train.augment is load_data("glyphs").train.augment is data.distort
    image = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    image[:, :, 4:28, 6:10] = image[:, :, 4:8, 6:26] = 255  # the upper left corner of a frame
    out = data.distort(image, 32, torch.Generator().manual_seed(0))
    left, right = out[..., :16].sum(dim=(1, 2, 3)), out[..., 16:].sum(dim=(1, 2, 3))
    assert (left > right).float().mean() > 0.9


# -------------------------------------------------------------------------------------------------- folders


def write_image(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


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


def test_a_folder_of_class_folders_is_split_80_20_in_each_class(folder):
    dataset = load_data(folder, {"image_size": 16})
    assert dataset.classes == ["red", "鬱金香"] and dataset.test is None
    assert torch.bincount(dataset.train.labels).tolist() == torch.bincount(dataset.val.labels).mul(4).tolist() == [8, 8]
    assert not {*dataset.train.images} & {*dataset.val.images}


def test_the_split_does_not_depend_on_the_listing_the_place_or_the_seed(folder, monkeypatch):
    validation = [path.relative_to(folder) for path in load_data(folder).val.images]
    moved = folder.rename(folder.with_name("moved"))
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(real(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __iter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert [path.relative_to(moved) for path in load_data(moved, seed=9).val.images] == validation
    write_image(moved / "red" / "new.jpg", (1, 2, 3))
    train = {path.relative_to(moved) for path in load_data(moved).train.images}
    assert len(train & set(validation)) <= 1  # a file more moves at most one over the border


def test_split_folders_are_taken_as_they_are(folder, tmp_path):
    root = tmp_path / "split"
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        for name in ("a", "b"):
            for number in numbers:
                write_image(root / split / name / f"{number}.png", (number, 0, 0))
    dataset = load_data(root, {"image_size": 8})
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [12, 4, 4]
    write_image(root / "val" / "c" / "x.png", 0, mode="L")
    with pytest.raises(DataError, match="classes of train and val in .* differ: only one has c"):
        load_data(root)


def test_photos_become_batches_whatever_their_mode_and_size(tmp_path):
    for mode, colour in (("L", 100), ("RGBA", (100, 100, 100, 255)), ("P", 0), ("CMYK", (0, 0, 0, 155)), ("1", 1)):
        suffix = "jpg" if mode == "CMYK" else "png"
        for name, size in (("a", (50, 20)), ("b", (3, 90))):
            for number in range(5):
                write_image(tmp_path / name / f"{mode}{number}.{suffix}", colour, size, mode)
    dataset = load_data(tmp_path, {"image_size": 24}, batch_size=16)
    for epoch in (None, 0):
        for images, _ in dataset.train.batches(epoch):
            assert images.shape[1:] == (3, 24, 24) and images.isfinite().all()


def test_a_photo_is_normalised_with_imagenet_statistics(folder):
    assert data.PREPROCESSING["flowers"] == mobilenetv2.IMAGENET_PREPROCESSING | {"crop": 0.875}
    dataset = load_data(folder, {"image_size": 16}, batch_size=32)
    images, labels = next(dataset.val.batches())
    path = dataset.val.images[0]
    pixel = torch.tensor(Image.open(path).getpixel((20, 15))) / 255
    expected = (pixel - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[0, :, 8, 8], expected, rtol=0.02, atol=0.02)


def test_grey_preprocessing_makes_photos_grey(folder):
    images, _ = next(
        load_data(folder, {"image_size": 16, "channels": 1, "mean": [0.5] * 3, "std": [0.5] * 3}).val.batches()
    )
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_a_rotated_camera_is_set_upright(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90° to display
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert data.open_image(tmp_path / "photo.jpg", 3, 20).size == (20, 40)


def test_augmented_photos_are_the_same_with_any_number_of_workers(folder):
    batches = []
    for workers in (0, 2):
        split = load_data(folder, {"image_size": 16}, batch_size=6, workers=workers, seed=1).train
        next(split.batches(3))  # the workers, who stay, forget what nobody fetched
        batches.append([torch.cat([images for images, _ in split.batches(epoch)]) for epoch in (3, 4)])
        assert torch.initial_seed() == 0  # the randomness of pictures leaves that of the network alone
    assert torch.equal(batches[0][0], batches[1][0]) and torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(*batches[0])


# ------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_name_is_neither_a_data_set_nor_a_folder():
    with pytest.raises(DataError, match="'letters' is neither a data set nor a folder"):
        load_data("letters")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="has 0 class folders"):
        load_data(tmp_path)
    write_image(tmp_path / "only" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="has 1 class folders"):
        load_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in .*empty' that can be read .0 found.: add some"):
        load_data(tmp_path)
    write_image(tmp_path / "empty" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="1 images in the class of '.*1.png': too few to split"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train' has 0 class folders"):
        load_data(tmp_path)


DAMAGES = {"truncated": lambda whole: whole[: len(whole) // 2], "text": lambda _: b"hello", "empty": lambda _: b""}


@pytest.mark.parametrize("suffix", (".jpg", ".png", ".bmp", ".webp", ".gif"))
def test_unreadable_images_are_left_out_and_named_in_one_line(tmp_path, suffix, capsys):
    pixels = numpy.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}{suffix}")
    whole = (tmp_path / "a" / f"0{suffix}").read_bytes()
    for number, damage in enumerate(DAMAGES.values()):
        (tmp_path / "a" / f"{number}{suffix}").write_bytes(damage(whole))
    dataset = load_data(tmp_path, {"image_size": 16})
    assert len(dataset.train) + len(dataset.val) == 9
    for split in (dataset.train, dataset.val):
        assert sum(len(labels) for _, labels in split.batches()) == len(split)
    error = capsys.readouterr().err
    assert error.startswith("3 unreadable images left out: ") and error.count("\n") == 1
    assert all(f"{number}{suffix}" in error for number in range(3))
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match="no image in .*a' that can be read .6 found, .*0.* .cannot identify image file.*: add some"
    ):
        load_data(tmp_path)


def test_processes_share_the_check_of_the_images(folder, monkeypatch):
    paths = sorted(folder.rglob("*.jpg"))
    paths[4].write_bytes(b"")
    alone = data.find_damages(paths)
    assert [*alone] == [paths[4]]

    def gather(shares, own):
        assert [*own] == paths[1::3]
        shares[:] = [dict.fromkeys(paths[0::3]), own, dict.fromkeys(paths[2::3])]

    monkeypatch.setattr(data, "processes", lambda: (1, 3))
    monkeypatch.setattr(data.distributed, "all_gather_object", gather)
    assert data.find_damages(paths) == alone


@pytest.mark.parametrize("workers", (0, 1))
def test_an_image_that_vanishes_is_named(folder, workers):
    dataset = load_data(folder, {"image_size": 16}, workers=workers)
    (folder / "red" / "3.jpg").unlink()
    with pytest.raises(DataError, match="cannot read the image .*3.jpg") as caught:
        for split in (dataset.train, dataset.val):
            list(split.batches())
    assert "Traceback" not in str(caught.value)


def test_a_jpeg_with_something_after_its_end_is_whole(folder):
    path = folder / "red" / "3.jpg"
    path.write_bytes(path.read_bytes() + b"a film of two seconds")
    assert data.find_damage(path) is None


def test_a_jpeg_that_is_damaged_inside_is_left_out(folder, capsys):
    path = folder / "red" / "3.jpg"
    path.write_bytes(b"\xff\xd8 begins and ends like a JPEG \xff\xd9")
    dataset = load_data(folder)
    assert len(dataset.train) + len(dataset.val) == 19
    assert "1 unreadable image left out: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # PIL tells what is wrong with it
def test_damaged_exif_data_leaves_the_pixels_whole(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    image.save(tmp_path / "photo.jpg", exif=exif)
    contents = bytearray((tmp_path / "photo.jpg").read_bytes())
    for position in range(12, contents.index(b"Maker") + 5):  # the EXIF data, after the segment's head
        for value in (0, 255):
            damaged = bytes(contents[:position]) + bytes([value]) + bytes(contents[position + 1 :])
            (tmp_path / "damaged.jpg").write_bytes(damaged)
            try:
                Image.open(tmp_path / "damaged.jpg").load()
            except OSError:
                continue  # where PIL finds the whole file unreadable
            assert sorted(data.open_image(tmp_path / "damaged.jpg", 3, 20).size) == [20, 40]


def test_every_way_to_hold_a_camera(tmp_path):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    upright.paste("blue", (16, 8, 32, 16))
    stored = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # the transposition that a viewer undoes
    for orientation, turns in stored.items():
        image = upright
        for turn in turns:
            image = image.transpose(Image.Transpose(turn))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / "photo.png", exif=exif)
        shown = data.open_image(tmp_path / "photo.png", 3, 16)
        assert shown.size == (32, 16) and shown.tobytes() == upright.tobytes(), orientation


@pytest.mark.parametrize(
    "names", (("Train", "Val", "Test"), ("train", "valid", "test"), ("TRAIN", "validation", "Test"))
)
def test_split_folders_by_other_names(tmp_path, names):
    for part, count in zip(names, (3, 2, 1), strict=True):
        for name in ("a", "b"):
            for number in range(count):
                write_image(tmp_path / part / name / f"{number}.png", (number, 0, 0))
    dataset = load_data(tmp_path, {"image_size": 8})
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [6, 4, 2]
    shutil.rmtree(tmp_path / names[0])
    with pytest.raises(DataError, match="has test and val but no train"):
        load_data(tmp_path)


def test_two_folders_of_one_name(folder):
    try:
        write_image(folder / "caf\u00e9" / "1.png", 0, mode="L")
        write_image(folder / "cafe\u0301" / "1.png", 0, mode="L")
    except OSError:
        pytest.skip("this file system normalises names")
    if len(list(folder.glob("caf*"))) == 1:
        pytest.skip("this file system takes the two for one")
    with pytest.raises(DataError, match="of different names"):
        load_data(folder)


def test_a_name_that_is_not_utf8_is_left_out(folder, capsys):
    try:
        (folder / "red" / "0.jpg").rename(folder / "red" / os.fsdecode(b"\xff.jpg"))
    except (OSError, UnicodeError):
        pytest.skip("this file system refuses such names")
    load_data(folder)
    assert "1 unreadable image left out" in capsys.readouterr().err


def test_sixteen_bits_and_transparency(tmp_path):
    Image.fromarray(numpy.full((8, 8), 32768, dtype=numpy.uint16)).save(tmp_path / "grey16.png")
    for channels, value in ((1, 127), (3, (127, 127, 127))):
        assert data.open_image(tmp_path / "grey16.png", channels, 8).getpixel((0, 0)) == value
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "clear.gif", transparency=1)
    for name in ("clear.png", "clear.gif"):
        assert data.open_image(tmp_path / name, 3, 8).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_frame_of_a_moving_gif(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert data.open_image(tmp_path / "moves.gif", 3, 8).getpixel((0, 0)) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    rows, columns = numpy.mgrid[0:1600, 0:2000]
    pixels = numpy.stack([rows // 8, columns // 8, (rows + columns) // 16], axis=2).astype(numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    small, large = (data.open_image(tmp_path / "large.jpg", 3, size) for size in (100, 1600))
    assert small.size == (250, 200) and large.size == (2000, 1600)
    views = [data.photo_transform(100, training=False)(image).float() for image in (small, large)]
    assert (views[0] - views[1]).abs().max() <= 4


def test_training_photos_are_tilted_cropped_mirrored_and_lit():
    """Of a picture with a red left and a blue right half: each of the four is seen to happen, and not to all."""
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    image.paste((0, 0, 200), (32, 0, 64, 64))
    pictures = torch.stack([data.photo_transform(32, training=True)(image) for _ in range(60)]).int()
    red, blue = pictures[:, 0], pictures[:, 2]
    mirrored = blue[:, :, :8].sum(dim=(1, 2)) > red[:, :, :8].sum(dim=(1, 2))
    assert 15 < mirrored.sum() < 45
    border = (red > blue).sum(dim=2)  # where red ends in each row
    tilted = (border.amax(dim=1) - border.amin(dim=1)) > 1
    assert tilted.sum() > 15
    assert len(border[:, 16].unique()) > 5  # cropped at many places
    brightest = pictures.amax(dim=(1, 2, 3))
    assert brightest.min() < 185 and brightest.max() > 215


def test_an_image_a_pixel_wide_is_no_trap(tmp_path):
    image = Image.new("RGB", (1, 5000), "white")
    for training in (False, True):
        assert data.photo_transform(32, training)(image).shape == (3, 32, 32)


def test_photos_are_seen_through_the_middle():
    image = Image.new("RGB", (64, 96), "black")
    image.paste("white", (4, 20, 60, 76))  # the centre, 56 = 64 · 224 / 256
    assert (data.photo_transform(32, training=False)(image) == 255).all()


def test_a_class_has_one_name_however_it_is_written(folder):
    (folder / "red").rename(folder / "cafe\u0301")  # e and an accent, as macOS writes it
    assert load_data(folder).classes == ["caf\u00e9", "鬱金香"]


def test_train_and_test_without_validation(folder, tmp_path):
    root = tmp_path / "parted"
    root.mkdir()
    folder.rename(root / "train")
    for name in ("red", "鬱金香"):
        write_image(root / "test" / name / "1.png", (1, 2, 3))
    dataset = load_data(root, {"image_size": 16})
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [16, 4, 2]


# ------------------------------------------------------------------------------ MNIST, Fashion-MNIST, CIFAR-10


def idx(array):
    """An array in LeCun's format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(numpy.uint8).tobytes()


@pytest.fixture
def idx_files():
    """{name: contents} of a data set of 100 training and 20 test images, each a number's worth of grey."""
    files = {}
    for part, count in (("train", 100), ("t10k", 20)):
        labels = numpy.arange(count) % 10
        grey = 25 * labels[:, None, None] + (part == "t10k")
        files[f"{part}-images-idx3-ubyte"] = idx(numpy.ones((count, 28, 28)) * grey)
        files[f"{part}-labels-idx1-ubyte"] = idx(labels)
    return files


@pytest.mark.parametrize(
    "layout", ("{}", "{}.gz", "FashionMNIST/raw/{}", "FashionMNIST/raw/{}.gz", "kaggle", "kaggle.gz")
)
def test_idx_files_are_used_where_they_lie(tmp_path, idx_files, layout):
    for name, contents in idx_files.items():
        path = tmp_path / layout.replace("kaggle", name.replace("-idx", ".idx")).format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)
    dataset = load_data("fashion-mnist", data_dir=tmp_path, batch_size=30)
    assert dataset.classes[0] == "T-shirt/top" and len(dataset.classes) == 10
    assert dataset.preprocessing["mean"] == [0.2860] * 3 and dataset.preprocessing["std"] == [0.3530] * 3
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [90, 10, 20]
    assert torch.equal(dataset.val.labels, torch.arange(90, 100) % 10)
    for split in (dataset.train, dataset.val, dataset.test):
        assert torch.equal(split.images[:, 0, 5, 5].long(), split.labels * 25 + (split is dataset.test))
    for epoch in (None, 0):
        images, _ = next(dataset.train.batches(epoch))
        assert images.shape == (30, 3, 32, 32)


def test_small_images_become_large_ones_batch_by_batch(tmp_path, idx_files):
    for name, contents in idx_files.items():
        (tmp_path / name).write_bytes(contents)
    split = load_data("fashion-mnist", {"image_size": 96}, data_dir=tmp_path, batch_size=30).train
    assert split.images.shape[2:] == (28, 28)
    for epoch in (None, 0):
        assert next(split.batches(epoch))[0].shape == (30, 3, 96, 96)


def test_mnist_has_the_classes_of_digits(tmp_path, idx_files):
    for name, contents in idx_files.items():
        (tmp_path / name).write_bytes(contents)
    dataset = load_data("mnist", data_dir=tmp_path)
    assert dataset.classes == load_data("digits").classes
    assert dataset.preprocessing["mean"] == [0.1307] * 3


@pytest.mark.parametrize("damage", ("short", "text", "gzip", "other labels", "columns", "a number", "nothing"))
def test_damaged_idx_files_are_named(tmp_path, idx_files, damage):
    name = "train-images-idx3-ubyte"
    for other, contents in idx_files.items():
        (tmp_path / other).write_bytes(contents)
    contents = idx_files[name]
    if damage == "gzip":
        (tmp_path / name).rename(tmp_path / f"{name}.gz")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(contents)[:-20])
    elif damage == "other labels":
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_files["t10k-labels-idx1-ubyte"])
    elif damage == "columns":
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(numpy.zeros((100, 1))))
    elif damage == "a number":
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\0\x07")
    elif damage == "nothing":
        (tmp_path / name).write_bytes(idx(numpy.zeros((0, 28, 28))))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(numpy.zeros(0)))
    else:
        (tmp_path / name).write_bytes(contents[:1000] if damage == "short" else b"hello")
    damaged = damage in ("short", "text", "gzip")
    expected = f"{name}.*' is damaged .*: delete it" if damaged else "do not belong together"
    with pytest.raises(DataError, match=expected):
        load_data("mnist", data_dir=tmp_path)


@pytest.fixture
def mirror(tmp_path, idx_files, monkeypatch):
    """A folder that a server on this computer offers as torchvision's MNIST."""
    folder = tmp_path / "server"
    folder.mkdir()
    resources = []
    for name, contents in idx_files.items():
        packed = gzip.compress(contents)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        yield folder
        server.shutdown()


def test_mnist_is_downloaded_once(tmp_path, mirror):
    assert len(load_data("mnist", data_dir=tmp_path / "here").test) == 20
    for path in mirror.iterdir():
        path.unlink()
    assert len(load_data("mnist", data_dir=tmp_path / "here").test) == 20


def test_a_download_that_is_not_what_was_asked_for_is_refused(tmp_path, mirror):
    (mirror / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="(?s)no mnist and no download .* fetch train-images"):
        load_data("mnist", data_dir=tmp_path / "here")


@pytest.mark.parametrize("name", ("mnist", "fashion-mnist", "cifar10", "flowers"))
def test_without_network_and_files_it_is_said_what_to_fetch(tmp_path, name):
    where = {"cifar10": "https://www.cs.toronto.edu", "flowers": "https://storage.googleapis.com"}.get(
        name, "http.*mnist"
    )
    with pytest.raises(DataError, match=f"(?s)no {name}.*fetch .*{where}.* put it") as caught:
        load_data(name, data_dir=tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)


def test_cifar10_in_torchvision_layout(tmp_path, monkeypatch):
    """Ten images in each of its six files, whose checksums torchvision verifies; the files are pickles, as published."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    sums = {}
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        batch = {
            "data": numpy.repeat(numpy.arange(10, dtype=numpy.uint8), 3072).reshape(10, 3072),
            "labels": [*range(10)],
        }
        batch["data"][:, 5] = 255  # red, first row, column 5
        contents = pickle.dumps({"label_names": classes} if name == "batches.meta" else batch)
        (folder / name).write_bytes(contents)
        sums[name] = hashlib.md5(contents).hexdigest()
    lists = [[name, checksum] for name, checksum in sums.items()]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[5:6])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": lists[6][1]}
    )
    dataset = load_data("cifar10", data_dir=tmp_path)
    assert dataset.classes == classes
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [45, 5, 10]
    assert torch.equal(dataset.test.images[:, 1, 9, 9].long(), dataset.test.labels)
    assert (dataset.test.images[:, 0, 0, 5] == 255).all() and (dataset.test.images[:, 0, 5, 0] < 10).all()
    assert next(dataset.train.batches(0))[0].shape == (45, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------ flowers


def make_archive(path, members):
    """A .tgz with files {name: contents}; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def garden(tmp_path, monkeypatch):
    """A flower archive on a server that is a folder: returns (archive, data_dir)."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "JPEG")
    members = {f"flower_photos/{kind}/{n}.jpg": buffer.getvalue() for kind in ("daisy", "tulips") for n in range(5)}
    archive = tmp_path / "server.tgz"
    digest = make_archive(archive, members | {"flower_photos/LICENSE.txt": b"CC BY"})
    monkeypatch.setattr(data, "FLOWERS_URL", archive.as_uri())
    monkeypatch.setattr(data, "FLOWERS_SHA256", digest)
    return archive, tmp_path / "here"


def test_flowers_are_downloaded_verified_and_unpacked_once(garden):
    archive, data_dir = garden
    dataset = load_data("flowers", {"image_size": 16}, data_dir=data_dir)
    assert dataset.classes == ["daisy", "tulips"] and len(dataset.train) == 8 and dataset.test is None
    assert sorted(path.name for path in data_dir.iterdir()) == ["flower_photos", "flower_photos.tgz"]
    archive.unlink()
    assert len(load_data("flowers", data_dir=data_dir).val) == 2


def test_an_archive_that_was_put_there_is_used(garden, monkeypatch):
    archive, data_dir = garden
    data_dir.mkdir()
    archive.rename(data_dir / "flower_photos.tgz")
    assert len(load_data("flowers", data_dir=data_dir).train) == 8


def test_half_an_archive_is_not_taken_for_a_whole_one(garden):
    archive, data_dir = garden
    half = archive.read_bytes()[:100]
    archive.write_bytes(half)  # the connection breaks off
    with pytest.raises(DataError, match="no flowers .*invalid hash.*: fetch file:.* and put it at"):
        load_data("flowers", data_dir=data_dir)
    assert list(data_dir.iterdir()) == []
    (data_dir / "flower_photos.tgz").write_bytes(half)  # another program's half
    with pytest.raises(DataError, match="flower_photos.tgz' is damaged .*: delete it"):
        load_data("flowers", data_dir=data_dir)


@pytest.mark.parametrize("name", ("../evil.txt", "flower_photos/../../evil.txt", "/tmp/evil-flower.txt"))
def test_no_member_of_an_archive_leaves_the_folder(garden, name, monkeypatch):
    archive, data_dir = garden
    monkeypatch.setattr(data, "FLOWERS_SHA256", make_archive(archive, {"flower_photos/a/1.jpg": b"", name: b"evil"}))
    with pytest.raises((tarfile.FilterError, DataError)):  # an absolute name is unpacked below the folder, and is no class
        load_data("flowers", data_dir=data_dir)
    assert not list(archive.parent.rglob("evil*")) and not os.path.exists("/tmp/evil-flower.txt")


def test_a_link_in_an_archive_is_not_followed(garden, monkeypatch, tmp_path):
    archive, data_dir = garden
    (tmp_path / "outside").mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("flower_photos/a")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
        tar.addfile(link)
        member = tarfile.TarInfo("flower_photos/a/1.jpg")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    monkeypatch.setattr(data, "FLOWERS_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    with pytest.raises(tarfile.FilterError):
        load_data("flowers", data_dir=data_dir)
    assert list((tmp_path / "outside").iterdir()) == []


# -------------------------------------------------------------------------------------------- python data.py


@pytest.mark.parametrize("name", ("glyphs", "digits", "folder"))
def test_the_script_describes_a_data_set_and_draws_it(name, folder, tmp_path, call, monkeypatch):
    grids = []
    monkeypatch.setattr(data.Figure, "savefig", lambda figure, path, dpi: grids.append((path.name, figure)))
    source = folder if name == "folder" else name
    code, text, _ = call(data, "--data", source, "--image-size", 24, "--out", tmp_path / "out", "--workers", 0)
    assert code == 0
    dataset = load_data(source, {"image_size": 24})
    assert f"{len(dataset.classes)} classes" in text and "24 × 24 pixels" in text
    images = torch.cat([images for images, _ in dataset.train.batches()])
    mean, deviation = (torch.tensor(dataset.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (images * deviation + mean).permute(1, 0, 2, 3).flatten(1)
    for line, values in (("mean", images.mean(dim=1)), ("deviation", images.std(dim=1))):
        printed = next(row for row in text.splitlines() if row.startswith(line)).split()[-3:]
        assert [float(number) for number in printed] == pytest.approx(values.tolist(), abs=2e-4)
    totals = next(row for row in text.splitlines() if row.startswith("total")).split()[1:]
    sizes = [len(split) for split in (dataset.train, dataset.val, dataset.test) if split]
    assert [int(number) for number in totals] == sizes
    (samples, grid), (augmented, ten) = grids
    assert (samples, augmented) == ("samples.png", "augmented.png")
    titles = [axes.get_title() for axes in grid.axes if axes.get_title()]
    assert len(titles) == min(32, len(dataset.train)) and set(titles) <= set(dataset.classes)
    shown = [axes.images[0].get_array() for axes in ten.axes]
    assert len(shown) == 10 and [axes.get_title() for axes in ten.axes].count("augmented") == 9
    assert len({picture.tobytes() for picture in shown}) == 10


def tree(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_split_copies_every_image_into_one_part_of_its_class(folder, tmp_path, call):
    before, target = tree(folder), tmp_path / "new" / "parted"
    code, text, _ = call(data, "--split", folder, target, "--val", 0.2, "--test", 0.1)
    assert code == 0 and "14 to train, 4 to val, 2 to test" in text
    assert tree(folder) == before
    parts = {part: tree(target / part) for part in ("train", "val", "test")}
    for part, count in (("train", 7), ("val", 2), ("test", 1)):
        assert [sum(path.parts[0] == name for path in parts[part]) for name in ("red", "鬱金香")] == [count, count]
    together = {path: contents for part in parts.values() for path, contents in part.items()}
    images = {path for path in before if path.suffix in (".jpg", ".PNG") and not path.name.startswith(".")}
    assert together == {path: before[path] for path in images}
    assert len(load_data(target).test) == 2
    assert [path.name for path in target.parent.iterdir()] == ["parted"]


def test_split_depends_on_the_seed_only(folder, tmp_path, call):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(data, "--split", folder, tmp_path / name, "--seed", seed)[0] == 0
    first, second, third = (set(tree(tmp_path / name)) for name in "abc")
    assert first == second and first != third


def test_split_without_a_test_part(folder, tmp_path, call):
    assert call(data, "--split", folder, tmp_path / "out", "--test", 0)[0] == 0
    assert not (tmp_path / "out" / "test").exists() and load_data(tmp_path / "out").test is None


def test_split_refuses_what_would_harm(folder, tmp_path, call, monkeypatch):
    before = tree(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for target, reason in ((tmp_path / "full", "not empty"), (folder / "parted", "only read"), (folder, "only read")):
        code, _, error = call(data, "--split", folder, target)
        assert code == 2 and reason in error and error.count("\n") == 1
    for shares, reason in (
        (("--val", 0.5, "--test", 0.5), "take 1 of the images"),
        (("--val", 0.89), "too few to split"),
    ):
        code, _, error = call(data, "--split", folder, tmp_path / "out", *shares)
        assert code == 2 and reason in error
    code, _, error = call(data, "--split", tmp_path / "nowhere", tmp_path / "out")
    assert code == 2 and "is not a folder" in error

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.shutil, "copy2", full_disk)
    code, _, error = call(data, "--split", folder, tmp_path / "out")
    assert code == 2 and "No space left" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "photos"] and tree(folder) == before


# -------------------------------------------------------------------------------------------------- class names


def test_fonts_are_found_for_every_script_or_their_lack_is_told_once(monkeypatch, capsys):
    """Of two 'installed' fonts the one that has more of the missing letters comes first, then the other."""
    has = {"/fonts/few.ttf": "鬱", "/fonts/most.ttf": "鬱金香", "/fonts/hangul.ttf": "한", "/fonts/bitmap.pcf": None}
    added, real = [], data.font_manager

    class Font:
        def __init__(self, letters):
            self.letters = letters

        def get_charmap(self):
            return {ord(letter): 1 for letter in self.letters}

    def get_font(path):
        if path not in has:
            return real.get_font(path)
        if has[path] is None:
            raise RuntimeError("cannot be scaled")
        return Font(has[path])

    manager = SimpleNamespace(findSystemFonts=lambda: [*has], findfont=real.findfont, get_font=get_font)
    manager.fontManager = SimpleNamespace(addfont=added.append)
    manager.FontProperties = lambda fname: SimpleNamespace(get_name=lambda: fname[7:-4])
    monkeypatch.setattr(data, "font_manager", manager)
    with matplotlib.rc_context():
        data.find_fonts(["rose", "鬱金香", "한"])
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "most", "hangul"]
        assert capsys.readouterr().err == "" and added == ["/fonts/most.ttf", "/fonts/hangul.ttf"]
        data.find_fonts(["鬱ก"])
        error = capsys.readouterr().err
        assert "no font here has ก" in error and "Noto" in error and error.count("\n") == 1
        data.find_fonts(["Füße", "naïve"])
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans"] and capsys.readouterr().err == ""


def test_a_picture_whose_class_names_look_like_formulas(tmp_path):
    with matplotlib.rc_context():
        names = ["$5$", "a_b^", "$x"]
        data.find_fonts(names)
        data.plot_grid(tmp_path / "grid.png", "$", numpy.zeros((3, 8, 8, 3)), names)
    assert Image.open(tmp_path / "grid.png").size[0] > 500


MEASURE = """
import re, sys
import torch, torchvision.datasets, matplotlib.figure
import data
memory = lambda kind: int(re.search(rf"{kind}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
held = memory("VmRSS")
split = data.load_data("mnist", data_dir=sys.argv[1]).train
for _ in split.batches():
    pass
print(memory("VmHWM") - held)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
def test_60000_images_take_less_than_400_megabytes(tmp_path):
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(numpy.zeros((count, 28, 28), dtype=numpy.uint8)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(numpy.arange(count) % 10))
    command = [sys.executable, "-c", MEASURE, tmp_path]
    output = subprocess.run(command, cwd=data.DIGITS_FILE.parent, check=True, capture_output=True, text=True).stdout
    assert float(output) < 400
