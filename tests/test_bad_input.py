"""Bad checkpoints, options and files: one line on stderr, exit code 2, and no file changes.

`bad_checkpoints` replaces each field of a checkpoint by each of a dozen wrong values.
"""

import math
import os
import zipfile
from itertools import islice

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
from mobilenetv2 import BOTTLENECKS, CheckpointError, load_checkpoint, to_torchvision

WRONG = {
    "none": None,
    "negative": -1,
    "large": 10**9,
    "huge": 10**400,
    "nan": math.nan,
    "text": "x",
    "list": [],
    "dict": {},
    "nested": [[None]],
    "numbers": [1, 2, 3],
    "tensor": torch.full((2, 2), math.nan),
    "meta": torch.zeros(2, device="meta"),
}


NUMBERS = {"negative", "large", "nan"}
HARMLESS = {  # first and last part of a field: values that mean something, or change nothing
    **dict.fromkeys(("preprocessing mean", "preprocessing std"), {"numbers"}),
    "history stage": {"text"},
    **dict.fromkeys(
        [f"history {name}" for name in ("epoch", "train_loss", "train_top1", "val_loss")], NUMBERS
    ),
    "epoch epoch": set(WRONG),  # for people; the scripts read the history
    "settings data": {"text"},  # another dataset
    "settings checkpoint": {"text"},  # a resumed run begins with its last.pt
    # The recipe's, or the dataset's.
    **dict.fromkeys(
        [f"settings {name}" for name in ("optimizer", "schedule", "block_decay")], set(WRONG)
    ),
    **dict.fromkeys(
        [f"settings {name}" for name in ("epochs", "learning_rate", "image_size")], {"none"}
    ),
    **dict.fromkeys(
        [f"settings {name}" for name in ("per_class", "unfreeze", "train_batch_norm")], {"none"}
    ),
    # Such numbers end in a loss that is not finite, or in a poor network.
    **dict.fromkeys(("optimizer lr", "optimizer weight_decay", "scheduler last_epoch"), NUMBERS),
    "optimizer step": {"large", "nan"},
    "optimizer momentum_buffer": {"none"},  # as in the first step
    "scheduler lr_lambdas": {"list", "dict"},
}


def is_harmless(path, name, script, resume):
    field = f"{path[0]} {path[-1]}"
    if not resume and field in ("classes classes", "history history"):  # no names, no epochs
        return name == "list" or (name, field) == ("dict", "history history")
    if field in ("settings batch_size", "settings output_stride"):  # unset in one of the scripts
        return name == "none" and script is (train if "batch" in field else finetune)
    return name in HARMLESS.get(field, ())


def fields(contents):
    """Yield the path of each field, for example ("arch", "dropout")."""
    for name, value in contents.items():
        yield (name,)
        if name in ("arch", "preprocessing", "settings"):
            yield from ((name, key) for key in value)
    yield ("model", "stem.conv.weight")
    for key in ("epoch", "stage", "train_loss", "train_top1", "val_loss", "val_top1"):
        yield ("history", 0, key)
    if "optimizer" in contents:
        yield from (("scheduler", key) for key in ("base_lrs", "last_epoch", "lr_lambdas"))
        yield from (("optimizer", key) for key in ("state", "param_groups"))
        yield from (
            ("optimizer", "param_groups", 0, key) for key in ("lr", "params", "weight_decay")
        )
        yield from (("optimizer", "state", 0, key) for key in contents["optimizer"]["state"][0])


def copy_containers(value):
    """Copy dicts and lists, and keep the tensors."""
    if isinstance(value, dict):
        return {key: copy_containers(item) for key, item in value.items()}
    return [copy_containers(item) for item in value] if isinstance(value, list) else value


def bad_checkpoints(contents):
    """Yield (field, name of the wrong value, checkpoint)."""
    for path in fields(contents):
        for name, value in WRONG.items():
            bad = place = copy_containers(contents)
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield path, name, bad


class Accepted(Exception):
    """A script has loaded the checkpoint, and begins its work."""


def accept(*_):
    raise Accepted


def tiny_data(args, preprocessing=None):
    """Sixteen images of two digits."""
    images, labels = torch.arange(16 * 256).view(16, 1, 16, 16).byte(), torch.arange(16) % 2
    splits = dict.fromkeys(("train", "val", "test"), (images, labels))
    preprocessing = data.SMALL | {"image_size": 16}
    return data.Data(["0", "1"], preprocessing, splits, data.distort, batch_size=16)


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
    source, out = tmp_path / "bad" / "last.pt", tmp_path / "out"
    source.parent.mkdir()

    def run(script, checkpoint, resume=False):
        torch.save(checkpoint, source)
        before = source.read_bytes()
        options = (
            ("--resume", "--out", source.parent)
            if resume
            else ("--checkpoint", source, "--out", out)
        )
        try:
            code, _, error = call(script, *options)
            assert (
                code == 2 and error.count("\n") == 1 and error.startswith(f"{script.__name__}.py: ")
            )
        except Accepted:
            error = ""
        assert source.read_bytes() == before and not out.exists()
        assert list(source.parent.iterdir()) == [source]
        return error

    return run


KINDS = [
    (evaluate, False, 1),
    (export, False, 13),
    (finetune, False, 13),
    (train, True, 7),
    (finetune, True, 13),
]


@pytest.mark.parametrize("script, resume, step", KINDS)
def test_every_field_of_a_checkpoint_may_have_a_wrong_value(script, resume, step, runs, attempt):
    """Each script sees every `step`-th row: a step of 13 meets each field and each value."""
    folder = runs / (script.__name__ if resume else "train")
    good = torch.load(folder / ("last.pt" if resume else "best.pt"), weights_only=True)
    assert attempt(script, good, resume) == ""
    surprises = []
    for path, name, bad in islice(bad_checkpoints(good), 0, None, step):
        error = attempt(script, bad, resume)
        if bool(error) == is_harmless(path, name, script, resume):
            surprises.append((path, name, error))
    assert surprises == []


# ------------------------------------------------------------------------ files that hold no checkpoint


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


def claim_many_classes(path):
    """A classifier for a thousand million classes that takes eight bytes."""
    contents = torch.load(path, weights_only=True)
    weights = contents["model"]
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = torch.zeros(1).expand(10**9, *weights[name].shape[1:])
    contents["classes"], contents["arch"]["num_classes"] = [], 10**9
    torch.save(contents, path)


def name_weights_by_number(path):
    weights = to_torchvision(torch.load(path, weights_only=True)["model"])
    torch.save(dict(enumerate(weights.values())) | {"features.0.0.weight": torch.zeros(1)}, path)


def change_weights(change):
    def damage(path):
        contents = torch.load(path, weights_only=True)
        weight = contents["model"]["classifier.weight"]
        contents["model"]["classifier.weight"] = change(weight)
        torch.save(contents, path)

    return damage


DAMAGES = {
    "flipped bit": (flip_a_weight, "a checksum differs"),
    "short records": (shorten_a_record, None),
    "pipe": (make_pipe, "no regular file"),
    "many classes": (claim_many_classes, "larger than the file"),
    "numbers as names": (name_weights_by_number, None),
    "sparse": (change_weights(torch.Tensor.to_sparse), None),
    "sparse rows": (change_weights(torch.Tensor.to_sparse_csr), None),
    "complex": (change_weights(lambda weight: weight + 1j), None),
    "integers": (change_weights(torch.Tensor.long), None),
    "meta": (change_weights(lambda weight: weight.to("meta")), None),
    "infinite": (change_weights(lambda weight: weight / 0), "NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_weights_is_found(damage, runs, tmp_path):
    change, reason = DAMAGES[damage]
    path = tmp_path / "bad.pt"
    path.write_bytes((runs / "train" / "best.pt").read_bytes())
    change(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"cannot load '{path}' (") and "\n" not in str(caught.value)


def test_weights_of_fewer_bits_are_usable(runs, tmp_path):
    contents = torch.load(runs / "train" / "best.pt", weights_only=True)
    contents["model"]["classifier.weight"] = contents["model"]["classifier.weight"].to(
        torch.float8_e4m3fn
    )
    torch.save(contents, tmp_path / "small.pt")
    assert load_checkpoint(tmp_path / "small.pt")[0].classifier.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------- images and folders


def test_a_pipe_named_jpg_is_skipped(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert data.find_images(tmp_path) == []
    assert "pipe.jpg" in capsys.readouterr().err


def test_a_gigantic_image_is_skipped_before_it_is_decoded(tmp_path, capsys, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 60_000_000  # PIL refuses twice as many
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    monkeypatch.setattr(PngImageFile, "load", accept)
    Image.new("I;16", (11, 11)).save(tmp_path / "bomb.png")
    assert data.find_images(tmp_path) == []
    assert "exceeds limit of 120 pixels" in capsys.readouterr().err


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


# --------------------------------------------------------------------------------------------------- options

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


@pytest.mark.parametrize("script", OWN_OPTIONS, ids=lambda script: script.__name__)
def test_every_bad_option_ends_in_one_line(script, runs, tmp_path, call, monkeypatch):
    monkeypatch.setattr(data, "load_for", accept)
    source = (
        ("--checkpoint", runs / "train" / "best.pt")
        if script in (finetune, evaluate, export)
        else ()
    )
    for option, values in (OPTIONS | OWN_OPTIONS[script]).items():
        for value in values:
            code, _, error = call(script, *source, "--out", tmp_path / "out", f"{option}={value}")
            assert code == 2 and error.count("\n") == 1, (option, value, error)
            assert error.startswith(f"{script.__name__}.py: ") and not (tmp_path / "out").exists()
