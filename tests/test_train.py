"""Training: the schedule, the groups, the loop, what a run leaves behind, and bad input."""

import copy
import csv
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, SMALL_NETWORK, call_script
from matplotlib.image import imread
from torch import nn

import data
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint


class Vectors(data.Split):
    """Inputs (N, D) of a small network, as a split."""

    def batches(self, epoch=None):
        for indices in self.indices(epoch):
            yield self.images[indices], self.labels[indices]


def test_the_schedule_is_a_warm_up_and_a_cosine():
    factors = [train.cosine(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10:] == pytest.approx([(1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)])
    assert max(factors) == factors[10] == 1 and min(factors) > 0
    assert train.cosine(0, 1) > 0  # the shortest of all runs learns, too


def test_the_schedules_of_the_recipes_step_by_step():
    whole = [factor for epoch in range(3) for factor in train.schedule("cosine", epoch, 3, 7)]
    assert whole == [train.cosine(step, 21) for step in range(21)]
    paper = [train.schedule("exponential", epoch, 300, 5) for epoch in range(4)]
    assert paper == [[pytest.approx(0.98**epoch)] * 5 for epoch in range(4)]
    assert 0.045 * train.schedule("exponential", 34, 300, 1)[0] == pytest.approx(
        0.0226, abs=1e-4
    )  # halved in 34 epochs


@pytest.mark.parametrize(
    "arguments, optimizer, expected",
    [
        ((), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}),
        (("--recipe", "cosine"), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 4e-5}),
        (
            ("--recipe", "paper"),
            torch.optim.RMSprop,
            {"lr": 0.045, "momentum": 0.9, "alpha": 0.9, "weight_decay": 4e-5},
        ),
        (("--recipe", "paper", "--learning-rate", 0.01), torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
        (("--optimizer", "rmsprop"), torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.9}),
    ],
)
def test_a_recipe_is_what_its_source_says_and_options_override_it(
    arguments, optimizer, expected, tmp_path, call, monkeypatch
):
    seen = []
    monkeypatch.setattr(train, "fit", lambda *arguments: seen.extend(arguments))
    monkeypatch.setattr(train.Run, "finish", lambda run: None)
    code, *_ = call(train, "--data", "digits", *arguments, "--out", tmp_path)
    assert code == 0 and type(seen[-2]) is optimizer
    assert {name: seen[-2].param_groups[0][name] for name in expected} == expected
    assert seen[-2].param_groups[1]["weight_decay"] == 0


def test_focal_loss_is_its_formula_and_with_gamma_0_cross_entropy():
    logits, labels = torch.randn(6, 4, dtype=torch.double), torch.tensor([0, 1, 2, 3, 0, 0])
    p = [logits[n].exp()[labels[n]] / logits[n].exp().sum() for n in range(6)]
    assert train.focal_loss(logits, labels) == pytest.approx(sum(-((1 - q) ** 2) * q.log() for q in p) / 6)
    torch.testing.assert_close(train.focal_loss(logits, labels, 0), nn.functional.cross_entropy(logits, labels))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: train.focal_loss(x, labels), logits)


def test_dice_loss_is_its_formula():
    logits, labels = torch.randn(6, 4, dtype=torch.double), torch.tensor([0, 1, 2, 2, 0, 0])  # class 3 is absent
    p = logits.softmax(1)
    dice = 0
    for c in range(4):
        products = sum(p[n, c] for n in range(6) if labels[n] == c)
        squares = sum(p[n, c] ** 2 for n in range(6)) + sum(1 for n in range(6) if labels[n] == c)
        dice += (2 * products + 1) / (squares + 1) / 4
    assert train.dice_loss(logits, labels) == pytest.approx(1 - dice)
    assert train.dice_loss(100 * nn.functional.one_hot(labels, 4).double(), labels) == pytest.approx(0, abs=1e-9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: train.dice_loss(x, labels), logits)


def test_weight_decay_is_for_convolutions_and_linear_layers_only():
    model = MobileNetV2(num_classes=5)
    decayed, plain = train.parameter_groups(model.parameters(), 0.1, 4e-5)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (4e-5, 0)
    expected = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(parameter.dim() == 1 for parameter in plain["params"])


def test_padding_tiny_maps_changes_no_number(monkeypatch):
    plain, padded = MobileNetV2(3, 0.35), MobileNetV2(3, 0.35)
    padded.load_state_dict(plain.state_dict())
    sizes, pad = [], train.functional.pad
    monkeypatch.setattr(train.functional, "pad", lambda x, border: sizes.append(x.shape[-1]) or pad(x, border))
    for _ in range(2):  # once for each stage of fine-tuning
        train.pad_tiny_maps(padded)
    images = torch.randn(4, 3, 64, 64)
    for model in (plain, padded):
        torch.manual_seed(1)
        model(images).square().sum().backward()
    assert sizes == [2, 2, 2]  # the last three blocks
    for ours, theirs in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max().item())
    copied = copy.deepcopy(padded).eval()
    nn.init.zeros_(copied.blocks[16].depthwise.conv.weight)  # a copy computes with its own weights
    torch.testing.assert_close(padded.eval()(images), plain.eval()(images))
    assert not copied(images).allclose(padded(images))


def test_an_epoch_is_plain_sgd_with_the_rate_of_the_schedule():
    torch.manual_seed(0)
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(train.parameter_groups(model.parameters(), 0.5, 0.01), lr=0.5)
    steps, loss = [], train.choose_loss(SimpleNamespace(loss="cross-entropy", label_smoothing=0.1))
    scores = train.train_epoch(model, batches, optimizer, [1, 1 / 2, 1 / 3], loss, lambda *step: steps.append(step))

    losses, right = [], 0
    for step, (inputs, labels) in enumerate(batches):
        logits = twin(inputs)
        target = torch.full((8, 3), 0.1 / 3).scatter_(1, labels[:, None], 0.9 + 0.1 / 3)
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        twin.zero_grad()
        loss.backward()
        losses.append(loss.item())
        right += (logits.argmax(1) == labels).sum().item()
        with torch.no_grad():
            rate = 0.5 / (step + 1)
            twin.weight -= rate * (twin.weight.grad + 0.01 * twin.weight)
            twin.bias -= rate * twin.bias.grad
    torch.testing.assert_close(model.weight, twin.weight)
    torch.testing.assert_close(model.bias, twin.bias)
    assert scores == {"train_loss": pytest.approx(sum(losses) / 3), "train_top1": right / 24}
    assert [step for step, _ in steps] == [1, 2, 3]
    assert [loss.item() for _, loss in steps] == pytest.approx(losses)


def test_a_run_leaves_its_files(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["best.pt", "curves.png", "last.pt", "log.csv"]
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "stage", "train_loss", "train_top1", "val_loss", "val_top1", "learning_rate"]
    assert [list(row) for row in rows] == [columns] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    steps = 714 // 64 + 1
    expected = [0.1 * train.cosine(last, 2 * steps) for last in (steps - 1, 2 * steps - 1)]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(expected)
    model, checkpoint = load_checkpoint(trained / "last.pt")
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in checkpoint["history"]]
    assert checkpoint["classes"] == list("0123456789") and checkpoint["preprocessing"]["image_size"] == 16
    assert model.arch == {"num_classes": 10, "width_mult": 0.35, "dropout": 0.2, "output_stride": 32}
    assert imread(trained / "curves.png").std() > 0


def train_nothing(folder, resume=False):
    """Three epochs that end with these validation accuracies; the classifier's bias tells which epoch a file is of."""
    args = SimpleNamespace(out=folder, resume=resume, overwrite=False)
    run = train.Run(args, MobileNetV2(2, 0.35), SimpleNamespace(classes=["a", "b"], preprocessing=data.SMALL))
    for epoch in range(run.begin_stage("scratch", 4, torch.optim.SGD(run.model.parameters())), 4):
        run.begin_epoch(1, 1)
        nn.init.constant_(run.model.classifier.bias, epoch + 1)
        scores = {"train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0, "val_top1": (0.5, 0.7, 0.7, 0.6)[epoch]}
        run.end_epoch(scores, 1)
    for name, epoch in (("best.pt", 3), ("last.pt", 4)):
        model, checkpoint = load_checkpoint(folder / name)
        assert model.classifier.bias.tolist() == [epoch] * 2 and checkpoint["history"] == run.history[:epoch]


def test_best_is_the_epoch_with_the_best_validation_and_among_equals_the_latest(tmp_path):
    train_nothing(tmp_path)


@pytest.mark.parametrize("written", range(1, 7))  # last and best of three epochs, last of the fourth
def test_a_run_that_ends_between_two_files_goes_on_to_the_same(written, tmp_path, monkeypatch):
    saved = []

    def save_or_end(path, *arguments, **more):
        if len(saved) == written:
            raise OSError(28, "No space left on device")
        saved.append(path.name)
        save_checkpoint(path, *arguments, **more)

    with monkeypatch.context() as context:
        context.setattr(train, "save_checkpoint", save_or_end)
        with pytest.raises(OSError):
            train_nothing(tmp_path)
    train_nothing(tmp_path, resume=True)


def test_the_same_command_gives_the_same_bytes(trained, tmp_path, call):
    call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path / "again")
    for name in ("best.pt", "last.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_training_learns(tmp_path):
    """Bars that stand and bars that lie, distorted like letters: the whole loop tells them apart."""
    images = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    for index, position in enumerate(torch.randint(3, 11, (64,)).tolist()):
        bar = images[index, 0] if index % 2 else images[index, 0].T
        bar[position : position + 3, 2:14] = 255
    preprocessing = data.SMALL | {"image_size": 16}
    common = {"batch_size": 16, "seed": 0, "preprocessing": preprocessing, "augment": data.distort}
    split = data.ArraySplit(images=images, labels=torch.arange(64) % 2, repeats=4, **common)
    dataset = data.Data(["stands", "lies"], preprocessing, split, split, None)
    model = MobileNetV2(2, 0.35, output_stride=8).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(train.parameter_groups(model.parameters(), 0.02, 4e-5), momentum=0.9)
    args = SimpleNamespace(out=tmp_path, resume=False, overwrite=False, seed=0, amp="off", schedule="cosine")
    args.loss, args.label_smoothing, args.patience = "cross-entropy", 0.1, None
    run = train.Run(args, model, dataset)
    train.fit(run, "scratch", model, [model], split, split, optimizer, 4)
    assert run.history[-1]["val_top1"] > 0.9
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


@pytest.mark.parametrize(
    "loss, amp",
    (("cross-entropy", "off"), ("focal", "off"), ("dice", "off"), ("cross-entropy", "bfloat16"), ("focal", "float16")),
)
def test_every_loss_learns_and_amp_computes_in_fewer_bits(loss, amp):
    network, types, rows = nn.Linear(8, 2), set(), []
    network.register_forward_hook(lambda layer, inputs, output: types.add(output.dtype) if layer.training else None)
    inputs = torch.randn(64, 8)
    split = Vectors(images=inputs, labels=(inputs.sum(dim=1) > 0).long(), batch_size=8, seed=0)
    args = SimpleNamespace(loss=loss, label_smoothing=0, amp=amp, schedule="cosine", seed=0)
    run = SimpleNamespace(args=args, epoch_started=0, end_epoch=lambda row, seconds: rows.append(row))
    run.begin_stage, run.begin_epoch, run.progress = lambda *_: 0, lambda *_: None, lambda *_: None
    run.is_stale = lambda: False
    optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 1, 0), lr=1)
    train.fit(run, "scratch", network, [network], split, split, optimizer, 10)
    assert types == {torch.float32 if amp == "off" else getattr(torch, amp)} and network.weight.dtype == torch.float32
    assert rows[0]["val_loss"] > 1.2 * rows[-1]["val_loss"] and rows[-1]["val_top1"] > 0.95


def test_gradients_too_small_for_float16_are_scaled():
    """A ten-millionth of the loss with ten million times the learning rate is the same step, unless the gradients become 0."""
    networks = [nn.Linear(8, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    batches = [(torch.randn(8, 8), torch.randint(0, 2, (8,)))]
    for network, size, amp in zip(networks, (1, 1e-7), (None, torch.float16), strict=True):
        optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 1 / size, 0))
        loss = lambda logits, labels, size=size: size * nn.functional.cross_entropy(logits, labels)  # noqa: E731
        train.train_epoch(network, batches, optimizer, [1.0], loss, lambda *_: None, amp)
    torch.testing.assert_close(networks[0].weight, networks[1].weight, rtol=0.02, atol=0.002)


def test_progress_is_one_line_an_epoch_in_a_file(tmp_path, call):
    _, out, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    lines = out.splitlines()
    assert "\r" not in out and err == ""
    assert sum(line.startswith("scratch ") for line in lines) == 2
    assert "images/s" in lines[1] and "ETA" in lines[1]
    assert str(tmp_path) in lines[-3] and lines[-2].startswith("next: python evaluate.py")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--epochs", "-1"), "'-1' is not from 1 to"),
        (("--epochs", "many"), "invalid int value: 'many'"),
        (("--batch-size", "1"), "'1' is not from 2 to"),
        (("--learning-rate", "nan"), "'nan' is not from 0"),
        (("--width", "1000"), "'1000' is not from 0.05 to 4"),
        (("--image-size", "1000000"), "'1000000' is not from 8 to 1024"),
        (("--output-stride", "5"), "invalid choice"),
        (("--surprise", "5"), "unrecognized arguments"),
        (("--data", "letters"), "'letters' is neither a data set"),
        (("--device", "cuda:99"), "--device cuda:99 is not to be had here"),
        (("--device", "toaster"), "--device toaster is not to be had here"),
        (("--device", "meta"), "--device meta is not to be had here"),
        (("--data", ""), "'' is neither a data set"),
        (("--data", "digits", "--per-class", "5000"), "--per-class 5000"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, message, tmp_path, call):
    code, out, err = call(train, *arguments, "--out", tmp_path / "out")
    assert code == 2 and message in err
    assert len(err.splitlines()) == 1 and err.startswith("train.py: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ("choose_loss", "score"))
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(broken, tmp_path, call, monkeypatch):
    real, calls = getattr(train, broken), []

    def diverge_later(*arguments):
        """Of 12 steps an epoch, the fifth of the second epoch loses itself; or the second validation."""
        if broken == "score":
            return real(*arguments) | ({"loss": math.nan} if (tmp_path / "last.pt").exists() else {})
        loss = real(*arguments)
        return lambda logits, labels: loss(logits, labels) * (math.inf if calls.append(0) or len(calls) == 17 else 1)

    monkeypatch.setattr(train, broken, diverge_later)
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    where = {"choose_loss": "step 12", "score": "validation"}[broken]
    assert code == 2 and f"the loss of scratch 2/2, {where}, is not finite: lower --learning-rate" in err
    for name in ("last.pt", "best.pt"):
        assert len(load_checkpoint(tmp_path / name)[1]["history"]) == 1


def test_an_interrupted_run_says_so_and_keeps_its_files(tmp_path, call, monkeypatch):
    real = train.predict

    def interrupt_later(*arguments):
        if (tmp_path / "last.pt").exists():
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train, "predict", interrupt_later)
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and "interrupted" in err
    assert len(load_checkpoint(tmp_path / "last.pt")[1]["history"]) == 1
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2


def test_an_output_folder_that_is_a_file_is_named(tmp_path, call):
    (tmp_path / "file").write_text("")
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path / "file")
    assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path / "file") in err


def test_too_little_memory_is_one_line(tmp_path, call, monkeypatch):
    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(train, "train_epoch", refuse)
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    assert code == 2 and err == "train.py: not enough memory: lower --batch-size or --image-size\n"


# ------------------------------------------------------------------------------------------- interrupt and resume

RUN_SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import data, train, finetune
from mobilenetv2 import CheckpointError
data.DIGITS_REPEATS = 1
script = {"train": train, "finetune": finetune}[sys.argv.pop(1)]
data.run(script.main, CheckpointError)
"""
SMALL_RUN = (*SMALL, *SMALL_NETWORK, "--epochs", "3")


def start(*arguments, launcher=()):
    command = [sys.executable, *launcher, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=data.DIGITS_FILE.parent, **pipes)


def same(first, second):
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first.equal(second) if isinstance(first, torch.Tensor) else first == second


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of SMALL_RUN, not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call_script(train, *SMALL_RUN, "--out", folder) == 0
    return folder


def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, call):
    """Killed at moments that differ from test run to test run; wherever they are, the end is the same."""
    endings, errors = (signal.SIGKILL, signal.SIGTERM), {}
    folders = [tmp_path / ending.name for ending in endings]
    runs = [start("-c", RUN_SCRIPT, "train", *SMALL_RUN, "--out", folder) for folder in folders]
    for ending, folder, run in zip(endings, folders, runs, strict=True):
        while not (folder / "last.pt").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        time.sleep(random.SystemRandom().uniform(0, 0.5))
        run.send_signal(ending)
        errors[ending] = run.communicate()[1]
    if runs[1].returncode != 0:  # 0: the signal came too late
        assert runs[1].returncode == 2 and "interrupted" in errors[signal.SIGTERM]
        assert len(errors[signal.SIGTERM].splitlines()) == 1
    for folder in folders:
        assert len(load_checkpoint(folder / "last.pt")[1]["history"]) >= 1
        assert call(train, *SMALL_RUN, "--out", folder, "--resume")[0] == 0
        for name in ("last.pt", "best.pt"):
            first, second = (torch.load(path / name, weights_only=True) for path in (folder, whole))
            assert same(first, second), name
        assert (folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_resume_wants_the_same_settings_and_another_run_is_not_overwritten(trained, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = (*SMALL, *SMALL_NETWORK, "--out", folder)
    (tmp_path / "best").mkdir()
    shutil.copy(folder / "best.pt", tmp_path / "best" / "last.pt")
    checkpoint = torch.load(folder / "last.pt", weights_only=True) | {"classes": list("abcdefghij")}
    (tmp_path / "classes").mkdir()
    torch.save(checkpoint, tmp_path / "classes" / "last.pt")
    for arguments, message in (
        ((), "holds a run: --resume it, --overwrite it, or name another --out"),
        (
            ("--resume", "--seed", 1, "--learning-rate", 0.3),
            "was made with --seed 0, --learning-rate 0.1: give the same",
        ),
        (("--resume", "--out", tmp_path / "none"), "no run to resume in"),
        (("--resume", "--out", tmp_path / "best"), "is not the last.pt of a run"),
        (("--resume", "--out", tmp_path / "classes"), "has other classes or another network"),
    ):
        code, _, error = call(train, *command, *arguments)
        assert code == 2 and message in error and len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert call(train, *command, "--resume", "--workers", 0)[0] == 0  # a run that is complete stays as it is
    assert (folder / "last.pt").read_bytes() == before["last.pt"]
    assert call(train, *command, "--overwrite", "--seed", 1)[0] == 0
    assert (folder / "last.pt").read_bytes() != before["last.pt"]


# ------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("count, batch_size", ((2, 64), (3, 50), (4, 8)))
def test_processes_share_every_batch_and_see_each_image_once(count, batch_size, monkeypatch):
    split = replace(data.load_data("digits", batch_size=batch_size).train, repeats=1)
    for epoch in (None, 3):
        monkeypatch.setattr(data, "processes", lambda: (0, 1))
        alone = split.indices(epoch)
        shares = []
        for rank in range(count):
            monkeypatch.setattr(data, "processes", lambda rank=rank: (rank, count))
            shares.append(split.indices(epoch))
            assert epoch is None or (len(shares[-1]) == split.steps() and all(len(batch) > 1 for batch in shares[-1]))
        seen = torch.cat([batch for share in shares for batch in share])
        assert seen.sort().values.equal(torch.arange(len(split)))
        first = torch.cat([share[0] for share in shares]).sort().values
        assert first.equal(alone[0].sort().values)  # the batch is the same; only who computes it differs


def test_fewer_images_than_processes_need_are_refused(monkeypatch):
    monkeypatch.setattr(data, "processes", lambda: (0, 3))
    split = Vectors(images=torch.randn(5, 3), labels=torch.arange(5) % 2, batch_size=6, seed=0)
    with pytest.raises(data.DataError, match="lower --nproc-per-node"):
        train.fit(SimpleNamespace(args=None), "scratch", None, [], split, split, None, 1)


def train_linear(wrap=lambda network: network):
    """An epoch of two steps, in which two processes have shares of 4 and 3 images, then of 3 and 2. The weights."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    split = Vectors(images=torch.randn(12, 3), labels=torch.arange(12) % 2, batch_size=7, seed=0)
    optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 1, 0))
    train.train_epoch(
        wrap(network), split.batches(0), optimizer, [1.0] * 2, nn.functional.cross_entropy, lambda *_: None
    )
    return network.weight.detach()


TWO_PROCESSES = """
import hashlib, os, sys, torch
torch.set_num_threads(1)
import data, train
from test_train import train_linear
data.DIGITS_REPEATS = 1
end_epoch = train.Run.end_epoch

def end_and_note(run, row, seconds):
    end_epoch(run, row, seconds)
    state = b"".join(tensor.numpy().tobytes() for tensor in run.model.state_dict().values())
    with open(f"{run.folder}/{data.processes()[0]}.txt", "a") as file:
        print(hashlib.sha256(state).hexdigest(), row, file=file)
    torch.save((torch.initial_seed(), train_linear(train.DistributedDataParallel)), f"{run.folder}/{data.processes()[0]}.pt")

train.Run.end_epoch = end_and_note
data.run(train.main)
"""


def test_two_processes_train_one_network(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}\n{TWO_PROCESSES}"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    process = start(
        tmp_path / "script.py", *SMALL_RUN, "--epochs", 2, "--out", tmp_path / "run", launcher=map(str, launcher)
    )
    output, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    first, second = ((tmp_path / "run" / f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second and len(first) == 2  # weights, statistics and scores, bit by bit, after each epoch
    assert len([line for line in output.splitlines() if line.startswith("scratch 2/2")]) == 1  # one speaks for both
    seeds, weights = zip(*(torch.load(tmp_path / "run" / f"{rank}.pt") for rank in (0, 1)), strict=True)
    assert seeds[0] != seeds[1]  # each drops out what it draws
    for weight in weights:
        torch.testing.assert_close(weight, train_linear())  # every image counts the same
    model, checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    scores = train.score(*train.predict(model, dataset.val))
    assert checkpoint["history"][-1]["val_top1"] == scores["top1"]  # each image counted, and once
    assert checkpoint["history"][-1]["val_loss"] == pytest.approx(scores["loss"], rel=1e-5)
