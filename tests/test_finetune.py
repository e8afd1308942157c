"""Transfer: what is frozen stays, what is unfrozen moves, where it may start from, and bad input."""

import csv
import pickle

import pytest
import torch
import torchvision
from conftest import SMALL, call_script

import data
import evaluate
import finetune
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint, to_torchvision

SHORT = (*SMALL, "--per-class", "4", "--epochs", "2", "--head-epochs", "2")
BLOCK_LAYERS = ("stem", *(f"blocks.{index}" for index in range(17)), "head", "classifier")


def changed_layers(before, after):
    """Which of BLOCK_LAYERS have any tensor, statistics of BatchNorm included, that differs."""
    return [
        layer
        for layer in BLOCK_LAYERS
        if any(not torch.equal(before[key], after[key]) for key in before if key.startswith(f"{layer}."))
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of letters with random weights: the classes differ from the digits'."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.pt"
    model = MobileNetV2(37, 0.35, output_stride=32)
    save_checkpoint(path, model, data.GLYPH_CLASSES, data.SMALL)
    return path


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    """The folder of SHORT, not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert call_script(finetune, *SHORT, "--checkpoint", start, "--out", folder) == 0
    return folder


def test_cached_features_are_the_live_ones():
    dataset = data.load_data("digits", per_class=3, batch_size=16)
    dataset.train.repeats = 2
    model = MobileNetV2(10, 0.35, output_stride=16)
    cached = finetune.compute_features(model, dataset.train)
    images = torch.cat([images for images, _ in dataset.train.batches()])
    with torch.no_grad():
        torch.testing.assert_close(cached.images, model.eval().features(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.classifier(cached.images), model(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(cached.labels, dataset.train.labels)
    more = finetune.compute_features(model, dataset.train, passes=3)  # 30 as they are, two epochs of 60
    assert more.images.shape == (150, 1280) and torch.equal(more.images[:30], cached.images)
    assert torch.bincount(more.labels).tolist() == [15] * 10
    assert more.steps() == len(list(more.batches(0))) == 10
    assert sum(len(labels) for _, labels in more.batches(0)) == more.epoch_size() == 150


@pytest.mark.parametrize("count", (0, 3, 17))
def test_unfreeze_leaves_the_last_blocks_the_head_and_the_classifier(count):
    model = MobileNetV2(10, 0.35)
    finetune.unfreeze(model, count)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = BLOCK_LAYERS if count == 17 else BLOCK_LAYERS[18 - count :]
    assert free == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{x}." for x in layers))}


@pytest.mark.parametrize("count", (2, 17))
def test_what_is_frozen_stays_bit_equal_and_what_is_not_moves(start, tmp_path, call, count, monkeypatch):
    before = load_checkpoint(start)[0].state_dict()
    after_head = {}
    real = finetune.train_blocks

    def remember(run, model, *arguments):
        after_head.update({key: tensor.clone() for key, tensor in model.state_dict().items()})
        return real(run, model, *arguments)

    monkeypatch.setattr(finetune, "train_blocks", remember)
    code, *_ = call(finetune, *SHORT, "--checkpoint", start, "--unfreeze", count, "--out", tmp_path)
    assert code == 0
    same_head = {key: tensor for key, tensor in after_head.items() if not key.startswith("classifier")}
    assert all(torch.equal(before[key], tensor) for key, tensor in same_head.items())
    after = load_checkpoint(tmp_path / "last.pt")[0].state_dict()
    assert changed_layers(after_head, after) == list(BLOCK_LAYERS if count == 17 else BLOCK_LAYERS[18 - count :])


def test_stage_blocks_starts_from_the_best_head_and_the_best_of_both_is_kept(start, tmp_path, call, monkeypatch):
    seen = {}
    real = finetune.train_blocks

    def remember(run, model, dataset, args):
        seen["classifier"] = model.classifier.weight.clone()
        seen["best"] = load_checkpoint(args.out / "best.pt")[0].classifier.weight
        return real(run, model, dataset, args)

    monkeypatch.setattr(finetune, "train_blocks", remember)
    call(finetune, *SHORT, "--head-epochs", 5, "--checkpoint", start, "--out", tmp_path)
    assert torch.equal(seen["classifier"], seen["best"])
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    best = load_checkpoint(tmp_path / "best.pt")[1]["history"][-1]
    assert best == max(history, key=lambda row: (row["val_top1"], row["epoch"]))


def test_a_run_leaves_one_history_over_both_stages_and_the_same_command_the_same_bytes(start, tuned, tmp_path, call):
    code, out, err = call(finetune, *SHORT, "--checkpoint", start, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "curves.png", "last.pt", "log.csv"]
    with open(tmp_path / "log.csv", newline="") as file:
        assert [(row["stage"], row["epoch"]) for row in csv.DictReader(file)] == [
            ("head", "1"),
            ("head", "2"),
            ("blocks", "3"),
            ("blocks", "4"),
        ]
    assert "fresh, for 10 classes (the weights know 37)" in out
    assert out.splitlines()[-1] == f"next: python evaluate.py --checkpoint {tmp_path / 'best.pt'} --data digits"
    checkpoint = load_checkpoint(tmp_path / "best.pt")[1]
    assert checkpoint["classes"] == list("0123456789")
    assert checkpoint["preprocessing"] == data.SMALL | {"image_size": 16}
    for name in ("best.pt", "log.csv"):
        assert (tmp_path / name).read_bytes() == (tuned / name).read_bytes()


def test_it_starts_from_a_torchvision_file_and_keeps_its_normalisation(tmp_path, call):
    weights = torchvision.models.mobilenet_v2(width_mult=0.35).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    options = (*SHORT, "--unfreeze", 0)
    code, out, _ = call(finetune, *options, "--checkpoint", tmp_path / "theirs.pth", "--out", tmp_path / "run")
    assert code == 0 and "from " in out
    model, checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert torch.equal(model.stem.conv.weight, weights["features.0.0.weight"])
    assert checkpoint["preprocessing"] == data.PREPROCESSING["flowers"] | {"image_size": 16, "channels": 1}
    assert call(evaluate, "--checkpoint", tmp_path / "run" / "best.pt", "--out", tmp_path / "eval")[0] == 0


def test_as_many_classes_with_other_names_get_a_fresh_classifier(tmp_path, call, monkeypatch):
    model = MobileNetV2(10, 0.35)
    save_checkpoint(tmp_path / "letters.pt", model, list("ABCDEFGHIJ"), data.SMALL)
    save_checkpoint(tmp_path / "digits.pt", model, list("0123456789"), data.SMALL)
    torch.save(to_torchvision(model.state_dict()), tmp_path / "torchvision.pt")
    kept = {}
    scores = dict.fromkeys(("train_loss", "train_top1", "val_loss", "val_top1"), 0.5)

    def train_nothing(run, *_):
        (
            run.begin_stage("head", 1, torch.optim.SGD(run.model.parameters())),
            run.begin_epoch(1, 1),
            run.end_epoch(scores, 1),
        )

    monkeypatch.setattr(finetune, "train_blocks", lambda *_: None)
    monkeypatch.setattr(finetune, "train_head", train_nothing)
    for name in ("letters", "digits", "torchvision"):
        code, out, _ = call(finetune, *SHORT, "--checkpoint", tmp_path / f"{name}.pt", "--out", tmp_path / name)
        tuned = load_checkpoint(tmp_path / name / "best.pt")[0]
        kept[name] = torch.equal(tuned.classifier.weight, model.classifier.weight)
        assert code == 0 and kept[name] == ("classifier: fresh" not in out)
        assert torch.equal(tuned.head.conv.weight, model.head.conv.weight)
    assert kept == {"letters": False, "digits": True, "torchvision": False}


# ------------------------------------------------------------------------------------------------ bad input


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def make_bad(kind, tmp_path, start):
    """The arguments of a bad command, and a part of what it must say."""
    bad = tmp_path / "bad.pt"
    folder = tmp_path / "folder"
    folder.mkdir()
    if kind == "missing checkpoint":
        return ("--checkpoint", tmp_path / "nothing.pt"), "no checkpoint at"
    if kind == "checkpoint of another kind":
        torch.save(torchvision.models.resnet18().state_dict(), bad)
        return ("--checkpoint", bad), "not a checkpoint of this project"
    if kind == "truncated checkpoint":
        bad.write_bytes(start.read_bytes()[:5000])
        return ("--checkpoint", bad), "cannot be read as a checkpoint"
    if kind == "hostile pickle":
        bad.write_bytes(pickle.dumps(Hostile()))
        return ("--checkpoint", bad), "cannot be read as a checkpoint"
    if kind == "missing folder":
        return ("--checkpoint", start, "--data", tmp_path / "photos"), "neither a data set"
    if kind == "empty folder":
        return ("--checkpoint", start, "--data", folder), "has 0 class folders"
    if kind == "one class":
        (folder / "cat").mkdir()
        (folder / "cat" / "1.jpg").write_bytes(b"")
        return ("--checkpoint", start, "--data", folder), "has 1 class folders"
    if kind == "unreadable image":
        for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"not an image")
        return ("--checkpoint", start, "--data", folder, "--workers", 0), "no image in"
    if kind == "epochs":
        return ("--checkpoint", start, "--epochs", -1), "'-1' is not from 1"
    return ("--checkpoint", start, "--data", "letters"), "'letters' is neither a data set"


@pytest.mark.parametrize(
    "kind",
    [
        "missing checkpoint",
        "checkpoint of another kind",
        "truncated checkpoint",
        "hostile pickle",
        "missing folder",
        "empty folder",
        "one class",
        "unreadable image",
        "epochs",
        "unknown data set",
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(kind, start, tmp_path, call):
    arguments, message = make_bad(kind, tmp_path, start)
    code, out, err = call(finetune, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and "must never" not in out
    assert len(err.splitlines()) == 1 and err.startswith("finetune.py: ")


def test_a_run_that_was_interrupted_in_either_stage_goes_on_to_the_same_end(start, tuned, tmp_path, call, monkeypatch):
    command = (*SHORT, "--checkpoint", start)
    end_epoch = train.Run.end_epoch
    for finished in (1, 3):

        def interrupt(run, *arguments, finished=finished):
            end_epoch(run, *arguments)
            if len(run.history) == finished:
                raise KeyboardInterrupt

        folder = tmp_path / str(finished)
        with monkeypatch.context() as context:
            context.setattr(train.Run, "end_epoch", interrupt)
            assert call(finetune, *command, "--out", folder)[0] == 2
        assert call(finetune, *command, "--out", folder, "--resume")[0] == 0
        for name in ("best.pt", "last.pt"):
            (model, first), (other, second) = (load_checkpoint(path / name) for path in (folder, tuned))
            assert first["history"] == second["history"]
            pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
