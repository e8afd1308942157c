"""Tests of mobilenetv2.py.

Every correct MobileNetV2 passes the tests of the first part. Those of the second part are about
this project's file. The first part grades a class MobileNetV2, whatever its modules are called:

    python -m pytest tests/test_mobilenetv2.py --implementation path/to/student.py

Each of these tests belongs to a criterion, and a failure is a message for students. grader.py
runs the network and records its layers. tests/test_grader.py proves that typical wrong networks
fail with a message that names their fault.
"""

import functools
import hashlib
import io
import os
import pickle
import re
import sys

import pytest
import torch
import torchvision
from grader import (
    TABLE_2,
    WIDTH_NAMES,
    count_products,
    criterion,
    expect,
    expected_layers,
    randomise,
    reference,
    same,
)
from torch import nn

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

# The order of the tests is the order of causes: the message that a student reads first should
# explain the later failures.

# Four rules are conventions of TensorFlow's and torchvision's code. The paper does not fix
# them.
CONVENTION = (
    "(This is a convention of TensorFlow's and torchvision's code; the paper does not fix it.)"
)
MODES = pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))


def in_mode(training):
    return "in training mode, " if training else ""


# ---------------------------------------------- layers, channels and strides: from shapes alone


def explain_strides(layers):
    """Return the message about all strides that differ from Table 2's, or None."""
    wanted = expected_layers()
    if len(layers) != len(wanted):
        # Layers are missing or superfluous: compare the 3×3 convolutions alone.
        layers = [layer for layer in layers if layer.kernel == (3, 3)]
        wanted = [layer for layer in wanted if layer.kernel == (3, 3)]
    pairs = list(zip(layers, wanted))
    firsts = [
        (found.stride[0], e.name)
        for found, e in pairs
        if "block 1 " in e.name and "depthwise" in e.name
    ]
    if [stride for stride, name in firsts if "c=64," in name or "c=96," in name] == [1, 2]:
        return (
            "the row of 64 channels has stride 1 and the row of 96 has stride 2, expected 2 and 1."
            " This is the typo of Table 2 in the paper's first version (arXiv:1801.04381v1)."
            " It costs 416M multiply-adds instead of 300M."
        )
    faults = []
    found_strides = []
    for found, expected in pairs:
        if found.stride != expected.stride:
            stride = found.stride[0] if len(set(found.stride)) == 1 else found.stride
            found_strides.append(stride)
            place = re.sub(r" of Table 2( \(t=.*?\))?", "", expected.name)
            faults.append(f"{place}: stride {stride}, expected {expected.stride[0]}")
    if not faults:
        return None
    why = (
        "The stride s of a row belongs to its first block, 'all others use stride 1' (Table 2),"
        " and in the block to the depthwise convolution (Table 1). The stem has stride 2."
    )
    if set(found_strides) == {1}:
        why = (
            "Fewer strides are the usual change for the 32 × 32 images of CIFAR. The paper's"
            " network takes 224 × 224 pixels and halves them five times."
        )
    return f"these strides differ from Table 2: {'; '.join(faults)}. {why}"


def also(message):
    return f" Moreover, {message}" if message else ""


@criterion("layers", stops=True)
def test_images_become_logits(submission):
    record = submission.structure
    strides = explain_strides(record.layers)
    expect(record.error is None, f"{record.error}{also(strides)}")
    if record.size == 32 and not strides:  # a network for CIFAR is judged by its strides
        submission.record_structure(224)
    shape = tuple(record.logits.shape)
    expect(
        shape == (2, 1000),
        f"two images and 1000 classes give {shape}, expected (2, 1000):"
        " one logit per class of each image.",
    )


def explain_layers(layers):
    """Return why the number of layers is not that of Table 2, or None."""
    expected = expected_layers()
    linear = sum(layer.linear for layer in layers)
    sizes = [layer.size for layer in layers]
    shared = [layer for layer in layers if layer.shares_input]
    if any(size == 1 < max(sizes[index:]) for index, size in enumerate(sizes)):
        return (
            f"{len(layers)} layers with weights; some of them work on averages, and feature maps"
            " follow. Squeeze-and-excitation belongs to MobileNetV3."
        )
    if shared:
        return (
            f"two convolutions take the same {shared[0].in_channels} channels: a shortcut with"
            " a convolution. §3.3 and Figure 4d add the input unchanged, and only where the"
            " stride is 1; where the channels differ, there is no shortcut."
        )
    if linear > 1:
        return (
            f"{linear} linear layers, expected one. Table 2 ends in a pooling and a single"
            " classifier on 1280 channels; '3 fully connected layers' belong to VGG."
        )
    if len(layers) == len(expected) + 1 and layers[1].kernel == (1, 1):
        return explain_expansion(layers)
    if len(layers) == len(expected) - 1 and layers[-1].in_channels == 320:
        return (
            "the head is missing: after the blocks, row 9 of Table 2 has a 1×1 convolution from"
            " 320 to 1280 channels."
        )
    if len(layers) != len(expected):
        return (
            f"{len(layers)} layers with weights, expected {len(expected)}: the stem, 2 of the first"
            " block, 3 of each of 16 blocks, the head and the classifier. n in Table 2 is the"
            " number of blocks in a row (1, 2, 3, 4, 3, 3, 1: 17 blocks); one block per row gives"
            " 23 layers, 2.43M parameters and 146M multiply-adds."
        )
    return None


def explain_expansion(layers):
    channels = layers[1].out_channels
    return (
        f"the first block begins with a 1×1 convolution to {channels} channels. Its row in"
        " Table 2 has t = 1: nothing is expanded, so the block begins with the depthwise"
        f" convolution. {CONVENTION}"
    )


@criterion("layers", stops=True)
def test_the_layers_of_table_2(submission):
    layers = submission.structure.layers
    message = explain_layers(layers)
    strides = explain_strides(layers)
    also_strides = also(strides if strides and "CIFAR" in strides else None)
    expect(
        message is None or submission.expands_first,  # the next test reports it
        f"{message}{also_strides}",
    )


@criterion("layers")
def test_the_first_block_is_not_expanded(submission):
    expect(not submission.expands_first, explain_expansion(submission.structure.layers))


@criterion("channels", stops=True)
def test_channels(submission):
    record = submission.structure
    for found, expected in zip(record.layers, submission.expected(), strict=True):
        channels = found.in_channels, found.out_channels
        wanted = expected.in_channels, expected.out_channels
        why = (
            "A block is t times as wide inside as its input (Table 1: k, tk, tk, k'); c in"
            " Table 2 counts its output channels."
        )
        if "row 1 of" in expected.name:
            why = "The stem turns 3 channels into 32; width_mult is 1.0 by default."
        elif channels[0] == 1280 * (record.size // 32) ** 2:
            side = record.size // 32
            why = (
                f"{channels[0]} = 1280 · {side} · {side}: the average pooling in front of the"
                " classifier is missing (row 10)."
            )
        expect(
            channels == wanted,
            f"{expected.name}: from {channels[0]} to {channels[1]} channels,"
            f" expected from {wanted[0]} to {wanted[1]}. {why}",
        )


@criterion("channels", stops=True)
def test_depthwise_convolutions_of_3_by_3(submission):
    layers = submission.structure.layers
    for found, expected in zip(layers, submission.expected(), strict=True):
        sizes = ["{} × {}".format(*layer.kernel) for layer in (found, expected)]
        expect(
            sizes[0] == sizes[1],
            f"{expected.name}: a kernel of {sizes[0]}, expected {sizes[1]} (Table 1).",
        )
        expect(
            set(found.dilation) == {1},
            f"{expected.name}: dilation={found.dilation[0]}, expected dilation=1:"
            " a kernel covers neighbouring pixels.",
        )
        expect(
            found.groups == expected.groups,
            f"{expected.name}: groups={found.groups}, expected groups={expected.groups}."
            " A depthwise convolution (§3.1) has one filter per channel, groups = channels;"
            " all other convolutions mix all channels, groups = 1.",
        )


@criterion("strides", stops=True)
def test_strides(submission):
    message = explain_strides(submission.structure.layers)
    expect(message is None, message)


@criterion("strides", stops=True)
def test_sizes(submission):
    record = submission.structure
    layers = record.layers
    expected = submission.expected(size=record.size)
    head, classifier = layers[-2:]
    expect(
        head.in_size == layers[-3].size,
        "the head works on averages. Table 2 has first the 1×1 convolution to 1280 channels, then"
        " the 7×7 average; in the other order the head's ReLU6 sees only averages.",
    )
    expect(
        classifier.size == 1,
        "the classifier works on feature maps, expected on their average (Table 2: avgpool first).",
    )
    for found, wanted in zip(layers, expected, strict=True):
        expect(
            found.size == wanted.size,
            f"{wanted.name}: gives {found.size} × {found.size} pixels for an image of"
            f" {record.size}, expected {wanted.size} × {wanted.size} (Table 2, column input)."
            " A 3×3 convolution has padding=1 and a 1×1 none, so that only strides make feature"
            " maps smaller.",
        )


# ------------------------------------------------------------------- layers again: from numbers


@criterion("layers")
def test_one_image_keeps_its_batch_dimension(submission):
    size = submission.structure.size
    with torch.no_grad():
        shape = tuple(submission.forward(torch.randn(1, 3, size, size)).shape)
    expect(
        shape == (1, 1000),
        f"one image gives {shape}, expected (1, 1000): .squeeze() also removes the batch"
        " dimension; use .flatten(1).",
    )


@criterion("layers", stops=True)
def test_logits_are_finite(submission):
    expect(submission.record().logits.isfinite().all(), "some logits are NaN or infinite.")


@criterion("layers", stops=True)
def test_pytorch_knows_all_weights(submission):
    known = {parameter.data_ptr() for parameter in submission.network.parameters()}
    layers = submission.record().layers
    strangers = [layer for layer in layers if layer.weight.data_ptr() not in known]
    expect(
        not strangers,
        f"the weights of {len(strangers)} of {len(layers)} layers are not among"
        " network.parameters(): no optimizer trains them, and eval() does not reach them. PyTorch"
        " does not see layers in a Python list or dict, or layers made in forward; make them in"
        " __init__ and use nn.ModuleList, nn.Sequential or nn.ModuleDict.",
    )


@criterion("layers")
def test_the_stem_takes_the_image_as_it_is(submission):
    found = submission.pairs()[0][0]
    expect(
        same(submission.record().images, found.taken),
        "the image is changed in front of the first convolution. Normalisation by mean and std"
        " belongs to the data: checkpoints and other people's weights expect it outside the"
        " network.",
    )


@criterion("layers")
def test_global_average_pooling_behind_the_head(submission):
    pairs = submission.pairs()
    head = pairs[-2][0].output().clamp(0, 6)
    pooled = pairs[-1][0].taken.flatten(1)
    ways = {
        "the maximum": lambda maps: maps.amax(dim=(2, 3)),
        "the sum": lambda maps: maps.sum(dim=(2, 3)),
    }
    side = pairs[-2][0].size
    way = (
        None
        if same(head.mean(dim=(2, 3)), pooled)
        else next((n for n, f in ways.items() if same(f(head), pooled)), None)
    )
    expect(
        way is None,  # another activation is reported by its own test
        f"of the {side} × {side} places in the head's feature maps the classifier takes {way},"
        " expected their average (row 10 of Table 2: avgpool).",
    )


# -------------------------------------------------------------------------------- normalisation


def never_called(submission):
    """Return names of BatchNorm layers that are built but never run."""
    called = {
        norm.running_mean.data_ptr()
        for norm in submission.record().norms
        if norm.running_mean is not None
    }
    modules = submission.network.named_modules()
    return [
        name
        for name, module in modules
        if isinstance(module, nn.BatchNorm2d)
        and module.running_mean is not None
        and module.running_mean.data_ptr() not in called
    ]


@criterion("normalisation")
def test_batch_norm_behind_every_convolution(submission):
    pairs = submission.pairs()[:-1]
    norms = submission.record().norms
    idle = never_called(submission)
    unused = f" '{idle[0]}' is built in __init__, but forward never calls it." if idle else ""
    folded = ""
    if not norms:
        folded = " No BatchNorm runs in the whole network."
    if not norms and pairs[0][0].bias is not None:
        folded = (
            " No BatchNorm runs in the whole network, and the convolutions have biases:"
            " is BatchNorm folded into them?"
        )
    convention = CONVENTION.replace("This", "Its place, before the activation,")
    for found, expected in pairs:
        expect(
            found.norm is not None and found.norm.weight is not None,
            f"{expected.name}: nn.BatchNorm2d, with its scale and shift, does not follow"
            f" directly.{folded}{unused} §6.1: 'We use batch normalization after every layer'."
            f" {convention}",
        )
    expect(
        not idle,
        f"'{idle[0] if idle else ''}' is built in __init__, but forward never calls it.",
    )
    expect(
        len(norms) == len(pairs),
        f"{len(norms)} BatchNorm layers run, expected {len(pairs)}: one behind every"
        " convolution, and no other.",
    )


@criterion("normalisation")
def test_convolutions_without_bias(submission):
    for found, expected in submission.pairs()[:-1]:
        expect(
            found.bias is None or found.norm is None,
            f"{expected.name}: has a bias, expected bias=False. BatchNorm follows; it subtracts"
            f" the mean, and with it any bias, and adds its own shift. {CONVENTION}",
        )


# ----------------------------------------------------------------------------------- activation

# Functions between two layers. The grader recognises them by their values, in whatever way they
# are written.
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


def name_fit(functions, before, after):
    """Return the first of the named functions that turns `before` into `after`."""
    return next(
        (name for name, function in functions.items() if same(function(before), after)),
        "something else",
    )


def normalised_pairs(submission, training):
    """Return the pairs of layers, each followed by BatchNorm.

    Skip the test if a BatchNorm is missing.
    """
    pairs = submission.pairs(training)
    if any(found.norm is None for found, _ in pairs[:-1]):
        pytest.skip("because of normalisation")
    return pairs


def expect_relu6(name, expected, training):
    expect(
        name == "ReLU6",
        f"{in_mode(training)}{expected.name}: is followed by {name}, expected ReLU6,"
        " min(max(x, 0), 6). §4: 'We use ReLU6 as the non-linearity because of its robustness"
        " when used with low-precision computation'.",
    )


@criterion("activation")
@MODES
def test_relu6_behind_all_convolutions_but_the_projection(submission, training):
    pairs = normalised_pairs(submission, training)
    for (found, expected), (after, _) in zip(pairs[:-2], pairs[1:-1], strict=True):
        if "projection" not in expected.name:
            name = name_fit(ACTIVATIONS, found.output(), after.taken)
            expect_relu6(name, expected, training)
    head, expected = pairs[-2]
    pooled = pairs[-1][0].taken.flatten(1)
    late = name_fit(ACTIVATIONS, head.output().mean(dim=(2, 3)), pooled)
    expect(
        late in ("no activation", "something else"),
        f"{in_mode(training)}{expected.name}: {late} follows the pooling,"
        " expected ReLU6 directly behind the head's BatchNorm.",
    )
    fits = [
        name
        for name, function in ACTIVATIONS.items()
        if same(function(head.output()).mean(dim=(2, 3)), pooled)
    ]
    # Without a fit, another pooling is the fault.
    expect_relu6((fits or ["ReLU6"])[0], expected, training)


@criterion("activation")
@MODES
def test_the_network_ends_in_logits(submission, training):
    classifier = submission.pairs(training)[-1][0]
    logits = submission.record(training).logits
    found = classifier.given.flatten(1)
    if classifier.linear and classifier.bias is None:
        # A bias that is added separately is the same for each image.
        found = found + (logits - found)[:1]
    softmaxes = {
        "softmax": lambda x: x.softmax(dim=1),
        "log-softmax": lambda x: x.log_softmax(dim=1),
    }
    way = name_fit(ACTIVATIONS | softmaxes, found, logits)
    why = ""
    if way == "softmax":
        why = (
            ": nn.functional.cross_entropy applies the softmax itself; applied twice, the"
            " gradients nearly vanish"
        )
    if way == "log-softmax":
        why = (
            ": it is redundant, because nn.functional.cross_entropy applies it itself; applied"
            " twice, the gradients are the same, but the output is not the logits"
        )
    expect(
        way == "no activation",
        f"{in_mode(training)}the classifier is followed by {way}, expected nothing{why}.",
    )


# --------------------------------------------------------------- linear bottleneck and shortcut


def block_ends(pairs):
    """Return a tuple for each block.

    It has the block's name, whether there should be a shortcut, and the two answers of
    `explain_block`.
    """
    first = 1
    ends = []
    for index, (found, expected) in enumerate(pairs):
        if "projection" in expected.name:
            agree = (
                pairs[index - 1][1].stride == (1, 1)
                and pairs[first][1].in_channels == expected.out_channels
            )
            explained = explain_block(
                pairs[first][0].taken, found.output(), pairs[index + 1][0].taken
            )
            ends.append((expected.name.removesuffix(", projection"), agree, *explained))
            first = index + 1
    return ends


def explain_block(x, projected, after):
    """Return the activation behind the projection, and the kind of shortcut.

    The kind is 'alone' (no shortcut), 'added', or 'before' (the activation follows the
    addition).
    """
    for name, function in ACTIVATIONS.items():
        if same(function(projected), after):
            return name, "alone"
        if x.shape == projected.shape and same(function(projected) + x, after):
            return name, "added"
        if x.shape == projected.shape and same(function(projected + x), after):
            return name, "before"
    return "something else", "alone"


@criterion("linear bottleneck")
@MODES
def test_the_projection_is_linear(submission, training):
    for block, _, name, how in block_ends(normalised_pairs(submission, training)):
        expect(
            name in ("no activation", "something else") or how == "before",
            f"{in_mode(training)}{block}, projection: is followed by {name}, expected no"
            " activation. §3.2: with few channels, ReLU destroys the information of the channels"
            " that it sets to zero, so the bottleneck is linear (Table 1, last line; Figure 6a).",
        )


@criterion("shortcut")
@MODES
def test_shortcuts_between_the_bottlenecks(submission, training):
    why = (
        "§3.3, Figure 4d: the input is added to the projection where the stride is 1 and the"
        " channels agree: in ten blocks."
    )
    for block, agree, name, how in block_ends(normalised_pairs(submission, training)):
        block = in_mode(training) + block
        expect(
            how != "before",
            f"{block}: {name} follows the addition, expected nothing (ResNet has it). {why}",
        )
        expect(
            name != "something else",
            f"{block}: gives neither its projection nor the sum of projection and input. {why}",
        )
        expect(
            not agree or how != "alone",
            f"{block}: the input is not added to the output, expected a shortcut. {why}",
        )
        expect(agree or how == "alone", f"{block}: has a shortcut, expected none. {why}")


# ----------------------------------------------------------------------- training and eval mode


@criterion("training and eval mode")
def test_eval_mode_gives_each_image_its_logits(submission):
    record = submission.record()
    expect(
        not any(norm.uses_batch for norm in record.norms),
        "in eval mode an image depends on the others in its batch: BatchNorm must use its running"
        " statistics there, not those of the batch.",
    )
    for dropout in record.dropouts:
        fix = "pass training=self.training to functional.dropout, or use nn.Dropout."
        if dropout.module is not None:
            fix = (
                "nn.Dropout is made inside forward, so it is always in training mode;"
                " make it once, in __init__."
            )
        expect(
            False,
            f"dropout is active in eval mode ({dropout.line}), so the same image gives other"
            f" logits each time: {fix}",
        )
    images = record.images
    with torch.no_grad():
        again = submission.forward(images.clone())
        alone = submission.forward(images[:1].clone())
    expect(
        torch.equal(submission.forward(images.clone()), again),
        "in eval mode the same image gives other logits each time.",
    )
    expect(
        same(again[0], alone.flatten()),
        "in eval mode an image gives other logits in another batch.",
    )


@criterion("training and eval mode")
def test_dropout_is_in_front_of_the_classifier(submission):
    expected = submission.expected()
    submission.pairs(training=True)
    for dropout in submission.record(training=True).dropouts:
        layer = expected[dropout.after - 1].name
        place = (
            f"behind the BatchNorm of {layer}"
            if dropout.behind_norm
            else f"behind the activation of {layer}"
        )
        if dropout.behind_norm and "projection" not in layer:
            place = f"between BatchNorm and activation of {layer}"
        place = {len(expected): "behind the classifier", 0: "in front of the stem"}.get(
            dropout.after, place
        )
        expect(
            dropout.after == len(expected) - 1 and not dropout.behind_norm,
            f"dropout is {place} ({dropout.line}), expected only in front of the classifier,"
            " as in torchvision's code.",
        )


@criterion("training and eval mode")
def test_training_gathers_statistics(submission):
    record = submission.record(training=True)
    idle = never_called(submission)  # reported by the test of BatchNorm
    still = [
        name
        for name in record.buffers
        if name not in record.changed and name.rpartition(".")[0] not in idle
    ]
    expect(
        not still,
        f"'{still[0] if still else ''}' is the same after a batch in training mode: BatchNorm"
        " must update its running statistics there (functional.batch_norm needs"
        " training=self.training, and your own train() must call super().train()).",
    )
    momenta = [
        layer.momentum or 0
        for layer in submission.network.modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    momentum = max(momenta, default=0)
    expect(
        momentum <= 0.5,
        f"BatchNorm's momentum is {momentum}: in PyTorch that is the weight of the new batch, in"
        " Keras of the past.",
    )


# ----------------------------- number of classes (channels again), parameters and multiply-adds


@criterion("channels")
def test_the_number_of_classes(submission):
    network = submission.build(classes=7)
    size = submission.structure.size
    logits = submission.record_structure(size, network, "with num_classes=7, ").logits
    expect(
        logits.shape == (2, 7),
        f"num_classes=7 gives {tuple(logits.shape)} for two images, expected (2, 7)."
        f" The parameters of MobileNetV2 are {submission.signature}.",
    )


@criterion("parameters and multiply-adds")
def test_parameters_and_multiply_adds(submission):
    if submission.expands_first:
        pytest.skip("because of layers")
    normalised_pairs(submission, training=False)
    parameters = sum(parameter.numel() for parameter in submission.network.parameters())
    surplus = parameters - 3_504_872
    if surplus == -1_000:
        why = f"The classifier's bias is missing. {CONVENTION}"
    elif surplus == 17_056:
        why = "The 52 convolutions have biases."
    elif surplus > 0:
        why = (
            "Does forward use all of them? Trainable are weights, BatchNorm's scale and shift,"
            " and the classifier's bias."
        )
    else:
        why = "Do several blocks share one object, and so share their weights?"
    expect(
        surplus == 0,
        f"{parameters:,} parameters, expected 3,504,872 (with BatchNorm's; 3,470,760 without"
        f" them; Table 4 says 3.4M): {surplus:+,}. {why}",
    )
    macs = count_products(submission.record_structure(224).layers)
    expect(
        macs == 300_774_272,
        f"{macs:,} multiply-adds at 224 pixels, expected 300,774,272 (Table 4: 300M).",
    )


# ------------------------------------------------------------------------------------ gradients


@criterion("gradients")
def test_a_gradient_reaches_every_parameter(submission):
    record = submission.record()
    network = submission.network
    used = {tensor.data_ptr() for tensor, _ in record.used}
    frozen = [
        name for name, parameter in network.named_parameters() if not parameter.requires_grad
    ]
    expect(
        not frozen,
        f"'{frozen[0] if frozen else ''}' has requires_grad=False: a new network trains all its"
        " weights.",
    )
    network.train()
    logits = submission.forward(torch.randn_like(record.images), note="in training mode, ")
    expect(
        logits.requires_grad,
        "the logits have no gradient: a .detach(), .data or no_grad in forward cuts it.",
    )
    nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    network.eval()
    for name, parameter in network.named_parameters():
        expect(
            parameter.data_ptr() not in used
            or (parameter.grad is not None and parameter.grad.abs().sum() > 0),
            f"'{name}' gets no gradient: a .detach(), .data or no_grad stands between it and the"
            " logits.",
        )


def relative(difference, size, least=1e-12):
    return (difference.norm() / size.norm().clamp(min=least)).item()


@criterion("gradients")
@MODES
def test_equal_weights_give_torchvisions_logits_and_gradients(submission, training):
    if submission.failed:
        pytest.skip(f"because of {submission.failed}")
    record = submission.record()
    network = submission.network
    theirs = reference(record.size)
    with torch.no_grad():
        for (tensor, _), value in zip(record.used, theirs.learned, strict=True):
            tensor.copy_(value.reshape(tensor.shape))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5  # the paper does not fix it
    known = {
        parameter.data_ptr(): (name, parameter)
        for name, parameter in network.named_parameters()
    }
    parameters = [
        (*known[tensor.data_ptr()], layer)
        for tensor, layer in record.used
        if tensor.data_ptr() in known
    ]
    network.train(training).zero_grad()
    images = theirs.images.clone().requires_grad_()
    again = type(record)(record.size)
    logits = submission.forward(images.clone(), again, note=in_mode(training))
    (logits * theirs.direction).sum().backward()
    network.eval()
    wanted, gradients = theirs.results[training]
    difference = relative(logits.detach() - wanted, wanted[0] - wanted[1])
    expect(
        difference < 0.01,
        f"{in_mode(training)}with torchvision's weights, layer by layer, the logits differ from"
        f" torchvision's by {difference:.0%} of their difference between two images. All layers"
        " are correct, so something between them is not.",
    )
    image_gradient = torch.zeros_like(images) if images.grad is None else images.grad
    found = [
        ("the image", image_gradient, -1),
        *((f"'{name}'", parameter.grad, layer) for name, parameter, layer in parameters),
    ]
    # BatchNorm subtracts what the shift of the layer before adds: such a gradient is zero, or
    # only a rounding error.
    least = 1e-4 * max(gradient.norm() for gradient in gradients)
    errors = [
        relative(one - other.reshape(one.shape), other, least)
        for (_, one, _), other in zip(found, gradients, strict=True)
    ]
    faults = [index for index, error in enumerate(errors) if error > 0.01]
    if faults:
        # Gradients flow from the last layer to the first, so the last fault is nearest to its
        # cause.
        last = faults[-1]
        name, gradient, layer = found[last]
        why = explain_gradient(theirs, training, last, gradient, layer)
        expect(
            False,
            f"{in_mode(training)}the gradient of {name} differs from torchvision's by"
            f" {errors[last]:.0%}. {why}",
        )


def explain_gradient(theirs, training, index, gradient, layer):
    """Return where the gradient stops.

    gradient: the last one that differs from the reference. It belongs to layer number `layer`.
    """
    expected = expected_layers()
    part = ", (expansion|depthwise convolution|projection)$"
    after = re.sub(part, "", expected[layer + 1].name)
    blocks_before = sum("projection" in expected[i].name for i in range(layer + 1))
    if 0 < blocks_before < 17 and "projection" in expected[layer].name:
        block = theirs.network.features[blocks_before + 1]
        if block.use_res_connect:
            block.forward = lambda x: x.detach() + block.conv(x)
            cut = theirs.run(training)[1][index]
            del block.forward
            if relative(gradient - cut.reshape(gradient.shape), cut) < 0.01:
                return (
                    f"The gradient stops in the shortcut of {after}: .detach(), .data or no_grad"
                    " cuts it; write x + ..."
                )
    return (
        f"Those of all later layers agree, so the gradient stops or changes in {after}, or"
        " directly in front of it: look for .detach(), .data and no_grad."
    )


# ---------------------------------------------------------------------------------------- width


@criterion("width")
@pytest.mark.parametrize("width", (0.35, 0.5, 0.75, 1.4))
def test_width_multiplier(submission, width):
    if not submission.accepts(WIDTH_NAMES):
        pytest.skip(f"no width_mult; the parameters of MobileNetV2 are {submission.signature}")
    network = submission.build(width=width)
    note = f"width_mult={width}, "
    layers = submission.record_structure(submission.structure.size, network, note).layers
    wanted = submission.expected(width)
    expect(
        len(layers) == len(wanted),
        f"{note}{len(layers)} layers with weights run, expected {len(wanted)}.",
    )
    for found, expected in zip(layers, wanted, strict=True):
        channels = found.in_channels, found.out_channels
        wanted = expected.in_channels, expected.out_channels
        why = (
            f"multiply channels by {width}, then round to the nearest multiple of 8, but not"
            " below 90%, as in TensorFlow's code"
        )
        if "head" in expected.name and channels[1] != wanted[1]:
            why = "below 1.0 the head keeps 1280 channels, above 1.0 it grows with the others (§4)"
        expect(
            channels == wanted,
            f"{note}{expected.name}: from {channels[0]} to {channels[1]} channels,"
            f" expected from {wanted[0]} to {wanted[1]}: {why}.",
        )


# ============================================================ the other tests of mobilenetv2.py


def pair(width):
    """Return torchvision's network and ours with the same random weights."""
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width))
    ours = MobileNetV2(width_mult=width)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs, ours


# ------------------------------------------------------------------ comparison with torchvision


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
    ours_gradients = to_torchvision(
        {name: parameter.grad for name, parameter in ours.named_parameters()}
    )
    assert list(gradients) == list(ours_gradients)
    assert all(torch.equal(gradients[name], ours_gradients[name]) for name in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    # The running statistics must be equal, too.
    after = to_torchvision(ours.state_dict())
    assert all(
        torch.equal(tensor, after[name]) for name, tensor in theirs.state_dict().items()
    )


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
    with pytest.raises(
        CheckpointError, match="'layer1.0.conv1.weight' is not a weight of MobileNetV2"
    ):
        from_torchvision({"layer1.0.conv1.weight": torch.zeros(1)})


def test_initial_weights_equal_torchvision_bit_for_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=5).state_dict()
    torch.manual_seed(0)
    ours = to_torchvision(MobileNetV2(num_classes=5).state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


# ------------------------------------------------------------------------------ published costs

# tensorflow/models, research/slim/nets/mobilenet/README.md:
# width, image size, million multiply-adds, million parameters
PUBLISHED = [
    (1.4, 224, 582, 6.06),
    (1.3, 224, 509, 5.34),
    *[
        (1.0, size, macs, 3.47)
        for size, macs in zip((224, 192, 160, 128, 96), (300, 221, 154, 99, 56), strict=True)
    ],
    *[
        (0.75, size, macs, 2.61)
        for size, macs in zip((224, 192, 160, 128, 96), (209, 153, 107, 69, 39), strict=True)
    ],
    *[
        (0.5, size, macs, 1.95)
        for size, macs in zip((224, 192, 160, 128, 96), (97, 71, 50, 32, 18), strict=True)
    ],
    *[
        (0.35, size, macs, 1.66)
        for size, macs in zip((224, 192, 160, 128, 96), (59, 43, 30, 20, 11), strict=True)
    ],
]


@functools.lru_cache
def model_without_numbers(width):
    with torch.device("meta"):
        return MobileNetV2(width_mult=width)


@pytest.mark.parametrize("width, size, million_macs, million_parameters", PUBLISHED)
def test_costs_equal_the_published_ones(width, size, million_macs, million_parameters):
    model = model_without_numbers(width)
    assert count_macs(model, size) // 1_000_000 == million_macs
    assert round(count_parameters(model, batch_norm=False) / 1e6, 2) == million_parameters


def test_exact_costs():
    assert count_parameters(MobileNetV2()) == 3_504_872
    assert count_macs(MobileNetV2(), 224) == 300_774_272 == count_products(expected_layers())


def test_make_divisible():
    assert [make_divisible(value) for value in (8, 11.2, 12, 20, 22.4, 33.6, 1280)] == [
        8,
        16,
        16,
        24,
        24,
        32,
        1280,
    ]
    for value in torch.arange(8, 2000, 0.7).tolist():
        assert make_divisible(value) % 8 == 0
        assert make_divisible(value) >= 0.9 * value


# ----------------------------------------------------------------------------------- the layers


def shapes_after_rows(model, size):
    """Return (C, H) after the stem, after each row of Table 2, and after the head."""
    x = model.stem(torch.zeros(1, 3, size, size))
    shapes = [(x.shape[1], x.shape[2])]
    index = 0
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


def test_row_strides_drop_the_first_strides_of_table_2():
    assert mobilenetv2.row_strides(32) == [stride for _, _, _, stride in TABLE_2]
    assert mobilenetv2.row_strides(16) == [1, 1, 2, 2, 1, 2, 1]
    assert mobilenetv2.row_strides(8) == [1, 1, 1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="output_stride is 4: use 32, 16 or 8"):
        mobilenetv2.row_strides(4)


def test_weights_have_the_same_shapes_at_every_output_stride():
    shapes = [
        {k: v.shape for k, v in MobileNetV2(output_stride=s).state_dict().items()}
        for s in (32, 16, 8)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_block_with_zero_projection_is_the_identity():
    for block in MobileNetV2().eval().blocks:
        nn.init.zeros_(block.project.conv.weight)
        channels = (
            block.expand.conv
            if isinstance(block.expand, nn.Sequential)
            else block.depthwise.conv
        ).in_channels
        x = torch.randn(1, channels, 8, 8)
        expected = x if block.use_residual else torch.zeros_like(block(x))
        assert torch.equal(block(x), expected)


def test_dropout_is_random_in_training_mode_only():
    model = MobileNetV2(num_classes=10, width_mult=0.35, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)
    for module in model.modules():
        # BatchNorm stays in eval mode, so that dropout alone is random.
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 0},
        {"width_mult": 0},
        {"width_mult": float("nan")},
        {"output_stride": 4},
        {"dropout": 1.5},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError):
        MobileNetV2(**arguments)


def test_script_prints_table_2_with_measured_numbers(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["mobilenetv2.py", "--width", "0.5", "--image-size", "160"]
    )
    mobilenetv2.main()
    lines = capsys.readouterr().out.splitlines()
    # The multiply-adds of the third row, by hand: 8·48·80² + 9·48·40² + 48·16·40² for its first
    # block, then 16·96·40² + 9·96·40² + 96·16·40².
    assert lines[1].split() == [
        "conv2d",
        "3×3",
        "3×160×160",
        "16×80×80",
        "-",
        "16",
        "1",
        "2",
        "464",
        "2,764,800",
    ]
    assert lines[3].split() == [
        "bottleneck",
        "8×80×80",
        "16×40×40",
        "6",
        "16",
        "2",
        "2",
        "6,160",
        "10,675,200",
    ]
    assert [line.split()[-3] for line in lines[1:10]] == [
        "2",
        "1",
        "2",
        "2",
        "2",
        "1",
        "2",
        "1",
        "1",
    ]  # s
    assert lines[11].split() == [
        "total",
        "1,968,680",
        f"{count_macs(MobileNetV2(width_mult=0.5), 160):,}",
    ]


@pytest.mark.parametrize(
    "option", (["--width", "-1"], ["--image-size", "0"], ["--output-stride", "7"])
)
def test_script_refuses_bad_options_in_one_line(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenetv2.py", *option])
    with pytest.raises(SystemExit) as stop:
        mobilenetv2.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------- checkpoints


ROW = {
    "epoch": 1,
    "stage": "scratch",
    "train_loss": 1.0,
    "train_top1": 0.5,
    "val_loss": 1.0,
    "val_top1": 0.5,
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Bytes of a checkpoint, made once."""
    model = randomise(MobileNetV2(num_classes=3, width_mult=0.35, output_stride=8))
    path = tmp_path_factory.mktemp("saved") / "runs" / "model.pt"
    save_checkpoint(path, model, ["a", "b", "鬱金香"], PREPROCESSING, [ROW])
    return path.read_bytes()


@pytest.fixture
def checkpoint(saved, tmp_path):
    path = tmp_path / "runs" / "model.pt"
    path.parent.mkdir()
    path.write_bytes(saved)
    return path


def test_checkpoint_restores_the_network_and_its_classes(checkpoint):
    model, contents = load_checkpoint(checkpoint)
    assert model.arch == {
        "num_classes": 3,
        "width_mult": 0.35,
        "dropout": 0.2,
        "output_stride": 8,
    }
    assert not model.training and all(
        parameter.requires_grad for parameter in model.parameters()
    )
    assert (
        contents["classes"] == ["a", "b", "鬱金香"]
        and contents["preprocessing"] == PREPROCESSING
    )
    assert contents["history"] == [ROW]
    again = checkpoint.with_name("again.pt")
    save_checkpoint(
        again, model, contents["classes"], contents["preprocessing"], contents["history"]
    )
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


def test_files_are_never_written_through_a_link(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "new.tmp").symlink_to(tmp_path / "other")
    mobilenetv2.write_file(tmp_path / "new", b"new")
    assert (tmp_path / "new").read_bytes() == b"new" and (
        tmp_path / "other"
    ).read_bytes() == b"other"
    assert sorted(os.listdir(tmp_path)) == ["new", "other"]


def assert_refused(path, reason=None):
    """Loading `path` must raise a CheckpointError of one line, with path, reason and fix."""
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"cannot load '{path}' (") and "\n" not in message
    assert message.endswith(
        "): make a checkpoint with train.py or finetune.py, or use imagenet"
    )


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
@pytest.mark.parametrize(
    "write",
    (
        lambda path: path.write_bytes(pickle.dumps(Hostile())),
        lambda path: torch.save(Hostile(), path),
    ),
)
def test_pickle_that_would_run_code_is_refused(write, tmp_path, capsys):
    write(tmp_path / "hostile.pt")
    assert_refused(tmp_path / "hostile.pt", "damaged, or more than tensors and plain values")
    assert "must never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda c: c["model"].pop("stem.conv.weight"),
            "'stem.conv.weight' is missing, unknown or of another shape",
        ),
        (
            lambda c: c["model"].update(extra=torch.zeros(1)),
            "'extra' is missing, unknown or of another shape",
        ),
        (
            lambda c: c["model"].update({"stem.conv.weight": torch.zeros(2, 3)}),
            "'stem.conv.weight' is missing, unknown or of another shape, and so are 0 others",
        ),
        (
            lambda c: c["model"].update({"stem.conv.weight": 3}),
            "'stem.conv.weight' is missing, unknown or of another shape",
        ),
        (
            lambda c: c["arch"].update(width_mult=1.0),
            "'stem.conv.weight' is missing, unknown or",
        ),
        # The checkpoint is at fault, not the batch size: no "not enough memory: lower ...".
        (lambda c: c["arch"].update(num_classes=10**12), r"no network has .*1000000000000"),
        (lambda c: c["arch"].update(width_mult="many"), "no network has .*many"),
        (lambda c: c["arch"].update(hidden=1), "no network has .*hidden"),
        (lambda c: c.pop("model"), "the file has no 'model' of type dict"),
        (lambda c: c.pop("arch"), "the file has no 'arch' of type dict"),
        (lambda c: c.pop("classes"), "the file has no 'classes' of type list"),
        (lambda c: c.pop("history"), "the file has no 'history' of type list"),
        (lambda c: c.update(classes={"a": 0}), "the file has no 'classes' of type list"),
        (
            lambda c: c["preprocessing"].pop("mean"),
            "the file has no 'mean' of type list",
        ),
        (
            lambda c: c["preprocessing"].update(image_size="32"),
            "the file has no 'image_size' of type int",
        ),
        (lambda c: c["classes"].pop(), "2 names, 3 classes"),
    ],
)
def test_incomplete_or_inconsistent_checkpoint_is_refused(checkpoint, change, reason):
    contents = torch.load(checkpoint, weights_only=True)
    change(contents)
    torch.save(contents, checkpoint)
    assert_refused(checkpoint, reason)


@pytest.mark.parametrize(
    "contents, reason",
    [
        ([1, 2], "the file has a list, not a dict"),
        ({"epoch": 3}, "no weights"),
        (torch.zeros(2), "the file has a Tensor, not a dict"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused(contents, reason, tmp_path):
    torch.save(contents, tmp_path / "other.pt")
    assert_refused(tmp_path / "other.pt", reason)


# --------------------------------------------------------------------------- pretrained weights


@pytest.mark.parametrize("width", WIDTHS)
def test_torchvision_file_gives_the_same_logits(width, tmp_path):
    path = tmp_path / "theirs.pth"
    images = torch.randn(2, 3, 64, 64)
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=4)).eval()
    torch.save(theirs.state_dict(), path)
    model, contents = load_checkpoint(path)
    assert torch.equal(model(images), theirs(images)) and contents["classes"] == []
    assert torch.equal(load_pretrained(path, num_classes=4)(images), theirs(images))
    fresh = load_pretrained(path, num_classes=9, output_stride=16)
    assert fresh.arch == {
        "num_classes": 9,
        "width_mult": width,
        "dropout": 0.2,
        "output_stride": 16,
    }
    assert fresh(images).shape == (2, 9)
    assert torch.equal(fresh.head.conv.weight, theirs.features[18][0].weight)


def test_another_number_of_classes_gives_a_new_classifier(checkpoint):
    model = load_checkpoint(checkpoint)[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pretrained(checkpoint, num_classes=3)(images), model(images))
    assert load_pretrained(checkpoint, num_classes=5)(images).shape == (2, 5)


@pytest.mark.parametrize(
    "name", ("features.5.conv.0.0.weight", "classifier.1.weight", "features.17.conv.3.bias")
)
def test_incomplete_torchvision_file_is_refused(name, tmp_path):
    state_dict = torchvision.models.mobilenet_v2(num_classes=4).state_dict()
    del state_dict[name]
    torch.save(state_dict, tmp_path / "part.pth")
    ours = list(from_torchvision({name: None}))[0]
    assert_refused(tmp_path / "part.pth", ours)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Replace torchvision's address by a local file with its hash in its name.

    The download folder is empty.
    """
    path = tmp_path / "server" / "weights.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.mobilenet_v2().state_dict(), path)
    path = path.rename(
        path.with_name(f"mobilenet_v2-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    )
    monkeypatch.setattr(mobilenetv2, "IMAGENET_URL", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return path


def test_address_and_preprocessing_of_imagenet_weights_are_torchvisions():
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    theirs = weights.transforms()
    ours = mobilenetv2.IMAGENET_PREPROCESSING
    assert weights.url == mobilenetv2.IMAGENET_URL
    assert [ours["image_size"]] == theirs.crop_size and ours["crop"] == theirs.crop_size[
        0
    ] / theirs.resize_size[0]
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
    with pytest.raises(
        CheckpointError, match=r"cannot load 'imagenet' \(no download, or a damaged"
    ):
        load_pretrained("imagenet", num_classes=6)
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


def test_error_without_a_network_names_address_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"download https://.*/mobilenet_v2-7ebf99e0.pth into '(.*)'$"
    ) as caught:
        load_pretrained("imagenet", num_classes=6)
    assert f"'{tmp_path}/hub/checkpoints'" in str(caught.value) and "\n" not in str(
        caught.value
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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
    assert (
        load_checkpoint(tmp_path / "half.pth")[0](torch.randn(1, 3, 32, 32)).dtype
        == torch.float32
    )
