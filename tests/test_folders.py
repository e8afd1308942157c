"""Folders of photos as people have them: what is found, what is printed, what is refused.

Each row of the tables is a layout, as {"path of a folder": number of photos}. Other files have
their own path and number.
"""

import csv
import json
import os
import sys

import numpy
import pytest
import torch
from PIL import Image

import data
import evaluate
import export
import finetune
import train
from data import DataError, load_data
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint


def build(root, layout):
    """Make the folders and files of a layout. A number stands for photos, a text for a file."""
    for place, contents in layout.items():
        path = root / place
        if isinstance(contents, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents)
            continue
        path.mkdir(parents=True, exist_ok=True)
        for number in range(contents):
            shade = 37 * number + 11 * len(place)
            Image.new("RGB", (12, 10), (shade % 256, 40, 200)).save(path / f"{number}.jpg")
    return root


def two(*places, count=5):
    """Return the layout of two classes, a and b, in each of these folders."""
    return {f"{place}/{name}".lstrip("/"): count for place in places for name in "ab"}


def counts(dataset):
    return {split: len(labels) for split, (_, labels) in dataset.splits.items()}


# ------------------------------------------------------------------------------ names of splits

UNSPLIT = {"train": 8, "val": 2}
SPLIT = {"train": 8, "val": 2, "test": 10}
WITH_VAL = {"train": 10, "val": 10}
AB = ["a", "b"]

LAYOUTS = {  # name: (layout, expected classes, expected counts, parts of the printed lines)
    "class folders": (two(""), AB, UNSPLIT, ["train: 8 images", "2 classes: a, b", "a fifth"]),
    "train and test": (two("train", "test"), AB, SPLIT, ["test: 10 images of", "test'"]),
    "capitals": (two("Training", "Testing"), AB, SPLIT, ["Training'", "Testing'"]),
    "upper case": (two("TRAIN", "TEST"), AB, SPLIT, []),
    "train_set": (two("train_set", "test_set"), AB, SPLIT, []),
    "training images": (two("Training images", "Test images"), AB, SPLIT, []),
    "train-data": (two("train-data", "val-data"), AB, WITH_VAL, []),
    "seg_train": (two("seg_train", "seg_test"), AB, SPLIT, []),
    "numbered": (two("train2017", "val2017"), AB, WITH_VAL, []),
    "valid": (two("train", "valid"), AB, WITH_VAL, []),
    "validation": (two("train", "Validation"), AB, WITH_VAL, []),
    "eval": (two("train", "eval"), AB, WITH_VAL, []),
    "dev": (two("train", "dev"), AB, WITH_VAL, []),
    "three splits": (
        two("training", "validation", "test"),
        AB,
        {"train": 10, "val": 10, "test": 10},
        [],
    ),
    "repeated folder": (
        {**two("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred": 3},
        AB,
        SPLIT,
        ["seg_pred', without class folders (see evaluate.py --images): 3"],
    ),
    "wrapper": (two("archive/train", "archive/val"), AB, WITH_VAL, ["archive/train'"]),
    "two wrappers": (two("archive/flowers"), AB, UNSPLIT, []),
    "wrapper with a readme": ({**two("flowers"), "README.md": "text"}, AB, UNSPLIT, []),
    "wrapper with system folders": (
        {**two("flowers"), "__MACOSX/flowers/a": 2},
        AB,
        UNSPLIT,
        [],
    ),
    "classes with names of splits": (
        {"bus": 5, "car": 5, "train": 5},
        ["bus", "car", "train"],
        {"train": 12, "val": 3},
        ["3 classes: bus, car, train"],
    ),
    "classes that begin like a split": (
        {"train_station": 5, "test_tube": 5},
        ["test_tube", "train_station"],
        UNSPLIT,
        [],
    ),
    "unlabelled test beside classes": (
        {**two(""), "test": 4},
        AB,
        UNSPLIT,
        ["test', without class folders (see evaluate.py --images): 4"],
    ),
    "unlabelled test beside train": (
        {**two("train"), "test": 4},
        AB,
        UNSPLIT,
        ["test', without class folders (see evaluate.py --images): 4"],
    ),
    "another folder beside the splits": (
        {**two("train", "val"), "pictures": 4},
        AB,
        WITH_VAL,
        ["pictures', without class folders"],
    ),
    "numbers": (
        {str(number): 5 for number in range(12)},
        [str(number) for number in range(12)],
        {"train": 48, "val": 12},
        ["class names are numbers: they are in numeric order"],
    ),
    "system folders": (
        {**two(""), "@eaDir": 2, "lost+found": 0, ".ipynb_checkpoints": 2, "a/@eaDir": 3},
        AB,
        UNSPLIT,
        ["hidden folders: 4"],
    ),
    "system folders beside the splits": (
        {**two("train", "test"), "__MACOSX/x": 1},
        AB,
        SPLIT,
        ["hidden folders: 1"],
    ),
    "underscores": (
        {"_": 5, "_background": 5, "a": 5},
        ["_", "_background", "a"],
        {"train": 12, "val": 3},
        [],
    ),
    "files of tools": (
        {**two(""), "a/Thumbs.db": "x", "a/._0.jpg": "x", "a/.DS_Store": "x"},
        AB,
        UNSPLIT,
        ["hidden files: 2", ".db files: 1"],
    ),
    "other types": (
        {**two(""), "a/1.tif": "x", "a/2.tif": "x", "b/3.heic": "x", "b/notes": "x"},
        AB,
        UNSPLIT,
        [".tif files: 2", ".heic files: 1", "nameless files: 1"],
    ),
    "images outside": (
        {**two(""), ".": 3},
        AB,
        UNSPLIT,
        ["images outside class folders in", ": 3"],
    ),
    "class missing in test": (
        {**two("train"), "test/a": 3},
        AB,
        {"train": 8, "val": 2, "test": 3},
        ["warning:", "test' has no images of b"],
    ),
    "empty class in val": (
        {**two("train"), "val/a": 3, "val/b": 0},
        AB,
        {"train": 10, "val": 3},
        ["val' has no images of b"],
    ),
    "folders in a class": (
        {"animals/cat": 5, "animals/dog": 5, "plants": 10},
        ["animals", "plants"],
        {"train": 16, "val": 4},
        ["warning: class 'animals' has only folders: cat, dog"],
    ),
    "deep class": ({"a/x/y": 5, "b": 5}, AB, UNSPLIT, []),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised_and_printed(name, tmp_path, capsys):
    layout, classes, expected, lines = LAYOUTS[name]
    dataset = load_data(str(build(tmp_path / "photos", layout)), {"image_size": 8})
    out = capsys.readouterr().out
    assert (dataset.classes, counts(dataset)) == (classes, expected)
    assert [line for line in lines if line not in out] == []
    for paths, labels in dataset.splits.values():
        for path, label in zip(paths, labels.tolist(), strict=True):
            assert f"/{classes[label]}/" in path.replace(os.sep, "/")


REFUSED = {  # name: (layout, part of the message)
    "nothing": ({}, "at least two class folders"),
    "one class": ({"a": 5}, "at least two class folders"),
    "images only": ({".": 5}, "at least two class folders"),
    "empty class": ({"a": 5, "b": 0}, "has no images of b; add images"),
    "empty folder train": ({"a": 5, "b": 5, "train": 0}, "has no images of train"),
    "class missing in train": ({"train/a": 5, "val/a": 3, "val/b": 3}, "has no images of b"),
    "no train": (two("val"), "has val, but no train: add this folder"),
    "val twice": (two("train", "val", "valid"), "both 'val' and 'valid' are folders for val"),
    "train twice": (two("train", "Train_set"), "are folders for train; keep one"),
    "a single image": ({"a": 5, "b": 1}, "too few images (1); add some"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_cannot_be_used_are_refused(name, tmp_path):
    layout, message = REFUSED[name]
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError) as caught:
        load_data(str(build(tmp_path / "photos", layout)))
    assert message in str(caught.value)


def test_names_that_a_terminal_would_interpret_are_escaped(tmp_path, capsys):
    for name in ("red\x1b[31m", "two\nlines"):
        build(tmp_path, {name: 5})
    dataset = load_data(str(tmp_path))
    assert dataset.classes == ["red<27>[31m", "two<10>lines"]
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    build(tmp_path, {"a": 5})
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/caf\xe9")
    build(tmp_path, {"b": 5})
    assert load_data(str(tmp_path)).classes == ["b", f"caf<{0xDCE9}>"]


# ------------------------------------------------------------------------- evaluation of folders


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint for the classes a and b, trained on nothing."""
    path = tmp_path_factory.mktemp("network") / "best.pt"
    torch.manual_seed(0)
    model = MobileNetV2(2, 0.35)
    save_checkpoint(path, model, AB, {**data.PHOTO, "image_size": 16})
    return path


SCORED = {  # name: (layout, expected split, expected number of images)
    "class folders": (two("", count=7), "test", 14),
    "one image per class": (two("", count=1), "test", 2),
    "only test": (two("test"), "test", 10),
    "only val": (two("val"), "val", 10),
    "only train": (two("train"), "test", 10),
    "train and test": (two("train", "Testing"), "test", 10),
    "train and val": (two("train", "val", count=3), "val", 6),
    "one class": ({"a": 4}, "test", 4),
    "one class in val": ({"val/b": 4}, "val", 4),
    "a class without training images": ({"train/a": 3, "test/a": 2}, "test", 2),
}


@pytest.mark.parametrize("name", SCORED)
def test_all_labelled_images_are_scored(name, network, tmp_path, call, monkeypatch):
    layout, split, images = SCORED[name]
    for module, function in ((data, "plot_grid"), (evaluate, "plot_confusion")):
        monkeypatch.setattr(module, function, lambda *_, **__: None)
    folder = build(tmp_path / "photos", layout)
    code, out, err = call(
        evaluate, "--checkpoint", network, "--data", folder, "--out", tmp_path / "out"
    )
    assert (code, err) == (0, "")
    assert f"on {images} images of {folder} ({split})" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["split"], metrics["images"]) == (split, images)
    assert ("these images also chose" in out) == (split == "val")


WITHOUT_IMAGES = {  # script: splits, of which the last one has empty class folders
    train: ("train", "val"),
    finetune: ("train", "val"),
    data: ("train", "val"),
    evaluate: ("train", "test"),
    export: ("test",),
}


@pytest.mark.parametrize("script", WITHOUT_IMAGES, ids=lambda script: script.__name__)
def test_a_split_without_any_image_is_refused(script, network, tmp_path, call):
    *others, last = WITHOUT_IMAGES[script]
    folder = build(tmp_path / "photos", {**two(*others), **two(last, count=0)})
    options = ["--data", folder, "--out", tmp_path / "out", "--image-size", 16]
    if script in (finetune, evaluate, export):
        options += ["--checkpoint", network]
    if script in (train, finetune):
        options += ["--epochs", 1, "--batch-size", 4]
    code, _, err = call(script, *options)
    assert code == 2 and f"{last}" in err and err.count("\n") == 1


def test_the_folder_of_a_training_run_is_scored_on_its_validation_images(tmp_path, call):
    folder = build(tmp_path / "photos", two("", count=10))
    options = ("--width", 0.35, "--image-size", 16, "--epochs", 1, "--batch-size", 4)
    run = tmp_path / "run"
    assert call(train, "--data", folder, *options, "--out", run)[0] == 0
    moved = folder.rename(tmp_path / "moved")
    best = ("--checkpoint", run / "best.pt")
    code, out, _ = call(evaluate, *best, "--data", moved, "--out", tmp_path / "out")
    assert code == 0 and "on 4 images of" in out and "these images also chose" in out
    build(moved, {"a/more": 1})
    _, out, _ = call(evaluate, *best, "--data", moved, "--out", tmp_path / "out")
    assert "on 21 images of" in out


def test_numbered_classes_of_weights_without_names_are_in_numeric_order(tmp_path, monkeypatch):
    """Sorted as text, logit 2 would be compared with class 10."""
    layout = {str(number): 1 for number in range(12)}
    folder = build(tmp_path / "photos", layout)
    dataset = load_data(str(folder), training=False)
    paths, labels = dataset.splits["test"]
    for path, label in zip(paths, labels.tolist(), strict=True):
        assert os.path.basename(os.path.dirname(path)) == str(label)


def test_the_order_of_classes_is_the_checkpoints(tmp_path):
    folder = build(tmp_path / "photos", two("", count=2))
    dataset = load_data(str(folder), classes=["b", "c", "a"], training=False)
    assert dataset.classes == ["b", "c", "a"]
    assert dataset.splits["test"][1].tolist() == [2, 2, 0, 0]


# ------------------------------------------------------------------------------ images, one by one


def test_jfif_is_jpeg_and_names_in_capitals_are_images(tmp_path):
    folder = build(tmp_path / "photos", two(""))
    (folder / "a" / "0.jpg").rename(folder / "a" / "0.JFIF")
    (folder / "a" / "1.jpg").rename(folder / "a" / "1.JPEG")
    assert sum(counts(load_data(str(folder))).values()) == 10


@pytest.mark.parametrize("bits", (8, 10, 12, 14, 16))
def test_pixels_of_any_depth_use_the_whole_range(bits, tmp_path):
    pixels = numpy.linspace(0, 2**bits - 1, 64).reshape(8, 8).astype(numpy.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    image = data.open_image(tmp_path / "deep.png", {"image_size": 8, "channels": 3})
    assert image.getextrema() == ((0, 255),) * 3


def test_a_bad_image_among_good_ones_is_skipped_with_a_line(network, tmp_path, call):
    folder = build(tmp_path / "photos", {".": 3})
    (folder / "bad.jpg").write_text("no image")
    pattern = str(folder / "*.jpg")  # PowerShell does not expand it
    for images in ([folder], [pattern], sorted(folder.iterdir())):
        options = ("--checkpoint", network, "--out", tmp_path / "out")
        code, _, err = call(evaluate, *options, "--images", *images)
        assert code == 0 and err.count("\n") == 1 and "bad.jpg': cannot read" in err
        with open(tmp_path / "out" / "images.csv", newline="") as file:
            names = [os.path.basename(row["image"]) for row in csv.DictReader(file)]
        assert names == ["0.jpg", "1.jpg", "2.jpg"]


def test_an_unreadable_photo_is_named_once_and_replaced(tmp_path, capsys):
    folder = build(tmp_path / "photos", two("train", "val", count=3))
    (folder / "train" / "a" / "1.jpg").write_text("no image")
    dataset = load_data(str(folder), {"image_size": 8}, batch_size=3)
    for augmented in (False, True, False):
        torch.manual_seed(0)
        batches = dataset.batches("train", augmented=augmented)
        labels = torch.cat([labels for _, labels in batches])
        assert len(labels) == len(batches) * 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("unreadable photo 1, left out: ")


def test_unreadable_photos_in_workers_are_named_once(tmp_path, capfd):
    folder = build(tmp_path / "photos", two("train", "val", count=3))
    (folder / "train" / "a" / "1.jpg").write_text("no image")
    dataset = load_data(str(folder), {"image_size": 8}, batch_size=3, workers=1)
    batches = dataset.batches("train")
    for _ in range(2):
        assert len(list(batches)) == 2
    assert capfd.readouterr().err.count("unreadable photo 1") == 1


def test_a_folder_of_unreadable_photos_ends_with_a_line(tmp_path, monkeypatch):
    folder = build(tmp_path / "photos", two("train", "val", count=3))
    for path in folder.glob("train/*/*.jpg"):
        path.write_text("no image")
    dataset = load_data(str(folder), {"image_size": 8})
    monkeypatch.setattr(data, "MOST_UNREADABLE", 20)
    with pytest.raises(DataError, match="20 unreadable photos in a row: check the folder"):
        list(dataset.batches("train"))
    with pytest.raises(DataError, match="no readable image for train"):
        dataset.keep_readable("train")


def test_starting_reads_no_image(tmp_path, monkeypatch):
    folder = build(tmp_path / "photos", two("train", "val", "test"))
    monkeypatch.setattr(data, "open_image", lambda *_: pytest.fail("an image was read"))
    assert counts(load_data(str(folder))) == {"train": 10, "val": 10, "test": 10}


def test_an_export_uses_the_images_that_are_there(network, tmp_path, call):
    folder = build(tmp_path / "photos", two("test", count=2))
    options = ("--checkpoint", network, "--formats", "torchscript")
    for source, line in ((folder, "4 images of"), ("none", "64 images of none (random)")):
        code, out, err = call(export, *options, "--data", source, "--out", tmp_path / "out")
        assert (code, err) == (0, "") and line in out


def test_classes_of_a_fine_tuned_network_keep_their_order(network, tmp_path, call):
    """A checkpoint for b and a, fine-tuned on the folders a and b, keeps its classifier."""
    model, checkpoint = load_checkpoint(network)
    save_checkpoint(tmp_path / "ba.pt", model, ["b", "a"], checkpoint["preprocessing"])
    folder = build(tmp_path / "photos", two(""))
    options = ("--classifier-epochs", 1, "--epochs", 0, "--data", folder)
    run = tmp_path / "run"
    assert call(finetune, *options, "--checkpoint", tmp_path / "ba.pt", "--out", run)[0] == 0
    assert load_checkpoint(run / "best.pt")[1]["classes"] == ["b", "a"]
