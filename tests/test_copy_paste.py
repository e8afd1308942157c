"""Each piece of code below runs in another project that has only the three imports of HEADER."""

import ast
import builtins
import dis
import inspect
import types

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import mobilenetv2
from evaluate import class_activation_map, classification_report, confusion_matrix
from export import fold_batch_norm
from finetune import extract_features, freeze_batch_norm
from mobilenetv2 import InvertedResidual, MobileNetV2, convolution, initialise, make_divisible
from train import cosine, dice_loss, exponential, focal_loss, train_epoch

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional\n"


def source_of(piece):
    """Return the source of a function or class, or of a constant of mobilenetv2.py, given its name."""
    if not isinstance(piece, str):
        return inspect.getsource(piece)
    text = inspect.getsource(mobilenetv2)
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return next(
        ast.get_source_segment(text, node) for node in assignments if node.targets[0].id == piece
    )


def global_names(code):
    """Return the global names in `code` and in all functions inside it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(
        *(global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    )


def paste(pieces, imports=""):
    """Run the source of all pieces after HEADER, and return the namespace."""
    code = compile(HEADER + imports + "\n\n".join(map(source_of, pieces)), "pasted.py", "exec")
    namespace = types.SimpleNamespace()
    exec(code, vars(namespace))
    assert (
        global_names(code) <= vars(namespace).keys() | vars(builtins).keys()
    )  # also on lines that do not run
    return namespace


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


# -------------------------------------------------------------------------- one function per piece: its exercise


def use_block(pasted):
    block, images = pasted.InvertedResidual(16, 24, stride=2, expansion=6), torch.randn(2, 16, 8, 8)
    assert block(images).shape == (2, 24, 4, 4) and block(images).min() < 0  # linear
    assert sum(p.numel() for p in block.parameters()) == 16 * 96 + 9 * 96 + 96 * 24 + 2 * (
        96 + 96 + 24
    )
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
    batches = DataLoader(
        TensorDataset(torch.randn(64, 10) + 2 * torch.eye(10)[labels], labels),
        batch_size=16,
        shuffle=True,
    )
    model = nn.Linear(10, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = LambdaLR(optimizer, lambda step: 0.99**step)
    rows = [
        pasted.train_epoch(model, batches, optimizer, scheduler, functional.cross_entropy)
        for _ in range(6)
    ]
    assert (
        rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]
        and rows[-1]["train_top1"] > rows[0]["train_top1"]
    )
    assert scheduler.last_epoch == 6 * 4


def use_losses(pasted):
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(
        pasted.focal_loss(logits, labels, gamma=0), functional.cross_entropy(logits, labels)
    )
    even = torch.zeros(2, 2)  # p = 1/2
    assert pasted.focal_loss(even, torch.tensor([0, 1])).item() == pytest.approx(
        0.25 * 0.693147, rel=1e-5
    )
    assert pasted.dice_loss(even, torch.tensor([0, 1])).item() == pytest.approx(
        1 - (2 * 0.5 + 1) / (0.5 + 1 + 1)
    )
    assert pasted.dice_loss(
        99 * functional.one_hot(labels).float(), labels
    ).item() == pytest.approx(0, abs=1e-6)


def use_schedules(pasted):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, rates = LambdaLR(optimizer, lambda step: pasted.cosine(step, steps=20)), []
    for _ in range(21):
        rates += scheduler.get_last_lr()
        optimizer.step(), scheduler.step()
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
    backbone, images, labels = small_network(), torch.randn(10, 3, 6, 6), torch.arange(10)
    dataset = TensorDataset(images, labels)
    features, order = pasted.extract_features(backbone, DataLoader(dataset, batch_size=4))
    assert features.shape == (10, 8) and torch.equal(order, labels) and not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(images).detach())


def use_freeze_batch_norm(pasted):
    model = small_network().train()
    pasted.freeze_batch_norm(model)
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 6, 6) + 5)
    assert torch.equal(model[1].running_mean, before)
    assert [layer.training for layer in model[:3]] == [True, False, True]


def use_fold_batch_norm(pasted):
    model, images = (
        nn.Sequential(convolution(3, 8, 3), convolution(8, 8, 3, 2, groups=8, activation=False)),
        torch.randn(2, 3, 8, 8),
    )
    for _ in range(3):
        model(images)  # updates the running statistics
    folded = pasted.fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def use_class_activation_map(pasted):
    model, images, classes = nn.Module(), torch.randn(2, 3, 8, 8), torch.tensor([4, 1])
    model.stem, model.blocks = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()
    model.head, model.classifier = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)
    maps = pasted.class_activation_map(model, images, classes)
    features = model.head(model.blocks(model.stem(images))).mean(dim=(2, 3))
    logits = model.classifier(features)[[0, 1], classes] - model.classifier.bias[classes]
    assert maps.shape == (2, 4, 4) and logits.abs().min() > 1e-3
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits.detach())


CONSTANTS = ("BOTTLENECKS", "STEM_CHANNELS", "HEAD_CHANNELS", "STRIDES_DROPPED")
PIECES = {  # exercise: pieces
    use_block: (convolution, InvertedResidual),
    use_network: (
        *CONSTANTS,
        make_divisible,
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


@pytest.mark.parametrize(
    "exercise", PIECES, ids=lambda exercise: exercise.__name__.removeprefix("use_")
)
def test_pasted_code_runs(exercise):
    exercise(paste(PIECES[exercise], "import copy\n" if exercise is use_fold_batch_norm else ""))
