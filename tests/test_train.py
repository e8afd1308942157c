"""Training: schedules, losses, the loop, files of a run, resuming, bad input, several processes."""

import csv
import io
import itertools
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_DATA, SMALL_NETWORK
from matplotlib.image import imread
from processes import Python, torchrun
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import LambdaLR

import cli
import data
import finetune
import mobilenetv2
import train
from mobilenetv2 import MobileNetV2, load_checkpoint


@pytest.fixture
def few_blocks(monkeypatch):
    """Use the first three of the 17 blocks, for a test of files with many runs."""
    monkeypatch.setattr(mobilenetv2, "BOTTLENECKS", mobilenetv2.BOTTLENECKS[:2])


def same(first, second):
    """Tell whether two loaded files have the same values, tensors bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(
            same(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first.equal(second) if isinstance(first, torch.Tensor) else first == second


def assert_same_runs(first, second):
    """Compare the files of two runs, by their values."""
    for name in ("last.pt", "best.pt"):
        loaded = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
        assert same(*loaded), name
    assert (first / "log.csv").read_bytes() == (second / "log.csv").read_bytes()
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))


# --------------------------------------------------------------- schedule, recipes, optimizer, loss


def test_cosine_is_a_warm_up_and_half_a_cosine():
    factors = [train.cosine(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    expected = [(1 + math.cos(math.pi * step / 90)) / 2 for step in range(91)]
    assert factors[10:] == pytest.approx(expected)
    assert max(factors) == factors[10] == 1 and min(factors[:-1]) > 0
    assert train.cosine(0, 1) > 0  # the shortest run learns, too


def test_the_recipe_sets_the_share_of_the_warm_up():
    assert [train.cosine(step, 4, warmup=0.5) for step in range(3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )
    expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [train.cosine(step, 4, warmup=0) for step in range(5)] == pytest.approx(expected)


def test_exponential_falls_once_per_epoch():
    factors = [train.exponential(step, 5) for step in range(20)]
    assert factors == [0.98**epoch for epoch in range(4) for _ in range(5)]
    assert 0.045 * train.exponential(34, 1) == pytest.approx(0.0226, abs=1e-4)  # half


@pytest.mark.parametrize(
    "arguments, kind, expected, schedule, batch_size, epochs",
    [
        ((), torch.optim.SGD, {"initial_lr": 0.1, "nesterov": True}, train.cosine, 64, 3),
        (
            ("--recipe", "cosine"),
            torch.optim.SGD,
            {"initial_lr": 0.05},
            train.cosine,
            256,
            150,
        ),
        (
            ("--recipe", "paper"),
            torch.optim.RMSprop,
            {"initial_lr": 0.045, "alpha": 0.9},
            train.exponential,
            96,
            300,
        ),
        (
            ("--recipe", "paper", "--learning-rate", 0.01, "--batch-size", 8, "--epochs", 3),
            torch.optim.RMSprop,
            {"initial_lr": 0.01},
            train.exponential,
            8,
            3,
        ),
        (
            ("--amp", "bfloat16", "--loss", "focal", "--weight-decay", 0.5),
            torch.optim.SGD,
            {"weight_decay": 0.5},
            train.cosine,
            64,
            3,
        ),
    ],
)
def test_recipes_follow_their_sources_and_options_override_them(
    arguments, kind, expected, schedule, batch_size, epochs, tmp_path, call, monkeypatch
):
    seen = stop_before_training(monkeypatch)
    call(train, "--data", "digits", *arguments, "--out", tmp_path)
    network, batches, optimizer, scheduler, loss = seen
    weights, others = optimizer.param_groups
    expected = {"momentum": 0.9, "weight_decay": 4e-5} | expected
    assert type(optimizer) is kind and {name: weights[name] for name in expected} == expected
    assert others["weight_decay"] == 0 and others["initial_lr"] == weights["initial_lr"]
    factor = scheduler.lr_lambdas[0]
    assert factor.func is schedule
    steps = 714 // batch_size  # per epoch
    if schedule is train.cosine:
        assert factor.keywords == {"steps": epochs * steps, "warmup": 0.1}
    else:
        assert factor.keywords == {"steps_per_epoch": steps}
    assert [len(labels) for _, labels in batches] == [batch_size] * steps
    assert isinstance(network, train.MixedPrecision) == ("bfloat16" in arguments)
    if "focal" in arguments:
        assert loss is train.focal_loss
    else:
        assert loss.func is cross_entropy and loss.keywords == {"label_smoothing": 0.1}


def stop_before_training(monkeypatch):
    """Interrupt the run at its first epoch. Returns a list, which gets train_epoch's arguments."""
    seen = []

    def stop(*arguments):
        seen.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", stop)
    return seen


def test_a_recipe_sets_every_training_option(tmp_path, call, monkeypatch):
    recipe = {
        "optimizer": "rmsprop",
        "schedule": "cosine",
        "learning_rate": 0.25,
        "batch_size": 119,
        "epochs": 5,
        "warmup": 0.2,
        "weight_decay": 0.5,
        "loss": "cross-entropy",
        "label_smoothing": 0.3,
    }
    assert recipe.keys() == train.RECIPES["small"].keys()
    assert all(known.keys() <= recipe.keys() for known in train.RECIPES.values())
    monkeypatch.setitem(train.RECIPES, "mine", recipe)
    seen = stop_before_training(monkeypatch)
    call(train, *SMALL_DATA, "--recipe", "mine", "--out", tmp_path)
    _, batches, optimizer, scheduler, loss = seen
    assert type(optimizer) is torch.optim.RMSprop
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.25, 0.5)
    factor = scheduler.lr_lambdas[0]
    assert factor.func is train.cosine
    assert factor.keywords == {"steps": 5 * 6, "warmup": 0.2}  # 714 / 119 steps per epoch
    assert [len(labels) for _, labels in batches] == [119] * 6
    assert loss.keywords == {"label_smoothing": 0.3}


def test_a_recipe_replaces_settings_of_small(tmp_path, call, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "mine", {"loss": "focal", "epochs": 7})
    seen = stop_before_training(monkeypatch)
    call(train, *SMALL_DATA, "--recipe", "mine", "--out", tmp_path)
    _, batches, optimizer, scheduler, loss = seen
    small = train.RECIPES["small"]
    assert loss is train.focal_loss and type(optimizer) is torch.optim.SGD
    weights = optimizer.param_groups[0]
    assert weights["initial_lr"] == small["learning_rate"]
    assert weights["weight_decay"] == small["weight_decay"]
    steps = 714 // small["batch_size"]
    assert [len(labels) for _, labels in batches] == [small["batch_size"]] * steps
    expected = {"steps": 7 * steps, "warmup": small["warmup"]}
    assert scheduler.lr_lambdas[0].keywords == expected


def test_an_unknown_optimizer_schedule_or_loss_is_an_error():
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(cli.UserError, match="unknown optimizer 'adagrad': use sgd or rmsprop"):
        train.make_optimizer("adagrad", [])
    with pytest.raises(
        cli.UserError, match="unknown schedule 'step': use cosine or exponential"
    ):
        train.make_scheduler("step", optimizer, steps_per_epoch=1, epochs=1)
    with pytest.raises(
        cli.UserError, match="unknown loss 'hinge': use cross-entropy, focal, dice"
    ):
        train.make_loss("hinge")


@pytest.mark.parametrize("option", ("optimizer", "schedule"))
def test_a_recipe_with_an_unknown_name_ends_in_one_line(
    option, bars, tmp_path, call, monkeypatch
):
    recipe = {**train.RECIPES["small"], option: "surprise"}
    monkeypatch.setitem(train.RECIPES, "mine", recipe)
    code, _, err = call(train, "--recipe", "mine", "--out", tmp_path / "out")
    assert code == 2 and err.startswith(f"train.py: unknown {option} 'surprise': use ")
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_weight_decay_is_for_convolutions_and_linear_layers_only():
    model = MobileNetV2(num_classes=5)
    decayed, plain = train.parameter_groups(model.parameters(), 0.1, 4e-5)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (4e-5, 0)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert set(decayed["params"]) == {layer.weight for layer in layers}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(parameter.dim() == 1 for parameter in plain["params"])


def test_focal_loss_equals_its_formula_and_with_gamma_0_cross_entropy():
    logits = torch.randn(6, 4, dtype=torch.double)
    labels = torch.tensor([0, 1, 2, 3, 0, 0])
    p = [logits[n].exp()[labels[n]] / logits[n].exp().sum() for n in range(6)]
    expected = sum(-((1 - q) ** 2) * q.log() for q in p) / 6
    assert train.focal_loss(logits, labels) == pytest.approx(expected)
    torch.testing.assert_close(
        train.focal_loss(logits, labels, 0), cross_entropy(logits, labels)
    )
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: train.focal_loss(x, labels), logits)


def test_dice_loss_equals_its_formula():
    logits = torch.randn(6, 4, dtype=torch.double)
    labels = torch.tensor([0, 1, 2, 2, 0, 0])
    p = logits.softmax(1)
    dice = 0
    for c in range(4):  # class 3 is absent
        products = sum(p[n, c] for n in range(6) if labels[n] == c)
        squares = sum(p[n, c] ** 2 for n in range(6)) + sum(
            1 for n in range(6) if labels[n] == c
        )
        dice += (2 * products + 1) / (squares + 1) / 4
    assert train.dice_loss(logits, labels) == pytest.approx(1 - dice)
    perfect = 100 * one_hot(labels, 4).double()
    assert train.dice_loss(perfect, labels) == pytest.approx(0, abs=1e-9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: train.dice_loss(x, labels), logits)


# ----------------------------------------------------------------------------------------- the loop


def test_an_epoch_equals_plain_sgd_with_the_learning_rates_of_the_schedule():
    model = nn.Linear(4, 3)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (8, 8, 4)]
    optimizer = torch.optim.SGD(train.parameter_groups(model.parameters(), 0.5, 0.01))
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    loss = train.make_loss("cross-entropy", label_smoothing=0.1)
    row = train.train_epoch(model, batches, optimizer, scheduler, loss)

    loss_sum = correct = 0
    for step, (inputs, labels) in enumerate(batches):
        logits = twin(inputs)
        target = 0.9 * one_hot(labels, 3) + 0.1 / 3
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        twin.zero_grad()
        loss.backward()
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        with torch.no_grad():
            rate = 0.5 / (step + 1)
            twin.weight -= rate * (twin.weight.grad + 0.01 * twin.weight)
            twin.bias -= rate * twin.bias.grad
    torch.testing.assert_close(model.weight, twin.weight)
    torch.testing.assert_close(model.bias, twin.bias)
    assert row == {"train_loss": pytest.approx(loss_sum / 20), "train_top1": correct / 20}


@pytest.mark.parametrize(
    "loss, amp",
    (
        ("cross-entropy", "off"),
        ("focal", "off"),
        ("dice", "off"),
        ("cross-entropy", "bfloat16"),
    ),
)
def test_every_loss_learns_and_mixed_precision_computes_in_bfloat16(loss, amp):
    network = nn.Linear(8, 2)
    types = set()
    inputs = torch.randn(64, 8)
    labels = (inputs.sum(dim=1) > 0).long()
    batches = list(zip(inputs.split(8), labels.split(8)))
    before = train.validate(network, batches)
    hook = network.register_forward_hook(lambda layer, inputs, output: types.add(output.dtype))
    optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 1, 0))
    scheduler = LambdaLR(optimizer, partial(train.cosine, steps=10 * 8))
    wrapped = train.wrap(network, amp)
    for _ in range(10):
        train.train_epoch(wrapped, batches, optimizer, scheduler, train.make_loss(loss))
    hook.remove()
    after = train.validate(network, batches)
    assert types == {torch.float32 if amp == "off" else torch.bfloat16}
    assert wrapped(inputs).dtype == network.weight.dtype == torch.float32
    assert before["val_loss"] > 1.2 * after["val_loss"] and after["val_top1"] > 0.95


def test_fit_trains_until_a_stage_has_all_its_epochs_and_saves_each():
    network = nn.Linear(4, 6)
    batches = [(torch.randn(8, 4), torch.randint(6, (8,)))] * 3
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, partial(train.cosine, steps=6))
    history = [{"epoch": 1, "stage": "other"}, {"epoch": 2, "stage": "mine"}]
    saved = []
    modes = []

    def save(*arguments):
        assert arguments == (history, optimizer, scheduler)
        saved.append(len(history))

    def training_mode(model):
        modes.append(model)
        model.train()

    fit = partial(train.fit, network, batches, batches, optimizer, scheduler, cross_entropy)
    options = {
        "history": history,
        "save": save,
        "stage": "mine",
        "training_mode": training_mode,
    }
    fit(epochs=3, **options)
    fit(epochs=3, **options)  # nothing is left
    assert saved == [3, 4] and modes == [network] * 2
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["stage"] for row in history] == ["other", "mine", "mine", "mine"]
    names = ["epoch", "stage", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5"]
    assert list(history[-1]) == [*names, "learning_rate"]
    assert history[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    assert history[-1]["train_loss"] < history[-2]["train_loss"]


def test_each_epoch_and_process_has_a_seed_of_its_own(monkeypatch):
    seeds = set()
    combinations = list(
        itertools.product((0, 1, 2, 10**6), (1, 2, 10, 99_999), (0, 1, 10, 999))
    )
    for seed, epoch, rank in combinations:
        monkeypatch.setattr(data, "process_rank", lambda rank=rank: (rank, 1000))
        train.set_epoch_seed(seed, epoch)
        seeds.add(torch.initial_seed())
    assert len(seeds) == len(combinations)
    first = torch.rand(3)
    train.set_epoch_seed(seed, epoch)
    assert first.equal(torch.rand(3))


def test_a_long_pass_shows_its_progress(monkeypatch, capsys):
    now = iter([0, 10, 20, 30, 40])  # seconds
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    batches = [(torch.zeros(8, 3), torch.zeros(8))] * 4
    assert list(train.show_progress(batches, "features (train)")) == batches
    lines = [
        "features (train)  2 of 4 batches, 1 images/s",
        "features (train)  4 of 4 batches, 1 images/s",
    ]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.fixture
def bars(monkeypatch):
    """Replace the dataset by vertical and horizontal bars, distorted like letters."""
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    for image, label, position in zip(
        images[:, 0], labels, torch.randint(3, 11, (64,)).tolist()
    ):
        if label == 0:
            image = image.T
        image[position : position + 3, 2:14] = 255
    splits = dict.fromkeys(("train", "val"), (images, labels))
    preprocessing = data.SMALL_IMAGE | {"image_size": 16}
    classes = ["vertical", "horizontal"]
    bars = data.Data(classes, preprocessing, splits, augment=data.distort)
    monkeypatch.setattr(
        data, "load_for", lambda args, **how: replace(bars, batch_size=args.batch_size)
    )
    return bars


def test_training_learns(bars, tmp_path, call):
    bars.repeats = 4
    options = ("--batch-size", 16, "--learning-rate", 0.02, "--epochs", 4)
    assert (
        call(train, *options, "--width", 0.35, "--output-stride", 8, "--out", tmp_path)[0] == 0
    )
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    assert history[-1]["val_top1"] > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"]


# ------------------------------------------------------------------------------- the files of a run


def test_a_run_leaves_its_files(trained):
    files = ["best.pt", "curves.png", "last.pt", "log.csv"]
    assert sorted(os.listdir(trained)) == files
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [
        "epoch",
        "stage",
        "train_loss",
        "train_top1",
        "val_loss",
        "val_top1",
        "val_top5",
    ]
    assert [list(row) for row in rows] == [[*columns, "learning_rate"]] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    expected = [0.1 * train.cosine(step, 10) for step in (5, 10)]  # 714 // 128 steps per epoch
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(expected)
    model, checkpoint = load_checkpoint(trained / "last.pt")
    losses = [row["val_loss"] for row in checkpoint["history"]]
    assert [float(row["val_loss"]) for row in rows] == losses
    assert checkpoint["classes"] == list("0123456789")
    assert checkpoint["preprocessing"] == data.SMALL_IMAGE | {"image_size": 16}
    arch = {"num_classes": 10, "width_mult": 0.35, "dropout": 0.2, "output_stride": 32}
    assert model.arch == arch
    assert imread(trained / "curves.png").std() > 0


def test_best_is_the_latest_epoch_within_one_standard_error_of_the_highest_accuracy(
    tmp_path, capsys
):
    args = SimpleNamespace(out=tmp_path, data="something")
    history = []
    model = MobileNetV2(2, 0.35)
    # Standard error at 0.7: √(0.7 · 0.3 / 100) = 0.046
    splits = {"train": (None, torch.zeros(5)), "val": (None, torch.zeros(100))}
    dataset = data.Data(["a", "b"], data.SMALL_IMAGE, splits)
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = LambdaLR(optimizer, partial(train.cosine, steps=4))
    row = {"stage": "scratch", "train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0}
    for epoch, top1 in enumerate((0.5, 0.7, 0.66, 0.65), start=1):
        nn.init.constant_(model.classifier.bias, epoch)
        history.append(row | {"epoch": epoch, "val_top1": top1})
        train.save_epoch(args, model, dataset, history, optimizer, scheduler)
    for name, epoch in (("best.pt", 3), ("last.pt", 4)):
        model, checkpoint = load_checkpoint(tmp_path / name)
        assert model.classifier.bias.tolist() == [epoch] * 2
        assert checkpoint["history"] == history[:epoch]
        assert checkpoint["data"] == {"name": "something", "train": 5, "val": 100}
    marks = [line.endswith("  best.pt") for line in capsys.readouterr().out.splitlines()]
    assert marks == [True, True, True, False]


def test_the_same_command_gives_the_same_bytes_and_prints_one_line_per_epoch(
    trained, tmp_path, call
):
    code, out, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    for name in ("best.pt", "last.pt", "log.csv"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    lines = [line for line in out.splitlines() if not line.startswith("warning: ")]
    assert (code, err, len(lines)) == (0, "", 6)
    assert lines[0].startswith("digits: 10 classes, 2 × ")
    assert lines[1].startswith("batch size: 2 times the recipe's. Consider 2 times")
    assert all(line.startswith("scratch ") for line in lines[2:4])
    assert str(tmp_path) in lines[4]
    best = tmp_path / "best.pt"
    command = (
        f"python evaluate.py --checkpoint {best} --data digits --out {tmp_path}-evaluation"
    )
    assert lines[5] == f"next: {command}"


# ----------------------------------------------------------------------------- interrupt and resume


def test_an_interrupted_run_says_so_and_resumes_with_its_own_settings(
    trained, tmp_path, call, monkeypatch
):
    def interrupt_later(*arguments, predict=train.predict):
        if (tmp_path / "last.pt").exists():
            raise KeyboardInterrupt
        return predict(*arguments)

    with monkeypatch.context() as context:
        context.setattr(train, "predict", interrupt_later)
        code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and "interrupted" in err
    assert len(load_checkpoint(tmp_path / "last.pt")[1]["history"]) == 1
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    ignored = ("--seed", 1, "--learning-rate", 0.3, "--epochs", 9, "--recipe", "paper")
    assert call(train, "--resume", "--out", tmp_path, *ignored)[0] == 0
    assert_same_runs(tmp_path, trained)


def test_a_run_interrupted_while_it_writes_resumes_to_the_same_values(
    bars, tmp_path, call, monkeypatch, few_blocks
):
    bars.splits = {
        name: (images[:8], labels[:8]) for name, (images, labels) in bars.splits.items()
    }
    command = (
        *SMALL_NETWORK,
        "--batch-size",
        4,
        "--learning-rate",
        0.001,
        "--epochs",
        2,
        "--out",
    )
    errors = KeyboardInterrupt, partial(OSError, 28, "No space left on device")
    score = train.score
    written = []
    # With equal accuracies, every epoch writes best.pt.
    monkeypatch.setattr(train, "score", lambda *pair: score(*pair) | {"top1": 0.5})

    class HalfFile(io.FileIO):
        def write(self, contents):
            super().write(contents[: len(contents) // 2])
            raise errors[last % 2]()

    def open_whole_or_half(path, mode):
        written.append(path.name)
        return HalfFile(path, mode) if len(written) == last else open(path, mode)

    monkeypatch.setattr(mobilenetv2, "open", open_whole_or_half, raising=False)
    last = None
    assert call(train, *command, tmp_path / "whole")[0] == 0
    epoch = ["log.csv.tmp", "best.pt.tmp", "last.pt.tmp"]
    assert written == [*epoch, *epoch, "curves.png.tmp"]
    for last in range(3, 8):
        folder = tmp_path / str(last)
        written.clear()
        code, _, err = call(train, *command, folder)
        assert code == 2 and len(err.splitlines()) == 1 and len(written) == last
        resume = ("--resume",) if last > 3 else ()  # a run without last.pt starts again
        assert (folder / "last.pt").exists() == bool(resume)
        assert call(train, *command, folder, *resume)[0] == 0
        assert_same_runs(folder, tmp_path / "whole")


def run_in_two_parts(arguments, folder, call, monkeypatch, change=lambda: None):
    """Interrupt a run after its first epoch, call `change`, and resume it."""

    def interrupt(*arguments, save_epoch=train.save_epoch):
        save_epoch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(train, "save_epoch", interrupt)
        assert call(train, *arguments, "--out", folder)[0] == 2
    assert len(load_checkpoint(folder / "last.pt")[1]["history"]) == 1
    change()
    assert call(train, "--resume", "--out", folder)[0] == 0


def test_a_recipe_may_have_an_integer_as_learning_rate(
    bars, tmp_path, call, monkeypatch, few_blocks
):
    recipe = {**train.RECIPES["small"], "learning_rate": 1, "epochs": 2}
    monkeypatch.setitem(train.RECIPES, "mine", recipe)
    command = ("--recipe", "mine", *SMALL_NETWORK, "--batch-size", 16)
    assert call(train, *command, "--out", tmp_path / "whole")[0] == 0
    run_in_two_parts(command, tmp_path / "parts", call, monkeypatch)
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_a_metric_that_is_added_to_a_run_gets_its_own_column(
    bars, tmp_path, call, monkeypatch, few_blocks
):
    score = train.score

    def add_metric():
        monkeypatch.setattr(train, "score", lambda *pair: {"error": 0.25, **score(*pair)})

    command = ("--epochs", 2, "--batch-size", 16, *SMALL_NETWORK)
    run_in_two_parts(command, tmp_path, call, monkeypatch, add_metric)
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [set(row) for row in rows] == [set(history[1])] * 2
    assert [row["val_error"] for row in rows] == ["", "0.25"]
    for row, expected in zip(rows, history, strict=True):
        assert {name: row[name] for name in expected} == {
            name: str(value) for name, value in expected.items()
        }


@pytest.mark.parametrize(
    "name, change",
    [
        ("optimizer", lambda last: last["optimizer"]["param_groups"].pop()),
        ("optimizer", lambda last: last["optimizer"]["param_groups"][0]["params"].pop()),
        ("optimizer", lambda last: last["optimizer"].pop("state")),
        ("scheduler", lambda last: last["scheduler"].pop("lr_lambdas")),
        ("model", lambda last: last["settings"].update(width=0.5)),
    ],
)
def test_a_state_in_last_pt_that_does_not_fit_ends_in_one_line(
    name, change, trained, tmp_path, call
):
    path = tmp_path / "last.pt"
    last = torch.load(trained / "last.pt", weights_only=True)
    change(last)
    torch.save(last, path)
    before = path.read_bytes()
    code, _, err = call(train, "--resume", "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"train.py: '{path}': its {name} does not fit (")
    assert err.endswith("); use --overwrite\n")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


RUN_SCRIPT = (
    "import conftest, sys, train; sys.exit(conftest.call_script(train, *sys.argv[1:]))"
)


def test_a_killed_run_resumes_to_the_same_values(trained, tmp_path, call):
    """The moment differs from test to test; the end is always the same."""
    endings = signal.SIGKILL, signal.SIGTERM
    folders = [tmp_path / ending.name for ending in endings]
    command = (RUN_SCRIPT, *SMALL, *SMALL_NETWORK, "--out")
    path = (ROOT, ROOT / "tests")
    runs = [
        Python(*command, folder, path=path, output=tmp_path / f"{folder.name}-output")
        for folder in folders
    ]
    for ending, folder, run in zip(endings, folders, runs, strict=True):
        while not (folder / "last.pt").exists():
            assert run.process.is_alive(), run.wait()
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, 0.15))
        if run.process.is_alive():
            os.kill(run.process.pid, ending)
        code, out, err = run.wait()
    if "next: python" not in out:  # else SIGTERM came too late
        assert code == 2 and "interrupted" in err and len(err.splitlines()) == 1
    for folder in folders:
        assert len(load_checkpoint(folder / "last.pt")[1]["history"]) >= 1
        assert call(train, "--resume", "--out", folder)[0] == 0
        assert_same_runs(folder, trained)


def test_a_run_is_only_overwritten_on_request_and_a_complete_one_stays(
    trained, tmp_path, call
):
    folder = tmp_path / "run"
    other = tmp_path / "other"
    shutil.copytree(trained, folder)
    other.mkdir()
    shutil.copy(folder / "best.pt", other / "last.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = (*SMALL, *SMALL_NETWORK, "--out")
    for arguments, message in (
        ((folder,), "contains a run; use --resume, --overwrite or another --out"),
        ((other, "--resume"), "this script did not write it"),
    ):
        code, _, err = call(train, *command, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert call(train, *command, folder, "--resume")[0] == 0
    assert (folder / "last.pt").read_bytes() == before["last.pt"]
    assert call(train, *command, folder, "--overwrite", "--epochs", 1)[0] == 0
    assert len(load_checkpoint(folder / "last.pt")[1]["history"]) == 1
    assert (
        call(train, *command, tmp_path / "new", "--resume")[0] == 0
    )  # nothing to resume: a new run
    assert (tmp_path / "new" / "best.pt").read_bytes() == before["best.pt"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--epochs", "-1"), "argument --epochs: -1: use a value from 0 to 100000; see"),
        (("--epochs", "many"), "invalid int value: 'many'"),
        (("--batch-size", "1"), "argument --batch-size: 1: use a value from 2 to 65536; see"),
        (("--learning-rate", "nan"), "argument --learning-rate: nan: use a value from 0 to"),
        (("--width", "1000"), "argument --width: 1000: use a value from 0.05 to 4"),
        (
            ("--image-size", "1000000"),
            "argument --image-size: 1000000: use a value from 8 to 1024",
        ),
        (("--output-stride", "5"), "invalid choice"),
        (("--surprise", "5"), "unrecognized arguments"),
        (("--data", "letters"), "'letters': no such folder or dataset"),
        (("--device", "cuda:99"), "--device cuda:99: not available; use auto or cpu"),
        (("--device", "toaster"), "--device toaster: not available; use auto or cpu"),
        (("--device", "meta"), "--device meta: not available; use auto or cpu"),
        (("--data", "digits", "--per-class", "5000"), "--per-class 5000: a class has"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, message, tmp_path, call):
    code, _, err = call(train, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err
    assert len(err.splitlines()) == 1 and err.startswith("train.py: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ("make_loss", "score"))
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(
    broken, tmp_path, call, monkeypatch
):
    real = getattr(train, broken)
    calls = []

    def diverge_later(*arguments):
        """Break one of the 5 steps of the second epoch, or its validation."""
        if broken == "score":
            scores = real(*arguments)
            if (tmp_path / "last.pt").exists():
                scores["loss"] = math.nan
            return scores
        loss = real(*arguments)

        def loss_function(*pair):
            calls.append(pair)
            return loss(*pair) * (math.inf if len(calls) == 8 else 1)

        return loss_function

    monkeypatch.setattr(train, broken, diverge_later)
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    assert code == 2
    assert (
        err == "train.py: the loss is not finite: lower --learning-rate and use --overwrite\n"
    )
    for name in ("last.pt", "best.pt"):
        assert len(load_checkpoint(tmp_path / name)[1]["history"]) == 1


@pytest.mark.parametrize("broken", ("training", "validation"))
def test_a_diverged_loss_is_no_data_error(broken):
    network = nn.Linear(4, 6)
    images = {"training": torch.zeros(8, 4), "validation": torch.zeros(8, 4)}
    images[broken].fill_(math.nan)
    labels = torch.zeros(8, dtype=torch.long)
    train_batches = [(images["training"], labels)]
    val_batches = [(images["validation"], labels)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1)
    fit = partial(train.fit, network, train_batches, val_batches, optimizer, scheduler)
    saved = []
    history = []
    with pytest.raises(train.DivergedError, match="the loss is not finite") as caught:
        fit(cross_entropy, history=history, epochs=2, save=lambda *_: saved.append(1))
    assert isinstance(caught.value, cli.UserError)
    assert not isinstance(caught.value, data.DataError)
    assert history == saved == []


def test_an_output_folder_that_is_a_file_is_named(bars, tmp_path, call):
    (tmp_path / "file").write_text("")
    code, _, err = call(train, *SMALL_NETWORK, "--epochs", 1, "--out", tmp_path / "file")
    assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path / "file") in err


def test_too_little_memory_is_one_line(bars, tmp_path, call, monkeypatch):
    def refuse(*_):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
        )

    monkeypatch.setattr(train, "train_epoch", refuse)
    code, _, err = call(train, "--out", tmp_path)
    assert code == 2
    assert err == "train.py: not enough memory: lower --batch-size or --image-size\n"


# -------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("count", (2, 3))
def test_processes_share_each_split_and_take_the_same_number_of_steps(count, monkeypatch):
    split = torch.zeros(23, 1, 8, 8, dtype=torch.uint8), torch.arange(23)
    splits = {"train": split, "val": split}
    preprocessing = data.SMALL_IMAGE | {"image_size": 8}
    dataset = data.Data([], preprocessing, splits, augment=data.resize, batch_size=4 * count)
    seen = {"train": [], "val": []}
    steps = []
    for rank in range(count):
        monkeypatch.setattr(data, "process_rank", lambda rank=rank: (rank, count))
        for name, labels in seen.items():
            labels.extend(
                label for _, batch in dataset.batches(name) for label in batch.tolist()
            )
        steps.append([len(labels) for _, labels in dataset.batches("train", augmented=True)])
    assert sorted(seen["val"]) == list(range(23))
    assert sorted(seen["train"]) == list(range(23 - 23 % count))
    assert steps == [[4] * (23 // count // 4)] * count


def train_linear():
    """Train a small network for two steps, each on all 12 images. Returns its weights."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    split = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % 2
    preprocessing = data.SMALL_IMAGE | {"image_size": 8}
    dataset = data.Data(
        [], preprocessing, {"train": split}, augment=data.resize, repeats=2, batch_size=12
    )
    optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 0.01, 0))
    scheduler = LambdaLR(optimizer, partial(train.cosine, steps=2))
    wrapped = train.wrap(network, amp="off")
    train.train_epoch(
        wrapped, dataset.batches("train", augmented=True), optimizer, scheduler, cross_entropy
    )
    return network[1].weight.detach()


TWO_PROCESSES = """
import sys, torch
import conftest, data, train
from test_train import train_linear

epochs, save_epoch = [], train.save_epoch

def save_and_record(args, model, dataset, history, *rest):
    save_epoch(args, model, dataset, history, *rest)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    row = history[-1]
    epochs.append([state, row["val_loss"], row["val_top1"], row["val_top5"]])
    record = epochs, torch.initial_seed(), train_linear()
    rank, _ = data.process_rank()
    torch.save(record, args.out.with_name(f"{rank}.pt"))

train.save_epoch = save_and_record
assert conftest.call_script(train, *sys.argv[1:]) == 0
"""


def test_two_processes_train_one_network(tmp_path):
    command = (*SMALL, *SMALL_NETWORK, "--out", tmp_path / "run")
    path = (ROOT, ROOT / "tests")
    torchrun(2, TWO_PROCESSES, *command, output=tmp_path / "output", path=path)
    output = "".join((tmp_path / "output" / rank / "stdout").read_text() for rank in "01")
    epochs, seeds, weights = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert len(epochs[0]) == 2 and same(*epochs)  # weights, statistics and scores, bit for bit
    assert len([line for line in output.splitlines() if line.startswith("scratch ")]) == 2
    assert seeds[0] != seeds[1]  # each process has its own dropout
    for weight in weights:
        torch.testing.assert_close(weight, train_linear())  # every image counts the same
    model, checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert same(dict(model.state_dict()), epochs[0][-1][0])
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    scores = train.validate(model, dataset.batches("val"))  # every image counts once
    row = checkpoint["history"][-1]
    assert scores == {name: pytest.approx(row[name], rel=1e-5) for name in scores}


def test_resume_refuses_runs_of_another_script_and_changed_classes(trained, tmp_path, call):
    shutil.copytree(trained, tmp_path / "run")
    code, _, error = call(finetune, "--resume", "--out", tmp_path / "run")
    assert code == 2 and "this script did not write it" in error
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    last["classes"] = ["zero", *last["classes"][1:]]
    torch.save(last, tmp_path / "run" / "last.pt")
    code, _, error = call(train, "--resume", "--out", tmp_path / "run")
    assert code == 2 and error.count("\n") == 1
    assert "the classes of the data have changed" in error


def test_a_resumed_run_keeps_its_order_of_the_classes(trained, tmp_path, call, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    last["classes"] = last["classes"][::-1]
    torch.save(last, tmp_path / "run" / "last.pt")
    datasets = []
    monkeypatch.setattr(train, "finish", lambda args, dataset, _: datasets.append(dataset))
    assert call(train, "--resume", "--out", tmp_path / "run")[0] == 0
    usual = data.load_data("digits", {"image_size": 16})
    (dataset,) = datasets
    assert dataset.classes == usual.classes[::-1]
    for split, (_, labels) in usual.splits.items():
        assert torch.equal(dataset.splits[split][1], 9 - labels)


def test_a_run_of_no_epochs_is_refused(tmp_path, call):
    code, _, error = call(train, "--data", "digits", "--epochs", 0, "--out", tmp_path)
    message = "train.py: argument --epochs: 0: use at least 1; see --help\n"
    assert (code, error) == (2, message)
