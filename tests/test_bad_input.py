"""Bad checkpoints, options and files: one line on stderr, exit code 2, and no file changes.

`damaged_checkpoints` leaves out each entry of a checkpoint, or replaces it by another type.
"""

import math
import os
import zipfile
from collections import Counter

import numpy
import pytest
import torch
from conftest import SMALL_NETWORK, call_script
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import data
import evaluate
import export
import finetune
import mobilenetv2
import train
from mobilenetv2 import (
    BOTTLENECKS,
    CheckpointError,
    load_checkpoint,
    to_torchvision,
)

# Entries of a checkpoint, as paths of keys.
ENTRIES = [
    ("model",),
    ("arch",),
    ("classes",),
    ("preprocessing",),
    ("history",),
    ("arch", "num_classes"),
    ("arch", "width_mult"),
    ("arch", "output_stride"),
    ("preprocessing", "image_size"),
    ("preprocessing", "mean"),
    ("preprocessing", "std"),
]
# The states that --resume needs besides.
STATES = [("optimizer",), ("scheduler",)]
MISSING = object()
WRONG = {
    "missing": MISSING,
    "none": None,
    "number": -1.5,
    "text": "x",
    "list": [],
    "dict": {},
    "tensor": torch.zeros(2),
}
# Options of a run that are not on the command line: the recipe or the kind of data sets them.
NO_OPTIONS = ("optimizer", "schedule", "warmup", "block_decay")


def copy_containers(value):
    """Copy dicts and lists, and keep the tensors."""
    if isinstance(value, dict):
        return {key: copy_containers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy_containers(item) for item in value]
    return value


def damaged_checkpoints(contents, paths):
    """Yield (path, name of the wrong value, copy without this entry or with another type)."""
    for path in paths:
        for name, value in WRONG.items():
            copy = copy_containers(contents)
            place = copy
            for key in path[:-1]:
                place = place[key]
            if type(value) is type(place[path[-1]]):
                continue
            if value is MISSING:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield path, name, copy


class Accepted(Exception):
    """A script has loaded the checkpoint, and begins its work."""


def accept(*_, **__):
    raise Accepted


def tiny_data(args, preprocessing=None, **how):
    """Sixteen images of two digits."""
    images = torch.arange(16 * 256).view(16, 1, 16, 16).byte()
    labels = torch.arange(16) % 2
    splits = dict.fromkeys(("train", "val", "test"), (images, labels))
    preprocessing = data.SMALL_IMAGE | {"image_size": 16}
    return data.Data(["0", "1"], preprocessing, splits, augment=data.distort, batch_size=16)


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """Use the first of the 17 blocks."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(mobilenetv2, "BOTTLENECKS", BOTTLENECKS[:1])
        yield


@pytest.fixture(scope="module")
def runs(one_block, tmp_path_factory):
    """The folder of a small run of train.py and one of finetune.py, each ended before its time."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(data, "load_for", tiny_data)
        context.setattr(train, "plot_history", lambda history, path: None)
        epochs = ("--epochs", 1, "--learning-rate", 0.01)
        assert call_script(train, *SMALL_NETWORK, *epochs, "--out", folder / "train") == 0
        options = ("--checkpoint", folder / "train" / "best.pt", "--classifier-epochs", 1)
        assert call_script(finetune, *options, *epochs, "--out", folder / "finetune") == 0
        for name in ("train", "finetune"):
            path = folder / name / "last.pt"
            last = torch.load(path, weights_only=True)
            last["settings"]["epochs"] = 2
            torch.save(last, path)
    return folder


@pytest.fixture
def attempt(runs, tmp_path, call, monkeypatch):
    """attempt(script, checkpoint, resume) -> the error line, or "" if the script accepts it."""
    monkeypatch.setattr(data, "load_for", tiny_data)
    for module, name in (
        (evaluate, "predict"),
        (export, "fold_batch_norm"),
        (train, "train_epoch"),
        (finetune, "extract_features"),
    ):
        monkeypatch.setattr(module, name, accept)
    source = tmp_path / "bad" / "last.pt"
    out = tmp_path / "out"
    source.parent.mkdir()

    def run(script, checkpoint, resume=False):
        torch.save(checkpoint, source)
        before = source.read_bytes()
        options = ("--checkpoint", source, "--out", out)
        if resume:
            options = ("--resume", "--out", source.parent)
        try:
            code, _, error = call(script, *options)
            assert code == 2 and error.count("\n") == 1
            assert error.startswith(f"{script.__name__}.py: ")
        except Accepted:
            error = ""
        assert source.read_bytes() == before and not out.exists()
        assert list(source.parent.iterdir()) == [source]
        return error

    return run


def name_of(script):
    return script.__name__


@pytest.mark.parametrize("script", (evaluate, export, finetune), ids=name_of)
def test_an_entry_of_a_checkpoint_may_be_missing_or_have_another_type(script, runs, attempt):
    good = torch.load(runs / "train" / "best.pt", weights_only=True)
    assert attempt(script, good) == ""
    assert_refused(good, ENTRIES, "cannot load '", lambda bad: attempt(script, bad))


@pytest.mark.parametrize("script", (train, finetune), ids=name_of)
def test_an_entry_of_a_resumed_run_may_be_missing_or_have_another_type(script, runs, attempt):
    good = load_last(script, runs)
    assert attempt(script, good, resume=True) == ""
    paths = [*ENTRIES, *STATES]
    assert_refused(good, paths, "last.pt'", lambda bad: attempt(script, bad, resume=True))


def assert_refused(good, paths, message, try_it):
    surprises = []
    for path, name, bad in damaged_checkpoints(good, paths):
        error = try_it(bad)
        # Without an output stride, the network has its default: the weights fit all three.
        expected = "" if (path[-1], name) == ("output_stride", "missing") else message
        if bool(error) != bool(expected) or expected not in error:
            surprises.append((path, name, error))
    assert surprises == []


def load_last(script, runs):
    return torch.load(runs / script.__name__ / "last.pt", weights_only=True)


@pytest.mark.parametrize("script", (train, finetune), ids=name_of)
def test_a_last_pt_of_an_earlier_version_may_lack_a_setting(script, runs, attempt):
    names = load_last(script, runs)["settings"].keys()
    assert {"epochs", "loss", "weight_decay", "data", "seed"} <= names
    for name in names:
        last = load_last(script, runs)
        del last["settings"][name]
        error = attempt(script, last, resume=True)
        expected = ""
        if name not in NO_OPTIONS:
            expected = "this script did not write it, or an earlier version (no "
        assert bool(error) == bool(expected) and expected in error, name
        assert name in error or not error


@pytest.mark.parametrize("script, other", ((train, finetune), (finetune, train)))
def test_a_run_of_another_script_does_not_resume(script, other, runs, attempt):
    error = attempt(script, load_last(other, runs), resume=True)
    assert "this script did not write it" in error and "last.pt'" in error
    last = torch.load(runs / "train" / "best.pt", weights_only=True)  # no settings at all
    assert "this script did not write it" in attempt(script, last, resume=True)


@pytest.mark.parametrize(
    "script, name",
    [(train, "optimizer"), (train, "schedule"), (train, "loss"), (finetune, "loss")],
)
def test_an_unknown_name_in_the_settings_is_an_error(script, name, runs, attempt):
    last = load_last(script, runs)
    last["settings"][name] = "surprise"
    error = attempt(script, last, resume=True)
    assert error.startswith(f"{script.__name__}.py: unknown {name} 'surprise': use ")


# ------------------------------------------------------------------------------- damaged files


def flip_a_weight(path):
    """Change one bit of the largest record, which only its checksum shows."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        record = archive.read(largest)
    contents = bytearray(path.read_bytes())
    contents[contents.find(record) + 43] ^= 64
    path.write_bytes(contents)


def shorten_a_record(path):
    """Leave half of each tensor, with correct checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record[: len(record) // 2] if "/data/" in name else record)


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def shorten(share):
    def damage(path):
        contents = path.read_bytes()
        path.write_bytes(contents[: int(share * len(contents))])

    return damage


def flip_bytes(path):
    """Change 16 bytes in the middle of the file."""
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    for position in range(middle, middle + 16):
        contents[position] ^= 255
    path.write_bytes(contents)


def write_page(path):
    """A server that does not find a file often sends a page instead."""
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")


def write_list(path):
    torch.save([1, 2, 3], path)


def write_weights_only(path):
    """Save a state_dict, as many programs do."""
    torch.save(torch.load(path, weights_only=True)["model"], path)


def write_torchvision_without_classifier(path):
    weights = to_torchvision(torch.load(path, weights_only=True)["model"])
    torch.save({key: weights[key] for key in weights if "classifier" not in key}, path)


def edit(change):
    """Make a function that loads a file, changes its contents, and writes it again."""

    def damage(path):
        contents = torch.load(path, weights_only=True)
        change(contents)
        torch.save(contents, path)

    return damage


def fill(name, value):
    return edit(lambda file: file["model"][name].fill_(value))


def cut_a_weight(file):
    weights = file["model"]
    weights["head.conv.weight"] = weights["head.conv.weight"][:, :4]


NOT_FINITE = "NaN or infinity"
DAMAGES = {  # name: (function of a path, part of the message)
    "missing": (os.remove, "No such file"),
    "empty": (shorten(0), None),
    "first bytes": (shorten(0.01), None),
    "half": (shorten(0.5), None),
    "almost complete": (shorten(0.999), None),
    "flipped bit": (flip_a_weight, "damaged"),
    "flipped bytes": (flip_bytes, None),
    "short records": (shorten_a_record, None),
    "pipe": (make_pipe, "no regular file"),
    "page": (write_page, None),
    "zip file": (write_zip, None),
    "list": (write_list, "has a list, not a dict"),
    "weights only": (write_weights_only, "weights without the other entries"),
    "torchvision, no classifier": (write_torchvision_without_classifier, "is missing"),
    "NaN in stem": (fill("stem.conv.weight", math.nan), NOT_FINITE),
    "NaN in block": (fill("blocks.0.depthwise.conv.weight", math.nan), NOT_FINITE),
    "NaN in statistics": (fill("blocks.0.project.norm.running_mean", math.nan), NOT_FINITE),
    "NaN in classifier": (fill("classifier.weight", math.nan), NOT_FINITE),
    "infinite classifier": (fill("classifier.bias", math.inf), NOT_FINITE),
    "negative variance": (fill("head.norm.running_var", -1.0), NOT_FINITE),
    "other width": (
        edit(lambda file: file["arch"].update(width_mult=1.0)),
        "of another shape",
    ),
    "other classes": (
        edit(lambda file: file["arch"].update(num_classes=3)),
        "of another shape",
    ),
    "other names": (edit(lambda file: file["classes"].append("2")), "3 names, 2 classes"),
    "other shape": (edit(cut_a_weight), "of another shape"),
    "other stride": (
        edit(lambda file: file["arch"].update(output_stride=4)),
        "no network has",
    ),
    "other network": (edit(lambda file: file["arch"].update(depth=50)), "no network has"),
    "lost weight": (edit(lambda file: file["model"].pop("head.norm.bias")), "head.norm.bias"),
    "more weights": (edit(lambda file: file["model"].update(extra=torch.zeros(8))), "extra"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_checkpoint_error_in_one_line(damage, runs, tmp_path):
    change, reason = DAMAGES[damage]
    path = tmp_path / "bad.pt"
    path.write_bytes((runs / "train" / "best.pt").read_bytes())
    change(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"cannot load '{path}' (") and "\n" not in str(
        caught.value
    )


def test_weights_of_fewer_bits_are_usable(runs, tmp_path):
    contents = torch.load(runs / "train" / "best.pt", weights_only=True)
    weights = contents["model"]
    weights["classifier.weight"] = weights["classifier.weight"].to(torch.float8_e4m3fn)
    torch.save(contents, tmp_path / "small.pt")
    assert load_checkpoint(tmp_path / "small.pt")[0].classifier.weight.dtype == torch.float32


# -------------------------------------------------------------------------- images and folders


def list_readable(folder):
    """List the names of the images below a folder that evaluate.py uses."""
    paths = numpy.array(data.list_images(folder, Counter()), dtype=object)
    splits = {"test": (paths, torch.zeros(len(paths)))}
    dataset = data.Data([], data.SMALL_IMAGE, splits, kind="photos")
    dataset.keep_readable("test")
    return [os.path.basename(path) for path in dataset.splits["test"][0]]


def test_a_pipe_named_jpg_is_skipped(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(data.DataError, match="no readable image .*pipe.jpg': .*no regular"):
        list_readable(tmp_path)
    Image.new("L", (11, 11)).save(tmp_path / "good.png")
    assert list_readable(tmp_path) == ["good.png"]
    error = capsys.readouterr().err
    assert "pipe.jpg" in error and error.count("\n") == 1


def test_a_gigantic_image_is_skipped_before_it_is_decoded(tmp_path, capsys, monkeypatch):
    assert data.MAX_PIXELS == 120_000_000
    monkeypatch.setattr(data, "MAX_PIXELS", 120)
    monkeypatch.setattr(PngImageFile, "load", accept)
    Image.new("I;16", (11, 11)).save(tmp_path / "bomb.png")
    Image.new("L", (12, 10)).save(tmp_path / "good.gif")
    assert list_readable(tmp_path) == ["good.gif"]
    assert "exceeds the limit of 120 pixels" in capsys.readouterr().err


def test_a_folder_of_results_inside_the_dataset_is_refused(tmp_path, call):
    for script in (data, train, finetune, evaluate, export):
        code, _, error = call(script, "--data", tmp_path, "--out", tmp_path / "runs")
        assert code == 2 and error.count("\n") == 1 and "is inside --data" in error
    assert list(tmp_path.iterdir()) == []


def test_truncated_digits_end_in_one_line(tmp_path, call, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    (tmp_path / "digits.npz").write_bytes(b"PK\x03\x04 half of a file")
    code, _, error = call(data, "--data", "digits", "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and "digits.npz' is damaged" in error


# ------------------------------------------------------------------------------------- options

OPTIONS = {  # option: wrong values
    "--device": ("privateuseone", "toaster", "cuda:99", "meta", None),
    "--image-size": ("7", "1025", "x", "1e9", "-1", "9" * 400),
    "--batch-size": ("1", "0", "x", "9" * 20),
    "--workers": ("-1", "65", "x"),
    "--seed": ("-1", "x", "9" * 20),
    "--surprise": ("1",),
}
OWN_OPTIONS = {
    train: {
        "--learning-rate": ("nan", "inf", "-1", "101"),
        "--width": ("0", "nan", "5"),
        "--loss": ("x",),
    },
    finetune: {"--unfreeze": ("-1", "18", "x"), "--classifier-epochs": ("0", "x")},
    evaluate: {"--images": ("nothing.jpg",)},
    export: {"--formats": ("x",)},
    data: {},
}


@pytest.mark.parametrize("script", OWN_OPTIONS, ids=name_of)
def test_every_bad_option_ends_in_one_line(script, runs, tmp_path, call, monkeypatch):
    monkeypatch.setattr(data, "load_for", accept)
    source = ()
    if script in (finetune, evaluate, export):
        source = ("--checkpoint", runs / "train" / "best.pt")
    for option, values in (OPTIONS | OWN_OPTIONS[script]).items():
        for value in values:
            code, _, error = call(
                script, *source, "--out", tmp_path / "out", f"{option}={value}"
            )
            assert code == 2 and error.count("\n") == 1, (option, value, error)
            assert (
                error.startswith(f"{script.__name__}.py: ") and not (tmp_path / "out").exists()
            )
