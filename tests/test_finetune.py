"""Transfer: what is frozen stays, what is unfrozen moves, where it may start from, and bad input."""

import csv
import pickle
from dataclasses import replace

import pytest
import torch
import torchvision
from conftest import SMALL, call_script
from test_train import same
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import finetune
import mobilenetv2
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint, to_torchvision

SHORT = (*SMALL, "--per-class", "4", "--epochs", "2", "--head-epochs", "2", "--unfreeze", "2")
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


@pytest.mark.parametrize("count", (0, 3, 17))
def test_front_backbone_and_head_are_the_network_cut_in_three(count):
    model = MobileNetV2(10, 0.35).eval()
    front, backbone, head = finetune.divide(model, count)
    images = torch.randn(2, 3, 32, 32)
    maps = front(images)
    assert torch.equal(backbone(maps), model.features(images))
    assert torch.equal(head(backbone(maps)), model(images))
    layers = BLOCK_LAYERS if count == 17 else BLOCK_LAYERS[18 - count :]
    behind = {id(parameter) for part in (backbone, head) for parameter in part.parameters()}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in behind}
    assert named == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{x}." for x in layers))}
    assert not behind & {id(parameter) for parameter in front.parameters()}
    assert torch.equal(maps, images) == (count == 17)


def test_kept_maps_and_features_are_the_live_ones():
    dataset = data.load_data("digits", per_class=3, batch_size=16)
    dataset.train.repeats = 2
    model = MobileNetV2(10, 0.35, output_stride=16)
    nn.init.normal_(model.stem.norm.running_mean)  # so that training mode would give other numbers
    front, backbone, _ = finetune.divide(model, 5)
    kept = finetune.freeze(front, dataset.train, views=3)
    features = finetune.freeze(backbone, kept)
    model.eval()
    with torch.no_grad():
        (maps, labels), (vectors, same_labels) = next(kept.batches()), next(features.batches())
        images, expected_labels = next(dataset.train.batches())
        torch.testing.assert_close(maps, front(images))
        torch.testing.assert_close(vectors, model.features(images))
        assert torch.equal(labels, expected_labels) and torch.equal(same_labels, labels)
        # Every epoch of training draws from the images as they are and two passes of augmented ones, as data.py gives them.
        live = torch.cat([front(images) for view in (None, 1, 2) for images, _ in dataset.train.batches(view)])
        live_labels = torch.cat([labels for view in (None, 1, 2) for _, labels in dataset.train.batches(view)])
        pairs = [[torch.cat(parts) for parts in zip(*kept.batches(epoch), strict=True)] for epoch in (0, 1, 1)]
        epochs = [maps for maps, _ in pairs]
        assert len(live) == 30 + 60 + 60 and epochs[0].shape == (60, 32, 4, 4)
        for maps, epoch_labels in pairs:
            distances = torch.cdist(maps.flatten(1), live.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.min(dim=1)
            assert nearest.values.max() < 1e-4 * distances.mean() and len(nearest.indices.unique()) == 60
            assert live_labels[nearest.indices].equal(epoch_labels)
        assert epochs[1].equal(epochs[2]) and not epochs[0].equal(epochs[1])
    assert features.steps() == kept.steps() == len(list(features.batches(7))) == 4
    every = torch.cat([vectors for vectors, _ in features.batches(7)])  # each of the 30 twice
    torch.testing.assert_close(every.sum(dim=1).sort().values[::2], features.keep(None)[0].sum(dim=1).sort().values)


class Counted(nn.Module):
    """Layers that count the images that they are shown."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.images = layers, 0

    def forward(self, x):
        self.images += len(x)
        return self.layers(x)


def test_the_frozen_layers_see_each_image_once_a_view_and_anew_only_where_nothing_is_kept():
    dataset = data.load_data("digits", per_class=3, batch_size=16)
    dataset.train.repeats = 2
    for views, expected in ((1, 30), (3, 30 + 2 * 60), (0, 6 * 60)):
        layers = Counted(MobileNetV2(10, 0.35, output_stride=16).stem)
        split = finetune.freeze(layers, dataset.train, views)
        for epoch in range(6):
            batches = list(split.batches(epoch))
            assert len(batches) == split.steps() and not batches[0][0].requires_grad
        assert layers.images == expected


def test_maps_that_do_not_fit_into_memory_are_not_kept(start, tmp_path, call, monkeypatch):
    seen = {}
    real = finetune.train_blocks

    def remember(run, backbone, head, train, val, args):
        seen.update(train=train, val=val)
        return real(run, backbone, head, train, val, args)

    monkeypatch.setattr(finetune, "train_blocks", remember)
    command = (*SHORT, "--epochs", 1, "--head-epochs", 1, "--checkpoint", start, "--views", 3)
    assert "views kept" not in call(finetune, *command, "--out", tmp_path / "3")[1]
    images, epoch = len(seen["train"]), seen["train"].epoch_size()
    assert (images, epoch, len(seen["val"])) == (40, 680, 184)
    for name, count in (("train", images + 2 * epoch), ("val", 184)):  # as they are, and augmented with repeats
        (maps, labels), *others = seen[name].kept.values()
        assert not others and len(maps) == len(labels) == count
    a_pass = maps[0].nbytes * epoch
    for space, views in ((3 * a_pass - 1, 2), (2 * a_pass - 1, 0)):
        monkeypatch.setattr(finetune, "KEEP_BYTES", space)
        code, out, _ = call(finetune, *command, "--out", tmp_path / str(space))
        assert code == 0 and f"views kept: {views} of 3" in out
        kept = {name: sum(len(maps) for maps, _ in split.kept.values()) for name, split in seen.items()}
        assert kept == {"train": images + epoch if views else 0, "val": 184}
    monkeypatch.setattr(finetune, "KEEP_BYTES", 184 * maps[0].nbytes - 1)
    code, out, _ = call(finetune, *command, "--out", tmp_path / "nothing")
    assert code == 0 and "views kept: 0 of 3" in out and "views kept: 0 of 1" in out and seen["val"].kept == {}


def test_learning_rates_fall_towards_the_input_and_biases_have_no_decay():
    model = MobileNetV2(10, 0.35)
    _, backbone, head = finetune.divide(model, 3)
    args = finetune.command_line().parse_args([])
    args.learning_rate, args.weight_decay = 1.0, 0.01
    rates = {}
    for group in finetune.block_groups(backbone, head, args):
        assert group["lr"] == group["base_rate"]
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
            assert group["weight_decay"] == (0.01 if parameter.dim() > 1 else 0)
    ratio, decay = finetune.BACKBONE_RATE, finetune.BLOCK_DECAY
    expected = {"blocks.14": decay**3, "blocks.15": decay**2, "blocks.16": decay, "head": 1}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        wanted = [ratio * rate for part, rate in expected.items() if f"{layer}.".startswith(f"{part}.")]
        wanted += [1.0] if layer == "classifier" else []
        assert [rates[parameter]] == pytest.approx(wanted) if wanted else parameter not in rates


@pytest.mark.parametrize("options", (("--unfreeze", "2"), ("--unfreeze", "all"), ("--unfreeze", "2", "--train-batch-norm")))
def test_what_is_frozen_stays_bit_equal_and_what_is_not_moves(start, tmp_path, call, options, monkeypatch):
    before = load_checkpoint(start)[0].state_dict()
    after_head = {}
    real = finetune.train_blocks

    def remember(run, *arguments):
        after_head.update({key: tensor.clone() for key, tensor in run.model.state_dict().items()})
        return real(run, *arguments)

    monkeypatch.setattr(finetune, "train_blocks", remember)
    code, *_ = call(finetune, *SHORT, "--checkpoint", start, *options, "--out", tmp_path)
    assert code == 0
    same_head = {key: tensor for key, tensor in after_head.items() if not key.startswith("classifier")}
    assert all(torch.equal(before[key], tensor) for key, tensor in same_head.items())
    after = load_checkpoint(tmp_path / "last.pt")[0].state_dict()
    free = BLOCK_LAYERS if "all" in options else BLOCK_LAYERS[18 - 2 :]
    for key in after:
        statistics = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        moves = key.startswith(tuple(f"{layer}." for layer in free)) and (not statistics or len(options) == 3)
        assert torch.equal(after_head[key], after[key]) != moves, key


def test_early_stopping_ends_each_stage_and_keeps_the_best(start, tmp_path, call, monkeypatch):
    # head: rises in its second epoch; blocks: in its first, never above the head's best
    scores = iter([0.5, 0.6, 0.6, 0.4, *[0.5, 0.3, 0.5]])
    monkeypatch.setattr(train, "score", lambda *_: {"loss": 1.0, "top1": next(scores)})
    options = (*SHORT, "--head-epochs", 9, "--epochs", 9, "--patience", 2, "--checkpoint", start, "--out", tmp_path)
    code, out, _ = call(finetune, *options)
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    assert code == 0 and [row["stage"] for row in history] == ["head"] * 4 + ["blocks"] * 3
    assert "head ends early: validation accuracy last rose 2 epochs ago" in out and "blocks ends early" in out
    best, checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert len(checkpoint["history"]) == 3
    frozen = load_checkpoint(start)[0].state_dict()
    assert changed_layers(frozen, best.state_dict()) == ["classifier"]
    assert call(finetune, *options, "--resume")[0] == 0  # a run that ended early is over
    assert load_checkpoint(tmp_path / "last.pt")[1]["history"] == history


def test_stage_blocks_starts_from_the_best_head_and_the_best_of_both_is_kept(start, tmp_path, call, monkeypatch):
    seen = {}
    real = finetune.train_blocks

    def remember(run, *arguments):
        seen["classifier"] = run.model.classifier.weight.clone()
        seen["best"] = load_checkpoint(run.folder / "best.pt")[0].classifier.weight
        return real(run, *arguments)

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


def weights_of_torchvision(tmp_path):
    weights = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    return weights, tmp_path / "theirs.pth"


def test_it_starts_from_a_torchvision_file_and_keeps_its_normalisation(tmp_path, call):
    weights, path = weights_of_torchvision(tmp_path)
    options = (*SHORT, "--unfreeze", 0, "--epochs", 1)
    code, out, _ = call(finetune, *options, "--checkpoint", path, "--out", tmp_path / "run")
    assert code == 0
    assert f"from {path}: stem, 17 blocks and last convolution, width 0.35, output stride 32" in out
    assert "classifier: fresh, for 10 classes (the weights know 7)" in out
    model, checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert torch.equal(model.stem.conv.weight, weights["features.0.0.weight"])
    assert checkpoint["preprocessing"] == data.PREPROCESSING["flowers"] | {"image_size": 16, "channels": 1, "crop": 1.0}


def test_imagenet_is_the_file_of_torchvision(tmp_path, call, monkeypatch):
    weights, path = weights_of_torchvision(tmp_path)
    monkeypatch.setattr(mobilenetv2, "download_imagenet", lambda: path)
    options = (*SHORT, "--checkpoint", "imagenet", "--epochs", 0, "--out", tmp_path / "run")
    code, out, _ = call(finetune, *options)
    assert code == 0 and "from imagenet: stem, 17 blocks" in out
    model = load_checkpoint(tmp_path / "run" / "best.pt")[0]
    assert torch.equal(model.head.conv.weight, weights["features.18.0.weight"])


def test_a_checkpoint_of_any_width_and_output_stride_goes_on_with_them_or_with_another_stride(tmp_path, call):
    model = MobileNetV2(3, 0.5, output_stride=8)
    save_checkpoint(tmp_path / "start.pt", model, ["one", "two", "three"], data.SMALL)
    for options, stride in (((), 8), (("--output-stride", 16), 16)):
        folder = tmp_path / str(stride)
        command = (*SHORT, "--checkpoint", tmp_path / "start.pt", "--epochs", 0, *options, "--out", folder)
        code, out, _ = call(finetune, *command)
        assert code == 0 and f"width 0.5, output stride {stride}" in out and "stage blocks" not in out
        tuned, checkpoint = load_checkpoint(folder / "best.pt")
        assert tuned.arch == model.arch | {"num_classes": 10, "output_stride": stride}
        assert {row["stage"] for row in checkpoint["history"]} == {"head"}


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
        assert code == 0 and kept[name] == ("classifier: fresh" not in out) == ("classifier: kept" in out)
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
    numbers = {"--epochs": -1, "--unfreeze": 18, "--views": -1}
    if kind in numbers:
        return ("--checkpoint", start, kind, numbers[kind]), f"{kind}: '{numbers[kind]}' is not from 0"
    if kind == "per class":
        return ("--checkpoint", start, "--per-class", 5000), "'0' has 7"
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
        "--epochs",
        "--unfreeze",
        "--views",
        "per class",
        "unknown data set",
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(kind, start, tmp_path, call):
    arguments, message = make_bad(kind, tmp_path, start)
    code, out, err = call(finetune, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err and "must never" not in out
    assert len(err.splitlines()) == 1 and err.startswith("finetune.py: ")


def test_a_run_on_photos_that_was_interrupted_goes_on_to_the_same_bits(start, tmp_path, call, monkeypatch):
    """In the first epoch of either stage, so that features and views which the interrupted run had are computed again."""
    colours = torch.randint(256, (2, 6, 3, 24, 24), dtype=torch.uint8)
    for name, images in zip(("cat", "dog"), colours, strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(images):
            to_pil_image(image).save(tmp_path / "photos" / name / f"{index}.png")
    command = ("--data", tmp_path / "photos", "--checkpoint", start, "--image-size", 16, "--batch-size", 4)
    command += ("--epochs", 2, "--head-epochs", 2, "--views", 3, "--unfreeze", 2)
    assert call(finetune, *command, "--out", tmp_path / "whole")[0] == 0
    _, whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert call(finetune, *command, "--out", tmp_path / "other", "--seed", 1)[0] == 0
    assert whole["history"] != load_checkpoint(tmp_path / "other" / "last.pt")[1]["history"]
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
        code, _, error = call(finetune, *command, "--out", folder, "--resume", "--views", 2)
        assert code == 2 and "was made with --views 3" in error
        assert call(finetune, *command, "--out", folder, "--resume")[0] == 0
        for name in ("last.pt", "best.pt"):
            assert same(torch.load(folder / name), torch.load(tmp_path / "whole" / name)), name


def test_the_order_of_kept_views_is_that_of_the_seed_and_stage_head_has_its_weight_decay(start, tmp_path, call, monkeypatch):
    split = data.load_data("digits", per_class=3, batch_size=16, seed=5).train
    first, second = (next(finetune.freeze(nn.Identity(), replace(split, seed=seed)).batches(0))[1] for seed in (5, 6))
    assert not first.equal(second)
    groups = []
    monkeypatch.setattr(finetune, "fit", lambda run, stage, *rest: groups.extend(rest[-2].param_groups) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(finetune, *SHORT, "--checkpoint", start, "--weight-decay", 0.25, "--out", tmp_path)
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
