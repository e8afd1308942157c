"""Data sets, splits, batches, augmentation, and what is said of a folder that cannot be used."""

import os
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

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
    with pytest.raises(DataError, match="--per-class 100: .* only"):
        load_data("digits", per_class=100)


# -------------------------------------------------------------------------------------------------- batches


def test_batches_are_normalised_channels_last_and_in_order():
    dataset = load_data("digits", batch_size=100)
    images, labels = zip(*dataset.val.batches(), strict=True)
    assert [len(batch) for batch in images] == [100, 84]
    images = torch.cat(images)
    assert images.shape == (184, 3, 32, 32) and images.dtype == torch.float32
    assert next(dataset.val.batches())[0].is_contiguous(memory_format=torch.channels_last)
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
    images = torch.zeros(64, 1, 48, 48)
    images[:, :, 12:36, 20:28] = 1
    out = data.distort(images, 32, torch.Generator().manual_seed(0))
    assert out.shape == (64, 1, 32, 32)
    assert out.min() >= 0 and out.max() <= 1
    assert out.amax(dim=(1, 2, 3)).min() > 0.5  # no picture is lost
    assert len(out.flatten(1).unique(dim=0)) == 64


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
    assert not {*dataset.train.paths} & {*dataset.val.paths}


def test_the_split_does_not_depend_on_the_listing_the_place_or_the_seed(folder, monkeypatch):
    validation = [path.relative_to(folder) for path in load_data(folder).val.paths]
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
    assert [path.relative_to(moved) for path in load_data(moved, seed=9).val.paths] == validation
    write_image(moved / "red" / "new.jpg", (1, 2, 3))
    train = {path.relative_to(moved) for path in load_data(moved).train.paths}
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
    with pytest.raises(DataError, match="different classes: only one has c"):
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
    assert data.PHOTO_PREPROCESSING == mobilenetv2.IMAGENET_PREPROCESSING
    dataset = load_data(folder, {"image_size": 16}, batch_size=32)
    images, labels = next(dataset.val.batches())
    path = dataset.val.paths[0]
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
    assert data.open_image(tmp_path / "photo.jpg", 3).size == (20, 40)


def test_augmented_photos_are_the_same_with_any_number_of_workers(folder):
    batches = []
    for workers in (0, 2):
        split = load_data(folder, {"image_size": 16}, batch_size=6, workers=workers, seed=1).train
        batches.append(torch.cat([images for images, _ in split.batches(3)]))
    assert torch.equal(*batches)


# ------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_name_is_neither_a_data_set_nor_a_folder():
    with pytest.raises(DataError, match="'letters' is neither a data set .* nor a folder"):
        load_data("letters")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="has 0 class folders"):
        load_data(tmp_path)
    write_image(tmp_path / "only" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="has 1 class folders"):
        load_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in .*empty"):
        load_data(tmp_path)
    write_image(tmp_path / "empty" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="has one image"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="none called 'val'"):
        load_data(tmp_path)


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("damage", ("truncated", "text", "empty"))
def test_an_unreadable_image_is_named(folder, workers, damage):
    path = folder / "red" / "3.jpg"
    contents = path.read_bytes()
    path.write_bytes({"truncated": contents[: len(contents) // 2], "text": b"hello", "empty": b""}[damage])
    dataset = load_data(folder, {"image_size": 16}, workers=workers)
    with pytest.raises(DataError, match="cannot read the image .*3.jpg") as caught:
        for split in (dataset.train, dataset.val):
            list(split.batches())
    assert "Traceback" not in str(caught.value)
