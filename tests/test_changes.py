"""The six changes on docs/experiments.md: each diff fits the scripts, and does what it says."""

import csv
import json
import re
import shutil

import numpy
import pytest
import torch
from conftest import ROOT, SMALL_DATA, SMALL_NETWORK
from processes import Python

from mobilenetv2 import count_macs, count_parameters

PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
DIFFS = dict(
    re.findall(r"^### (.*?)\n.*?```diff\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
)
# Files that each change may touch.
PLACES = {
    "A dataset": {"data.py"},
    "A recipe": {"train.py"},
    "A loss": {"train.py"},
    "A metric": {"evaluate.py"},
    "An export format": {"export.py"},
    "Another network": {"mobilenetv1.py", "train.py", "mobilenetv2.py"},
}
TRAINING = ("train.py", *SMALL_DATA, *SMALL_NETWORK, "--device", "cpu", "--epochs", 1)
# Runs scripts one after another. Pictures are only counted, a thread verifies exported files, and
# digits are not repeated: all this saves seconds.
PROGRAM = """
import concurrent.futures
import json
import runpy
import sys

from matplotlib.figure import Figure

import data


def count_panels(figure, path, **options):
    print(f"{path.name} has {len(figure.axes)} panels")


def start_thread(count, context):
    return concurrent.futures.ThreadPoolExecutor(count)


Figure.savefig = count_panels
concurrent.futures.ProcessPoolExecutor = start_thread
data.DATASETS["digits"]["repeats"] = 1
for command in json.loads(sys.argv[1]):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
"""


def read_diff(diff):
    """Read a unified diff. Returns [(file, old lines, new lines)], one per hunk."""
    hunks = []
    for line in diff.splitlines():
        if line.startswith("--- "):
            continue
        if line.startswith("+++ "):
            name = line.removeprefix("+++ ")
        elif line == "@@":
            hunks.append((name, [], []))
        else:
            _, old, new = hunks[-1]
            kind = line[:1] or " "  # an editor may remove the space of an empty line
            assert kind in " +-", line
            if kind != "+":
                old.append(line[1:])
            if kind != "-":
                new.append(line[1:])
    return hunks


def apply(diff, folder):
    """Apply a diff to the scripts in `folder`. The old lines of each hunk must occur once."""
    for name, old, new in read_diff(diff):
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if old else []
        places = range(len(lines) - len(old) + 1)
        found = [place for place in places if lines[place : place + len(old)] == old]
        assert len(found) == 1, f"{name} has {len(found)} places for: {old}"
        lines[found[0] : found[0] + len(old)] = new
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.fixture
def changed(tmp_path):
    """changed("A loss", commands...) applies a change, and runs the commands. Returns stdout."""

    def change_and_run(title, *commands):
        folder = tmp_path / "copy"
        folder.mkdir()
        for path in (*ROOT.glob("*.py"), ROOT / "digits.npz"):
            shutil.copy(path, folder)
        apply(DIFFS[title], folder)
        words = [[str(word) for word in command] for command in commands]
        process = Python(
            PROGRAM,
            json.dumps(words),
            output=tmp_path / "output",
            cwd=folder,
            path=(folder,),
        )
        code, out, error = process.wait()
        assert (code, error) == (0, "")
        return out

    return change_and_run


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_page_has_the_six_changes_in_their_places():
    assert DIFFS.keys() == PLACES.keys()
    for title, diff in DIFFS.items():
        assert {name for name, _, _ in read_diff(diff)} == PLACES[title]


def test_hunks_that_do_not_fit_are_an_error(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\none\n")
    for old in ("three", "one"):  # no place, two places
        with pytest.raises(AssertionError, match="places for"):
            apply(f"--- a.py\n+++ a.py\n@@\n-{old}\n+new\n", tmp_path)
    apply("--- a.py\n+++ a.py\n@@\n two\n-one\n+new\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\ntwo\nnew\n"


def test_new_dataset_trains(changed, tmp_path):
    arrays = {}
    for split, count in (("train", 24), ("val", 16), ("test", 8)):
        arrays[f"{split}_images"] = numpy.full((count, 28, 28, 3), 99, dtype=numpy.uint8)
        arrays[f"{split}_labels"] = numpy.arange(count, dtype=numpy.uint8)[:, None] % 8
    numpy.savez(tmp_path / "bloodmnist.npz", **arrays)
    options = ("--data", "bloodmnist", "--data-dir", tmp_path)
    out = changed("A dataset", (*TRAINING, "--out", tmp_path / "run", *options))
    assert out.startswith("bloodmnist: 8 classes, 1 × 1 steps, on cpu\n")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["classes"][::7] == ["basophil", "platelet"]
    assert best["preprocessing"]["channels"] == 3 and len(read_log(tmp_path / "run")) == 1


def test_new_recipe_sets_its_settings(changed, tmp_path):
    changed("A recipe", (*TRAINING, "--out", tmp_path, "--recipe", "torchvision"))
    settings = torch.load(tmp_path / "last.pt", weights_only=True)["settings"]
    expected = {
        "recipe": "torchvision",
        "optimizer": "sgd",
        "schedule": "exponential",
        "batch_size": 256,
        "weight_decay": 4e-5,
        "label_smoothing": 0.0,
    }
    assert {name: settings[name] for name in expected} == expected
    (row,) = read_log(tmp_path)
    assert float(row["learning_rate"]) == pytest.approx(0.98 * 0.045)  # after one epoch


def test_new_loss_trains(changed, tmp_path):
    changed("A loss", (*TRAINING, "--out", tmp_path, "--loss", "brier"))
    (row,) = read_log(tmp_path)
    # Ten equal probabilities: 0.9² + 9 · 0.1² = 0.9. Cross-entropy would have log 10 = 2.3.
    assert float(row["train_loss"]) == pytest.approx(0.9, abs=0.1)
    assert float(row["val_loss"]) == pytest.approx(2.3, abs=0.1)  # always cross-entropy


def test_new_metric_is_in_the_log_the_curves_and_the_metrics(changed, tmp_path):
    evaluation = ("evaluate.py", *SMALL_DATA, "--checkpoint", tmp_path / "best.pt")
    evaluation += ("--device", "cpu", "--out", tmp_path / "evaluation")
    out = changed("A metric", (*TRAINING, "--out", tmp_path), evaluation)
    (row,) = read_log(tmp_path)
    assert 0 < float(row["val_macro_recall"]) < 1
    assert out.count("curves.png has 4 panels") == 2
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text("utf-8"))
    assert metrics["macro_recall"] == metrics["macro"]["recall"] > 0
    assert f"macro_recall {metrics['macro_recall']:.4f}" in out


def test_new_format_is_written_and_verified(changed, trained, tmp_path):
    options = ("--checkpoint", trained / "best.pt", "--out", tmp_path / "export")
    changed("An export format", ("export.py", *SMALL_DATA, *options, "--formats", "weights"))
    report = json.loads((tmp_path / "export" / "report.json").read_text("utf-8"))
    assert report["formats"].keys() == {"model.weights.pt"}
    result = report["formats"]["model.weights.pt"]
    assert result["largest_difference"] < 1e-4 and result["accuracy"] > 0
    contents = torch.load(tmp_path / "export" / "model.weights.pt", weights_only=True)
    assert json.loads(contents["classes"]) == list("0123456789")
    kinds = {name.rpartition(".")[2] for name in contents["weights"]}
    assert kinds == {"weight", "bias"}  # BatchNorm is folded


def test_new_network_trains_and_its_checkpoints_load(changed, tmp_path):
    best = tmp_path / "best.pt"
    options = (*SMALL_DATA, "--checkpoint", best, "--device", "cpu")
    epochs = ("--classifier-epochs", 1, "--epochs", 1)
    export = ("export.py", *SMALL_DATA, "--checkpoint", best, "--formats", "torchscript")
    out = changed(
        "Another network",
        (*TRAINING, "--out", tmp_path),
        ("evaluate.py", *options, "--explain", "--out", tmp_path / "evaluation"),
        ("finetune.py", *options, *epochs, "--out", tmp_path / "finetune"),
        (*export, "--out", tmp_path / "export"),
    )
    assert "explanation.png has" in out and "wrote model.torchscript.pt" in out
    network = new_network()(10, 0.35)
    for path in (best, tmp_path / "finetune" / "best.pt"):
        network.load_state_dict(torch.load(path, weights_only=True)["model"])


def new_network():
    """Return the class MobileNetV1 of the page."""
    hunks = read_diff(DIFFS["Another network"])
    (lines,) = [new for name, _, new in hunks if name == "mobilenetv1.py"]
    names = {}
    exec("\n".join(lines), names)
    return names["MobileNetV1"]


def test_new_network_costs_as_much_as_the_page_and_the_paper_say():
    network = new_network()()
    parameters = count_parameters(network)
    macs = count_macs(network, 224)
    assert f"{parameters:,} parameters and {macs:,} multiply-adds" in PAGE
    # Table 8 of arXiv:1704.04861: 4.2 and 569 million.
    assert (round(parameters / 1e6, 1), round(macs / 1e6)) == (4.2, 569)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_new_network_has_the_output_stride(stride):
    network = new_network()(10, 0.35, output_stride=stride).eval()
    maps = network.blocks(network.stem(torch.zeros(1, 3, 64, 64)))
    assert maps.shape[2:] == (64 // stride, 64 // stride)
