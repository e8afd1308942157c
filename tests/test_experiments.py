"""The experiments end in their tables and pictures, tried on the smallest data that there are."""

import csv
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_data import write_image

import finetune
import train
from mobilenetv2 import MobileNetV2

sys.path.insert(0, str(ROOT / "experiments"))
few_labels, resnet18, ablation = (importlib.import_module(name) for name in ("few_labels", "resnet18", "ablation"))


def test_few_labels_compares_four_ways_that_the_scripts_accept(trained, tmp_path, call, monkeypatch):
    scripts, accuracies = [], iter(range(100))

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
    assert [row["way"] for row in rows[::3]] == ["from scratch", "frozen head", "last blocks", "everything"]
    assert rows[1] == {
        "way": "from scratch", "labels a class": "50", "accuracy": "2.50", "deviation": "0.71", "seconds": "1",
    }  # fmt: skip
    assert (tmp_path / "few_labels.png").exists()


def test_few_labels_ends_in_one_line_when_a_run_fails_or_nothing_is_there(trained, tmp_path, call, monkeypatch):
    monkeypatch.setattr(few_labels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    options = ("--seeds", 2, "--out", tmp_path, "--data", "digits")
    code, _, error = call(few_labels, *options, "--checkpoint", trained / "best.pt")
    assert code == 2 and error == "few_labels.py: train.py failed, see above\n"  # what that said goes to the terminal
    code, _, error = call(few_labels, *options, "--checkpoint", tmp_path / "nothing.pt")
    assert code == 2 and error.startswith("few_labels.py: no checkpoint at")


def test_resnet18_goes_through_the_same_two_stages(tmp_path, call, monkeypatch):
    for name in ("cat/1", "cat/2", "cat/3", "dog/1", "dog/2", "dog/3"):
        write_image(tmp_path / f"{name}.png", (0, 0, 0))
    monkeypatch.setattr(resnet18, "learn_letters", lambda *_: None)  # 20 seconds
    options = ("--data", tmp_path, "--image-size", 8, "--head-epochs", 1, "--epochs", 1)
    code, out, _ = call(resnet18, *options)
    header, ours, theirs = (line.split() for line in out.splitlines()[-3:])
    assert code == 0 and header == ["network", "accuracy", "parameters", "multiply-adds", "time"]
    assert (ours[0], ours[2], theirs[0], theirs[2]) == ("MobileNetV2", "2,226,434", "ResNet18", "11,177,538")


def count_shortcuts(model, images):
    """Additions that run for some images."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(images)
    return sum(event.name == "aten::add" for event in profile.events())


def test_ablation_changes_what_it_says():
    images, blocks = torch.randn(2, 3, 32, 32), {}
    for name, (change, _) in ablation.VARIANTS.items():
        torch.manual_seed(0)
        model = MobileNetV2(5, 0.35, output_stride=16).eval()
        weights = list(model.state_dict())
        change(model)
        assert list(model.state_dict()) == weights
        blocks[name] = count_shortcuts(model, images), bool((model.blocks(model.stem(images)) < 0).any())
    assert blocks == {
        "the paper's": (10, True),
        "ReLU6 in bottlenecks": (10, False),
        "wide shortcuts": (10, True),
        "no shortcuts": (0, True),
    }


def test_wide_shortcuts_add_what_the_last_expansion_gave():
    blocks = MobileNetV2(5, 0.35).eval().blocks[4:6]  # both from 16 channels to 16, at the same size
    x = torch.randn(1, 16, 8, 8)
    wide = blocks[0].expand(x)
    between = blocks[0].project(blocks[0].depthwise(wide))
    expected = blocks[1].project(blocks[1].depthwise(blocks[1].expand(between) + wide))
    assert torch.equal(ablation.WideShortcuts(*blocks)(x), expected)


def test_ablation_ends_in_a_table_and_a_picture(tmp_path, call, monkeypatch):
    monkeypatch.setattr(ablation, "VARIANTS", dict(list(ablation.VARIANTS.items())[2:3]))
    options = ("--data", "digits", "--epochs", 1, "--seeds", 2, "--width", 0.35, "--out", tmp_path)
    code, out, _ = call(ablation, *options)
    assert code == 0 and out.endswith(f"wrote ablation.csv and ablation.png to {tmp_path}\n")
    with open(tmp_path / "ablation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["variant"] == "wide shortcuts" and 0 < float(row["test accuracy"]) <= 100
    assert f"{row['variant']:22}{row['test accuracy']:>7} ± {row['deviation']}%" in out
    assert (tmp_path / "ablation.png").exists()
