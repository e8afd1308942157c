"""Typical wrong networks, as patches of the correct one.

The grader must fail each with a message that names its fault.
"""

import ast
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import grader
import pytest
import test_mobilenetv2
import torch
import torchvision
from conftest import ROOT
from grader import CRITERIA, TABLE_2, Score, Submission, load_submission
from torch import nn
from torch.nn import functional

SOURCE = (ROOT / "mobilenetv2.py").read_text(encoding="utf-8")
TESTS = [test for name, test in vars(test_mobilenetv2).items() if name.startswith("test_")]
GRADING = [test for test in TESTS if "submission" in inspect.signature(test).parameters]

# Places in mobilenetv2.py that several patches change.
STRIDE_64, STRIDE_96 = ("(6, 64, 4, 2)", "(6, 64, 4, 1)"), ("(6, 96, 3, 1)", "(6, 96, 3, 2)")
POOLING = "return x.mean(dim=(2, 3))"
FORWARD = "return self.classifier(x)"
CLASSIFIER = "self.classifier = nn.Linear(head_channels, num_classes)"
SHORTCUT = "if self.use_residual:\n            out = x + out\n        return out"
NORM = 'layers.add_module("norm", nn.BatchNorm2d(out_channels))'
BIAS = ("bias=False,", "bias=True,")
STEM = ("convolution(3, channels, 3, stride=2)", "convolution(3, channels, 3, stride=1)")
DEPTHWISE = "self.depthwise = convolution(wide, wide, 3, stride, groups=wide)"
EXPAND = (
    "self.expand = nn.Identity()\n        if expansion > 1:\n"
    "            self.expand = convolution(in_channels, wide, 1)"
)
PROJECT = "self.project = convolution(wide, out_channels, 1, activation=False)"
HEAD = "self.head = convolution(channels, head_channels, 1)"
REPEAT = "stride = row_stride if repeat == 0 else 1"

# fault: (pattern of the message, (old text, new text), ...)
WRONG = {
    "the typo of Table 2 in the paper's first version": (
        "typo of Table 2",
        STRIDE_64,
        STRIDE_96,
    ),
    "one block per row": (
        "n in Table 2 is the number of blocks in a row",
        ("for repeat in range(n)", "for repeat in range(1)"),
    ),
    "a block too many": (
        "56 layers with weights, expected 53",
        ("(6, 64, 4, 2)", "(6, 64, 5, 2)"),
    ),
    "three fully connected layers": (
        "3 linear layers, expected one",
        (
            CLASSIFIER,
            (
                "self.classifier = nn.Sequential("
                "nn.Linear(1280, 64), nn.Linear(64, 64), nn.Linear(64, num_classes))"
            ),
        ),
    ),
    "no head": (
        "the head is missing: after the blocks, row 9",
        (HEAD, "self.head, head_channels = nn.Identity(), channels"),
    ),
    "expansion on the first block": (
        "the first block begins with a 1×1 convolution to 32 .*convention",
        (EXPAND, "self.expand = convolution(in_channels, wide, 1)"),
    ),
    "expansion of 6 on the first block": (
        "the first block begins with a 1×1 convolution to 192",
        ("(1, 16, 1, 1)", "(6, 16, 1, 1)"),
    ),
    "a shortcut with a convolution": (
        "a shortcut with a convolution",
        (
            PROJECT,
            PROJECT
            + "\n        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride)",
        ),
        (SHORTCUT, "return self.shortcut(x) + out"),
    ),
    "average before the head": (
        "first the 1×1 convolution to 1280",
        ("x = self.head(x)", "x = self.head(x.mean(dim=(2, 3), keepdim=True))"),
    ),
    "maximum for average": (
        (
            "of the 2 × 2 places in the head's feature maps the classifier takes the maximum,"
            " expected their average"
        ),
        (POOLING, "return x.amax(dim=(2, 3))"),
    ),
    "flattened for averaged": (
        "from 62720 to 1000 channels.* 62720 = 1280 · 7 · 7: the average pooling",
        (POOLING, "return x.flatten(1)"),
        (CLASSIFIER, CLASSIFIER.replace("head_channels", "62720")),
    ),
    "expansion counted from the output": (
        "expansion: from 16 to 144",
        ("wide = in_channels *", "wide = (out_channels if expansion > 1 else in_channels) *"),
    ),
    "another c": (
        "from 144 to 40 channels, expected from 144 to 32",
        ("(6, 32, 3, 2)", "(6, 40, 3, 2)"),
    ),
    "dense for depthwise": ("groups=1, expected groups=32", (", groups=wide)", ")")),
    "5 × 5 filters": (
        "a kernel of 5 × 5, expected 3 × 3",
        (DEPTHWISE, DEPTHWISE.replace("3,", "5,")),
    ),
    "stride in the expansion": (
        "expansion: stride 2, expected 1",
        (EXPAND, EXPAND.replace("wide, 1", "wide, 1, stride")),
        (DEPTHWISE, "self.depthwise = convolution(wide, wide, 3, groups=wide)"),
    ),
    "stride in the projection": (
        "depthwise convolution: stride 1, expected 2",
        (DEPTHWISE, "self.depthwise = convolution(wide, wide, 3, groups=wide)"),
        (
            PROJECT,
            "self.project = convolution(wide, out_channels, 1, stride, activation=False)",
        ),
    ),
    "stride in every block of a row": (
        "block 2 of 2, depthwise convolution: stride 2, expected 1",
        (REPEAT, "stride = row_stride"),
    ),
    "stride in the last block of a row": (
        "block 1 of 2, depthwise convolution: stride 1",
        (REPEAT, REPEAT.replace("0", "n - 1")),
    ),
    "a stem without stride": (
        "row 1 .the stem.*: stride 1, expected 2",
        STEM,
    ),
    "no padding": (
        r"student.py, line \d+ .*: RuntimeError: .*padding=1",
        ("kernel_size // 2", "0"),
    ),
    "padding of 1 everywhere": (
        r"student.py, line \d+ .*: RuntimeError: .*padding=1",
        ("kernel_size // 2", "1"),
    ),
    "no padding in the stem": (
        "row 1 .*: gives 31 × 31 pixels for an image of 64, expected 32 × 32",
        ("kernel_size // 2", "kernel_size // 2 * (in_channels > 3)"),
    ),
    "bias left on": (
        "has a bias, expected bias=False. .*convention",
        BIAS,
    ),
    "no BatchNorm": (
        "row 1 .* nn.BatchNorm2d, .* does not follow directly",
        (NORM, NORM.replace("BatchNorm2d(out_channels)", "Identity()")),
    ),
    "BatchNorm after the activation": (
        "row 1 .* nn.BatchNorm2d, .* does not follow directly",
        ("return layers", "return nn.Sequential(*layers[::2], *layers[1:2])"),
    ),
    "group normalisation": (
        "row 1 .* nn.BatchNorm2d, .* does not follow directly",
        (NORM, NORM.replace("BatchNorm2d(", "GroupNorm(8, ")),
    ),
    "ReLU6 after the projection": (
        "projection: is followed by ReLU6, expected no activation",
        (", activation=False)", ")"),
    ),
    "ReLU for ReLU6": ("is followed by ReLU, expected ReLU6", ("nn.ReLU6(", "nn.ReLU(")),
    "SiLU for ReLU6": (
        r"is followed by SiLU \(Swish\), expected ReLU6",
        ("nn.ReLU6(", "nn.SiLU("),
    ),
    "no activation behind the depthwise convolution": (
        "depthwise convolution: is followed by no activation",
        (DEPTHWISE, DEPTHWISE.replace("groups=wide", "groups=wide, activation=False")),
    ),
    "no activation in the head": (
        "head.*: is followed by no activation",
        (HEAD, HEAD.replace("1)", "1, activation=False)")),
    ),
    "no shortcuts": ("the input is not added to the output", (SHORTCUT, "return out")),
    "shortcuts between the wide ends, too": (
        "depthwise convolution: is followed by something else, expected ReLU6",
        (
            "out = self.depthwise(out)",
            "out = out + self.depthwise(out) if self.use_residual else self.depthwise(out)",
        ),
    ),
    "ReLU6 after the addition": (
        "ReLU6 follows the addition",
        (SHORTCUT, SHORTCUT.replace("x + out", "nn.functional.relu6(x + out)")),
    ),
    "a product for the sum": (
        "gives neither its projection nor the sum of projection and input",
        (SHORTCUT, SHORTCUT.replace("x + out", "x * out")),
    ),
    "softmax at the end": (
        "is followed by softmax, expected nothing: .*the gradients nearly vanish",
        (FORWARD, FORWARD + ".softmax(dim=1)"),
    ),
    "dropout in eval": (
        r"active in eval mode \(student.py, line \d+\).*training=self.training",
        ("x = self.dropout(x)", "x = nn.functional.dropout(x, 0.2)"),
    ),
    "BatchNorm that looks at the batch in eval": (
        "not those of the batch",
        (NORM, NORM.replace("channels)", "channels, track_running_stats=False)")),
    ),
    "one block for a whole row": (
        "share their weights",
        (
            "blocks.append(InvertedResidual(channels, out_channels, stride, t))",
            (
                "blocks.append(self.blocks[-1] if repeat > 1"
                " else InvertedResidual(channels, out_channels, stride, t))"
            ),
        ),
    ),
    "layers in a Python list": (
        "the weights of 1 of 53 layers are not among network.parameters",
        (HEAD, "self.list = [convolution(channels, head_channels, 1)]"),
        ("x = self.head(x)", "x = self.list[0](x)"),
    ),
    "a temperature": (
        "^the classifier is followed by something else",
        (FORWARD, FORWARD + " / 0.1"),
    ),
    "a squeeze that takes the batch": (
        r"one image gives \(1000,\), expected \(1, 1000\)",
        (FORWARD, FORWARD + ".squeeze()"),
    ),
    "a number of classes of its own": (
        r"num_classes=7 gives \(2, 1000\)",
        (CLASSIFIER, CLASSIFIER.replace("num_classes", "1000")),
    ),
    "a tuple": (
        "forward returns tuple, .*return the logits alone",
        (FORWARD, FORWARD + ", x"),
    ),
    "nothing returned": (
        "forward returns NoneType, .*is a return missing",
        (FORWARD, FORWARD.replace("return ", "")),
    ),
    "not a number": ("some logits are NaN", (FORWARD, FORWARD + " * float('nan')")),
    "an image that is normalised inside": (
        "the image is changed in front",
        ("x = self.stem(x)", "x = self.stem(x / 255)"),
    ),
    "a pooling behind the stem": (
        "row 2 .*: gives 16 × 16 pixels for an image of 64, expected 32",
        ("x = self.stem(x)", "x = nn.functional.max_pool2d(self.stem(x), 2)"),
    ),
    "the classifier before the average": (
        "the classifier works on feature maps",
        (POOLING, "return x"),
        (CLASSIFIER, "self.classifier = nn.Conv2d(head_channels, num_classes, 1)"),
        (FORWARD, FORWARD + ".mean(dim=(2, 3))"),
    ),
    "sum for average": ("the classifier takes the sum", (POOLING, "return x.sum(dim=(2, 3))")),
    "a shortcut wherever the stride is 1": (
        "a shortcut is only where the channels agree",
        (
            "self.use_residual = stride == 1 and in_channels == out_channels",
            "self.use_residual = stride == 1",
        ),
    ),
    "a shortcut in training only": (
        "^row .*: the input is not added to the output",
        (SHORTCUT, SHORTCUT.replace("residual:", "residual and self.training:")),
    ),
    "no shortcut in training": (
        "in training mode, row .*: the input is not added to the output",
        (SHORTCUT, SHORTCUT.replace("residual:", "residual and not self.training:")),
    ),
    "softmax in training": (
        "in training mode, the classifier is followed by softmax",
        (
            FORWARD,
            "x = self.classifier(x)\n        return x.softmax(dim=1) if self.training else x",
        ),
    ),
    "BatchNorm that never learns": (
        "is the same after a batch in training mode",
        (NORM, NORM.replace("channels)", "channels, momentum=0.0)")),
    ),
    "the momentum of Keras": (
        "BatchNorm's momentum is 0.99",
        (NORM, NORM.replace("channels)", "channels, momentum=0.99)")),
    ),
    "a classifier without bias": (
        "-1,000. The classifier's bias is missing. .*convention",
        (CLASSIFIER, CLASSIFIER.replace("classes)", "classes, bias=False)")),
        (
            "nn.init.normal_(module.weight, std=0.01)\n        nn.init.zeros_(module.bias)",
            "nn.init.normal_(module.weight, std=0.01)",
        ),
    ),
    "squeeze-and-excitation": (
        "Squeeze-and-excitation belongs to MobileNetV3",
        (PROJECT, PROJECT + "\n        self.gate = nn.Conv2d(wide, wide, 1)"),
        (
            "out = self.depthwise(out)",
            (
                "out = self.depthwise(out)\n"
                "        out = out * self.gate(out.mean((2, 3), keepdim=True)).sigmoid()"
            ),
        ),
    ),
    "frozen weights": (
        "has requires_grad=False",
        ("self.apply(initialise)", "self.apply(initialise).requires_grad_(False)"),
    ),
    "a layer that nothing uses": (
        "parameters, expected 3,504,872",
        (CLASSIFIER, CLASSIFIER + "\n        self.second = nn.Linear(1280, 10)"),
    ),
    "a detached backbone": (
        "'stem.conv.weight' gets no gradient",
        ("x = self.head(x)", "x = self.head(x.detach())"),
    ),
    "channels cut off, not rounded": (
        "width_mult=0.35, .*: from 3 to 11 channels, expected from 3 to 16",
        ("make_divisible(STEM_CHANNELS * width_mult)", "int(STEM_CHANNELS * width_mult)"),
    ),
    "channels below 90%": (
        "width_mult=.* but not below 90%",
        ("if rounded < 0.9 * value:\n        rounded += divisor\n    return", "return"),
    ),
    "a narrow head": ("below 1.0 the head keeps 1280", ("max(1.0, width_mult)", "width_mult")),
    "a head that never grows": (
        "width_mult=1.4, .*: from 448 to 1280 channels",
        ("make_divisible(HEAD_CHANNELS * max(1.0, width_mult))", "HEAD_CHANNELS"),
    ),
    "a difference for the sum": (
        "gives neither its projection nor the sum of projection and input",
        (SHORTCUT, SHORTCUT.replace("x + out", "out - x")),
    ),
    "half of the sum": (
        "gives neither its projection nor the sum of projection and input",
        (SHORTCUT, SHORTCUT.replace("x + out", "torch.add(x, out, alpha=0.5)")),
    ),
    "a shortcut without gradient": (
        "gradient stops in the shortcut of row 7 .* block 3 of 3: .detach",
        (SHORTCUT, SHORTCUT.replace("x + out", "x.detach() + out")),
    ),
    "a detached image": (
        (
            "the gradient of the image differs .* by 100%.*"
            " in row 1 of Table 2 .the stem, conv2d 3×3., or directly in front of it"
        ),
        ("x = self.stem(x)", "x = self.stem(x.detach())"),
    ),
    "half of the gradient": (
        (
            "the gradient of 'blocks.16.project.norm.bias' differs .* by 50%."
            " Those of all later layers agree"
        ),
        ("x = self.blocks(x)", "x = self.blocks(x) / 2\n        x = x + x.detach()"),
    ),
    "strides and pooling for CIFAR": (
        (
            "row 1 .*: stride 1, expected 2;"
            " row 3, block 1 of 2, depthwise convolution: stride 1, expected 2. .* CIFAR"
        ),
        STEM,
        ("(6, 24, 2, 2)", "(6, 24, 2, 1)"),
        (POOLING, "return nn.functional.avg_pool2d(x, 4).flatten(1)"),
    ),
    "no global pooling": (
        (
            r"student.py, line \d+ .* 62720 = 1280 · 7 · 7:"
            " the pooling in front of the classifier is not global"
        ),
        (POOLING, "return x.flatten(1)"),
    ),
    "a pooling of 7 × 7 for an image of 64": (
        "5120 = 1280 · 2 · 2: the average pooling",
        (POOLING, "return x.flatten(1)"),
        (CLASSIFIER, CLASSIFIER.replace("head_channels", "5120")),
    ),
    "no blocks": (
        "1 of 52 convolutions ran before the classifier: the blocks are missing",
        ("x = self.blocks(x)", ""),
        ("x = self.head(x)", ""),
    ),
    "more memory than the grader allows": (
        (
            r"student.py, line .*grader's limit .*:"
            r" with this Linear the network has 1,0\d\d MB of weights"
        ),
        (
            CLASSIFIER,
            (
                "self.classifier = nn.Sequential("
                "nn.Linear(62720, 4096), nn.Linear(4096, num_classes))"
            ),
        ),
        (POOLING, "return x.flatten(1)"),
    ),
    "BatchNorm that is never called": (
        "'blocks.0.norm' is built in __init__, but forward never calls it",
        (PROJECT, PROJECT + "\n        self.norm = nn.BatchNorm2d(out_channels)"),
    ),
    "BatchNorm built, but missing after the projection": (
        (
            "projection: nn.BatchNorm2d, .* does not follow directly."
            " 'blocks.0.norm' is built in __init__"
        ),
        (
            PROJECT,
            (
                "self.project, self.norm = nn.Conv2d(wide, out_channels, 1),"
                " nn.BatchNorm2d(out_channels)"
            ),
        ),
    ),
    "BatchNorm folded into the convolutions": (
        "row 1 .* does not follow directly. No BatchNorm runs .*is BatchNorm folded into them",
        (NORM, NORM.replace("BatchNorm2d(out_channels)", "Identity()")),
        BIAS,
    ),
    "nn.Dropout made in forward": (
        r"active in eval mode \(student.py, line \d+\).*made inside forward",
        ("x = self.dropout(x)", "x = nn.Dropout(0.2)(x)"),
    ),
    "dropout between BatchNorm and activation": (
        (
            "dropout is between BatchNorm and activation of row 1 .*,"
            " expected only in front of the classifier"
        ),
        (NORM, NORM + '\n    layers.add_module("dropout", nn.Dropout(0.1))'),
    ),
    "dropout behind the projection": (
        "dropout is behind the BatchNorm of row 2 .* projection",
        (
            SHORTCUT,
            "out = nn.functional.dropout(out, 0.1, self.training)\n        " + SHORTCUT,
        ),
    ),
    "log-softmax at the end": (
        "is followed by log-softmax, .*it is redundant.*the gradients are the same",
        (FORWARD, FORWARD + ".log_softmax(dim=1)"),
    ),
    "ReLU6 after the pooling": (
        "row 9 .*: ReLU6 follows the pooling, expected ReLU6 directly behind",
        (HEAD, HEAD.replace("1)", "1, activation=False)")),
        (POOLING, "return nn.functional.relu6(x.mean(dim=(2, 3)))"),
    ),
    "channels rounded to whole numbers": (
        "width_mult=0.35, row 1 .*: from 3 to 11 channels, expected from 3 to 16: .* multiple of 8",
        (
            "rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)",
            "return round(value)",
        ),
    ),
    "a width that does not fit": (
        "width_mult=0.35, forward fails for images of 64 × 64 pixels: student.py, line",
        (
            "self.head = convolution(channels, head_channels, 1)",
            "self.head = convolution(320, head_channels, 1)",
        ),
    ),
    "torchvision's network inside": (
        "uses torchvision's MobileNetV2; write all parts yourself",
        (
            "self.apply(initialise)",
            (
                "import torchvision\n"
                "        self.network = torchvision.models.MobileNetV2(num_classes)"
            ),
        ),
    ),
}


def load(source):
    """Return the submission of a Python file's text."""
    module = types.ModuleType("student")
    exec(compile(source, "student.py", "exec"), vars(module))
    return Submission(module.MobileNetV2)


def runs():
    """Return (test, arguments) for each test that grades, in order."""
    for test in GRADING:
        marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
        for value in marks[0].args[1] if marks else [None]:
            yield test, {marks[0].args[0]: value} if marks else {}


def grade(submission):
    """Return the message of the first test that fails, or None."""
    for test, arguments in runs():
        try:
            test(submission, **arguments)
        except pytest.fail.Exception as failure:
            return str(failure)
        except pytest.skip.Exception as skip:
            return f"nothing failed before {test.__name__} was skipped: {skip}"
    return None


def score(submission):
    """Run all tests that grade, and return their Score."""
    found = Score("student.py")
    for test, arguments in runs():
        outcome, message = "passed", ""
        try:
            test(submission, **arguments)
        except pytest.fail.Exception as failure:
            outcome, message = "failed", str(failure)
        except pytest.skip.Exception as skip:
            outcome, message = "skipped", str(skip)
        found.add(
            next(mark.args[0] for mark in test.pytestmark if mark.name == "criterion"),
            outcome,
            message,
        )
    return found


def patch(*changes):
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, (
            f"'{old}' is {source.count(old)} times in mobilenetv2.py"
        )
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_network_fails_with_the_correct_message(fault, monkeypatch):
    # Initialisation is slow, and the grader randomises the weights that it finds.
    for name in ("kaiming_uniform_", "kaiming_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, **_: tensor.detach().fill_(0.01))
    message, *changes = WRONG[fault]
    found = grade(load(patch(*changes)))
    assert found and re.search(message, found), found


class Stage(nn.Sequential):
    """A student's way to write a block.

    It has other names, a subclass of Sequential, ReLU6 as a clamp, and a functional one.
    """

    def __init__(self, inside, outside, stride, expansion):
        wide = inside * expansion
        layers = (
            [nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3), Clamp()]
            if expansion > 1
            else []
        )
        layers += [
            nn.Conv2d(wide, wide, 3, stride, 1, 1, wide, False),
            nn.BatchNorm2d(wide, eps=1e-3),
            Clamp(),
        ]
        super().__init__(
            *layers, nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside, eps=1e-3)
        )
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
        self.first, self.first_norm = (
            nn.Conv2d(3, last, 3, 2, 1, bias=False),
            nn.BatchNorm2d(last, eps=1e-3),
        )
        self.middle = nn.ModuleList()
        for t, c, n, s in TABLE_2:
            for i in range(n):
                self.middle.append(Stage(last, scaled(c), s if i == 0 else 1, t))
                last = scaled(c)
        self.last, self.last_norm = (
            nn.Conv2d(last, wide, 1, bias=False),
            nn.BatchNorm2d(wide, eps=1e-3),
        )
        self.scores = nn.Conv2d(wide, num_classes, 1)

    def forward(self, x):
        x = functional.relu6(self.first_norm(self.first(x)))
        for stage in self.middle:
            x = stage(x)
        x = torch.clip(self.last_norm(self.last(x)), 0, 6)
        x = functional.avg_pool2d(x, x.shape[-1])
        return self.scores(functional.dropout(x, 0.2, self.training)).flatten(1)


class Renamed(MobileNetV2):
    """Other names for the arguments, and no defaults."""

    def __init__(self, ch_in, numClasses, alpha=1.0):
        super().__init__(numClasses, alpha)


@pytest.mark.parametrize("network_class", (torchvision.models.MobileNetV2, Renamed))
def test_correct_networks_pass_in_whatever_style_they_are_written(network_class):
    found = score(Submission(network_class))
    assert found.complete and found.points == 100, found.lines()


def statuses(submission):
    found = score(submission)
    return {name: found.status(name)[0] for name in CRITERIA}


def test_independent_faults_cost_only_their_own_points():
    changes = (
        (", activation=False)", ")"),
        (SHORTCUT, "return out"),
        BIAS,
    )
    found = statuses(load(patch(*changes)))
    assert [name for name in found if found[name] == "failed"] == [
        "normalisation",
        "linear bottleneck",
        "shortcut",
        "parameters and multiply-adds",
    ]
    # The gradients reach all parameters, but their values cannot be compared.
    assert [name for name in found if found[name] == "skipped"] == ["gradients"]


def test_an_expansion_with_t_1_costs_no_other_points():
    found = score(load(patch((EXPAND, "self.expand = convolution(in_channels, wide, 1)"))))
    assert found.points == 75 and "(This is a convention" in found.status("layers")[1]


def test_after_another_structure_the_rest_is_skipped():
    found = statuses(load(patch(STRIDE_64, STRIDE_96)))
    assert list(found.values()) == ["passed", "passed", "failed"] + 8 * ["skipped"]


def test_a_network_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(grader, "TIME_LIMIT", 0.5)
    message = grade(load(patch((POOLING, "while True: pass"))))
    assert re.search(
        r"student.py, line \d+ .*: the grader's limit .*: it takes more than 0.5 seconds",
        message,
    ), message


NOISE = """
import logging, sys, warnings
print("noise")
print("noise", file=sys.stderr)
logging.warning("noise")
warnings.warn("noise")
"""


def command(path, *options):
    return [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_mobilenetv2.py",
        "--implementation",
        path,
        *options,
    ]


def test_the_command_grades_a_file_and_noise_does_not_hide_the_score(tmp_path):
    path = tmp_path / "student.py"
    no_strides = [
        (
            "for repeat in range(n):\n",
            "for repeat in range(n):\n                row_stride = 1\n",
        )
    ]
    no_strides += [STEM]
    noise = [
        (
            "return self.classifier(x)",
            "print('noise'); warnings.warn('noise')\n        return self.classifier(x)",
        )
    ]
    path.write_text(NOISE + patch(*no_strides, *noise), encoding="utf-8")
    done = subprocess.run(
        command(path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = done.stdout
    assert done.returncode == 1
    lines = output.splitlines()
    assert [line.split()[-5:] for line in lines if line.startswith("strides  ")] == [
        ["strides", "failed", "0", "/", "10"]
    ]
    message = (
        "strides: these strides differ from Table 2:"
        " row 1 (the stem, conv2d 3×3): stride 1, expected 2;"
    )
    assert message in " ".join(lines)
    assert "shortcut                      skipped    0 / 10   because of strides" in lines
    assert "total                                   20 / 100" in lines
    assert "noise" not in output and "Traceback" not in output and "FAILED" not in output
    assert "1 failed" in lines[-1]


def test_the_exit_code_is_0_only_if_all_criteria_pass(tmp_path, monkeypatch, capsys):
    """In this process, because another one would import torch for seconds."""
    monkeypatch.chdir(ROOT)
    no_width = (
        "\nclass MobileNetV2(MobileNetV2):\n"
        "    def __init__(self, categories=10):\n"
        "        super().__init__(categories)"
    )
    for source, code, points, end in (
        (SOURCE, 0, "100 / 100", ""),
        (
            SOURCE + no_width,
            1,
            " 95 / 100",
            "Correct at width 1.0. The points of width are missing, so the exit code is 1.",
        ),
    ):
        (tmp_path / "student.py").write_text(source, encoding="utf-8")
        assert (
            pytest.main(command(tmp_path / "student.py", "-q", "-p", "no:cacheprovider")[3:])
            == code
        )
        output = capsys.readouterr().out
        assert points in output and end in output
    assert "no width_mult; the parameters of MobileNetV2 are (categories=10)" in output


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "FileNotFoundError"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("def MobileNetV2(: pass", "SyntaxError"),
        ("x = 3", "no class MobileNetV2; it has no class at all"),
        ("MobileNetV2 = 3", "MobileNetV2 is 3, not a class"),
        (
            "class Block: pass\nclass MobileNet_V2: pass",
            "no class MobileNetV2; its classes are Block, MobileNet_V2 .*rename",
        ),
        ("from torchvision.models import MobileNetV2", "torchvision's class or a subclass"),
        (
            "import torchvision\nclass MobileNetV2(torchvision.models.MobileNetV2): pass",
            "torchvision's class or a subclass",
        ),
        ("\n1 / 0", "ZeroDivisionError, line 2"),
        ("exit(0)", "SystemExit, line 1.*__main__"),
        ("while True: pass", "the grader's limit, line 1: it takes more than 0.3 seconds"),
    ],
)
def test_a_file_that_cannot_be_graded_gives_an_error_of_one_line(
    tmp_path, text, message, monkeypatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(grader, "TIME_LIMIT", 0.3)
    monkeypatch.chdir(tmp_path)
    path = Path("student.py")
    if text is not None:
        path.write_text(text)
    with pytest.raises(pytest.UsageError, match=message) as caught:
        load_submission(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parameters, message",
    [
        (
            "self, depth, num_classes=1000",
            r"TypeError: .*'depth'. The parameters are \(depth, num_classes=1000\); expected",
        ),
        (
            "self, **kwargs",
            (
                r"TypeError: .*unexpected keyword argument 'num_classes'."
                r" The parameters are \(\*\*kwargs\)"
            ),
        ),
    ],
)
def test_a_message_about_parameters_names_those_of_the_network(parameters, message):
    source = (
        "from torch import nn\n"
        "class MobileNetV2(nn.Module):\n"
        f"  def __init__({parameters}):\n"
        "    super().__init__()\n"
    )
    source += "    print(depth)" if "depth" in parameters else "    nn.ReLU(**kwargs)"
    assert re.search(message, grade(load(source)))


# ------------------------------------------------------------------------------- the assignment

ASSIGNMENT = ROOT / "docs" / "assignment"
SKELETON = (ASSIGNMENT / "student.py").read_text(encoding="utf-8")


def definitions(source):
    """Return the source of each class, function and constant at a file's top level, by name."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(source, node)
    return found


def fill(*names):
    """Return the skeleton with the project's code in the places of `names`."""
    source, solution = SKELETON, definitions(SOURCE)
    for name in names:
        source = source.replace(definitions(SKELETON)[name], solution[name])
    # The project's network uses row_strides and initialise.
    return "\n\n".join([solution["row_strides"], source, solution["initialise"]])


TASKS = {  # solved parts: pattern of the message
    (): "student.py, line .*TODO 1: write make_divisible",
    ("make_divisible",): "student.py, line .*TODO 2: write convolution",
    ("make_divisible", "convolution"): "student.py, line .*TODO 4: build the blocks",
    (
        "make_divisible",
        "convolution",
        "MobileNetV2",
    ): "student.py, line .*TODO 3: build the layers of a block",
    (
        "make_divisible",
        "convolution",
        "MobileNetV2",
        "InvertedResidual",
    ): "5 layers with weights, expected 53",
    ("make_divisible", "convolution", "MobileNetV2", "InvertedResidual", "BOTTLENECKS"): None,
}


@pytest.mark.parametrize(
    "solved, message", TASKS.items(), ids=lambda value: str(len(value or ()))
)
def test_the_skeleton_fails_with_its_next_task_until_it_is_filled_in(solved, message, capsys):
    found = score(load(fill(*solved)))
    if message:
        assert found.points == 0 and re.search(message, found.status("layers")[1]), (
            found.lines()
        )
    else:
        assert found.points == 100, found.lines()
        exec(fill(*solved), {"__name__": "__main__"})
        assert "Tasks 1 to 3 have the correct numbers" in capsys.readouterr().out


def test_the_skeleton_has_the_projects_signatures():
    namespaces = {"__name__": "skeleton"}, {"__name__": "project"}
    for source, names in zip((SKELETON, SOURCE), namespaces, strict=True):
        exec(source, names)
    skeleton, project = namespaces
    for name in ("make_divisible", "convolution", "InvertedResidual"):
        assert inspect.signature(skeleton[name]) == inspect.signature(project[name])
    parameters = [
        list(inspect.signature(names["MobileNetV2"]).parameters.values())
        for names in namespaces
    ]
    # The skeleton has no output_stride, which is not the paper's.
    assert parameters[0] == parameters[1][:3]


@pytest.mark.parametrize("name", ("handout.md", "handout.zh-CN.md"))
def test_handouts_and_grader_name_the_same_criteria(name):
    text = (ASSIGNMENT / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z -]+) \| (\d+) \|", text, flags=re.MULTILINE)
    assert {
        criterion: int(points) for criterion, points in rows if not criterion.isdigit()
    } == CRITERIA
    assert list(dict(rows)) == list(CRITERIA)
    assert [int(task) for task in re.findall(r"^\| (\d) \|", text, flags=re.MULTILINE)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    line = " ".join(["python", *command("docs/assignment/student.py")[1:]])
    assert re.findall(r"```bash\n(.*)\n```", text) == [line]


def test_each_criterion_has_a_test():
    assert {
        mark.args[0]
        for test, _ in runs()
        for mark in test.pytestmark
        if mark.name == "criterion"
    } == set(CRITERIA)
    assert sum(CRITERIA.values()) == 100
