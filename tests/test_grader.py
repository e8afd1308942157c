"""Typical wrong networks, as patches of the right one: test_mobilenetv2.py must fail each, and say what is wrong with it."""

import inspect
import re
import subprocess
import sys
import types

import pytest
import test_mobilenetv2
import torch
import torchvision
from conftest import ROOT, load_class
from torch import nn
from torch.nn import functional

SOURCE = (ROOT / "mobilenetv2.py").read_text(encoding="utf-8")
TESTS = [test for name, test in vars(test_mobilenetv2).items() if name.startswith("test_")]
GRADING = [test for test in TESTS if "network_class" in inspect.signature(test).parameters]

# Places in mobilenetv2.py that several patches change.
STRIDE_64, STRIDE_96 = ("(6, 64, 4, 2)", "(6, 64, 4, 1)"), ("(6, 96, 3, 1)", "(6, 96, 3, 2)")
POOLING = "return x.mean(dim=(2, 3))"
FORWARD = "return self.classifier(x)"
CLASSIFIER = "self.classifier = nn.Linear(head_channels, num_classes)"
SHORTCUT = "return x + out if self.use_residual else out"
NORM = "layers.norm = nn.BatchNorm2d(out_channels)"
DEPTHWISE = "self.depthwise = convolution(wide, wide, 3, stride, groups=wide)"
EXPAND = "nn.Identity() if expansion == 1 else convolution(in_channels, wide, 1)"
PROJECT = "self.project = convolution(wide, out_channels, 1, activation=False)"
HEAD = "self.head = convolution(channels, head_channels, 1)"
REPEAT = "stride = row_stride if repeat == 0 else 1"

# what is wrong: (what the message says, (old text, new text), ...)
WRONG = {
    "the typo of Table 2 in the paper's first version": ("typo of Table 2", STRIDE_64, STRIDE_96),
    "one block a row": ("says how often a row is repeated", ("for repeat in range(repeats)", "for repeat in range(1)")),
    "a block too many": ("56 layers with weights, expected 53", ("(6, 64, 4, 2)", "(6, 64, 5, 2)")),
    "three fully connected layers": (
        "3 linear layers, expected one",
        (CLASSIFIER, "self.classifier = nn.Sequential(nn.Linear(1280, 64), nn.Linear(64, 64), nn.Linear(64, num_classes))"),
    ),
    "no head": ("the head is missing: after the blocks, row 9", (HEAD, "self.head, head_channels = nn.Identity(), channels")),
    "expansion on the first block": (
        "the first block begins with a 1×1 convolution to 32",
        (EXPAND, "convolution(in_channels, wide, 1)"),
    ),
    "expansion of 6 on the first block": (
        "the first block begins with a 1×1 convolution to 192",
        ("(1, 16, 1, 1)", "(6, 16, 1, 1)"),
    ),
    "a shortcut with a convolution": (
        "a shortcut with a convolution",
        (PROJECT, PROJECT + "\n        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride)"),
        (SHORTCUT, "return self.shortcut(x) + out"),
    ),
    "average before the head": (
        "first the 1×1 convolution to 1280",
        ("x = self.head(x)", "x = self.head(x.mean(dim=(2, 3), keepdim=True))"),
    ),
    "maximum for average": (
        "of the 7 × 7 places the classifier takes the maximum, expected their average",
        (POOLING, "return x.amax(dim=(2, 3))"),
    ),
    "flattened for averaged": (
        "from 5120 to 1000",
        (POOLING, "return x.flatten(1)"),
        (CLASSIFIER, CLASSIFIER.replace("head_channels", "5120")),
    ),
    "expansion counted from the output": (
        "expansion: from 16 to 144",
        ("wide = in_channels *", "wide = (out_channels if expansion > 1 else in_channels) *"),
    ),
    "another c": ("from 144 to 40 channels, expected from 144 to 32", ("(6, 32, 3, 2)", "(6, 40, 3, 2)")),
    "dense for depthwise": ("groups=1, expected groups=32", (", groups=wide)", ")")),
    "5 × 5 filters": ("a kernel of 5 × 5", (DEPTHWISE, DEPTHWISE.replace("3,", "5,"))),
    "stride in the expansion": (
        "expansion: stride 2, expected 1",
        (EXPAND, "nn.Identity() if expansion == 1 else convolution(in_channels, wide, 1, stride)"),
        (DEPTHWISE, "self.depthwise = convolution(wide, wide, 3, groups=wide)"),
    ),
    "stride in the projection": (
        "depthwise convolution: stride 1, expected 2",
        (DEPTHWISE, "self.depthwise = convolution(wide, wide, 3, groups=wide)"),
        (PROJECT, "self.project = convolution(wide, out_channels, 1, stride, activation=False)"),
    ),
    "stride in every block of a row": (
        "block 2 of 2, depthwise convolution: stride 2, expected 1",
        (REPEAT, "stride = row_stride"),
    ),
    "stride in the last block of a row": (
        "block 1 of 2, depthwise convolution: stride 1",
        (REPEAT, REPEAT.replace("0", "repeats - 1")),
    ),
    "a stem without stride": (
        "row 1 .* stride 1, expected 2",
        ("convolution(3, channels, 3, strides[0])", "convolution(3, channels, 3, 1)"),
    ),
    "no padding": (r"student.py, line \d+ .*: RuntimeError: .*padding=1", ("kernel_size // 2", "0")),
    "padding of 1 everywhere": (r"student.py, line \d+ .*: RuntimeError: .*padding=1", ("kernel_size // 2", "1")),
    "no padding in the stem": (
        "row 1 .*: gives 31 × 31 pixels of an image of 64, expected 32 × 32",
        ("kernel_size // 2", "kernel_size // 2 * (in_channels > 3)"),
    ),
    "bias left on": ("has a bias, expected bias=False", ("bias=False", "bias=True")),
    "no BatchNorm": ("row 1 .* nn.BatchNorm2d, .* does not follow at once", (NORM, "layers.norm = nn.Identity()")),
    "BatchNorm after the activation": (
        "row 1 .* nn.BatchNorm2d, .* does not follow at once",
        ("return layers", "return nn.Sequential(*layers[::2], *layers[1:2])"),
    ),
    "group normalisation": ("row 1 .* nn.BatchNorm2d, .* does not follow at once", (NORM, "layers.norm = nn.GroupNorm(8, out_channels)")),
    "ReLU6 after the projection": ("projection: is followed by ReLU6, expected no activation", (", activation=False)", ")")),
    "ReLU for ReLU6": ("is followed by ReLU, expected ReLU6", ("nn.ReLU6(", "nn.ReLU(")),
    "SiLU for ReLU6": (r"is followed by SiLU \(Swish\), expected ReLU6", ("nn.ReLU6(", "nn.SiLU(")),
    "no activation behind the depthwise convolution": (
        "depthwise convolution: is followed by no activation",
        (DEPTHWISE, DEPTHWISE.replace("groups=wide", "groups=wide, activation=False")),
    ),
    "no activation in the head": ("head.*: is followed by no activation", (HEAD, HEAD.replace("1)", "1, activation=False)"))),
    "no shortcuts": ("the input is not added to the output", (SHORTCUT, "return out")),
    "shortcuts between the wide ends, too": (
        "depthwise convolution: is followed by something else, expected ReLU6",
        ("out = self.depthwise(out)", "out = out + self.depthwise(out) if self.use_residual else self.depthwise(out)"),
    ),
    "ReLU6 after the addition": (
        "ReLU6 follows the addition",
        (SHORTCUT, "return nn.functional.relu6(x + out) if self.use_residual else out"),
    ),
    "a product for the sum": (
        "gives neither its projection nor the sum of that and its input",
        (SHORTCUT, SHORTCUT.replace("x + out", "x * out")),
    ),
    "softmax at the end": ("is followed by softmax, expected nothing", (FORWARD, FORWARD + ".softmax(dim=1)")),
    "dropout in eval": ("Dropout must rest there", ("x = self.dropout(x)", "x = nn.functional.dropout(x, 0.2)")),
    "BatchNorm that looks at the batch in eval": (
        "not those of the batch",
        (NORM, NORM.replace(")", ", track_running_stats=False)")),
    ),
    "one block for a whole row": (
        "share their weights",
        (
            "blocks.append(InvertedResidual(channels, out_channels, stride, expansion))",
            "blocks.append(self.blocks[-1] if repeat > 1 else InvertedResidual(channels, out_channels, stride, expansion))",
        ),
    ),
    "layers in a Python list": (
        "1 layers ran whose weights are not among network.parameters",
        (HEAD, "self.list = [convolution(channels, head_channels, 1)]"),
        ("x = self.head(x)", "x = self.list[0](x)"),
    ),
    "a temperature": ("^the classifier is followed by something else", (FORWARD, FORWARD + " / 0.1")),
    "a squeeze that takes the batch": (r"one image gives \(1000,\), expected \(1, 1000\)", (FORWARD, FORWARD + ".squeeze()")),
    "a number of classes of its own": (
        r"num_classes=7 gives \(2, 1000\)",
        (CLASSIFIER, CLASSIFIER.replace("num_classes", "1000")),
    ),
    "a tuple": ("forward returns tuple, expected one tensor", (FORWARD, FORWARD + ", x")),
    "nothing returned": ("forward returns NoneType", (FORWARD, FORWARD.replace("return ", ""))),
    "not a number": ("some logits are NaN", (FORWARD, FORWARD + " * float('nan')")),
    "an image that is normalised inside": ("the image is changed in front", ("x = self.stem(x)", "x = self.stem(x / 255)")),
    "a pooling behind the stem": (
        "row 2 .*: gives 16 × 16 pixels of an image of 64, expected 32",
        ("x = self.stem(x)", "x = nn.functional.max_pool2d(self.stem(x), 2)"),
    ),
    "the classifier before the average": (
        "the classifier works on maps",
        (POOLING, "return x"),
        (CLASSIFIER, "self.classifier = nn.Conv2d(head_channels, num_classes, 1)"),
        (FORWARD, FORWARD + ".mean(dim=(2, 3))"),
    ),
    "sum for average": ("of the 7 × 7 places the classifier takes the sum", (POOLING, "return x.sum(dim=(2, 3))")),
    "a shortcut wherever the stride is 1": (
        "a shortcut is only where the channels agree",
        ("self.use_residual = stride == 1 and in_channels == out_channels", "self.use_residual = stride == 1"),
    ),
    "a shortcut in training only": (
        "^row .*: the input is not added to the output",
        (SHORTCUT, "return x + out if self.use_residual and self.training else out"),
    ),
    "no shortcut in training": (
        "in training mode, row .*: the input is not added to the output",
        (SHORTCUT, "return x + out if self.use_residual and not self.training else out"),
    ),
    "softmax in training": (
        "in training mode, the classifier is followed by softmax",
        (FORWARD, "x = self.classifier(x)\n        return x.softmax(dim=1) if self.training else x"),
    ),
    "BatchNorm that never learns": ("is the same after a batch in training mode", (NORM, NORM.replace(")", ", momentum=0.0)"))),
    "the momentum of Keras": ("BatchNorm's momentum is 0.99", (NORM, NORM.replace(")", ", momentum=0.99)"))),
    "a classifier without bias": (
        "so -1,000. .*the classifier's bias",
        (CLASSIFIER, CLASSIFIER.replace("classes)", "classes, bias=False)")),
        (
            "nn.init.normal_(module.weight, std=0.01)\n        nn.init.zeros_(module.bias)",
            "nn.init.normal_(module.weight, std=0.01)",
        ),
    ),
    "squeeze-and-excitation": (
        "squeeze-and-excitation is MobileNetV3's",
        (PROJECT, PROJECT + "\n        self.gate = nn.Conv2d(wide, wide, 1)"),
        (
            "out = self.depthwise(out)",
            "out = self.depthwise(out)\n        out = out * self.gate(out.mean((2, 3), keepdim=True)).sigmoid()",
        ),
    ),
    "frozen weights": ("has requires_grad=False", ("self.apply(initialise)", "self.apply(initialise).requires_grad_(False)")),
    "a layer that nothing uses": (
        "parameters, expected 3,504,872",
        (CLASSIFIER, CLASSIFIER + "\n        self.second = nn.Linear(1280, 10)"),
    ),
    "a detached backbone": ("'stem.conv.weight' gets no gradient", ("x = self.head(x)", "x = self.head(x.detach())")),
    "channels cut off, not rounded": (
        "width_mult=0.35, .*: from 3 to 11 channels, expected from 3 to 16",
        ("make_divisible(STEM_CHANNELS * width_mult)", "int(STEM_CHANNELS * width_mult)"),
    ),
    "channels below 90%": ("width_mult=.* but not below 90%", ("if rounded >= 0.9 * value else rounded + divisor", "")),
    "a narrow head": ("below 1.0 the head keeps its 1280", ("max(1.0, width_mult)", "width_mult")),
    "a head that never grows": (
        "width_mult=1.4, .*: from 448 to 1280 channels",
        ("make_divisible(HEAD_CHANNELS * max(1.0, width_mult))", "HEAD_CHANNELS"),
    ),
    "a difference for the sum": (
        "gives neither its projection nor the sum of that and its input",
        (SHORTCUT, SHORTCUT.replace("x + out", "out - x")),
    ),
    "half of the sum": (
        "gives neither its projection nor the sum of that and its input",
        (SHORTCUT, SHORTCUT.replace("x + out", "torch.add(x, out, alpha=0.5)")),
    ),
}


def load(source):
    """The class MobileNetV2 of a Python file's text."""
    module = types.ModuleType("student")
    exec(compile(source, "student.py", "exec"), vars(module))
    return module.MobileNetV2


def grade(network_class):
    """Message of the first test that fails, or None."""
    for test in GRADING:
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for value in marks[0].args[1] if marks else [None]:
            try:
                test(network_class, **({marks[0].args[0]: value} if marks else {}))
            except pytest.fail.Exception as failure:
                return str(failure)
            except pytest.skip.Exception:
                return f"nothing failed before {test.__name__} was skipped"
    return None


def patch(*changes):
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, f"'{old}' stands {source.count(old)} times in mobilenetv2.py"
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_network_is_failed_with_the_right_message(fault, monkeypatch):
    monkeypatch.setattr(test_mobilenetv2, "SIZE", 64)  # a tenth of the time
    message, *changes = WRONG[fault]
    found = grade(load(patch(*changes)))
    assert found and re.search(message, found), found


class Stage(nn.Sequential):
    """A student's way to write it: other names, a subclass of Sequential, ReLU6 as a clamp, and a functional one."""

    def __init__(self, inside, outside, stride, expansion):
        wide = inside * expansion
        layers = [nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3), Clamp()] if expansion > 1 else []
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, 1, wide, False), nn.BatchNorm2d(wide, eps=1e-3), Clamp()]
        super().__init__(*layers, nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside, eps=1e-3))
        self.skip = stride == 1 and inside == outside

    def forward(self, x):
        y = super().forward(x)
        if self.skip:
            y += x
        return y


class Clamp(nn.Module):
    def forward(self, x):
        return functional.relu(x).clamp(max=6)


class MobileNetV2(nn.Module):
    """Table 2 to the letter: a pooling of 7 × 7, and a 1×1 convolution as the classifier."""

    def __init__(self, num_classes=1000, width_mult=1):
        super().__init__()

        def scaled(channels):
            rounded = max(8, int(channels * width_mult + 4) // 8 * 8)
            return rounded if rounded >= 0.9 * channels * width_mult else rounded + 8

        last, wide = scaled(32), max(1280, scaled(1280))
        self.first, self.first_norm = nn.Conv2d(3, last, 3, 2, 1, bias=False), nn.BatchNorm2d(last, eps=1e-3)
        self.middle = nn.ModuleList()
        for t, c, n, s in test_mobilenetv2.TABLE_2:
            for i in range(n):
                self.middle.append(Stage(last, scaled(c), s if i == 0 else 1, t))
                last = scaled(c)
        self.last, self.last_norm = nn.Conv2d(last, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3)
        self.scores = nn.Conv2d(wide, num_classes, 1)

    def forward(self, x):
        x = functional.relu6(self.first_norm(self.first(x)))
        for stage in self.middle:
            x = stage(x)
        x = torch.clip(self.last_norm(self.last(x)), 0, 6)
        x = functional.avg_pool2d(x, x.shape[-1])
        return self.scores(functional.dropout(x, 0.2, self.training)).flatten(1)


@pytest.mark.parametrize("network_class", (torchvision.models.MobileNetV2, MobileNetV2))
def test_right_networks_pass_however_they_are_written(network_class):
    assert grade(network_class) is None


def test_the_command_grades_a_file(tmp_path):
    path = tmp_path / "student.py"
    path.write_text(patch(STRIDE_64, STRIDE_96), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_mobilenetv2.py", "--implementation", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "typo of Table 2" in done.stdout and "Traceback" not in done.stdout
    assert "FAILED tests/test_mobilenetv2.py::test_strides" in done.stdout and "1 failed, 7 passed" in done.stdout


@pytest.mark.parametrize(
    "text, message",
    [(None, "FileNotFoundError"), ("import nothing_like_this", "ModuleNotFoundError"), ("def MobileNetV2(: pass", "SyntaxError"),
     ("x = 3", "has no attribute 'MobileNetV2'"), ("MobileNetV2 = 3", "MobileNetV2 is 3, and not a class"),
     ("from torchvision.models import MobileNetV2", "not a class of its own"), ("exit(0)", "SystemExit, line 1.*__main__")],
)  # fmt: skip
def test_a_file_that_cannot_be_graded_is_told_in_one_line(tmp_path, text, message, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "student.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(pytest.UsageError, match=message) as caught:
        load_class(path)
    assert "\n" not in str(caught.value)
