"""The network: first what any right MobileNetV2 does, then what else this project's file does.

The first part grades a class MobileNetV2 of anybody, whatever its modules are called:

    python -m pytest tests/test_mobilenetv2.py --implementation path/to/student.py

It watches the layers that run (`Recorder`), and holds them, and what passes from one to the next, against Table 2.
tests/test_grader.py proves that it fails typical wrong networks, each with the message that tells its fault.
"""

import functools
import hashlib
import io
import math
import pickle
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenetv2
from mobilenetv2 import (
    CheckpointError,
    MobileNetV2,
    count_macs,
    count_parameters,
    from_torchvision,
    load_checkpoint,
    load_pretrained,
    make_divisible,
    save_checkpoint,
    to_torchvision,
)

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)
PREPROCESSING = {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}

SIZE = 224  # pixels a side of the images that grade, as in Table 2

# Table 2 of the paper, here once more, so that a mistake in the network's own table cannot hide: t, c, n, s
TABLE_2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def randomise(model):
    """Random statistics and weights everywhere, so that no two layers could be exchanged unnoticed."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim():
            spread = 1.0 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * spread)
    return model


# ------------------------------------------------------------------------------- what a network does with images


@dataclass
class Call:
    """A convolution, linear layer or BatchNorm that ran, with copies of what it took and gave, which may be changed in place."""

    name: str  # as PyTorch's operators are called, and take their arguments (tried with torch 2.14)
    arguments: tuple
    taken: torch.Tensor
    given: torch.Tensor


@dataclass
class Layer:
    """A convolution or linear layer, as Table 2 wants it or as it ran."""

    in_channels: int
    out_channels: int
    kernel: tuple  # pixels
    stride: tuple
    groups: int
    size: int  # pixels a side of what it gives
    name: str = ""
    call: Call = None
    norm: Call = None  # the BatchNorm that follows at once

    def output(self):
        """What it gives, normalised if that follows."""
        return (self.norm or self.call).given


class Recorder(TorchDispatchMode):
    """Record the layers that run, in whatever way the network is written."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("convolution", "addmm", "mm", "native_batch_norm"):
            return function(*args, **(kwargs or {}))
        taken = args[1 if name == "addmm" else 0].clone()
        result = function(*args, **(kwargs or {}))
        self.calls.append(Call(name, args, taken, (result[0] if isinstance(result, tuple) else result).clone()))
        return result

    @functools.cached_property
    def layers(self):
        layers = []
        for call, after in zip(self.calls, [*self.calls[1:], None], strict=True):
            if call.name == "native_batch_norm":
                continue
            kernel, stride, groups, size = (1, 1), (1, 1), 1, 1
            if call.name == "convolution":
                kernel, stride, groups = tuple(call.arguments[1].shape[2:]), tuple(call.arguments[3]), call.arguments[8]
                size = call.given.shape[2]
            normalised = after and after.name == "native_batch_norm" and same(after.taken, call.given)
            shape = call.taken.shape[1], call.given.shape[1], kernel, stride, groups, size
            layers.append(Layer(*shape, call=call, norm=after if normalised else None))
        return layers


def same(one, other):
    """Whether two tensors are equal but for rounding; `other` may have a border of zeros, which some pad by themselves."""
    border = other.shape[-1] - one.shape[-1]
    if one.dim() == other.dim() == 4 and border > 0:
        other = other[:, :, border // 2 : -(border - border // 2), border // 2 : -(border - border // 2)]
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * one.abs().max())


def expected_layers(width=1.0):
    """The 53 layers of Table 2, with the place of each in the table."""

    def scaled(channels):  # as in the paper's reference implementation: a multiple of 8, not below 90%
        rounded = max(8, int(channels * width + 4) // 8 * 8)
        return rounded if rounded >= 0.9 * channels * width else rounded + 8

    channels, size = scaled(32), SIZE // 2
    layers = [Layer(3, channels, (3, 3), (2, 2), 1, size, "row 1 of Table 2 (conv2d 3×3)")]
    for row, (t, c, n, s) in enumerate(TABLE_2, start=2):
        for block in range(n):
            name = f"row {row} of Table 2 (t={t}, c={c}, n={n}, s={s}), block {block + 1} of {n}"
            stride, wide = s if block == 0 else 1, channels * t
            if t > 1:
                layers.append(Layer(channels, wide, (1, 1), (1, 1), 1, size, f"{name}, expansion"))
            size //= stride
            layers.append(Layer(wide, wide, (3, 3), (stride, stride), wide, size, f"{name}, depthwise convolution"))
            layers.append(Layer(wide, scaled(c), (1, 1), (1, 1), 1, size, f"{name}, projection"))
            channels = layers[-1].out_channels
    head = max(1280, scaled(1280))
    layers.append(Layer(channels, head, (1, 1), (1, 1), 1, size, "row 9 of Table 2 (conv2d 1×1, the head)"))
    return [*layers, Layer(head, 1000, (1, 1), (1, 1), 1, 1, "row 11 of Table 2 (the classifier)")]


# ---------------------------------------------------------------------------------------- how a student is told


def expect(right, message):
    """Fail with the message alone, which is for students; a traceback would tell them of this file."""
    if not right:
        pytest.fail(message, pytrace=False)


def attempt(what, function, *args, **kwargs):
    """Call a student's code; what it raises fails the test with the student's line, not with a page of PyTorch's."""
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:
        ours = Path(torch.__file__).parent, Path(__file__).parent
        frames = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(folder) for folder in ours)]
        place = [f"{Path(frame.filename).name}, line {frame.lineno} ({frame.line})" for frame in frames[-1:]]
        fault = ": ".join([what, *place, f"{type(error).__name__}", " ".join(str(error).split())])
    if "must match the size" in fault and "dimension 1" in fault:
        fault += " (a shortcut is only where the channels agree)"
    elif "must match the size" in fault:
        fault += " (a 3×3 convolution has padding=1, a 1×1 none: only strides make maps smaller; shortcuts are only where they are 1)"
    expect(False, fault)


def build(network_class, **arguments):
    named = ", ".join(f"{name}={value}" for name, value in arguments.items())
    network = attempt(f"MobileNetV2({named}) cannot be built", network_class, **arguments)
    expect(isinstance(network, nn.Module), "MobileNetV2 is not an nn.Module: class MobileNetV2(nn.Module).")
    if any(map(nn.parameter.is_lazy, network.parameters())):  # nn.LazyConv2d and its like have no weights before
        forward(network.eval(), torch.zeros(2, 3, SIZE, SIZE))
    return network


def forward(network, images):
    logits = attempt("forward fails", network, images)
    kind = type(logits).__name__
    expect(isinstance(logits, torch.Tensor), f"forward returns {kind}, expected one tensor of logits (is a return missing?).")
    return logits


@functools.lru_cache(maxsize=2)
def record(network_class, width=None, training=False):
    """What a network of random weights does with two images, as a Recorder."""
    torch.manual_seed(0)
    network = build(network_class, num_classes=1000, **({} if width is None else {"width_mult": width}))
    images = torch.randn(2, 3, SIZE, SIZE)
    randomise(network).train(training)
    recorder = Recorder()
    recorder.network, recorder.images = network, images.clone()
    recorder.buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad(), recorder:
        recorder.logits = forward(network, images)
    return recorder


def recorded(network_class, training=False):
    """`record`, for a network that runs; others skip the test."""
    try:
        return record(network_class, training=training)
    except (Exception, pytest.fail.Exception):
        pytest.skip("the network does not run: see the first test that fails")


def aligned(network_class, training=False):
    """Pairs (layer as it ran, layer as Table 2 wants it); networks that have not as many skip the test."""
    recorder = recorded(network_class, training)
    if explain_layers(recorder):
        pytest.skip("the layers are not those of Table 2: see test_the_layers_of_table_2")
    return list(zip(recorder.layers, expected_layers(), strict=True))


# --------------------------------------------------------------------------------- what any right MobileNetV2 does

# Their order is that of explanations: what a student reads first should be the cause of what follows.


def test_images_become_logits(network_class):
    recorder = record(network_class)
    shape = tuple(recorder.logits.shape)
    expect(shape == (2, 1000), f"two images and 1000 classes give {shape}, expected (2, 1000): a logit for each class of each image.")
    expect(recorder.logits.isfinite().all(), "some logits are NaN or infinite.")
    with torch.no_grad():
        alone = tuple(forward(recorder.network, recorder.images[:1].clone()).shape)
    expect(alone == (1, 1000), f"one image gives {alone}, expected (1, 1000): .squeeze() takes the batch, too, if not told.")


@functools.lru_cache(maxsize=2)
def explain_layers(recorder):
    """Why the layers are not as many as those of Table 2, or None."""
    layers, expected = recorder.layers, expected_layers()
    convolutions = [layer for layer in layers if layer.call.name == "convolution"]
    linear = len(layers) - len(convolutions)
    # the expansion, a shortcut and the first layer of the next block are close to each other
    near = [(one, other) for index, one in enumerate(convolutions) for other in convolutions[index + 1 : index + 4]]
    twice = [one for one, other in near if same(one.call.taken, other.call.taken)]
    sizes = [layer.size for layer in layers]
    if any(size == 1 < max(sizes[index:]) for index, size in enumerate(sizes)):
        return f"{len(layers)} layers with weights; some see averages, and maps follow: squeeze-and-excitation is MobileNetV3's."
    if twice:
        return (
            f"two convolutions take the same {twice[0].in_channels} channels: a shortcut with a convolution. §3.3 and Figure 4d add"
            " the input as it is, and only where the stride is 1; where the channels differ, there is none."
        )
    if linear > 1:
        return (
            f"{linear} linear layers, expected one. Table 2 ends in a pooling and a single classifier on its 1280 channels;"
            " '3 fully connected layers' are those of VGG."
        )
    if len(layers) == len(expected) + 1 and layers[1].kernel == (1, 1):
        return (
            f"the first block begins with a 1×1 convolution to {layers[1].out_channels} channels. Its row in Table 2 has t = 1:"
            " nothing is expanded, so that it begins with the depthwise convolution (as in TensorFlow's and torchvision's code)."
        )
    if len(layers) == len(expected) - 1 and layers[-1].in_channels == 320:
        return "the head is missing: after the blocks, row 9 of Table 2 has a 1×1 convolution from 320 to 1280 channels."
    if len(layers) != len(expected):
        return (
            f"{len(layers)} layers with weights, expected {len(expected)}: the stem, 2 of the first block, 3 of each of 16 blocks,"
            " the head and the classifier. n in Table 2 says how often a row is repeated (1, 2, 3, 4, 3, 3, 1: 17 blocks);"
            " once each would give 23 layers, 2.43M parameters and 146M multiply-adds."
        )


def test_the_layers_of_table_2(network_class):
    message = explain_layers(recorded(network_class))
    expect(message is None, message)


def test_pytorch_knows_all_weights(network_class):
    recorder = recorded(network_class)
    known = {parameter.data_ptr() for parameter in recorder.network.parameters()}
    strangers = [layer for layer in recorder.layers if weight(layer.call).data_ptr() not in known]
    expect(
        not strangers,
        f"{len(strangers)} layers ran whose weights are not among network.parameters(): no optimiser would train them, and eval() does"
        " not reach them. Layers in a Python list or dict are unknown to PyTorch: nn.ModuleList, nn.Sequential or nn.ModuleDict.",
    )


def weight(call):
    return call.arguments[{"convolution": 1, "native_batch_norm": 1, "addmm": 2, "mm": 1}[call.name]]


def test_eval_mode_gives_each_image_its_logits(network_class):
    recorder = recorded(network_class)
    with torch.no_grad():
        again, alone = forward(recorder.network, recorder.images.clone()), forward(recorder.network, recorder.images[:1].clone())
    own = "BatchNorm must take the mean and deviation that it has gathered in training, not those of the batch"
    batch = [call for call in recorder.calls if call.name == "native_batch_norm" and call.arguments[5]]
    expect(not batch, f"in eval mode an image depends on the others of its batch: {own}.")
    expect(
        torch.equal(recorder.logits, again),
        "the same image gives other logits each time in eval mode. Dropout must rest there: nn.Dropout does so by itself,"
        " functional.dropout only with training=self.training.",
    )
    expect(same(recorder.logits[:1], alone), "in eval mode an image gives other logits in another batch.")


def test_training_gathers_statistics(network_class):
    recorder = record(network_class, training=True)
    still = [name for name, buffer in recorder.network.named_buffers() if torch.equal(buffer, recorder.buffers[name])]
    expect(
        not still,
        f"'{still[0] if still else ''}' is the same after a batch in training mode: BatchNorm must follow there (functional.batch_norm"
        " needs training=self.training, and an own train() must call super().train()).",
    )
    momenta = [layer.momentum or 0 for layer in recorder.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    expect(
        max(momenta, default=0) <= 0.5,
        f"BatchNorm's momentum is {max(momenta, default=0)}: in PyTorch that is the share of the new batch, in Keras of the past.",
    )


def test_channels(network_class):
    for found, expected in aligned(network_class):
        channels, wanted = [(layer.in_channels, layer.out_channels) for layer in (found, expected)]
        why = "Inside, a block is t times as wide as its input (Table 1: k, tk, tk, k'); c in Table 2 is what it gives."
        if "row 1 of" in expected.name:
            why = "The stem makes 32 channels of three; width_mult is 1.0 if nothing is said."
        elif channels[0] == 1280 * (SIZE // 32) ** 2:
            why = f"{channels[0]} = 1280 · {SIZE // 32} · {SIZE // 32}: the average pooling in front of it is missing (row 10)."
        expect(
            channels == wanted,
            f"{expected.name}: from {channels[0]} to {channels[1]} channels, expected from {wanted[0]} to {wanted[1]}. {why}",
        )


def test_depthwise_convolutions_of_3_by_3(network_class):
    for found, expected in aligned(network_class):
        sizes = ["{} × {}".format(*layer.kernel) for layer in (found, expected)]
        expect(sizes[0] == sizes[1], f"{expected.name}: a kernel of {sizes[0]}, expected {sizes[1]} (Table 1).")
        expect(
            found.call.name != "convolution" or set(found.call.arguments[5]) == {1},
            f"{expected.name}: dilated, expected dilation=1: neighbouring pixels.",
        )
        expect(
            found.groups == expected.groups,
            f"{expected.name}: groups={found.groups}, expected groups={expected.groups}. Depthwise (§3.1): one filter a channel,"
            " groups = channels; all other convolutions mix all channels, groups = 1.",
        )


def test_strides(network_class):
    pairs = aligned(network_class)
    rows = {c: next(found.stride[0] for found, e in pairs if f"c={c}," in e.name and "depthwise" in e.name) for c in (64, 96)}
    expect(
        rows != {64: 1, 96: 2},
        "the row of 64 channels has stride 1 and that of 96 has stride 2, expected 2 and 1. That is the typo of Table 2 in the paper's"
        " first version (arXiv:1801.04381v1), and costs 416M multiply-adds, where the text has 300M.",
    )
    for found, expected in pairs:
        strides = [layer.stride[0] if len(set(layer.stride)) == 1 else layer.stride for layer in (found, expected)]
        expect(
            strides[0] == strides[1],
            f"{expected.name}: stride {strides[0]}, expected {strides[1]}. The stride s of a row belongs to its first block,"
            " 'all others use stride 1' (Table 2), and in the block to the depthwise convolution (Table 1); the stem has 2.",
        )


def test_sizes(network_class):
    pairs = aligned(network_class)
    if any(found.stride != expected.stride for found, expected in pairs):
        pytest.skip("the strides are not those of Table 2: see test_strides")
    head, classifier = pairs[-2][0], pairs[-1][0]
    expect(
        head.call.taken.shape[2] == pairs[-3][0].size,
        "the head takes averages. Table 2: first the 1×1 convolution to 1280 channels, then the 7×7 average; the other way round"
        " its ReLU6 would see averages only.",
    )
    expect(classifier.size == 1, "the classifier works on maps, expected on their average (Table 2: avgpool first).")
    for found, expected in pairs:
        expect(
            found.size == expected.size,
            f"{expected.name}: gives {found.size} × {found.size} pixels of an image of {SIZE}, expected {expected.size} ×"
            f" {expected.size} (Table 2, column input). A 3×3 convolution has padding=1, a 1×1 none: only strides make maps smaller.",
        )


def test_the_stem_takes_the_image_as_it_is(network_class):
    found = aligned(network_class)[0][0]
    changed = "the image is changed in front of the first convolution. Its mean and deviation belong into the data: checkpoints and"
    expect(same(recorded(network_class).images, found.call.taken), f"{changed} other people's weights expect it outside.")


def test_convolutions_without_bias(network_class):
    for found, expected in aligned(network_class)[:-1]:
        expect(
            found.call.arguments[2] is None,
            f"{expected.name}: has a bias, expected bias=False. BatchNorm follows, which subtracts the mean, and with it any"
            " bias, and adds its own shift.",
        )


def test_batch_norm_behind_every_convolution(network_class):
    recorder = recorded(network_class)
    for found, expected in aligned(network_class)[:-1]:
        expect(
            found.norm is not None and found.norm.arguments[1] is not None,
            f"{expected.name}: nn.BatchNorm2d, with its scale and shift, does not follow at once. §6.1: 'We use batch normalization"
            " after every layer'.",
        )
    count = sum(call.name == "native_batch_norm" for call in recorder.calls)
    expect(count == 52, f"{count} BatchNorm layers, expected 52: one behind every convolution, and no other.")


# What may come between two layers. Told by what they do, in whatever way they are written.
ACTIVATIONS = {
    "no activation": lambda x: x,
    "ReLU6": lambda x: x.clamp(0, 6),
    "ReLU": torch.relu,
    "LeakyReLU": nn.functional.leaky_relu,
    "SiLU (Swish)": nn.functional.silu,
    "Hardswish": nn.functional.hardswish,
    "GELU": nn.functional.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def name_fit(ways, before, after):
    """The first of the named functions that makes `after` of `before`."""
    return next((name for name, function in ways.items() if same(function(before), after)), "something else")


MODES = pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))


def in_mode(training):
    return "in training mode, " if training else ""


@MODES
def test_relu6_behind_all_convolutions_but_the_projection(network_class, training):
    pairs = aligned(network_class, training)
    for (found, expected), (after, _) in zip(pairs[:-2], pairs[1:-1], strict=True):
        if "projection" not in expected.name:
            expect_relu6(name_fit(ACTIVATIONS, found.output(), after.call.taken), expected, training)
    if not training:  # where dropout would come between
        head, pooled = pairs[-2][0].output(), pairs[-1][0].call.taken.flatten(1)
        fits = [name for name, function in ACTIVATIONS.items() if same(function(head).mean(dim=(2, 3)), pooled)]
        expect_relu6((fits or ["ReLU6"])[0], pairs[-2][1], training)  # none: the test of the pooling has more to say


def expect_relu6(name, expected, training):
    expect(
        name == "ReLU6",
        f"{in_mode(training)}{expected.name}: is followed by {name}, expected ReLU6, min(max(x, 0), 6). §4: 'We use ReLU6 as the"
        " non-linearity because of its robustness when used with low-precision computation'.",
    )


def block_ends(pairs):
    """Of each block: its name, whether it shall have a shortcut, what follows the projection, and 'alone', 'added' or 'before'.

    alone: the next layer takes the projection; added: its sum with the block's input; before: what follows comes behind the sum.
    """
    first = 1
    for index, (found, expected) in enumerate(pairs):
        if "projection" in expected.name:
            agree = pairs[index - 1][1].stride == (1, 1) and pairs[first][1].in_channels == expected.out_channels
            ends = explain_block(pairs[first][0].call.taken, found.output(), pairs[index + 1][0].call.taken)
            yield expected.name.removesuffix(", projection"), agree, *ends
            first = index + 1


def explain_block(x, projected, after):
    for name, function in ACTIVATIONS.items():
        if same(function(projected), after):
            return name, "alone"
        if x.shape == projected.shape and same(function(projected) + x, after):
            return name, "added"
        if x.shape == projected.shape and same(function(projected + x), after):
            return name, "before"
    return "something else", "alone"


@MODES
def test_the_projection_is_linear(network_class, training):
    for block, _, name, how in block_ends(aligned(network_class, training)):
        expect(
            name in ("no activation", "something else") or how == "before",
            f"{in_mode(training)}{block}, projection: is followed by {name}, expected no activation. §3.2: among few channels a ReLU"
            " loses what the channels that it sets to zero carried: the bottleneck is linear (Table 1, last line; Figure 6a).",
        )


@MODES
def test_shortcuts_between_the_bottlenecks(network_class, training):
    why = "§3.3, Figure 4d: the input is added to the projection where the stride is 1, and the channels agree: ten times in all."
    for block, agree, name, how in block_ends(aligned(network_class, training)):
        block = in_mode(training) + block
        expect(how != "before", f"{block}: {name} follows the addition, expected nothing (that is ResNet). {why}")
        expect(name != "something else", f"{block}: gives neither its projection nor the sum of that and its input. {why}")
        expect(not agree or how != "alone", f"{block}: the input is not added to the output, expected a shortcut. {why}")
        expect(agree or how == "alone", f"{block}: has a shortcut, expected none. {why}")


def test_global_average_pooling_behind_the_head(network_class):
    pairs = aligned(network_class)
    head, pooled = pairs[-2][0].output().clamp(0, 6), pairs[-1][0].call.taken.flatten(1)
    ways = {
        "average": lambda maps: maps.mean(dim=(2, 3)),
        "the maximum": lambda maps: maps.amax(dim=(2, 3)),
        "the sum": lambda maps: maps.sum(dim=(2, 3)),
    }
    way = name_fit(ways, head, pooled)
    expect(way == "average", f"of the 7 × 7 places the classifier takes {way}, expected their average (Table 2: avgpool).")


@MODES
def test_the_network_ends_in_logits(network_class, training):
    call, logits = aligned(network_class, training)[-1][0].call, recorded(network_class, training).logits
    found = call.given.flatten(1)
    if call.name == "mm":  # a bias that is added by itself: the same for each image
        found = found + (logits - found)[:1]
    ways = ACTIVATIONS | {"softmax": lambda x: x.softmax(dim=1), "log-softmax": lambda x: x.log_softmax(dim=1)}
    way = name_fit(ways, found, logits)
    why = "cross_entropy applies the softmax itself: of probabilities it would take it a second time, and hardly learn"
    why = f": {why}" if "softmax" in way else ""
    expect(way == "no activation", f"{in_mode(training)}the classifier is followed by {way}, expected nothing{why}.")


def test_parameters_and_multiply_adds(network_class):
    recorder = recorded(network_class)
    parameters = sum(parameter.numel() for parameter in recorder.network.parameters())
    more = "Are some there that nothing uses? Learned are weights, BatchNorm's scale and shift, and the classifier's bias."
    fewer = "Is one object used for several blocks, which then share their weights, or the classifier's bias (1,000) missing?"
    expect(
        parameters == 3_504_872,
        f"{parameters:,} parameters, expected 3,504,872 (with BatchNorm's; 3,470,760 without them; Table 4 says 3.4M), so"
        f" {parameters - 3_504_872:+,}. {more if parameters > 3_504_872 else fewer}",
    )
    macs, wanted = count_products(recorder.layers), count_products(expected_layers())
    expect(macs == wanted, f"{macs:,} multiply-adds at {SIZE} pixels, expected {wanted:,} (Table 4: 300M at 224).")


def count_products(layers):
    """Multiply-adds: each output is a sum of kernel area × input channels / groups products."""
    return sum(
        layer.size**2 * layer.out_channels * math.prod(layer.kernel) * layer.in_channels // layer.groups for layer in layers
    )


def test_a_gradient_reaches_every_parameter(network_class):
    recorded(network_class)
    network = build(network_class, num_classes=7).train()
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    expect(not frozen, f"'{frozen[0] if frozen else ''}' has requires_grad=False: a fresh network learns with all its weights.")
    with torch.no_grad():
        for parameter in network.parameters():  # some begin as zeros, behind which no gradient comes
            parameter.add_(0.01 * torch.randn_like(parameter))
    logits = forward(network, torch.randn(2, 3, SIZE, SIZE))
    expect(logits.shape == (2, 7), f"num_classes=7 gives {tuple(logits.shape)} for two images, expected (2, 7).")
    loss = nn.functional.cross_entropy(logits, torch.arange(2))
    expect(loss.requires_grad, "the logits have no gradient: something in forward computes without one.")
    loss.backward()
    for name, parameter in network.named_parameters():
        expect(
            parameter.grad is not None and parameter.grad.abs().sum() > 0,
            f"'{name}' gets no gradient: it is not used in forward, or a .detach(), .data or no_grad lies behind it.",
        )


@pytest.mark.parametrize("width", (0.35, 0.5, 0.75, 1.4))
def test_width_multiplier(network_class, width):
    aligned(network_class)
    for found, expected in zip(record(network_class, width).layers, expected_layers(width), strict=True):
        channels, wanted = [(layer.in_channels, layer.out_channels) for layer in (found, expected)]
        why = f"channels are scaled by {width}, then rounded to the nearest multiple of 8, but not below 90%, as in the reference code"
        if "head" in expected.name and channels[1] != wanted[1]:
            why = "below 1.0 the head keeps its 1280 channels, above it grows with the others (§4)"
        expect(
            channels == wanted,
            f"width_mult={width}, {expected.name}: from {channels[0]} to {channels[1]} channels, expected from {wanted[0]} to"
            f" {wanted[1]}: {why}.",
        )


def learned_tensors(recorder):
    """Weights and statistics in the order in which they are used, of each layer the weights first."""
    used = []
    for call in recorder.calls:
        linear = call.name in ("addmm", "mm")
        bias = call.arguments[:1] if call.name == "addmm" else ()
        tensors = [weight(call).t(), *bias] if linear else call.arguments[1:5]
        used += [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return used


def test_equal_weights_give_torchvisions_logits(network_class):
    aligned(network_class)
    recorder, theirs = [record.__wrapped__(kind) for kind in (network_class, torchvision.models.MobileNetV2)]
    ours, given = learned_tensors(recorder), learned_tensors(theirs)
    if [tensor.numel() for tensor in ours] != [tensor.numel() for tensor in given]:
        pytest.skip("the weights are not as many as torchvision's: see the tests above")
    with torch.no_grad():
        # Statistics of real maps: with random ones the logits would hardly depend on the image.
        for layer in theirs.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
                layer.momentum = 1.0
        for layer in recorder.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 1e-5  # whatever it was: the paper does not speak of it
        theirs.network.train()(torch.randn(2, 3, SIZE, SIZE))
        theirs.network.eval()
        for tensor, other in zip(ours, given, strict=True):
            tensor.copy_(other.reshape(tensor.shape))
        images = torch.randn(2, 3, SIZE, SIZE)
        logits, wanted = forward(recorder.network, images), theirs.network(images)
    difference = (logits - wanted).norm() / (wanted[0] - wanted[1]).norm()
    expect(
        difference < 0.01,
        f"with torchvision's weights, layer by layer, the logits differ from torchvision's by {difference:.0%} of what they differ"
        " from image to image. If all tests above pass, the layers are right, and something between them is not.",
    )


# =========================================================================== the other tests of mobilenetv2.py


def pair(width):
    """Return torchvision's network and ours with the same random weights."""
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width))
    ours = MobileNetV2(width_mult=width)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs, ours


# -------------------------------------------------------------------------------- comparison with torchvision


@pytest.mark.parametrize("width", WIDTHS)
def test_logits_and_gradients_equal_torchvision_bit_for_bit(width):
    theirs, ours = pair(width)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs.eval()(images), ours.eval()(images))

    theirs.train(), ours.train()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)  # the same dropout mask
        outputs.append(model(images))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours_gradients = to_torchvision({name: parameter.grad for name, parameter in ours.named_parameters()})
    assert list(gradients) == list(ours_gradients)
    assert all(torch.equal(gradients[name], ours_gradients[name]) for name in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    # The running statistics must be equal, too.
    after = to_torchvision(ours.state_dict())
    assert all(torch.equal(tensor, after[name]) for name, tensor in theirs.state_dict().items())


def test_logits_equal_torchvision_at_224_pixels():
    theirs, ours = pair(1.0)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize("width", WIDTHS)
def test_renaming_to_ours_and_back_changes_no_byte(width):
    def to_bytes(state_dict):
        buffer = io.BytesIO()
        torch.save(dict(state_dict), buffer)
        return buffer.getvalue()

    state_dict = torchvision.models.mobilenet_v2(width_mult=width).state_dict()
    renamed = from_torchvision(state_dict)
    assert list(renamed) == list(MobileNetV2(width_mult=width).state_dict())
    assert to_bytes(to_torchvision(renamed)) == to_bytes(state_dict)


def test_unknown_weight_name_is_refused():
    with pytest.raises(CheckpointError, match="'layer1.0.conv1.weight' is not a weight of MobileNetV2"):
        from_torchvision({"layer1.0.conv1.weight": torch.zeros(1)})


def test_initial_weights_equal_torchvision_bit_for_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=5).state_dict()
    torch.manual_seed(0)
    ours = to_torchvision(MobileNetV2(num_classes=5).state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


# ------------------------------------------------------------------------------------------- published costs

# tensorflow/models, research/slim/nets/mobilenet/README.md: width, image size, million multiply-adds, million parameters
PUBLISHED = [
    (1.4, 224, 582, 6.06),
    (1.3, 224, 509, 5.34),
    *[(1.0, size, macs, 3.47) for size, macs in zip((224, 192, 160, 128, 96), (300, 221, 154, 99, 56), strict=True)],
    *[(0.75, size, macs, 2.61) for size, macs in zip((224, 192, 160, 128, 96), (209, 153, 107, 69, 39), strict=True)],
    *[(0.5, size, macs, 1.95) for size, macs in zip((224, 192, 160, 128, 96), (97, 71, 50, 32, 18), strict=True)],
    *[(0.35, size, macs, 1.66) for size, macs in zip((224, 192, 160, 128, 96), (59, 43, 30, 20, 11), strict=True)],
]


@pytest.mark.parametrize("width, size, million_macs, million_parameters", PUBLISHED)
def test_costs_equal_the_published_ones(width, size, million_macs, million_parameters):
    with torch.device("meta"):  # shapes without numbers
        model = MobileNetV2(width_mult=width)
    assert count_macs(model, size) // 1_000_000 == million_macs
    assert round(count_parameters(model, batch_norm=False) / 1e6, 2) == million_parameters


def test_exact_costs():
    assert count_parameters(MobileNetV2()) == 3_504_872
    assert count_macs(MobileNetV2(), 224) == 300_774_272 == count_products(expected_layers())


def test_make_divisible():
    assert [make_divisible(value) for value in (8, 11.2, 12, 20, 22.4, 33.6, 1280)] == [8, 16, 16, 24, 24, 32, 1280]
    for value in torch.arange(8, 2000, 0.7).tolist():
        assert make_divisible(value) % 8 == 0
        assert make_divisible(value) >= 0.9 * value


# ------------------------------------------------------------------------------------------------- the layers


def shapes_after_rows(model, size):
    """Return (C, H) after the stem, after each row of Table 2, and after the head."""
    x = model.stem(torch.zeros(1, 3, size, size))
    shapes, index = [(x.shape[1], x.shape[2])], 0
    for _, _, repeats, _ in TABLE_2:
        x = model.blocks[index : index + repeats](x)
        shapes.append((x.shape[1], x.shape[2]))
        index += repeats
    assert index == len(model.blocks) == 17
    x = model.head(x)
    return shapes + [(x.shape[1], x.shape[2])]


@pytest.mark.parametrize(
    "output_stride, size, sides",
    [
        (32, 224, (112, 112, 56, 28, 14, 14, 7, 7, 7)),
        (32, 32, (16, 16, 8, 4, 2, 2, 1, 1, 1)),
        (16, 32, (16, 16, 16, 8, 4, 4, 2, 2, 2)),
        (8, 32, (16, 16, 16, 16, 8, 8, 4, 4, 4)),
    ],
)
def test_shapes_after_every_row(output_stride, size, sides):
    model = MobileNetV2(output_stride=output_stride).eval()
    channels = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
    assert shapes_after_rows(model, size) == list(zip(channels, sides, strict=True))
    assert model.features(torch.zeros(2, 3, size, size)).shape == (2, 1280)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 1000)


def test_weights_have_the_same_shapes_at_every_output_stride():
    shapes = [{k: v.shape for k, v in MobileNetV2(output_stride=s).state_dict().items()} for s in (32, 16, 8)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_block_with_zero_projection_is_the_identity():
    for block in MobileNetV2().eval().blocks:
        nn.init.zeros_(block.project.conv.weight)
        channels = (block.expand.conv if isinstance(block.expand, nn.Sequential) else block.depthwise.conv).in_channels
        x = torch.randn(1, channels, 8, 8)
        expected = x if block.use_residual else torch.zeros_like(block(x))
        assert torch.equal(block(x), expected)


def test_dropout_is_random_in_training_mode_only():
    model = MobileNetV2(num_classes=10, width_mult=0.35, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)  # so that dropout alone is random
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 0}, {"width_mult": 0}, {"width_mult": float("nan")}, {"output_stride": 4}, {"dropout": 1.5}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError):
        MobileNetV2(**arguments)


def test_script_prints_table_2_with_measured_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", "--width", "0.5", "--image-size", "160"])
    mobilenetv2.main()
    lines = capsys.readouterr().out.splitlines()
    # by hand for the third row: 8·48·80² + 9·48·40² + 48·16·40², then 16·96·40² + 9·96·40² + 96·16·40²
    assert lines[1].split() == ["conv2d", "3×3", "3×160×160", "16×80×80", "-", "16", "1", "2", "464", "2,764,800"]
    assert lines[3].split() == ["bottleneck", "8×80×80", "16×40×40", "6", "16", "2", "2", "6,160", "10,675,200"]
    assert [line.split()[-3] for line in lines[1:10]] == ["2", "1", "2", "2", "2", "1", "2", "1", "1"]  # s
    assert lines[11].split() == ["total", "1,968,680", f"{count_macs(MobileNetV2(width_mult=0.5), 160):,}"]


@pytest.mark.parametrize("option", (["--width", "-1"], ["--image-size", "0"], ["--output-stride", "7"]))
def test_script_refuses_bad_options_in_one_line(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", *option])
    with pytest.raises(SystemExit) as stop:
        mobilenetv2.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ checkpoints


ROW = {"epoch": 1, "stage": "scratch", "train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0, "val_top1": 0.5}


@pytest.fixture
def checkpoint(tmp_path):
    model = randomise(MobileNetV2(num_classes=3, width_mult=0.35, output_stride=8))
    path = tmp_path / "runs" / "model.pt"
    save_checkpoint(path, model, ["a", "b", "鬱金香"], PREPROCESSING, [ROW])
    return path


def test_checkpoint_restores_the_network_and_its_classes(checkpoint):
    model, contents = load_checkpoint(checkpoint)
    assert model.arch == {"num_classes": 3, "width_mult": 0.35, "dropout": 0.2, "output_stride": 8}
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert contents["classes"] == ["a", "b", "鬱金香"] and contents["preprocessing"] == PREPROCESSING
    assert contents["history"] == [ROW]
    again = checkpoint.with_name("again.pt")
    save_checkpoint(again, model, contents["classes"], contents["preprocessing"], contents["history"])
    assert again.read_bytes() == checkpoint.read_bytes()


def test_loading_does_not_change_the_random_state(checkpoint):
    before = torch.get_rng_state()
    load_checkpoint(checkpoint)
    assert torch.equal(before, torch.get_rng_state())


def test_failed_write_keeps_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mobilenetv2.Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device: .*model.pt"):
        save_checkpoint(checkpoint, MobileNetV2(num_classes=2), ["a", "b"], PREPROCESSING)
    assert checkpoint.read_bytes() == before
    assert [file.name for file in checkpoint.parent.iterdir()] == ["model.pt"]


def assert_refused(path, reason=None):
    """Loading `path` must raise a CheckpointError of one line, with path, reason and fix."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"cannot load '{path}' (") and "\n" not in message
    assert message.endswith("): make a checkpoint with train.py or finetune.py, or use imagenet")


def test_missing_checkpoint_is_named(tmp_path):
    assert_refused(tmp_path / "nothing.pt", "No such file")


@pytest.mark.parametrize("share", (0, 0.001, 0.3, 0.9, 0.9999))
def test_truncated_checkpoint_is_refused(checkpoint, share):
    contents = checkpoint.read_bytes()
    checkpoint.write_bytes(contents[: int(len(contents) * share)])
    assert_refused(checkpoint)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", (lambda path: path.write_bytes(pickle.dumps(Hostile())), lambda path: torch.save(Hostile(), path)))
def test_pickle_that_would_run_code_is_refused(write, tmp_path, capsys):
    write(tmp_path / "hostile.pt")
    assert_refused(tmp_path / "hostile.pt", "damaged, or more than tensors and plain values")
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda c: c["model"].pop("stem.conv.weight"), 'Missing key.*"stem.conv.weight"'),
        (lambda c: c["model"].update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
        (lambda c: c["model"].update({"stem.conv.weight": torch.zeros(2, 3)}), "size mismatch for stem.conv.weight"),
        (lambda c: c["model"].update({"stem.conv.weight": 3}), '"stem.conv.weight", expected torch.Tensor'),
        (lambda c: c["arch"].update(width_mult=1.0), "size mismatch for stem.conv.weight"),
        (lambda c: c["arch"].update(num_classes=10**12), "size mismatch"),  # not: not enough memory
        (lambda c: c["arch"].update(width_mult="many"), "'<=' not supported"),
        (lambda c: c["arch"].update(hidden=1), "unexpected keyword argument 'hidden'"),
        (lambda c: c.pop("model"), "'model'"),
        (lambda c: c.pop("arch"), "'arch'"),
        *[(lambda c, part=part: c.pop(part), f"KeyError: '{part}'") for part in ("classes", "preprocessing", "history")],
        (lambda c: c["classes"].pop(), "2 names, 3 classes"),
    ],
)
def test_incomplete_or_inconsistent_checkpoint_is_refused(checkpoint, change, reason):
    contents = torch.load(checkpoint, weights_only=True)
    change(contents)
    torch.save(contents, checkpoint)
    assert_refused(checkpoint, reason)


@pytest.mark.parametrize("contents", ([1, 2], {"epoch": 3}, torch.zeros(2)))
def test_file_that_is_no_checkpoint_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt")


# ----------------------------------------------------------------------------------------- pretrained weights


@pytest.mark.parametrize("width", WIDTHS)
def test_torchvision_file_gives_the_same_logits(width, tmp_path):
    path, images = tmp_path / "theirs.pth", torch.randn(2, 3, 64, 64)
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=4)).eval()
    torch.save(theirs.state_dict(), path)
    model, contents = load_checkpoint(path)
    assert torch.equal(model(images), theirs(images)) and contents["classes"] == []
    assert torch.equal(load_pretrained(path, num_classes=4)(images), theirs(images))
    fresh = load_pretrained(path, num_classes=9, output_stride=16)
    assert fresh.arch == {"num_classes": 9, "width_mult": width, "dropout": 0.2, "output_stride": 16}
    assert fresh(images).shape == (2, 9)
    assert torch.equal(fresh.head.conv.weight, theirs.features[18][0].weight)


def test_another_number_of_classes_gives_a_new_classifier(checkpoint):
    model = load_checkpoint(checkpoint)[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained(checkpoint, num_classes=3)(images), model(images))
    assert load_pretrained(checkpoint, num_classes=5)(images).shape == (2, 5)


@pytest.mark.parametrize("name", ("features.5.conv.0.0.weight", "classifier.1.weight", "features.17.conv.3.bias"))
def test_incomplete_torchvision_file_is_refused(name, tmp_path):
    state_dict = torchvision.models.mobilenet_v2(num_classes=4).state_dict()
    del state_dict[name]
    torch.save(state_dict, tmp_path / "part.pth")
    ours = list(from_torchvision({name: None}))[0]
    assert_refused(tmp_path / "part.pth", ours)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Replace torchvision's address by a local file with its hash in its name, and empty the download folder."""
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    path = path.rename(path.with_name(f"mobilenet_v2-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))
    monkeypatch.setattr(mobilenetv2, "IMAGENET_URL", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return path


def test_address_and_preprocessing_of_imagenet_weights_are_torchvisions():
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    theirs, ours = weights.transforms(), mobilenetv2.IMAGENET_PREPROCESSING
    assert mobilenetv2.IMAGENET_URL == weights.url
    assert [ours["image_size"]] == theirs.crop_size and ours["crop"] == theirs.crop_size[0] / theirs.resize_size[0]
    assert (ours["mean"], ours["std"], ours["channels"]) == (theirs.mean, theirs.std, 3)


def test_imagenet_weights_are_downloaded_once(imagenet, tmp_path):
    model = load_pretrained("imagenet", num_classes=6)
    assert model.arch["num_classes"] == 6
    expected = torch.load(imagenet, weights_only=True)["features.18.0.weight"]
    assert torch.equal(model.head.conv.weight, expected)
    imagenet.unlink()
    load_pretrained("imagenet", num_classes=6)
    cached = tmp_path / "home" / "hub" / "checkpoints" / imagenet.name
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot load 'imagenet'"):
        load_pretrained("imagenet", num_classes=6)


def test_imagenet_weights_with_a_wrong_hash_are_deleted(imagenet, tmp_path):
    imagenet.write_bytes(imagenet.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match=r"cannot load 'imagenet' \(RuntimeError: invalid hash"):
        load_pretrained("imagenet", num_classes=6)
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


def test_error_without_a_network_names_address_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"download https://.*/mobilenet_v2-7ebf99e0.pth into '(.*)'$") as caught:
        load_pretrained("imagenet", num_classes=6)
    assert f"'{tmp_path}/hub/checkpoints'" in str(caught.value) and "\n" not in str(caught.value)


def test_imagenet_weights_in_the_cache_cannot_run_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / mobilenetv2.IMAGENET_URL.rpartition("/")[2]
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="cannot load 'imagenet'"):
        load_checkpoint("imagenet")
    assert "must never" not in capsys.readouterr().out


def test_half_precision_weights_become_float32(tmp_path):
    weights = torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.35).state_dict()
    half = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
    torch.save(half, tmp_path / "half.pth")
    assert load_checkpoint(tmp_path / "half.pth")[0](torch.randn(1, 3, 32, 32)).dtype == torch.float32
