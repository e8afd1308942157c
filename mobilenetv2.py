"""MobileNetV2, written by hand from the paper.

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, https://arxiv.org/abs/1801.04381 ("the paper" in every comment below)

Read in this order: `BOTTLENECKS` (Table 2), `InvertedResidual` (Table 1, §3.1 to §3.3), `MobileNetV2` (§4). After the network
come the weight names (torchvision's and ours), the checkpoints, and the counting of parameters and multiply-adds (Table 4).

This file stands alone: copy it into another project as it is. It needs torch, and torchvision only to
find the address of the ImageNet weights.

    python mobilenetv2.py                    # Table 2 with live shapes, parameters and multiply-adds
    python mobilenetv2.py --width 0.5 --image-size 32 --output-stride 8
"""

import argparse
import copy
import hashlib
import io
import math
import os
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

# Table 2 of the paper, the rows between the first and the last convolution. Each row is a group of n inverted
# residuals; only the first one of a group has the stride s and changes the number of channels. (The first version on arXiv
# was at odds with itself here, and copies with the stride 2 of the row of 64 in that of 96 are still around: 416 million
# multiply-adds, where the text has 300.)
#   t: expansion, how many times wider the block is inside than at its ends
#   c: output channels
#   n: how many blocks
#   s: stride of the first of them
BOTTLENECKS = (
    # t,  c, n, s    at 224 pixels:  input  -> output
    (1, 16, 1, 1),  #           112² ×  32 -> 112² ×  16
    (6, 24, 2, 2),  #           112² ×  16 ->  56² ×  24
    (6, 32, 3, 2),  #            56² ×  24 ->  28² ×  32
    (6, 64, 4, 2),  #            28² ×  32 ->  14² ×  64
    (6, 96, 3, 1),  #            14² ×  64 ->  14² ×  96
    (6, 160, 3, 2),  #           14² ×  96 ->   7² × 160
    (6, 320, 1, 1),  #            7² × 160 ->   7² × 320
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280

# The network that Table 2 describes halves the image five times: 224 / 32 = 7. An image of 32 pixels would end as a single
# one, so an output stride of 16 or 8 turns the first one or two strides of 2 into 1. (Segmentation networks, the paper's §6.3
# among them, drop the last strides instead, and dilate what follows: they want large maps, not large details.)
STRIDES_DROPPED = {32: 0, 16: 1, 8: 2}  # output_stride -> how many

# What torchvision's ImageNet weights are evaluated with (torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2): the middle 224
# pixels of a shorter side of 232.
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET_PREPROCESSING = {"image_size": 224, "crop": 224 / 232, "channels": 3, "mean": MEAN, "std": DEVIATION}


class CheckpointError(ValueError):
    """A file of weights that is missing, damaged, unsafe, or of another network. The message names the mend."""


# --------------------------------------------------------------------------------------------- the network


def make_divisible(value, divisor=8):
    """Round a number of channels to the nearest multiple of `divisor`, never below 90% of `value`.

    Vector units work on 8 numbers at a time; 35 channels would cost as much as 40. The 90% rule keeps small
    networks from losing too much: 11.2 would round to 8, and becomes 16.
    Source: TensorFlow's reference implementation of the paper (tensorflow/models, slim/nets/mobilenet).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def convolution(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Convolution, batch normalisation and, unless `activation` is False, ReLU6: (N, in, H, W) -> (N, out, H/s, W/s).

    The convolution has no bias: the normalisation that follows would subtract it again and adds its own.
    ReLU6 is min(max(x, 0), 6): values in a range known beforehand fit in 8 bits with little rounding error (§4 of the paper).
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels))
    if activation:
        layers["activation"] = nn.ReLU6(inplace=True)
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """The bottleneck block, Table 1 of the paper: expand, filter, project.

        input              operator                      output
        h × w × k          1×1 convolution, ReLU6        h × w × tk          .expand
        h × w × tk         3×3 depthwise, stride s, ReLU6    h/s × w/s × tk  .depthwise
        h/s × w/s × tk     1×1 convolution, linear       h/s × w/s × k'      .project

    Depthwise separable (§3.1): in a dense 3×3 convolution each output channel has a filter for each input channel, 9 · k · k'
    multiply-adds a pixel. One filter a channel and then a 1×1 convolution that mixes them cost k · (9 + k'): 6 to 9 times less
    in this network.
    Inverted (§3.3): a ResNet's shortcut joins the wide ends of a block that is narrow inside; here it joins the
    narrow ends of a block that is wide inside, so that what must be kept in memory between blocks is small.
    Linear (§3.2): no activation after the projection. ReLU sets every negative value to zero: among many
    channels the others still carry the information, among the few channels of a bottleneck it is lost.
    (experiments/ablation.py takes the last two away and measures.)

    Args: in_channels k, out_channels k', stride s (1 or 2), expansion t. Shape: (N, k, H, W) -> (N, k', H/s, W/s).
    """

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}: a block has stride 1 or 2")
        wide = in_channels * expansion
        # t = 1 (the first block only) would expand nothing: as in TensorFlow's and torchvision's code it has no expansion.
        self.expand = nn.Identity() if expansion == 1 else convolution(in_channels, wide, 1)
        # groups = channels: one 3×3 filter for each.
        self.depthwise = convolution(wide, wide, 3, stride, groups=wide)
        self.project = convolution(wide, out_channels, 1, activation=False)
        self.use_residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        # The shapes are those of blocks[1], the first with stride 2, at 224 pixels.
        out = self.expand(x)  #         (N, 16, 112, 112) -> (N, 96, 112, 112)
        out = self.depthwise(out)  #    (N, 96, 112, 112) -> (N, 96, 56, 56)
        out = self.project(out)  #      (N, 96, 56, 56)   -> (N, 24, 56, 56)
        return x + out if self.use_residual else out


class MobileNetV2(nn.Module):
    """The whole network, Table 2 of the paper: stem, 17 inverted residuals, head, pooling, classifier.

    (The text of §4 counts 19 of them; the table's n add up to 17, and so do all implementations.)

    Args:
        num_classes: outputs of the classifier.
        width_mult: the width multiplier (§4 of the paper), 0 < width_mult <= 4: scales the channels of every layer,
            except that the head keeps its 1280 below 1.0 ("for multipliers less than one, we apply width multiplier
            to all layers except the very last convolutional layer. This improves performance for smaller models", §4): as
            many classes need as many features, however thin what computes them.
        dropout: probability in front of the classifier; 0.2 as in torchvision. The paper does not give one.
        output_stride: 32 (the paper), 16 or 8: image size over size of the last feature map. Of 32 pixels, 16 leaves 2 × 2
            and 8 leaves 4 × 4; each step costs 3.5 times the multiply-adds. The weights have the same shapes whatever it is.

    Shape: (N, 3, S, S) -> (N, num_classes) logits; S is 224 in the paper.
    Raises ValueError for an argument out of its range.
    """

    def __init__(self, num_classes=1000, width_mult=1.0, dropout=0.2, output_stride=32):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: at least 1 is needed")
        if not 0 < width_mult <= 4:
            raise ValueError(f"width_mult is {width_mult}: above 0 and at most 4 is needed (the paper: 0.35 to 1.4)")
        if output_stride not in STRIDES_DROPPED:
            raise ValueError(f"output_stride is {output_stride}: 32, 16 or 8 is needed")
        # What rebuilds this network; a checkpoint carries it beside the weights.
        sizes = {"num_classes": num_classes, "width_mult": width_mult}
        self.arch = sizes | {"dropout": dropout, "output_stride": output_stride}

        strides = [2] + [stride for _, _, _, stride in BOTTLENECKS]  # stem, then the first block of each row
        reductions = [index for index, stride in enumerate(strides) if stride == 2]
        for index in reductions[: STRIDES_DROPPED[output_stride]]:
            strides[index] = 1  # NOTE: for small images, stride 2 -> 1

        channels = make_divisible(STEM_CHANNELS * width_mult)
        self.stem = convolution(3, channels, 3, strides[0])
        blocks = []
        for (expansion, row_channels, repeats, _), row_stride in zip(BOTTLENECKS, strides[1:], strict=True):
            out_channels = make_divisible(row_channels * width_mult)
            for repeat in range(repeats):
                stride = row_stride if repeat == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        head_channels = make_divisible(HEAD_CHANNELS * max(1.0, width_mult))
        self.head = convolution(channels, head_channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head_channels, num_classes)
        self.apply(initialise)

    def features(self, x):
        """The feature vector (embedding) of each image: (N, 3, S, S) -> (N, 1280), pooled, before dropout and classifier."""
        x = self.stem(x)  #             (N, 3, 224, 224)  -> (N, 32, 112, 112)
        x = self.blocks(x)  #           (N, 32, 112, 112) -> (N, 320, 7, 7), row by row as beside BOTTLENECKS
        x = self.head(x)  #             (N, 320, 7, 7)    -> (N, 1280, 7, 7)
        return x.mean(dim=(2, 3))  #    (N, 1280, 7, 7)   -> (N, 1280): global average pooling, for any image size

    def forward(self, x):
        x = self.features(x)  #         (N, 3, 224, 224)  -> (N, 1280)
        x = self.dropout(x)  #          (N, 1280)
        return self.classifier(x)  #    (N, 1280)         -> (N, num_classes)


def initialise(module):
    """Set the initial weights of one layer. The paper gives none; these are torchvision's.

    Convolutions: normal with variance 2 / (kernel area · output channels), "fan out" of He et al.
    (arXiv:1502.01852), which keeps the size of the gradients from layer to layer. A depthwise convolution is counted
    as if it were dense, as torchvision does. Normalisation: scale 1, shift 0. Classifier: normal with deviation 0.01.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def replace_classifier(model, num_classes):
    """Give `model` a fresh classifier for `num_classes` classes, on the same device, and say so; everything else stays."""
    old = model.classifier
    print(f"classifier: fresh, for {num_classes} classes (the weights know {old.out_features})")
    model.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device)
    initialise(model.classifier)
    model.arch["num_classes"] = num_classes


# -------------------------------------------------------------------------------- weight names: torchvision's and ours


def torchvision_names():
    """Each layer that has weights: our name -> torchvision's name, in the order of the forward pass.

    torchvision numbers its layers: features.0 is the stem, features.1 to features.17 are the blocks, features.18 is the
    head. In a block, `conv` is a list of: expansion (absent from the first block), depthwise, projection, its norm.
    """
    names = {"stem.conv": "features.0.0", "stem.norm": "features.0.1"}
    expansions = [expansion for expansion, _, repeats, _ in BOTTLENECKS for _ in range(repeats)]
    for index, expansion in enumerate(expansions):
        ours, theirs, position = f"blocks.{index}", f"features.{index + 1}.conv", 0
        if expansion != 1:
            names[f"{ours}.expand.conv"] = f"{theirs}.0.0"
            names[f"{ours}.expand.norm"] = f"{theirs}.0.1"
            position = 1
        names[f"{ours}.depthwise.conv"] = f"{theirs}.{position}.0"
        names[f"{ours}.depthwise.norm"] = f"{theirs}.{position}.1"
        names[f"{ours}.project.conv"] = f"{theirs}.{position + 1}"
        names[f"{ours}.project.norm"] = f"{theirs}.{position + 2}"
    names |= {"head.conv": "features.18.0", "head.norm": "features.18.1", "classifier": "classifier.1"}
    return names


def rename(state_dict, names):
    """Rename the layer part of each key by `names`, keep order and tensors: 'stem.conv.weight' -> 'features.0.0.weight'."""
    renamed = OrderedDict()
    for key, tensor in state_dict.items():
        layer, _, tensor_name = key.rpartition(".")
        if layer not in names:
            example = next(iter(names))
            raise CheckpointError(f"'{key}' is not a weight of MobileNetV2: expected names such as '{example}.weight'")
        renamed[f"{names[layer]}.{tensor_name}"] = tensor
    return renamed


def from_torchvision(state_dict):
    """torchvision's names -> ours: a pure renaming. Raises CheckpointError for a key that is not of MobileNetV2."""
    return rename(state_dict, {theirs: ours for ours, theirs in torchvision_names().items()})


def to_torchvision(state_dict):
    """Our names -> torchvision's: the inverse of `from_torchvision`."""
    return rename(state_dict, torchvision_names())


def check_weights(model, state_dict, source):
    """Raise CheckpointError, naming the first few problems, unless every key and shape of `state_dict` fits `model`."""
    expected = model.state_dict()
    problems = [f"'{key}' is missing" for key in expected if key not in state_dict]
    problems += [f"'{key}' is unexpected" for key in state_dict if key not in expected]
    for key in expected:
        needed, given = expected[key], state_dict.get(key, expected[key])
        if not isinstance(given, torch.Tensor) or given.shape != needed.shape:
            what = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            problems.append(f"'{key}' is {what} where {tuple(needed.shape)} is needed")
        elif given.is_floating_point() != needed.is_floating_point():
            problems.append(f"'{key}' has numbers of type {given.dtype}")
        elif not given.is_meta and not given.isfinite().all():
            problems.append(f"'{key}' has numbers that are not finite")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"'{source}' does not fit the network: {', '.join(problems[:3])}{more}")


# ------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, model, classes, preprocessing, history=(), **more):
    """Write a checkpoint: one file with everything that later steps need to know.

    Args:
        classes: list of class names, in the order of the logits.
        preprocessing: dict with image_size, channels (1: grayscale repeated thrice, 3: colour), mean and std (3 floats
            each, of pixels in 0..1).
        history: list of dicts, one an epoch.
        more: tensors and plain values that belong to the training and not to the network, such as the optimiser's state.
    Raises ValueError if the classes are not as many as the logits, and OSError when the file cannot be written; a file of
    that name that was there before is then untouched.
    """
    if len(classes) != model.arch["num_classes"]:
        raise ValueError(f"{len(classes)} names for a network of {model.arch['num_classes']} classes")
    checkpoint = {
        "model": {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()},
        "arch": dict(model.arch),
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
        "history": [dict(row) for row in history],
    } | more
    # In memory first: the archive's inner names then do not depend on the file's, and equal runs give equal bytes.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def write_file(path, contents):
    """Write bytes so that whoever reads `path` finds the old file or the new one, never half of one. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(contents)
        os.replace(temporary, path)  # atomic
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say for which file
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_file(path):
    """Unpickle tensors and plain values from `path`, nothing else: weights_only=True refuses what could run code."""
    try:
        contents = Path(path).read_bytes()
    except FileNotFoundError as error:
        mend = "make one with train.py or finetune.py, or name another with --checkpoint"
        raise CheckpointError(f"no checkpoint at '{path}': {mend}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a strange pickle protocol: the error below says enough
            return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint: it is damaged, not from PyTorch, or holds more than tensors and"
            f" plain values ({type(error).__name__}); make it again, or fetch it again"
        ) from error


def check_checkpoint(checkpoint, path):
    """Raise CheckpointError unless `checkpoint` has the parts, of the types, that `save_checkpoint` wrote."""
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"'{path}' is not a checkpoint of this project: it holds a {type(checkpoint).__name__}")
    if "features.0.0.weight" in checkpoint:
        raise CheckpointError(f"'{path}' has torchvision's names and no classes: fine-tune it with finetune.py first")
    types = {"model": dict, "arch": dict, "classes": list, "preprocessing": dict, "history": list}
    wrong = [part for part, kind in types.items() if not isinstance(checkpoint.get(part), kind)]
    if wrong:
        raise CheckpointError(f"'{path}' is not a checkpoint of this project: it has no '{wrong[0]}', as save_checkpoint writes")
    named, known = len(checkpoint["classes"]), checkpoint["arch"].get("num_classes")
    if named != known:
        raise CheckpointError(f"'{path}' contradicts itself: it names {named} classes for a network of {known}")
    mean, deviation = (checkpoint["preprocessing"].get(key) for key in ("mean", "std"))
    size, channels = (checkpoint["preprocessing"].get(key) for key in ("image_size", "channels"))
    numbers = [*mean, *deviation] if isinstance(mean, list) and isinstance(deviation, list) else []
    usable = len(numbers) == 6 and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    if not (usable and 0 not in numbers[3:] and isinstance(size, int) and size > 0 and channels in (1, 3)):
        raise CheckpointError(f"'{path}' lacks a usable preprocessing (image_size, channels, mean, std): make it again")


def build(checkpoint, path):
    """Rebuild the network that `checkpoint` describes, with its weights, in eval mode."""
    try:
        # The meta device has shapes and no memory: a file that claims a billion classes is refused before it costs any.
        with torch.device("meta"):
            model = MobileNetV2(**checkpoint["arch"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' describes a network that cannot be built: {error}") from error
    check_weights(model, checkpoint["model"], path)
    model.to_empty(device="cpu").load_state_dict(checkpoint["model"])
    return model.eval()


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote: returns (model in eval mode on the CPU, checkpoint dict).

    Raises CheckpointError when the file is missing, damaged, unsafe, or not such a checkpoint.
    """
    checkpoint = read_file(path)
    check_checkpoint(checkpoint, path)
    return build(checkpoint, path), checkpoint


def download_imagenet():
    """Path of torchvision's ImageNet weights (IMAGENET1K_V2, 13.6 MB), fetched once, its hash verified each time."""
    from torchvision.models import MobileNet_V2_Weights

    url = MobileNet_V2_Weights.IMAGENET1K_V2.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)  # where torchvision itself looks, too
    digest = path.stem.rpartition("-")[2]  # PyTorch's convention: NAME-<first 8 digits of the SHA-256>.pth
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
            raise CheckpointError(f"no ImageNet weights ({error}): fetch {url} and put it at '{path}'") from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
        raise CheckpointError(f"'{path}' is damaged (its SHA-256 is not {digest}...): delete it to fetch it again")
    return path


def infer_width(weights):
    """The width multiplier, in hundredths, that gives the channels which `weights` (our names) have.

    Several may, since channels are rounded to multiples of 8: the nearest to what the last projection has of its 320.
    """
    blocks = [weights[f"blocks.{index}.project.conv.weight"].shape[0] for index in range(17)]
    found = [weights["stem.conv.weight"].shape[0], *blocks]
    rows = [STEM_CHANNELS] + [channels for _, channels, repeats, _ in BOTTLENECKS for _ in range(repeats)]
    for width in sorted((n / 100 for n in range(1, 401)), key=lambda width: abs(width - blocks[-1] / rows[-1])):
        if [make_divisible(channels * width) for channels in rows] == found:
            return width
    return blocks[-1] / rows[-1]  # none fits; the check of the shapes will say where


def read_pretrained(source):
    """Read weights to start from as a checkpoint dict (model, arch, classes, preprocessing, history).

    `source` is 'imagenet', a file in torchvision's names, or a checkpoint of ours. torchvision's files carry no class
    names (classes is then an empty list) and are taken to be trained with ImageNet's preprocessing.
    """
    path = download_imagenet() if source == "imagenet" else source
    contents = read_file(path)
    if not isinstance(contents, dict) or "features.0.0.weight" not in contents:
        check_checkpoint(contents, path)
        return contents
    weights = from_torchvision(contents)
    try:
        width_mult = infer_width(weights)
        num_classes = weights["classifier.weight"].shape[0]
    except (KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"'{path}' is not a whole MobileNetV2 in torchvision's names: {error}") from error
    arch = {"num_classes": num_classes, "width_mult": width_mult, "dropout": 0.2, "output_stride": 32}
    return {"model": weights, "arch": arch, "classes": [], "preprocessing": IMAGENET_PREPROCESSING, "history": []}


def load_pretrained(source, num_classes=None, output_stride=None):
    """Build a network from pretrained weights, ready to be fine-tuned.

    Args:
        source: 'imagenet' (torchvision's IMAGENET1K_V2), a .pth file in torchvision's names, a checkpoint of ours, or
            what `read_pretrained` returned for one of these.
        num_classes: classes wanted; None keeps the classifier. Another number than that of the weights gives a fresh classifier.
        output_stride: None keeps that of the weights.
    Returns the model, in eval mode, on the CPU. Raises CheckpointError, as `load_checkpoint` does.
    """
    checkpoint, name = (source, "weights") if isinstance(source, dict) else (read_pretrained(source), source)
    arch = dict(checkpoint["arch"])
    if output_stride is not None:
        arch["output_stride"] = output_stride
    model = build(checkpoint | {"arch": arch}, name)
    if num_classes not in (None, arch["num_classes"]):
        replace_classifier(model, num_classes)
    return model


# ---------------------------------------------------------------------------------- parameters and multiply-adds


def count_parameters(model, batch_norm=True):
    """Number of learned parameters; with batch_norm=False those of BatchNorm are left out, as in TensorFlow's tables.

    Three numbers are in circulation for width 1.0: 3,504,872 in all; 3.47 million without BatchNorm's; and 3.4M, the same
    cut off, in Table 4 of the paper. (For width 1.4 that table has 6.9M and 585M; the authors' code has 6.06M and 582M, as here.)
    """
    layers = [layer for layer in model.modules() if batch_norm or not isinstance(layer, nn.BatchNorm2d)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))


def measure_layers(model, image_size):
    """Run one image through a copy of `model` and note, for each convolution and linear layer, what it cost.

    A convolution computes each of its outputs (channels × height × width) from kernel area × input channels / groups
    products; a linear layer has a product per weight. Normalisation folds into the convolution before it, and
    activations and additions are not products: they count nothing, in the paper as here.

    Returns {layer name: (input shape, output shape, multiply-adds)}, shapes without the batch, in forward order.
    """
    measured = {}

    def note(name):
        def hook(layer, inputs, output):
            outputs = output[0].numel()
            products = layer.weight[0].numel()  # kernel area × input channels / groups; in_features if linear
            measured[name] = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]), outputs * products)

        return hook

    # The meta device computes shapes and no numbers, so that this takes no time at any size.
    model = copy.deepcopy(model).to("meta").eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note(name))
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return measured


def count_macs(model, image_size=224):
    """Multiply-adds for one image of `image_size` pixels a side: 300,774,272 for the paper's network at 224 (Table 4: 300M)."""
    return sum(macs for _, _, macs in measure_layers(model, image_size).values())


def table2(model, image_size):
    """Table 2 of the paper as text, with the shapes and the costs that `model` really has at `image_size`."""
    rows = [("conv2d 3×3", "-", 1, ("stem.",))]  # operator, t, n, beginnings of the names of its layers
    first = 0
    for expansion, _, repeats, _ in BOTTLENECKS:
        rows.append(("bottleneck", expansion, repeats, tuple(f"blocks.{first + i}." for i in range(repeats))))
        first += repeats
    rows += [("conv2d 1×1", "-", 1, ("head.",)), ("avgpool, linear", "-", 1, ("classifier",))]

    measured = measure_layers(model, image_size)
    line = "{:<16} {:>14} {:>14} {:>3} {:>5} {:>2} {:>2} {:>11} {:>14}".format
    text = [line("operator", "input", "output", "t", "c", "n", "s", "parameters", "multiply-adds")]
    for operator, expansion, repeats, prefixes in rows:
        layers = [cost for name, cost in measured.items() if name.startswith(prefixes)]
        source, target = layers[0][0], layers[-1][1]  # (C, H, W), or (C) around the classifier
        modules = [module for name, module in model.named_modules() if name.startswith(prefixes)]
        stride = max((module.stride[0] for module in modules if isinstance(module, nn.Conv2d)), default="-")
        parameters = sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        macs = sum(layer[2] for layer in layers)
        shapes = ["×".join(map(str, shape)) for shape in (source, target)]
        text.append(line(operator, *shapes, expansion, target[0], repeats, stride, f"{parameters:,}", f"{macs:,}"))
    total, without = count_parameters(model), count_parameters(model, batch_norm=False)
    macs = sum(layer[2] for layer in measured.values())
    text.append(line("total", "", "", "", "", "", "", f"{total:,}", f"{macs:,}"))
    text.append(f"parameters without BatchNorm's: {without:,}")
    return "\n".join(text)


def main():
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Print Table 2 with live shapes and costs.", formatter_class=form)
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side")
    parser.add_argument("--output-stride", type=int, default=32, choices=(8, 16, 32), help="less for small images")
    parser.error = lambda message: parser.exit(2, f"mobilenetv2.py: {message}\n")  # one line, without the usage
    args = parser.parse_args()
    if args.image_size < 1:
        parser.error(f"--image-size {args.image_size}: at least 1 is needed")
    try:
        print(table2(MobileNetV2(width_mult=args.width, output_stride=args.output_stride), args.image_size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
