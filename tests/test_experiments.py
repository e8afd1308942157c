"""The experiments write their tables and pictures; tried on very small data."""

import csv
import importlib
import itertools
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from processes import Python
from test_data import write_image

import data
import finetune
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint

sys.path.insert(0, str(ROOT / "experiments"))
few_labels, resnet18, ablation, benchmark, hero, samples = (
    importlib.import_module(name)
    for name in ("few_labels", "resnet18", "ablation", "benchmark", "hero", "samples")
)


def test_few_labels_runs_four_ways_with_valid_options(trained, tmp_path, call, monkeypatch):
    scripts = []
    accuracies = iter(range(100))

    def measure(command, args, budget, seed):
        scripts.append((command[0], budget, seed))
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", [command[0], *command[1:], "--help"])
            with pytest.raises(SystemExit) as stop:
                {"train.py": train, "finetune.py": finetune}[command[0]].main()
            assert stop.value.code == 0
        return next(accuracies) / 100, 1.0

    monkeypatch.setattr(few_labels, "measure", measure)
    options = ("--checkpoint", trained / "best.pt", "--seeds", 2, "--out", tmp_path)
    code, out, _ = call(few_labels, *options)
    assert code == 0 and len(scripts) == 4 * 3 * 2
    assert scripts[:3] == [("train.py", 10, 0), ("train.py", 10, 1), ("train.py", 50, 0)]
    with open(tmp_path / "few_labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ways = ["from scratch", "classifier only", "last 11 blocks", "whole network"]
    assert [row["way"] for row in rows[::3]] == ways
    assert rows[1] == {
        "way": "from scratch",
        "labels per class": "50",
        "accuracy": "2.50",
        "std": "0.71",
        "seconds": "1",
    }
    assert (tmp_path / "few_labels.png").exists()
    results, budgets = hero.read_results(tmp_path / "few_labels.csv")
    assert budgets == [10, 50, None]
    assert list(results) == list(itertools.product(ways, budgets))
    assert results["from scratch", 50] == (2.5, 0.71)
    options = ("--csv", tmp_path / "few_labels.csv", "--out", tmp_path / "hero.png")
    assert call(hero, *options)[0] == 0 and (tmp_path / "hero.png").exists()


def test_hero_says_which_script_measures_its_lines(tmp_path, call):
    code, _, error = call(hero, "--csv", tmp_path / "nothing.csv")
    assert code == 2 and error.endswith("run experiments/few_labels.py first\n")
    assert error.startswith(f"hero.py: '{tmp_path / 'nothing.csv'}' cannot be used")


def test_samples_begin_with_the_most_confident_mistakes():
    labels = torch.zeros(40, dtype=torch.long)
    logits = torch.zeros(40, 2)
    logits[:, 0] = torch.linspace(1, 2, 40)
    for index, confidence in ((7, 3.0), (3, 5.0), (9, 4.0)):
        logits[index, 1] = confidence
    indices = samples.choose(logits, labels).tolist()
    assert indices[:3] == [3, 9, 7] and len(set(indices)) == len(indices) == 12


def test_samples_are_drawn_for_digits_only(trained, tmp_path, call, few_digits, monkeypatch):
    monkeypatch.setattr(samples, "ROWS", 1)
    options = ("--checkpoint", trained / "best.pt", "--out", tmp_path / "digits.png")
    assert call(samples, *options)[0] == 0 and (tmp_path / "digits.png").exists()
    network = MobileNetV2(2, 0.35)
    save_checkpoint(tmp_path / "cats.pt", network, ["cat", "dog"], data.SMALL_IMAGE)
    code, _, error = call(samples, "--checkpoint", tmp_path / "cats.pt", "--out", tmp_path)
    assert code == 2 and error.endswith("has other classes: use a network for digits\n")


def test_few_labels_measures_the_best_epoch_of_a_command(trained, tmp_path, monkeypatch):
    spent = []

    def run(command, stdout):
        begun = time.perf_counter()
        interpreter, script, *options = command
        assert interpreter == sys.executable
        code, _, error = Python(script, *options, output=tmp_path / "output").wait()
        assert error == ""
        spent.append(time.perf_counter() - begun)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(few_labels.subprocess, "run", run)
    args = SimpleNamespace(data="digits", data_dir=tmp_path, image_size=None)
    options = ["--epochs", "0", "--classifier-epochs", "2"]
    command = ["finetune.py", "--checkpoint", trained / "best.pt", *options]
    accuracy, seconds = few_labels.measure(command, args, budget=10, seed=0)
    assert 0 < accuracy < 1 and seconds > spent[0] > 0  # the time of the whole command


def test_few_labels_reports_a_failed_run_in_one_line(trained, tmp_path, call, monkeypatch):
    failed = SimpleNamespace(returncode=2)
    monkeypatch.setattr(few_labels.subprocess, "run", lambda *_, **__: failed)
    options = ("--seeds", 2, "--out", tmp_path, "--data", "digits")
    code, _, error = call(few_labels, *options, "--checkpoint", trained / "best.pt")
    assert code == 2 and error == "few_labels.py: train.py failed: see the message above\n"
    code, _, error = call(few_labels, *options, "--checkpoint", tmp_path / "nothing.pt")
    assert code == 2 and error.startswith("few_labels.py: cannot load")
    for option in (("--seeds", 1), ("--epochs", 0)):
        code, _, error = call(few_labels, *option)
        assert code == 2 and error.startswith(
            f"few_labels.py: argument {option[0]}: {option[1]}:"
        )
        assert "use a value from" in error and error.count("\n") == 1


def test_resnet18_runs_the_same_two_stages(tmp_path, call, monkeypatch):
    for name in ("cat/1", "cat/2", "cat/3", "dog/1", "dog/2", "dog/3"):
        write_image(tmp_path / f"{name}.png", (0, 0, 0))
    monkeypatch.setattr(resnet18, "train_network", lambda *_: None)  # 20 seconds
    options = ("--data", tmp_path, "--image-size", 8, "--classifier-epochs", 1, "--epochs", 1)
    code, out, _ = call(resnet18, *options)
    header, ours, theirs = (line.split() for line in out.splitlines()[-3:])
    columns = "network accuracy parameters multiply-adds time"
    assert code == 0 and header == columns.split()
    assert (ours[0], ours[2]) == ("MobileNetV2", "2,226,434")
    assert (theirs[0], theirs[2]) == ("ResNet18", "11,177,538")
    assert out.count("classifier 1  validation accuracy") == 2
    assert out.count("blocks 2  validation accuracy") == 2


def count_shortcuts(model, images):
    """Count the additions of a forward pass."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile, torch.no_grad():
        model(images)
    return sum(event.name == "aten::add" for event in profile.events())


def test_ablation_changes_the_blocks_but_no_weights():
    images = torch.randn(2, 3, 32, 32)
    blocks = {}
    for name, variant in ablation.VARIANTS.items():
        torch.manual_seed(0)
        model = MobileNetV2(5, 0.5, output_stride=16).eval()
        weights = list(model.state_dict())
        variant["change"](model)
        assert list(model.state_dict()) == weights
        negative = (model.blocks(model.stem(images)) < 0).any().item()
        blocks[name] = count_shortcuts(model, images), negative
    assert blocks == {
        "the paper's": (10, True),
        "ReLU6 in bottlenecks": (10, False),
        "wide shortcuts": (10, True),
        "no shortcuts": (0, True),
    }


def test_wide_shortcuts_add_the_last_expansion():
    blocks = MobileNetV2(5, 0.35).eval().blocks[4:6]  # both 16 -> 16 channels, same size
    x = torch.randn(1, 16, 8, 8)
    wide = blocks[0].expand(x)
    between = blocks[0].project(blocks[0].depthwise(wide))
    expected = blocks[1].project(blocks[1].depthwise(blocks[1].expand(between) + wide))
    assert torch.equal(ablation.WideShortcuts(*blocks)(x), expected)


def test_ablation_writes_a_table_and_a_picture(tmp_path, call, monkeypatch, few_digits):
    one = {"wide shortcuts": ablation.VARIANTS["wide shortcuts"]}
    monkeypatch.setattr(ablation, "VARIANTS", one)
    options = ("--data", "digits", "--epochs", 1, "--seeds", 2, "--width", 0.35)
    code, out, _ = call(ablation, *options, "--out", tmp_path)
    assert code == 0 and out.endswith(f"wrote ablation.csv and ablation.png to {tmp_path}\n")
    with open(tmp_path / "ablation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["variant"] == "wide shortcuts" and 0 < float(row["test accuracy"]) <= 100
    assert f"{row['variant']:22}{row['test accuracy']:>7} ± {row['std']}%" in out
    assert (tmp_path / "ablation.png").exists()


def test_ablation_trains_as_train_py_does(tmp_path, call, monkeypatch, few_digits):
    options = ("--data", "digits", "--epochs", 2, "--width", 0.35, "--out", tmp_path)
    assert call(train, *options, "--seed", 1)[0] == 0
    scores = []
    validate = train.validate

    def record(*batches):
        scores.append(validate(*batches))
        return scores[-1]

    monkeypatch.setattr(train, "validate", record)
    args = SimpleNamespace(data="digits", data_dir=tmp_path, width=0.35, epochs=2)
    curve, _ = ablation.measure(ablation.change_nothing, args, seed=1)
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert curve == [float(row["val_top1"]) for row in rows]
    assert [row["val_loss"] for row in scores] == [float(row["val_loss"]) for row in rows]


@pytest.mark.usefixtures("few_digits")
def test_resnet18_fine_tunes_as_finetune_py_does(trained, tmp_path, call, monkeypatch):
    # Each epoch is better than the one before, so both keep the last.
    accuracies = itertools.count(1)

    def better(logits, labels):
        return {"loss": 1.0, "top1": next(accuracies) / 100}

    monkeypatch.setattr(train, "score", better)
    options = ("--data", "digits", "--checkpoint", trained / "best.pt", "--out", tmp_path)
    assert call(finetune, *options, "--classifier-epochs", 1, "--epochs", 1)[0] == 0
    expected, _ = load_checkpoint(tmp_path / "best.pt")
    model, checkpoint = load_checkpoint(trained / "best.pt")
    model.to(memory_format=torch.channels_last)
    monkeypatch.setattr(resnet18, "replace_classifier", lambda *_: None)  # it knows the digits
    args = SimpleNamespace(
        data="digits", data_dir=tmp_path, classifier_epochs=1, epochs=1, seed=0
    )
    resnet18.transfer(model, checkpoint["preprocessing"], args)
    weights = zip(model.state_dict().values(), expected.state_dict().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in weights)


def test_keep_best_keeps_the_later_of_equal_epochs():
    model = torch.nn.Linear(1, 1, bias=False)
    best = {}
    history = []
    kept = []
    for epoch, accuracy in enumerate((0.5, 0.25, 0.5, 0.75, 0.5), start=1):
        torch.nn.init.constant_(model.weight, epoch)
        history.append({"stage": "scratch", "epoch": epoch, "val_top1": accuracy})
        ablation.keep_best(model, best, history, None, None)
        kept.append(best["weight"].item())
    assert kept == [1, 1, 3, 4, 4]


def test_benchmark_fine_tunes_both_ways(tmp_path, call, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    narrow = partial(benchmark.mobilenet_v2, width_mult=0.35)
    monkeypatch.setattr(benchmark, "mobilenet_v2", narrow)
    for name in ("cat/1", "cat/2", "cat/3", "dog/1", "dog/2", "dog/3"):
        write_image(tmp_path / f"{name}.png", (0, 0, 0))
    code, out, error = call(benchmark, "finetuning", "--photos", tmp_path)
    assert (code, error) == (0, "") and out.count("times as fast") == 2
