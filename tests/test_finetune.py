"""Fine-tuning: frozen and trained layers, features, starting points, resuming, bad input."""

import csv
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import SMALL, call_script
from test_train import assert_same_runs
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import finetune
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint, to_torchvision

SHORT = (*SMALL, "--per-class", "4", "--classifier-epochs", "2", "--unfreeze", "2")
LAYERS = ("stem", *(f"blocks.{index}" for index in range(17)), "head", "classifier")


def changed_layers(before, after):
    """List the LAYERS with any changed tensor, statistics of BatchNorm included."""
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    return [layer for layer in LAYERS if any(key.startswith(f"{layer}.") for key in changed)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Save a network for letters with random weights. Its classes are not the digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.pt"
    save_checkpoint(path, MobileNetV2(37, 0.35), data.GLYPH_CLASSES, data.SMALL_IMAGE)
    return path


@pytest.fixture(scope="module")
def tuned(start, tmp_path_factory):
    """Return the folder of a run of SHORT."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert call_script(finetune, *SHORT, "--checkpoint", start, "--out", folder) == 0
    return folder


@pytest.fixture
def photos(tmp_path):
    """Save 12 photos of two classes: 10 for training, 2 for validation."""
    colours = torch.randint(256, (2, 6, 3, 24, 24), dtype=torch.uint8)
    for name, images in zip(("cat", "dog"), colours, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(images):
            to_pil_image(image).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def epochs(monkeypatch):
    """Collect stage, weights and names of the parameters with gradients after each epoch."""
    epochs = []
    save_epoch = train.save_epoch

    def save_and_collect(args, model, dataset, history, *rest):
        save_epoch(args, model, dataset, history, *rest)
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        gradients = {name for name, p in model.named_parameters() if p.grad is not None}
        epochs.append((history[-1]["stage"], weights, gradients))

    monkeypatch.setattr(train, "save_epoch", save_and_collect)
    return epochs


@pytest.fixture
def untrained(monkeypatch):
    """Replace `train_epoch`: it trains nothing. Collects the optimizers that it gets."""
    optimizers = []

    def train_nothing(network, batches, optimizer, *rest):
        optimizers.append(optimizer)
        return {"train_loss": 1.0, "train_top1": 0.5}

    monkeypatch.setattr(train, "train_epoch", train_nothing)
    return optimizers


# --------------------------------------------------------------------------- the parts of a network


@pytest.mark.parametrize("count", (0, 3, 17))
def test_front_and_rest_are_the_backbone_cut_in_two(count):
    model = MobileNetV2(10, 0.35).eval()
    front, rest = finetune.divide(model, count)
    images = torch.randn(2, 3, 32, 32)
    maps = front(images)
    torch.testing.assert_close(rest(maps).mean(dim=(2, 3)), model.features(images))
    assert torch.equal(maps, images) == (count == 17)
    free = LAYERS if count == 17 else LAYERS[18 - count :]
    behind = {*rest.parameters(), *model.classifier.parameters()}
    assert not behind & set(front.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter in behind) == name.startswith(tuple(f"{layer}." for layer in free))


def test_learning_rates_fall_towards_the_input_and_biases_have_no_weight_decay():
    model = MobileNetV2(10, 0.35)
    _, rest = finetune.divide(model, 3)
    args = SimpleNamespace(learning_rate=1.0, weight_decay=0.01, block_decay=0.9)
    rates = {}
    for group in finetune.make_optimizer(model.classifier, rest, args).param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
            assert group["weight_decay"] == (0.01 if parameter.dim() > 1 else 0)
    expected = {"blocks.14": 0.9**3, "blocks.15": 0.9**2, "blocks.16": 0.9, "head": 1}
    expected = {layer: 0.5 * rate for layer, rate in expected.items()} | {"classifier": 1.0}
    for name, parameter in model.named_parameters():
        wanted = [rate for layer, rate in expected.items() if name.startswith(f"{layer}.")]
        assert ([rates[parameter]] if parameter in rates else []) == pytest.approx(wanted)


def test_both_stages_use_adamw_with_the_options(start, tmp_path, call, untrained):
    options = ("--learning-rate", 0.5, "--weight-decay", 0.25, "--checkpoint", start)
    assert call(finetune, *SHORT, *options, "--out", tmp_path)[0] == 0
    first, second = dict.fromkeys(untrained)  # each is used for two epochs
    assert type(first) is type(second) is torch.optim.AdamW
    assert [group["weight_decay"] for group in first.param_groups] == [0.25, 0]
    assert [group["weight_decay"] for group in second.param_groups] == [0.25, 0] * 4
    for optimizer in (first, second):
        assert optimizer.param_groups[-1]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    "options", ((2, "--no-train-batch-norm"), (17, "--no-train-batch-norm"), (2,))
)
def test_frozen_layers_stay_bit_equal_and_others_move(start, tmp_path, call, epochs, options):
    command = (*SHORT, "--checkpoint", start, "--out", tmp_path, "--unfreeze", *options)
    assert call(finetune, *command)[0] == 0
    stages, weights, gradients = zip(*epochs)
    assert stages == ("classifier", "classifier", "blocks", "blocks")
    pretrained = load_checkpoint(start)[0].state_dict()
    for before in (pretrained, weights[0]):
        assert changed_layers(before, weights[1]) == ["classifier"]
    free = tuple(f"{layer}." for layer in (LAYERS if 17 in options else LAYERS[18 - 2 :]))
    parameters = {name for name, _ in MobileNetV2(10, 0.35).named_parameters()}
    assert gradients[1] == {"classifier.weight", "classifier.bias"}
    assert gradients[3] == {name for name in parameters if name.startswith(free)}
    for key in weights[3]:
        statistics = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        moves = key.startswith(free) and (
            not statistics or "--no-train-batch-norm" not in options
        )
        assert torch.equal(weights[1][key], weights[3][key]) != moves, key


def test_small_images_train_all_layers_and_photos_the_last_blocks(
    start, photos, tmp_path, call, untrained
):
    small = {
        "epochs": 6,
        "learning_rate": 0.005,
        "block_decay": 1.0,
        "unfreeze": 17,
        "train_batch_norm": True,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
    }
    large = {
        "epochs": 10,
        "learning_rate": 0.002,
        "block_decay": 0.9,
        "unfreeze": 8,
        "train_batch_norm": False,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
    }
    for source, expected in (("digits", small), (photos, large)):
        options = ("--data", source, "--image-size", 16, "--classifier-epochs", 1)
        folder = tmp_path / f"run-{expected['unfreeze']}"
        assert call(finetune, *options, "--checkpoint", start, "--out", folder)[0] == 0
        settings = load_checkpoint(folder / "last.pt")[1]["settings"]
        assert {name: settings[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------- features


def test_extracted_features_are_those_of_the_network_in_eval_mode():
    model = MobileNetV2(10, 0.35, output_stride=16)
    nn.init.normal_(model.stem.norm.running_mean)  # the outputs in training mode differ
    front, rest = finetune.divide(model, 5)
    backbone = nn.Sequential(front, rest, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    features, labels = finetune.extract_features(backbone, batches)
    assert features.shape == (8, 1280) and not features.requires_grad
    assert labels.tolist() == [0, 1, 2, 3] * 2
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model.features(images) for images, _ in batches])
    torch.testing.assert_close(features, expected)


def test_stage_classifier_trains_on_cached_features_and_an_epoch_repeats_them(monkeypatch):
    dataset = data.load_data("digits", {"image_size": 16}, per_class=3, batch_size=16)
    dataset.repeats = 2
    model = MobileNetV2(10, 0.35, output_stride=16)
    nn.init.normal_(model.stem.norm.running_mean)  # the outputs in training mode differ
    seen = []
    monkeypatch.setattr(train, "fit", lambda *arguments, **options: seen.extend(arguments))
    args = SimpleNamespace(
        classifier_epochs=1,
        learning_rate=0.1,
        weight_decay=0,
        loss="dice",
        label_smoothing=0,
        seed=0,
        amp="off",
    )
    finetune.train_classifier(model, dataset, args, history=[], save=None)
    trained, train_batches, val_batches, _, _, loss = seen
    assert set(trained.parameters()) == set(model.classifier.parameters())
    assert loss is train.dice_loss
    features = train_batches.inputs
    labels = train_batches.labels
    assert features.shape == (30, 1280) and not features.requires_grad
    model.eval()
    for split, batches in (("train", train_batches), ("val", val_batches)):
        with torch.no_grad():
            pairs = [(model.features(x), y) for x, y in dataset.batches(split)]
        expected, expected_labels = (torch.cat(parts) for parts in zip(*pairs))
        torch.testing.assert_close(batches.inputs, expected)
        assert torch.equal(batches.labels, expected_labels)
    in_order = torch.cat([inputs for inputs, _ in val_batches])
    assert torch.equal(in_order, val_batches.inputs)

    # An epoch has 3 batches, as 2 passes over 30 images have, in random order.
    orders = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        epoch = list(train_batches)
        assert [len(labels) for _, labels in epoch] == [16] * 3
        drawn = torch.cat([maps for maps, _ in epoch])
        order = (drawn[:, None] == features).all(dim=2).int().argmax(dim=1)  # (48,)
        assert torch.equal(features[order], drawn)
        assert torch.equal(labels[order], torch.cat([labels for _, labels in epoch]))
        assert len(order[:30].unique()) == 30 and len(order[30:].unique()) == 18
        orders.append(order)
    assert orders[0].equal(orders[2]) and not orders[0].equal(orders[1])


def test_the_backbone_sees_each_image_once_in_stage_classifier(
    start, tmp_path, call, monkeypatch
):
    counts = []

    def count(module, inputs, output):
        if isinstance(module, nn.Flatten):
            counts.append(len(output))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    command = (*SHORT, "--checkpoint", start, "--epochs", 0, "--out", tmp_path)
    try:
        assert call(finetune, *command)[0] == 0
    finally:
        hook.remove()
    assert sum(counts) == 40 + 184


# -------------------------------------------------------------------------------------------- a run


def test_each_stage_has_all_its_epochs_and_best_is_kept(
    start, tmp_path, call, monkeypatch, epochs
):
    # The best score is that of the second epoch, and of the third.
    scores = iter([0.5, 0.6, 0.6, 0.4, *[0.5, 0.3, 0.5]])
    first_weights = []
    make_optimizer = finetune.make_optimizer

    def collect(classifier, layers, args):
        first_weights.append(classifier.weight.clone())
        return make_optimizer(classifier, layers, args)

    monkeypatch.setattr(finetune, "make_optimizer", collect)
    monkeypatch.setattr(train, "score", lambda *_: {"loss": 1.0, "top1": next(scores)})
    command = (*SHORT, "--classifier-epochs", 4, "--epochs", 3)
    command += ("--checkpoint", start, "--out", tmp_path)
    assert call(finetune, *command)[0] == 0
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    assert [row["stage"] for row in history] == ["classifier"] * 4 + ["blocks"] * 3
    best, checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert len(checkpoint["history"]) == 3  # the latest among equals
    assert torch.equal(best.classifier.weight, epochs[2][1]["classifier.weight"])
    # Stage blocks starts from the last classifier.
    assert torch.equal(first_weights[1], epochs[3][1]["classifier.weight"])
    assert not torch.equal(first_weights[1], best.classifier.weight)
    assert call(finetune, *command, "--resume")[0] == 0  # a complete run stays as it is
    assert load_checkpoint(tmp_path / "last.pt")[1]["history"] == history


def test_a_run_has_one_history_and_the_same_command_gives_the_same_bytes(
    start, tuned, tmp_path, call
):
    code, out, err = call(finetune, *SHORT, "--checkpoint", start, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "curves.png", "last.pt", "log.csv"]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = [(row["stage"], row["epoch"]) for row in csv.DictReader(file)]
    assert rows == [("classifier", "1"), ("classifier", "2"), ("blocks", "3"), ("blocks", "4")]
    best = tmp_path / "best.pt"
    lines = out.splitlines()
    assert lines[0] == f"digits: 10 classes, on cpu; from {start}"
    command = (
        f"python evaluate.py --checkpoint {best} --data digits --out {tmp_path}-evaluation"
    )
    assert lines[-1] == f"next: {command}"
    checkpoint = load_checkpoint(best)[1]
    assert checkpoint["classes"] == list("0123456789")
    assert checkpoint["preprocessing"] == data.SMALL_IMAGE | {"image_size": 16}
    for name in ("best.pt", "last.pt", "log.csv"):
        assert (tmp_path / name).read_bytes() == (tuned / name).read_bytes()


def test_an_interrupted_run_on_photos_resumes_to_the_same_values(
    start, photos, tmp_path, call, monkeypatch
):
    """Interrupt each stage, so that the resumed run computes its features again."""
    command = ("--data", photos, "--checkpoint", start, "--image-size", 16, "--batch-size", 4)
    command += ("--epochs", 2, "--classifier-epochs", 2, "--unfreeze", 2)
    assert call(finetune, *command, "--out", tmp_path / "whole")[0] == 0
    model, whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    before = load_checkpoint(start)[0].state_dict()
    assert changed_layers(before, model.state_dict()) == list(LAYERS[16:])
    assert call(finetune, *command, "--out", tmp_path / "other", "--seed", 1)[0] == 0
    assert whole["history"] != load_checkpoint(tmp_path / "other" / "last.pt")[1]["history"]
    save_epoch = train.save_epoch
    for finished in (1, 2, 3):

        def interrupt(args, model, dataset, history, *rest, finished=finished):
            save_epoch(args, model, dataset, history, *rest)
            if len(history) == finished:
                raise KeyboardInterrupt

        folder = tmp_path / str(finished)
        with monkeypatch.context() as context:
            context.setattr(train, "save_epoch", interrupt)
            assert call(finetune, *command, "--out", folder)[0] == 2
        # The run keeps its settings: --unfreeze 1 is ignored.
        assert call(finetune, "--unfreeze", 1, "--out", folder, "--resume")[0] == 0
        assert_same_runs(folder, tmp_path / "whole")


# ---------------------------------------------------------------------------- where a run may start


def test_it_starts_from_torchvisions_weights_and_keeps_their_normalisation(
    tmp_path, call, monkeypatch, untrained
):
    weights = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: weights)
    for source in (tmp_path / "theirs.pth", "imagenet"):
        command = (*SHORT, "--checkpoint", source, "--epochs", 0, "--overwrite")
        code, out, _ = call(finetune, *command, "--out", tmp_path / "run")
        assert code == 0 and f"; from {source}\n" in out and "blocks" not in out
        model, checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
        theirs = to_torchvision(model.state_dict())
        assert all(torch.equal(theirs[key], weights[key]) for key in list(weights)[:-2])
        assert model.arch["num_classes"] == 10
        grey = {"image_size": 16, "channels": 1, "crop": 1.0}
        assert checkpoint["preprocessing"] == data.PHOTO | grey


def test_width_and_output_stride_come_from_the_checkpoint_but_the_stride_may_change(
    tmp_path, call, untrained
):
    model = MobileNetV2(3, 0.5, output_stride=8)
    save_checkpoint(tmp_path / "start.pt", model, ["one", "two", "three"], data.SMALL_IMAGE)
    for options, stride in (((), 8), (("--output-stride", 16), 16)):
        folder = tmp_path / str(stride)
        command = (*SHORT, "--checkpoint", tmp_path / "start.pt", "--epochs", 0, *options)
        assert call(finetune, *command, "--out", folder)[0] == 0
        tuned, checkpoint = load_checkpoint(folder / "best.pt")
        assert tuned.arch == model.arch | {"num_classes": 10, "output_stride": stride}
        assert {row["stage"] for row in checkpoint["history"]} == {"classifier"}


def test_the_classifier_is_kept_only_for_the_same_class_names(tmp_path, call, untrained):
    model = MobileNetV2(10, 0.35)
    save_checkpoint(tmp_path / "letters", model, list("ABCDEFGHIJ"), data.SMALL_IMAGE)
    save_checkpoint(tmp_path / "digits", model, list("0123456789"), data.SMALL_IMAGE)
    torch.save(to_torchvision(model.state_dict()), tmp_path / "torchvision")
    for name, kept in (("letters", False), ("digits", True), ("torchvision", False)):
        folder = tmp_path / f"run-{name}"
        command = (*SHORT, "--epochs", 0, "--checkpoint", tmp_path / name, "--out", folder)
        assert call(finetune, *command)[0] == 0
        tuned = load_checkpoint(folder / "last.pt")[0]
        assert torch.equal(tuned.classifier.weight, model.classifier.weight) == kept
        assert torch.equal(tuned.head.conv.weight, model.head.conv.weight)


# ---------------------------------------------------------------------------------------- bad input


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def make_bad(kind, tmp_path, start):
    """Return the arguments of a bad command, and a part of its message."""
    bad = tmp_path / "bad.pt"
    folder = tmp_path / "folder"
    folder.mkdir()
    damaged = f"cannot load '{bad}' ("
    if kind == "missing checkpoint":
        return ("--checkpoint", bad), "No such file"
    if kind == "checkpoint of another network":
        torch.save(torchvision.models.resnet18().state_dict(), bad)
        return ("--checkpoint", bad), damaged
    if kind == "truncated checkpoint":
        bad.write_bytes(start.read_bytes()[:5000])
        return ("--checkpoint", bad), damaged
    if kind == "hostile pickle":
        bad.write_bytes(pickle.dumps(Hostile(), protocol=2))
        return ("--checkpoint", bad), f"{damaged}damaged, or more than tensors"
    if kind == "missing folder":
        return (
            "--checkpoint",
            start,
            "--data",
            tmp_path / "none",
        ), "no such folder or dataset"
    if kind == "empty folder":
        return ("--checkpoint", start, "--data", folder), "at least two class folders"
    if kind == "no image":
        for name in ("cat", "dog"):
            (folder / name).mkdir()
            (folder / name / "notes.txt").write_text("not an image")
        return ("--checkpoint", start, "--data", folder), "has no images; add"
    if kind == "per class":
        return ("--checkpoint", start, "--per-class", 5000), "a class has 68 images"
    value = {"--epochs": -1, "--unfreeze": 18, "--classifier-epochs": 0}[kind]
    return ("--checkpoint", start, kind, value), f"argument {kind}: {value}: use a value from "


@pytest.mark.parametrize(
    "kind",
    [
        "missing checkpoint",
        "checkpoint of another network",
        "truncated checkpoint",
        "hostile pickle",
        "missing folder",
        "empty folder",
        "no image",
        "per class",
        "--epochs",
        "--unfreeze",
        "--classifier-epochs",
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(kind, start, tmp_path, call):
    arguments, message = make_bad(kind, tmp_path, start)
    code, out, err = call(finetune, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and "must never" not in out
    assert len(err.splitlines()) == 1 and err.startswith("finetune.py: ")
