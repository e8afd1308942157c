"""Training: the schedule, the groups, the loop, what a run leaves behind, and bad input."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, SMALL_NETWORK
from matplotlib.image import imread
from torch import nn

import data
import train
from mobilenetv2 import MobileNetV2, load_checkpoint


def test_the_schedule_is_a_warm_up_and_a_cosine():
    factors = [train.cosine(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10:] == pytest.approx([(1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)])
    assert max(factors) == factors[10] == 1 and min(factors) > 0
    assert train.cosine(0, 1) > 0  # the shortest of all runs learns, too


def test_weight_decay_is_for_convolutions_and_linear_layers_only():
    model = MobileNetV2(num_classes=5)
    decayed, plain = train.parameter_groups(model.parameters(), 0.1, 4e-5)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (4e-5, 0)
    expected = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(parameter.dim() == 1 for parameter in plain["params"])


def test_an_epoch_is_plain_sgd_with_the_rate_of_the_schedule():
    torch.manual_seed(0)
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(train.parameter_groups(model.parameters(), 0.5, 0.01), lr=0.5)
    steps = []
    scores = train.train_epoch(model, batches, optimizer, [1, 1 / 2, 1 / 3], 0.1, steps.append)

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
    assert steps == [1, 2, 3]


def test_a_run_leaves_its_files(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["best.pt", "curves.png", "last.pt", "log.csv"]
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["epoch", "stage", "train_loss", "train_top1", "val_loss", "val_top1", "seconds"]
    assert [list(row) for row in rows] == [columns] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    model, checkpoint = load_checkpoint(trained / "last.pt")
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in checkpoint["history"]]
    assert checkpoint["classes"] == list("0123456789") and checkpoint["preprocessing"]["image_size"] == 16
    assert model.arch == {"num_classes": 10, "width_mult": 0.35, "dropout": 0.2, "output_stride": 32}
    assert imread(trained / "curves.png").std() > 0


def test_best_is_the_epoch_with_the_best_validation(tmp_path, call):
    code, *_ = call(train, *SMALL, *SMALL_NETWORK, "--epochs", 4, "--out", tmp_path)
    assert code == 0
    history = load_checkpoint(tmp_path / "last.pt")[1]["history"]
    best = load_checkpoint(tmp_path / "best.pt")[1]["history"]
    assert len(history) == 4 and best == history[: len(best)]
    assert best[-1] == max(history, key=lambda row: (row["val_top1"], row["epoch"]))


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(trained, tmp_path, call):
    call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path / "again")
    for name in ("best.pt", "last.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
    call(train, *SMALL, *SMALL_NETWORK, "--seed", 1, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "last.pt").read_bytes() != (trained / "last.pt").read_bytes()


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
    run = train.Run(tmp_path, model, dataset)
    train.fit(run, "scratch", model, [model], split, split, optimizer, SimpleNamespace(label_smoothing=0.1), 4)
    assert run.history[-1]["val_top1"] > 0.9
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


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


@pytest.mark.parametrize("broken", ("train_epoch", "score"))
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(broken, tmp_path, call, monkeypatch):
    real, names = getattr(train, broken), {"train_epoch": "train_loss", "score": "loss"}

    def diverge_later(*arguments):
        result = real(*arguments)
        return result | {names[broken]: math.nan} if (tmp_path / "last.pt").exists() else result

    monkeypatch.setattr(train, broken, diverge_later)
    code, _, err = call(train, *SMALL, *SMALL_NETWORK, "--out", tmp_path)
    assert code == 2 and "the loss of scratch 2/2 is not finite: lower --learning-rate" in err
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
