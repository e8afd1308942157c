"""Each piece of code below runs in another project that has only the three imports of HEADER.

Two pieces need one more import. A project that imports the scripts keeps its own settings.
"""

import ast
import builtins
import dis
import inspect
import types

import pytest
import torch
from processes import Python
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import mobilenetv2
from evaluate import class_activation_map, classification_report, confusion_matrix
from export import fold_batch_norm
from finetune import extract_features, freeze_batch_norm
from mobilenetv2 import (
    InvertedResidual,
    MobileNetV2,
    convolution,
    initialise,
    make_divisible,
    row_strides,
)
from train import cosine, dice_loss, exponential, focal_loss, train_epoch

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional\n"


def source_of(piece):
    """Return the source of a function or class, or of a named constant of mobilenetv2.py."""
    if not isinstance(piece, str):
        return inspect.getsource(piece)
    text = inspect.getsource(mobilenetv2)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == piece:
            return ast.get_source_segment(text, node)
    raise AssertionError(f"mobilenetv2.py has no constant {piece}")


def global_names(code):
    """Return the global names in `code` and in all functions inside it."""
    names = {
        step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"
    }
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names.update(global_names(part))
    return names


def paste(pieces, imports=""):
    """Run the source of all pieces after HEADER, and return the namespace."""
    sources = "\n\n".join(source_of(piece) for piece in pieces)
    code = compile(HEADER + imports + sources, "pasted.py", "exec")
    namespace = types.SimpleNamespace()
    exec(code, vars(namespace))
    # Also the names on lines that do not run.
    assert global_names(code) <= vars(namespace).keys() | vars(builtins).keys()
    return namespace


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


# --------------------------------------------------------- one function per piece: its exercise


def use_block(pasted):
    block = pasted.InvertedResidual(16, 24, stride=2, expansion=6)
    images = torch.randn(2, 16, 8, 8)
    outputs = block(images)
    assert outputs.shape == (2, 24, 4, 4) and outputs.min() < 0  # linear
    weights = 16 * 96 + 9 * 96 + 96 * 24
    norms = 2 * (96 + 96 + 24)
    assert sum(p.numel() for p in block.parameters()) == weights + norms
    block = pasted.InvertedResidual(16, 16, stride=1, expansion=6)
    nn.init.zeros_(block.project.norm.weight)
    assert torch.equal(block(images), images)  # the shortcut
    assert pasted.convolution(16, 8, 1)(100 * images).max() <= 6


def use_network(pasted):
    model = pasted.MobileNetV2(num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 3_504_872
    model = pasted.MobileNetV2(num_classes=7, width_mult=0.35, output_stride=8)
    logits = model(torch.randn(4, 3, 32, 32))
    functional.cross_entropy(logits, torch.arange(4)).backward()
    assert logits.shape == (4, 7) and all(p.grad.abs().sum() > 0 for p in model.parameters())


def use_train_epoch(pasted):
    labels = torch.arange(64) % 4
    dataset = TensorDataset(torch.randn(64, 10) + 2 * torch.eye(10)[labels], labels)
    batches = DataLoader(dataset, batch_size=16, shuffle=True)
    model = nn.Linear(10, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = LambdaLR(optimizer, lambda step: 0.99**step)
    loss_function = functional.cross_entropy
    rows = []
    for _ in range(6):
        rows.append(pasted.train_epoch(model, batches, optimizer, scheduler, loss_function))
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
    assert rows[-1]["train_top1"] > rows[0]["train_top1"]
    assert scheduler.last_epoch == 6 * 4


def use_losses(pasted):
    logits = torch.randn(5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    without_focus = pasted.focal_loss(logits, labels, gamma=0)
    torch.testing.assert_close(without_focus, functional.cross_entropy(logits, labels))
    even = torch.zeros(2, 2)  # p = 1/2
    loss = pasted.focal_loss(even, torch.tensor([0, 1])).item()
    assert loss == pytest.approx(0.25 * 0.693147, rel=1e-5)
    loss = pasted.dice_loss(even, torch.tensor([0, 1])).item()
    assert loss == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 1 + 1))
    sure = 99 * functional.one_hot(labels).float()
    assert pasted.dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-6)


def use_schedules(pasted):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = LambdaLR(optimizer, lambda step: pasted.cosine(step, steps=20))
    rates = []
    for _ in range(21):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2]) and rates[11] == pytest.approx(1)
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[20] == pytest.approx(0)
    assert [pasted.exponential(step, 2) for step in (0, 1, 2, 19)] == [1, 1, 0.98, 0.98**9]


def use_metrics(pasted):
    labels, predictions = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    confusion = pasted.confusion_matrix(labels, predictions, 2)
    assert confusion.tolist() == [[2, 1], [0, 1]]
    report = pasted.classification_report(confusion)
    assert [row["precision"] for row in report["per_class"]] == [1, 0.5]
    assert report["macro"]["recall"] == pytest.approx((2 / 3 + 1) / 2)


def use_extract_features(pasted):
    backbone = small_network()
    images = torch.randn(10, 3, 6, 6)
    labels = torch.arange(10)
    dataset = TensorDataset(images, labels)
    features, order = pasted.extract_features(backbone, DataLoader(dataset, batch_size=4))
    assert (
        features.shape == (10, 8) and torch.equal(order, labels) and not features.requires_grad
    )
    torch.testing.assert_close(features, backbone.eval()(images).detach())


def use_freeze_batch_norm(pasted):
    model = small_network().train()
    pasted.freeze_batch_norm(model)
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 6, 6) + 5)
    assert torch.equal(model[1].running_mean, before)
    assert [layer.training for layer in model[:3]] == [True, False, True]


def use_fold_batch_norm(pasted):
    last = convolution(8, 8, 3, 2, groups=8, activation=False)
    model = nn.Sequential(convolution(3, 8, 3), last)
    images = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        model(images)  # updates the running statistics
    folded = pasted.fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def use_class_activation_map(pasted):
    model = nn.Module()
    images = torch.randn(2, 3, 8, 8)
    classes = torch.tensor([4, 1])
    model.stem = nn.Conv2d(3, 8, 3, 2, 1)
    model.blocks = nn.ReLU()
    model.head = nn.Conv2d(8, 16, 1)
    model.classifier = nn.Linear(16, 5)
    maps = pasted.class_activation_map(model, images, classes)
    features = model.head(model.blocks(model.stem(images))).mean(dim=(2, 3))
    logits = model.classifier(features)[[0, 1], classes] - model.classifier.bias[classes]
    assert maps.shape == (2, 4, 4) and logits.abs().min() > 1e-3
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits.detach())


PIECES = {  # exercise: pieces
    use_block: (convolution, InvertedResidual),
    use_network: (
        "BOTTLENECKS",
        "STEM_CHANNELS",
        "HEAD_CHANNELS",
        make_divisible,
        row_strides,
        convolution,
        InvertedResidual,
        MobileNetV2,
        initialise,
    ),
    use_train_epoch: (train_epoch,),
    use_losses: (focal_loss, dice_loss),
    use_schedules: (cosine, exponential),
    use_metrics: (confusion_matrix, classification_report),
    use_extract_features: (extract_features,),
    use_freeze_batch_norm: (freeze_batch_norm,),
    use_fold_batch_norm: (fold_batch_norm,),
    use_class_activation_map: (class_activation_map,),
}
IMPORTS = {use_schedules: "import math\n", use_fold_batch_norm: "import copy\n"}


@pytest.mark.parametrize(
    "exercise", PIECES, ids=lambda exercise: exercise.__name__.removeprefix("use_")
)
def test_pasted_code_runs(exercise):
    exercise(paste(PIECES[exercise], IMPORTS.get(exercise, "")))


# ----------------------------------------------------------- importing the scripts as modules


SETTINGS = """
import locale, logging, signal, sys, warnings
import matplotlib, numpy, torch, torchvision
from PIL import Image, ImageFile
from matplotlib import figure, font_manager, pyplot, style
from torch import distributed, export
from torch.utils import data as torch_data

def settings():
    return {
        "warnings": list(warnings.filters),
        "logging": [list(logging.getLogger().filters), list(logging.getLogger().handlers)],
        "matplotlib": dict(matplotlib.rcParams),
        "PIL": [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()],
        "signals": [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)],
        "output": [sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors],
    }

before = settings()
import mobilenetv2, cli, data, evaluate, train, finetune, export
after = settings()
changed = [name for name in before if before[name] != after[name]]
assert changed == [], changed
"""


def test_importing_the_scripts_changes_no_setting(tmp_path):
    """A project's warnings, log, pictures, random numbers and signals stay as they are."""
    code, _, error = Python(SETTINGS, output=tmp_path / "output").wait()
    assert code == 0, error
