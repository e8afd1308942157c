"""The network: first what any right MobileNetV2 does, then what else this project's file does.

The first part grades a class MobileNetV2 of anybody, whatever its modules are called:

    python -m pytest tests/test_mobilenetv2.py --implementation path/to/student.py

It watches the operations that run for one image (`Recorder`) and holds them against Table 2. tests/test_grader.py proves that
it fails typical wrong networks, each with the message that tells its fault.
"""

import functools
import hashlib
import io
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

# Table 2 of the paper, here once more, so that a mistake in the network's own table cannot hide: t, c, n, s
TABLE_2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def randomise(model):
    """Random statistics and weights everywhere, so that no two layers could be exchanged unnoticed."""
    for name, tensor in model.state_dict().items():
        if "num_batches" not in name:
            spread = 1.0 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * spread)
    return model


# ------------------------------------------------------------------------------- what a network does with an image


@dataclass
class Operation:
    """One that ran: what it took and gave are numbers of values; a tensor that is changed in place has a new value."""

    name: str
    taken: list
    given: int
    arguments: tuple
    before: tuple  # shape of the first tensor that it took
    after: tuple


@dataclass
class Layer:
    """A convolution or linear layer, as Table 2 wants it or as it ran."""

    in_channels: int
    out_channels: int
    kernel: int  # pixels a side
    stride: int
    groups: int
    size: int  # pixels a side of what it gives
    name: str = ""
    operation: Operation = None


class Recorder(TorchDispatchMode):
    """Record the operations that depend on `images`, in whatever way the network is written."""

    SAME = ("view", "reshape", "squeeze", "unsqueeze", "clone", "detach", "alias", "permute", "to_copy")

    def __init__(self, images):
        super().__init__()
        self.operations, self.values, self.alive = [], {id(images): 0}, [images]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flat = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
        known = [part for part in flat if isinstance(part, torch.Tensor) and id(part) in self.values]
        taken = [self.values[id(part)] for part in known]
        before = tuple(known[0].shape) if known else ()
        result = function(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, tuple) else result
        if taken and isinstance(output, torch.Tensor):
            name = function.overloadpacket.__name__.strip("_")
            if name in self.SAME:
                given = taken[0]
            else:
                given = len(self.operations) + 1
                self.operations.append(Operation(name, taken, given, args, before, tuple(output.shape)))
            self.alive.append(output)  # or another tensor could get its id
            self.values[id(output)] = given
        return result

    def takers(self, value):
        return [operation for operation in self.operations if value in operation.taken]

    def following(self, operation):
        """What happens to each number before the next layer: (names of the operations, the last one's value)."""
        names, value = [], operation.given
        while True:
            takers = self.takers(value)
            single = len(takers) == 1 and len(takers[0].taken) == 1 and takers[0].before == takers[0].after
            if not single or takers[0].name in ("convolution", "addmm", "mm"):
                return names, value
            names.append(name_activation(takers[0]))
            value = takers[0].given
            if names[-2:] == ["ReLU", "clamp(None, 6)"]:
                names[-2:] = ["ReLU6"]

    def layers(self):
        return [layer_of(operation) for operation in self.operations if operation.name in ("convolution", "addmm", "mm")]


def name_activation(operation):
    if operation.name in ("hardtanh", "clamp", "clamp_max"):
        limits = operation.arguments[1:3] if operation.name != "clamp_max" else (None, operation.arguments[1])
        return "ReLU6" if tuple(limits) == (0, 6) else f"clamp{tuple(limits)}".replace(".0", "")
    names = {"relu": "ReLU", "native_batch_norm": "BatchNorm", "softmax": "softmax", "log_softmax": "log-softmax"}
    return names.get(operation.name, operation.name)


def layer_of(operation):
    if operation.name != "convolution":
        return Layer(operation.before[1], operation.after[1], 1, 1, 1, 1, operation=operation)
    _, weight, _, stride, _, _, _, _, groups = operation.arguments
    return Layer(operation.before[1], operation.after[1], weight.shape[2], stride[0], groups, operation.after[2], operation=operation)


def expected_layers(width=1.0):
    """The 53 layers of Table 2 at 224 pixels, with the place of each in the table."""
    channels, size = make_divisible(32 * width), 112
    layers = [Layer(3, channels, 3, 2, 1, size, "row 1 of Table 2 (conv2d 3×3)")]
    for row, (t, c, n, s) in enumerate(TABLE_2, start=2):
        for block in range(n):
            name = f"row {row} of Table 2 (t={t}, c={c}, n={n}, s={s}), block {block + 1} of {n}"
            stride, wide = s if block == 0 else 1, channels * t
            if t > 1:
                layers.append(Layer(channels, wide, 1, 1, 1, size, f"{name}, expansion"))
            size //= stride
            layers.append(Layer(wide, wide, 3, stride, wide, size, f"{name}, depthwise convolution"))
            layers.append(Layer(wide, make_divisible(c * width), 1, 1, 1, size, f"{name}, projection"))
            channels = layers[-1].out_channels
    head = make_divisible(1280 * max(1.0, width))
    layers.append(Layer(channels, head, 1, 1, 1, size, "row 9 of Table 2 (conv2d 1×1, the head)"))
    return [*layers, Layer(head, 1000, 1, 1, 1, 1, "row 11 of Table 2 (the classifier)")]


def build(network_class, **arguments):
    try:
        return network_class(**arguments)
    except TypeError as error:
        named = ", ".join(f"{name}={value}" for name, value in arguments.items())
        pytest.fail(f"MobileNetV2({named}) is refused: {error}. The class takes num_classes and width_mult.", pytrace=False)


def forward(network, images):
    """The network's output; what it raises fails the test with the student's line, not with a page of PyTorch's."""
    try:
        return network(images)
    except Exception as error:  # a student's network may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torch" not in Path(frame.filename).parts]
        theirs = [frame for frame in frames if frame.filename != __file__]
        place = [f"{Path(frame.filename).name}, line {frame.lineno} ({frame.line})" for frame in theirs[-1:]]
        fault = ": ".join([*place, type(error).__name__, str(error)])
    mend = "If maps of two sizes meet in an addition: a 3×3 convolution has a border of 1 (padding=1), a 1×1 has none"
    pytest.fail(f"{fault}. {mend}; only strides make maps smaller.", pytrace=False)


@functools.lru_cache(maxsize=4)
def record(network_class, width=None):
    """What the network does with two images of 224 pixels, in eval mode, as a Recorder."""
    torch.manual_seed(0)
    network = build(network_class, num_classes=1000, **({} if width is None else {"width_mult": width})).eval()
    images = torch.randn(2, 3, 224, 224)
    recorder = Recorder(images)
    with torch.no_grad(), recorder:
        recorder.logits = forward(network, images)
    recorder.network = network  # its weights are told apart by their ids
    return recorder


def recorded(network_class):
    """`record`, for a network that runs; others skip the test."""
    try:
        return record(network_class)
    except (Exception, pytest.fail.Exception):
        pytest.skip("the network does not run: see test_an_image_becomes_logits")


def aligned(network_class):
    """Recorder, and pairs (layer as it ran, layer as expected); networks that have not as many skip the test."""
    recorder = recorded(network_class)
    if explain_layers(recorder):
        pytest.skip("the layers are not those of Table 2: see test_the_layers_of_table_2")
    return recorder, list(zip(recorder.layers(), expected_layers(), strict=True))


def expect(right, message):
    """Fail with the message alone, which is for students; a traceback would tell them of this file."""
    if not right:
        pytest.fail(message, pytrace=False)


# --------------------------------------------------------------------------------- what any right MobileNetV2 does


def test_an_image_becomes_logits(network_class):
    shape = tuple(record(network_class).logits.shape)
    expect(shape == (2, 1000), f"two images and 1000 classes give {shape}, expected (2, 1000): a logit for each class of each image.")


def explain_layers(recorder):
    """Why the layers are not as many as those of Table 2, or None."""
    layers, expected = recorder.layers(), expected_layers()
    convolutions = [layer for layer in layers if layer.operation.name == "convolution"]
    linear = len(layers) - len(convolutions)
    twice = [op for op in recorder.operations if sum(t.name == "convolution" for t in recorder.takers(op.given)) > 1]
    if twice:
        return (
            f"two convolutions take the same {twice[0].after[1]} channels: a shortcut with a convolution. §3.3 and Figure 4 have a"
            " shortcut only where stride is 1 and the channels agree, and there it adds the input as it is."
        )
    if linear > 1:
        return (
            f"{linear} linear layers, expected one. Table 2 ends in a pooling and a single classifier on its 1280 channels;"
            " '3 fully connected layers' are those of VGG."
        )
    if len(layers) > 1 and layers[1].kernel == 1 and layers[1].groups == 1 and len(layers) == len(expected) + 1:
        return (
            f"the first block begins with a 1×1 convolution to {layers[1].out_channels} channels. Its row in Table 2 has t = 1:"
            " nothing is expanded, so that it begins with the depthwise convolution (both reference implementations do)."
        )
    if len(layers) != len(expected):
        return (
            f"{len(layers)} layers with weights, expected {len(expected)}: the stem, 2 of the first block, 3 of each of 16 blocks,"
            " the head and the classifier. n in Table 2 says how often a row is repeated (1, 2, 3, 4, 3, 3, 1: 17 blocks);"
            " once each would give 23 layers, 2.43M parameters and 146M multiply-adds."
        )


def test_the_layers_of_table_2(network_class):
    message = explain_layers(recorded(network_class))
    expect(message is None, message)


def test_global_average_pooling_behind_the_head(network_class):
    recorder, pairs = aligned(network_class)
    givers = {operation.given: operation.name for operation in recorder.operations}
    before_head, before_classifier = [givers[found.operation.taken[0]] for found, _ in pairs[-2:]]
    expect(
        "mean" not in before_head and "pool" not in before_head,
        f"the head follows '{before_head}', expected the last block. Table 2: first the 1×1 convolution to 1280 channels, then the"
        " 7×7 average; the other way round its ReLU6 would see averages only.",
    )
    expect(
        "max" not in before_classifier,
        f"the classifier follows '{before_classifier}', expected the average of the 7 × 7 places (Table 2: avgpool).",
    )


def test_channels(network_class):
    for found, expected in aligned(network_class)[1]:
        channels, wanted = [(layer.in_channels, layer.out_channels) for layer in (found, expected)]
        expect(
            channels == wanted,
            f"{expected.name}: from {channels[0]} to {channels[1]} channels, expected from {wanted[0]} to {wanted[1]}. Inside, a block"
            " is t times as wide as its input (Table 1: k, tk, tk, k'); c in Table 2 is what it gives.",
        )


def test_depthwise_convolutions_of_3_by_3(network_class):
    for found, expected in aligned(network_class)[1]:
        expect(
            found.kernel == expected.kernel,
            f"{expected.name}: a kernel of {found.kernel} × {found.kernel}, expected {expected.kernel} × {expected.kernel} (Table 1).",
        )
        expect(
            found.groups == expected.groups,
            f"{expected.name}: groups={found.groups}, expected groups={expected.groups}. Depthwise (§3.1): one filter a channel,"
            " groups = channels; all other convolutions mix all channels, groups = 1.",
        )


def test_strides(network_class):
    pairs = aligned(network_class)[1]
    rows = {c: next(found.stride for found, e in pairs if f"c={c}," in e.name and "depthwise" in e.name) for c in (64, 96)}
    expect(
        rows != {64: 1, 96: 2},
        "the row of 64 channels has stride 1 and that of 96 has stride 2, expected 2 and 1. That is the typo of Table 2 in the paper's"
        " first version (arXiv:1801.04381v1): it costs 416M multiply-adds, where the text has 300M.",
    )
    for found, expected in pairs:
        expect(
            found.stride == expected.stride,
            f"{expected.name}: stride {found.stride}, expected {expected.stride}. The stride s of a row belongs to its first block,"
            " 'all others use stride 1' (Table 2), and in the block to the depthwise convolution (Table 1); the stem has 2.",
        )


def test_padding(network_class):
    for found, expected in aligned(network_class)[1][:-1]:
        before = found.operation.before[2]
        wanted = -(-before // found.stride)
        expect(
            found.size == wanted,
            f"{expected.name}: gives {found.size} × {found.size} pixels of {before} × {before}, expected {wanted} × {wanted} (Table 2,"
            " column input). A 3×3 convolution has a border of 1 (padding=1), a 1×1 has none: only strides make maps smaller.",
        )


def test_convolutions_without_bias(network_class):
    for found, expected in aligned(network_class)[1][:-1]:
        expect(
            found.operation.arguments[2] is None,
            f"{expected.name}: has a bias, expected bias=False. BatchNorm follows, which subtracts the mean, and with it any"
            " bias, and adds its own shift.",
        )


def test_batch_norm_behind_every_convolution(network_class):
    recorder, pairs = aligned(network_class)
    for found, expected in pairs[:-1]:
        names, _ = recorder.following(found.operation)
        expect(
            names[:1] == ["BatchNorm"] and names.count("BatchNorm") == 1,
            f"{expected.name}: is followed by {', '.join(names) or 'nothing'}, expected BatchNorm at once. §6.1: 'We use"
            " batch normalization after every layer'.",
        )


def test_the_projection_is_linear(network_class):
    recorder, pairs = aligned(network_class)
    for found, expected in pairs:
        names = [name for name in recorder.following(found.operation)[0] if name != "BatchNorm"]
        expect(
            "projection" not in expected.name or not names,
            f"{expected.name}: is followed by {', '.join(names)}, expected no activation. §3.2: among few channels a ReLU loses what"
            " the channels that it sets to zero carried: the bottleneck is linear (Table 1, last line; Figure 6a).",
        )


def test_relu6_behind_all_other_convolutions(network_class):
    recorder, pairs = aligned(network_class)
    for found, expected in pairs[:-1]:
        names = [name for name in recorder.following(found.operation)[0] if name != "BatchNorm"]
        expect(
            "projection" in expected.name or names == ["ReLU6"],
            f"{expected.name}: is followed by {', '.join(names) or 'no activation'}, expected ReLU6, min(max(x, 0), 6). §4: 'We use"
            " ReLU6 as the non-linearity because of its robustness when used with low-precision computation'.",
        )


def test_shortcuts_between_the_bottlenecks(network_class):
    recorder, pairs = aligned(network_class)
    adds = {frozenset(op.taken): op for op in recorder.operations if op.name == "add" and len(op.taken) == 2}
    joined = [op for op in recorder.operations if len(op.taken) > 1 and len(op.after) == 4 and op.name != "add"]
    why = "§3.3, Figure 4: the input is added to the projection where stride is 1 and the channels agree, ten times in all."
    expect(not joined, f"'{joined[0].name if joined else ''}' joins two maps, expected an addition. {why}")
    for index, (found, expected) in enumerate(pairs):
        if "projection" not in expected.name:
            continue
        first = index - 2 if "t=6" in expected.name else index - 1
        begins, wanted = pairs[first][0], pairs[first][1]
        ends = recorder.following(found.operation)[1]
        add = adds.pop(frozenset((begins.operation.taken[0], ends)), None)
        agree = pairs[index - 1][1].stride == 1 and wanted.in_channels == expected.out_channels
        block = expected.name.removesuffix(", projection")
        expect(not agree or add is not None, f"{block}: the input is not added to the output, expected a shortcut. {why}")
        expect(agree or add is None, f"{block}: has a shortcut, expected none. {why}")
        names = recorder.following(add)[0] if add else []
        expect(not names, f"{block}: {', '.join(names)} follows the addition, expected nothing (that was ResNet). {why}")
    expect(not adds, f"{len(adds)} additions are no shortcut between the two ends of a block, expected none. {why}")


def test_the_network_ends_in_logits(network_class):
    recorder, pairs = aligned(network_class)
    names = recorder.following(pairs[-1][0].operation)[0]
    expect(
        not names,
        f"the classifier is followed by {', '.join(names)}, expected nothing. cross_entropy applies the softmax itself: of"
        " probabilities it would take it a second time, and the network would hardly learn.",
    )


def test_eval_mode_is_deterministic(network_class):
    recorded(network_class)
    network = build(network_class, num_classes=10).train()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        network(images)  # statistics that are not those of a fresh network
        network.eval()
        logits = network(images)
        expect(logits.shape[1] == 10, f"num_classes=10 gives {logits.shape[1]} logits.")
        expect(
            torch.equal(logits, network(images)),
            "the same image gives other logits each time in eval mode. Dropout must rest there: nn.Dropout does so by itself,"
            " functional.dropout only with training=self.training.",
        )
        others = torch.cat([images[:1], 100 * torch.randn(1, 3, 224, 224)])
        expect(
            torch.allclose(network(others)[:1], logits[:1], rtol=1e-3, atol=1e-4),
            "an image gives other logits in another batch, in eval mode. BatchNorm must take the mean and deviation that it has"
            " gathered in training, not those of the batch.",
        )


def test_parameters_and_multiply_adds(network_class):
    recorder = recorded(network_class)
    parameters = sum(parameter.numel() for parameter in recorder.network.parameters())
    expect(
        parameters == 3_504_872,
        f"{parameters:,} parameters, expected 3,504,872 (with BatchNorm's; 3,470,760 without them; Table 4 says 3.4M). If the layers"
        " are right, some are there that nothing uses, or one object is used for several blocks, which then share their weights.",
    )
    macs = sum(
        layer.size**2 * layer.out_channels * layer.in_channels * layer.kernel**2 // layer.groups for layer in recorder.layers()
    )
    expect(macs == 300_774_272, f"{macs:,} multiply-adds at 224 pixels, expected 300,774,272 (Table 4: 300M).")


def test_a_gradient_reaches_every_parameter(network_class):
    recorded(network_class)
    network = build(network_class, num_classes=7).train()
    loss = nn.functional.cross_entropy(network(torch.randn(2, 3, 224, 224)), torch.arange(2))
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
    for found, expected in zip(record(network_class, width).layers(), expected_layers(width), strict=True):
        channels, wanted = [(layer.in_channels, layer.out_channels) for layer in (found, expected)]
        why = f"channels are scaled by {width}, then rounded to the nearest multiple of 8, but not below 90% (make_divisible)"
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
    for operation in recorder.operations:
        if operation.name in ("convolution", "addmm", "mm", "native_batch_norm"):
            tensors = [part for part in operation.arguments[:5] if isinstance(part, torch.Tensor) and id(part) not in recorder.values]
            tensors = [part.t() if part.dim() == 2 else part for part in tensors]  # a linear layer hands on a transposed view
            used.append(sorted(tensors, key=lambda tensor: -tensor.dim()))
    return used


def test_equal_weights_give_torchvisions_logits(network_class):
    aligned(network_class)
    recorder, theirs = [record.__wrapped__(kind) for kind in (network_class, torchvision.models.MobileNetV2)]
    with torch.no_grad():
        # Statistics of real maps: with random ones the logits would hardly depend on the image.
        for layer in randomise(theirs.network).modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
                layer.momentum = 1.0
        for layer in recorder.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 1e-5  # whatever it was: the paper does not speak of it
        theirs.network.train()(torch.randn(2, 3, 224, 224))
        theirs.network.eval()
        for ours, given in zip(learned_tensors(recorder), learned_tensors(theirs), strict=True):
            for tensor, other in zip(ours, given, strict=True):
                tensor.copy_(other.reshape(tensor.shape))
        images = torch.randn(2, 3, 224, 224)
        logits, wanted = recorder.network(images), theirs.network(images)
    difference = (logits - wanted).norm() / (wanted[0] - wanted[1]).norm()
    expect(
        difference < 0.01,
        f"with torchvision's weights, layer by layer, the logits differ from torchvision's by {difference:.0%} of what they differ"
        " from image to image. If all tests above pass, the layers are right, and something between them is not.",
    )


# =============================================================================== what else this project's file does


def pair(width):
    """torchvision's network and ours with the same weights."""
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width))
    ours = MobileNetV2(width_mult=width)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs, ours


# ------------------------------------------------------------------------------------- against torchvision


@pytest.mark.parametrize("width", WIDTHS)
def test_logits_and_gradients_equal_torchvision_bit_for_bit(width):
    theirs, ours = pair(width)
    images = torch.randn(2, 3, 64, 64)
    theirs.eval(), ours.eval()
    assert torch.equal(theirs(images), ours(images))

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
    # the running statistics after a step in training mode, too
    after = to_torchvision(ours.state_dict())
    assert all(torch.equal(tensor, after[name]) for name, tensor in theirs.state_dict().items())


def test_logits_equal_torchvision_at_224():
    theirs, ours = pair(1.0)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize("width", WIDTHS)
def test_names_make_the_round_trip_byte_for_byte(width):
    def to_bytes(state_dict):
        buffer = io.BytesIO()
        torch.save(dict(state_dict), buffer)
        return buffer.getvalue()

    state_dict = torchvision.models.mobilenet_v2(width_mult=width).state_dict()
    renamed = from_torchvision(state_dict)
    assert list(renamed) == list(MobileNetV2(width_mult=width).state_dict())
    assert to_bytes(to_torchvision(renamed)) == to_bytes(state_dict)


def test_a_name_of_another_network_is_refused():
    with pytest.raises(CheckpointError, match="'layer1.0.conv1.weight' is not a weight of MobileNetV2"):
        from_torchvision({"layer1.0.conv1.weight": torch.zeros(1)})


def test_initial_weights_are_torchvisions_bit_for_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=5).state_dict()
    torch.manual_seed(0)
    ours = to_torchvision(MobileNetV2(num_classes=5).state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


# ----------------------------------------------------------------------------------- against published tables

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
def test_costs_are_the_published_ones(width, size, million_macs, million_parameters):
    with torch.device("meta"):  # shapes without numbers
        model = MobileNetV2(width_mult=width)
    assert count_macs(model, size) // 1_000_000 == million_macs
    assert round(count_parameters(model, batch_norm=False) / 1e6, 2) == million_parameters


def test_all_22_rows_are_there_and_the_exact_totals():
    assert len(PUBLISHED) == 22
    assert count_parameters(MobileNetV2()) == 3_504_872
    assert count_macs(MobileNetV2(), 224) == 300_774_272


def test_make_divisible():
    assert [make_divisible(value) for value in (8, 11.2, 12, 20, 22.4, 33.6, 1280)] == [8, 16, 16, 24, 24, 32, 1280]
    for value in torch.arange(8, 2000, 0.7).tolist():
        assert make_divisible(value) % 8 == 0
        assert make_divisible(value) >= 0.9 * value


# ------------------------------------------------------------------------------------------ layer by layer


def shapes_after_rows(model, size):
    """(C, H) after the stem, after each row of Table 2, and after the head."""
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
        (16, 32, (32, 32, 16, 8, 4, 4, 2, 2, 2)),
        (8, 32, (32, 32, 32, 16, 8, 8, 4, 4, 4)),
    ],
)
def test_shapes_after_every_row(output_stride, size, sides):
    model = MobileNetV2(output_stride=output_stride).eval()
    channels = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
    assert shapes_after_rows(model, size) == list(zip(channels, sides, strict=True))
    assert model.features(torch.zeros(2, 3, size, size)).shape == (2, 1280)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 1000)


def test_output_stride_keeps_the_shapes_of_the_weights():
    shapes = [{k: v.shape for k, v in MobileNetV2(output_stride=s).state_dict().items()} for s in (32, 16, 8)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_block_with_a_zero_projection_is_the_identity():
    for block in MobileNetV2().eval().blocks:
        nn.init.zeros_(block.project.conv.weight)
        channels = (block.expand.conv if isinstance(block.expand, nn.Sequential) else block.depthwise.conv).in_channels
        x = torch.randn(1, channels, 8, 8)
        expected = x if block.use_residual else torch.zeros_like(block(x))
        assert torch.equal(block(x), expected)


def test_dropout_only_in_training():
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


def test_table_2_is_printed_with_live_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", "--width", "0.5", "--image-size", "160"])
    mobilenetv2.main()
    lines = capsys.readouterr().out.splitlines()
    # by hand for the third row: 8·48·80² + 9·48·40² + 48·16·40², then 16·96·40² + 9·96·40² + 96·16·40²
    assert lines[1].split() == ["conv2d", "3×3", "3×160×160", "16×80×80", "-", "16", "1", "2", "464", "2,764,800"]
    assert lines[3].split() == ["bottleneck", "8×80×80", "16×40×40", "6", "16", "2", "2", "6,160", "10,675,200"]
    assert [line.split()[-3] for line in lines[1:10]] == ["2", "1", "2", "2", "2", "1", "2", "1", "1"]  # s
    assert lines[11].split() == ["total", "1,968,680", f"{count_macs(MobileNetV2(width_mult=0.5), 160):,}"]


@pytest.mark.parametrize("option", (["--width", "-1"], ["--image-size", "0"], ["--output-stride", "7"]))
def test_table_2_refuses_absurd_options_in_one_line(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", *option])
    with pytest.raises(SystemExit) as stop:
        mobilenetv2.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    model = randomise(MobileNetV2(num_classes=3, width_mult=0.35, output_stride=8))
    path = tmp_path / "runs" / "model.pt"
    save_checkpoint(path, model, ["a", "b", "鬱金香"], PREPROCESSING, [{"epoch": 1, "val_top1": 0.5}])
    return path


def test_a_checkpoint_gives_back_the_network_and_what_belongs_to_it(checkpoint):
    model, contents = load_checkpoint(checkpoint)
    assert model.arch == {"num_classes": 3, "width_mult": 0.35, "dropout": 0.2, "output_stride": 8}
    assert not model.training
    assert contents["classes"] == ["a", "b", "鬱金香"] and contents["preprocessing"] == PREPROCESSING
    assert contents["history"] == [{"epoch": 1, "val_top1": 0.5}]
    again = checkpoint.with_name("again.pt")
    save_checkpoint(again, model, contents["classes"], contents["preprocessing"], contents["history"])
    assert again.read_bytes() == checkpoint.read_bytes()


def test_loading_leaves_the_random_state_alone(checkpoint):
    before = torch.get_rng_state()
    load_checkpoint(checkpoint)
    assert torch.equal(before, torch.get_rng_state())


def test_a_failed_write_leaves_the_old_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mobilenetv2.os, "replace", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(checkpoint, MobileNetV2(num_classes=2), ["a", "b"], PREPROCESSING)
    assert checkpoint.read_bytes() == before
    assert [file.name for file in checkpoint.parent.iterdir()] == ["model.pt"]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing.pt"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("share", (0, 0.001, 0.3, 0.9, 0.9999))
def test_a_truncated_checkpoint_is_refused(checkpoint, share):
    contents = checkpoint.read_bytes()
    checkpoint.write_bytes(contents[: int(len(contents) * share)])
    with pytest.raises(CheckpointError, match="model.pt"):
        load_checkpoint(checkpoint)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    for name, write in (
        ("plain.pt", lambda p: p.write_bytes(pickle.dumps(Hostile()))),
        ("zip.pt", lambda p: torch.save(Hostile(), p)),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].pop("stem.conv.weight"), "'stem.conv.weight' is missing"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "'extra' is unexpected"),
        (
            lambda c: c["model"].update({"stem.conv.weight": torch.zeros(2, 3)}),
            r"'stem.conv.weight' is \(2, 3\) where \(16, 3, 3, 3\)",
        ),
        (lambda c: c["model"].update({"stem.conv.weight": 3}), "'stem.conv.weight' is int where"),
        (lambda c: c["arch"].update(width_mult=1.0), "and [0-9]+ more"),
        (lambda c: c["arch"].update(num_classes=10**12), "names 3 classes for a network of 1000000000000"),
        (lambda c: c["arch"].update(width_mult="many"), "cannot be built"),
        (lambda c: c["arch"].update(hidden=1), "cannot be built"),
        (lambda c: c.pop("classes"), "has no 'classes'"),
        (lambda c: c["classes"].pop(), "names 2 classes"),
        (
            lambda c: c["model"]["stem.conv.weight"].fill_(float("nan")),
            "'stem.conv.weight' has numbers that are not finite",
        ),
        (
            lambda c: c["model"].update({"head.norm.bias": torch.zeros(1280, dtype=torch.int)}),
            "numbers of type torch.int32",
        ),
        (lambda c: c["preprocessing"].pop("mean"), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(mean=[0.5]), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(std=[0.5, 0, 0.5]), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(image_size="32"), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(image_size=32.5), "lacks a usable preprocessing"),
        (lambda c: c["preprocessing"].update(std=(0.5, 0.5, 0.5)), "lacks a usable preprocessing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, change, message):
    contents = torch.load(checkpoint, weights_only=True)
    change(contents)
    torch.save(contents, checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


def test_a_file_of_something_else_is_refused(tmp_path):
    for contents in ([1, 2], {"epoch": 3}, torch.zeros(2)):
        torch.save(contents, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            load_checkpoint(tmp_path / "other.pt")


# ---------------------------------------------------------------------------------------- pretrained weights


def test_pretrained_from_a_torchvision_file(tmp_path, capsys):
    for width in (*WIDTHS, 0.97, 0.22):
        theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=4)).eval()
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(load_pretrained(tmp_path / "theirs.pth")(images), theirs(images))
        assert capsys.readouterr().out == ""
        fresh = load_pretrained(tmp_path / "theirs.pth", num_classes=9, output_stride=16)
        assert "fresh, for 9 classes (the weights know 4)" in capsys.readouterr().out
        assert fresh.arch["num_classes"] == 9 and fresh.arch["output_stride"] == 16
        assert width not in WIDTHS or fresh.arch["width_mult"] == width
        assert fresh(images).shape == (2, 9)
        assert torch.equal(fresh.head.conv.weight, theirs.features[18][0].weight)


def test_pretrained_from_a_checkpoint_of_ours(checkpoint):
    model = load_checkpoint(checkpoint)[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained(checkpoint)(images), model(images))
    assert load_pretrained(checkpoint, num_classes=5)(images).shape == (2, 5)


def test_a_torchvision_file_with_a_missing_weight_is_refused(tmp_path):
    state_dict = torchvision.models.mobilenet_v2(num_classes=4).state_dict()
    for name in ("features.5.conv.0.0.weight", "classifier.1.weight", "features.17.conv.2.weight"):
        torch.save({key: tensor for key, tensor in state_dict.items() if key != name}, tmp_path / "part.pth")
        with pytest.raises(CheckpointError, match="missing|not a whole"):
            load_pretrained(tmp_path / "part.pth")


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """torchvision's address replaced by a local file whose name carries its hash, and an empty download folder."""
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    path = path.rename(path.with_name(f"mobilenet_v2-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    assert weights.url.endswith("/mobilenet_v2-7ebf99e0.pth")
    monkeypatch.setattr(weights.value, "url", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return path


def test_imagenet_weights_are_fetched_once_and_verified(imagenet, tmp_path):
    model = load_pretrained("imagenet", num_classes=6)
    assert model.arch["num_classes"] == 6
    expected = torch.load(imagenet, weights_only=True)["features.18.0.weight"]
    assert torch.equal(model.head.conv.weight, expected)
    imagenet.unlink()
    load_pretrained("imagenet", num_classes=6)
    cached = tmp_path / "home" / "hub" / "checkpoints" / imagenet.name
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_pretrained("imagenet", num_classes=6)


def test_imagenet_weights_with_a_wrong_hash_are_not_kept(imagenet, tmp_path):
    imagenet.write_bytes(imagenet.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match="no ImageNet weights .*invalid hash"):
        load_pretrained("imagenet", num_classes=6)
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


def test_imagenet_without_a_network_names_the_file_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"fetch https://.*/mobilenet_v2-7ebf99e0.pth and put it at") as caught:
        load_pretrained("imagenet", num_classes=6)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
