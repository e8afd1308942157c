"""MobileNetV2, written by hand from the paper.

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear
    Bottlenecks", CVPR 2018, https://arxiv.org/abs/1801.04381 ("the paper" in every comment
    below)

Read in this order: `BOTTLENECKS` (Table 2), `InvertedResidual` (Table 1, §3.1 to §3.3),
`MobileNetV2` (§4). Three sections follow: weight names, checkpoints, and costs (Table 4). This
file imports no other script, so you can copy it into another project. Terms used here:

    backbone     stem, blocks and head: an image becomes 1280 features
    head         the last 1×1 convolution, before pooling
    classifier   the linear layer that turns features into logits
    checkpoint   a file with the weights and everything needed to use them

    python mobilenetv2.py --width 0.5      # print Table 2 with measured shapes and costs
"""

import argparse
import copy
import io
import re
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

# The middle rows of Table 2. Each row is a group of n blocks (inverted residuals). Only the
# first block of a group has stride s and changes the number of channels.
#   t: expansion, the ratio of inner to input channels      c: output channels
#   n: number of blocks                                     s: stride of the first block
# The first arXiv version had stride 2 in the row of 96 channels instead of the row of 64. Many
# implementations copy this error, which costs 416 million multiply-adds instead of 300.
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


def make_divisible(value, divisor=8):
    """Round a number of channels to the nearest multiple of `divisor`, at least 90% of it.

    Processors compute 8 or more numbers at a time, so multiples of 8 waste nothing. For
    example, 35 becomes 32. But 11.2 becomes 16, because 8 is below 90% of 11.2.
    Source: TensorFlow (models, slim/nets).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * value:
        rounded += divisor
    return rounded


def row_strides(output_stride):
    """Return the stride of each row of BOTTLENECKS, as a list. Raises ValueError.

    Output stride: image size divided by the size of the last feature map. In Table 2 it is 224
    / 7 = 32: the stem and four rows halve the image. An image of 32 pixels would end as a
    single pixel. For output stride 16 or 8, the first one or two of these four rows keep the
    size. The stem always halves it: a stem with stride 1 was slower and less accurate on
    digits.
    """
    if output_stride not in (32, 16, 8):
        raise ValueError(f"output_stride is {output_stride}: use 32, 16 or 8")
    strides = [stride for _, _, _, stride in BOTTLENECKS]
    current = 32
    for row, stride in enumerate(strides):
        if stride == 2 and current > output_stride:
            strides[row] = 1
            current //= 2
    return strides


def convolution(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Build convolution, batch normalisation and ReLU6: (N, in, H, W) -> (N, out, H/s, W/s).

    The convolution has no bias, because the normalisation would subtract it again.
    ReLU6(x) = min(max(x, 0), 6). A known range loses little accuracy in 8-bit arithmetic (§4).
    """
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=False,
    )
    layers = nn.Sequential()
    layers.add_module("conv", conv)  # a layer with a name: layers.conv
    layers.add_module("norm", nn.BatchNorm2d(out_channels))
    if activation:
        layers.add_module("activation", nn.ReLU6(inplace=True))
    return layers


class InvertedResidual(nn.Module):
    """The bottleneck block (Table 1 of the paper): expand, filter, project.

        input              operator                          output
        h × w × k          1×1 convolution, ReLU6            h × w × tk          .expand
        h × w × tk         3×3 depthwise, stride s, ReLU6    h/s × w/s × tk      .depthwise
        h/s × w/s × tk     1×1 convolution, linear           h/s × w/s × k'      .project

    Depthwise separable (§3.1): a dense 3×3 convolution from d to d' channels costs 9 · d · d'
    multiply-adds per pixel. A depthwise and a 1×1 convolution cost d · (9 + d'): 6 times less
    for d' = 16, 9 times less for d' = 320.

    Inverted (§3.3): a ResNet block is narrow inside, and its shortcut connects the wide ends.
    Here the block is wide inside, and the shortcut connects the narrow ends. This saves
    memory, because only the narrow ends must be kept between blocks.

    Linear (§3.2): no activation follows the projection. ReLU sets negative values to zero.
    With many channels the others still carry the information; with few channels it is lost.

    Arguments: in_channels k, out_channels k', stride s (1 or 2, else ValueError), expansion t.
    Shape: (N, k, H, W) -> (N, k', H/s, W/s).
    """

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}: use 1 or 2")
        wide = in_channels * expansion
        # The first block has t = 1 and no expansion, as in TensorFlow's and torchvision's
        # code.
        self.expand = nn.Identity()
        if expansion > 1:
            self.expand = convolution(in_channels, wide, 1)
        # groups = channels: one 3×3 filter per channel.
        self.depthwise = convolution(wide, wide, 3, stride, groups=wide)
        self.project = convolution(wide, out_channels, 1, activation=False)
        self.use_residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        # The shapes are those of blocks[1], the first block with stride 2, at 224 pixels.
        out = self.expand(x)  #         (N, 16, 112, 112) -> (N, 96, 112, 112)
        out = self.depthwise(out)  #    (N, 96, 112, 112) -> (N, 96, 56, 56)
        out = self.project(out)  #      (N, 96, 56, 56)   -> (N, 24, 56, 56)
        if self.use_residual:
            out = x + out
        return out


class MobileNetV2(nn.Module):
    """The whole network (Table 2 of the paper): stem, 17 blocks, head, pooling, classifier.

    The text of §4 counts 19 blocks. The column n of Table 2 adds up to 17, as in all code.

    Args:
        num_classes: number of logits.
        width_mult: width multiplier (§4) of all channels, from 0.05 to 4. Below 1.0 the head
            keeps 1280 channels, because a thin network still has to separate as many classes.
        dropout: probability before the classifier. The paper gives none; torchvision has 0.2.
        output_stride: ratio of image size to the size of the last feature map: 32 (the paper),
            16 or 8. An image of 32 pixels ends as 1×1, 2×2 or 4×4, each step costs 3 to 4
            times the multiply-adds, and the weights keep their shapes.
    Shape: (N, 3, S, S) -> (N, num_classes) logits; S is 224 in the paper.
    Raises ValueError for an argument out of range.
    """

    def __init__(self, num_classes=1000, width_mult=1.0, dropout=0.2, output_stride=32):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: use 1 or more")
        if not 0.05 <= width_mult <= 4:
            raise ValueError(f"width_mult is {width_mult}: use a value from 0.05 to 4")
        # A checkpoint stores these arguments, so that it can rebuild the network.
        self.arch = {
            "num_classes": num_classes,
            "width_mult": width_mult,
            "dropout": dropout,
            "output_stride": output_stride,
        }
        channels = make_divisible(STEM_CHANNELS * width_mult)
        self.stem = convolution(3, channels, 3, stride=2)
        self.blocks = nn.Sequential()
        for (t, c, n, _), row_stride in zip(BOTTLENECKS, row_strides(output_stride)):
            out_channels = make_divisible(c * width_mult)
            for repeat in range(n):
                stride = row_stride if repeat == 0 else 1
                self.blocks.append(InvertedResidual(channels, out_channels, stride, t))
                channels = out_channels
        head_channels = make_divisible(HEAD_CHANNELS * max(1.0, width_mult))
        self.head = convolution(channels, head_channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head_channels, num_classes)
        self.apply(initialise)

    def features(self, x):
        """Compute the feature vector (embedding) of each image: (N, 3, S, S) -> (N, 1280)."""
        x = self.stem(x)  #             (N, 3, 224, 224)  -> (N, 32, 112, 112)
        x = self.blocks(x)  #           (N, 32, 112, 112) -> (N, 320, 7, 7), see BOTTLENECKS
        x = self.head(x)  #             (N, 320, 7, 7)    -> (N, 1280, 7, 7)
        return x.mean(dim=(2, 3))  #    (N, 1280, 7, 7)   -> (N, 1280): global average pooling

    def forward(self, x):
        x = self.features(x)  #         (N, 3, 224, 224)  -> (N, 1280)
        x = self.dropout(x)  #          (N, 1280)
        return self.classifier(x)  #    (N, 1280)         -> (N, num_classes)


def initialise(module):
    """Set the initial weights of one layer. The paper gives none; these are torchvision's.

    Convolutions: normal with variance 2 / (kernel area · output channels), the "fan out" of He
    et al. (arXiv:1502.01852), which keeps gradients of similar size in all layers. For a
    depthwise convolution PyTorch counts all output channels, so its weights start smaller than
    the rule asks for; the BatchNorm that follows corrects the scale. Classifier: std 0.01.
    BatchNorm keeps PyTorch's 1 and 0.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def replace_classifier(model, num_classes):
    """Give `model` a new, random classifier for `num_classes` classes, in place."""
    old = model.classifier
    model.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device)
    initialise(model.classifier)
    model.arch["num_classes"] = num_classes


# -------------------------------------------------------- weight names: torchvision's and ours
def torchvision_names():
    """Map each layer with weights: our name -> torchvision's name, in forward order.

    torchvision numbers them: features.0 is the stem, 1 to 17 are the blocks, 18 is the head.
    In a block, `conv` lists expansion (not in the first block), depthwise, projection and its
    norm.
    """
    names = {"stem.conv": "features.0.0", "stem.norm": "features.0.1"}
    index = 0
    for t, _, n, _ in BOTTLENECKS:
        for _ in range(n):
            ours = f"blocks.{index}"
            theirs = f"features.{index + 1}.conv"
            parts = ["depthwise"] if t == 1 else ["expand", "depthwise"]
            for position, part in enumerate(parts):
                names[f"{ours}.{part}.conv"] = f"{theirs}.{position}.0"
                names[f"{ours}.{part}.norm"] = f"{theirs}.{position}.1"
            names[f"{ours}.project.conv"] = f"{theirs}.{len(parts)}"
            names[f"{ours}.project.norm"] = f"{theirs}.{len(parts) + 1}"
            index += 1
    names["head.conv"] = "features.18.0"
    names["head.norm"] = "features.18.1"
    names["classifier"] = "classifier.1"
    return names


def rename(state_dict, names):
    """Rename the layer in each key: 'stem.conv.weight' -> 'features.0.0.weight'."""
    renamed = {}
    for key, tensor in state_dict.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise CheckpointError(f"'{key}' is not a weight of MobileNetV2: {CONVERT}")
        renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


def from_torchvision(state_dict):
    """Rename torchvision's weights to ours. Raises CheckpointError for an unknown key."""
    return rename(state_dict, {theirs: ours for ours, theirs in torchvision_names().items()})


def to_torchvision(state_dict):
    """Rename our weights to torchvision's: the inverse of `from_torchvision`."""
    return rename(state_dict, torchvision_names())


# --------------------------------------------------------------------------------- checkpoints
IMAGENET_URL = "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"
# torchvision's for MobileNet_V2_Weights.IMAGENET1K_V2
IMAGENET_PREPROCESSING = {
    "image_size": 224,
    "crop": 224 / 232,  # of the shorter side
    "channels": 3,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# Names and types of the entries of a checkpoint, and of its preprocessing.
CHECKPOINT = {
    "model": dict,
    "arch": dict,
    "classes": list,
    "preprocessing": dict,
    "history": list,
}
PREPROCESSING = {"image_size": int, "mean": list, "std": list}
# Fixes of errors. The file's path replaces FILE.
CONVERT = "python experiments/convert.py FILE weights.pth"
SAVE = "in the program that made it, call torch.save(model.state_dict(), 'weights.pth')"
# Bytes in files that torch.load refuses, as a regular expression, and "problem: fix".
OTHER_FILES = {
    rb"\A\s*<": "an HTML page: download the file again",
    rb"\Aversion https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    rb"\A.{7}\0\{": f"a safetensors file: {CONVERT}",
    rb"\A\x08.[\x12:B]": f"an ONNX file: {SAVE}",
    rb"constants\.pkl|models/model\.json": f"a TorchScript or torch.export file: {SAVE}",
    rb"torch\.nn\.modules": f"a whole pickled model: {SAVE}",
    rb"numpy\.|argparse": f"more than tensors and plain values: {CONVERT}",
    rb"": "damaged, or more than tensors and plain values",
}
# The same for other weights than torchvision's and this project's. The bytes replace {}.
OTHER_WEIGHTS = {
    rb"\w[\w.]{0,80}\.(?=features\.1\.)": f"weights with the prefix '{{}}': {CONVERT}",
    rb"features\.1\.conv\.": f"weights in another entry or with older names: {CONVERT}",
    rb"conv_stem\.weight": f"timm's names: {CONVERT}",
    rb"blocks\.0\.depthwise\.conv": f"weights without the other entries: {CONVERT}",
    rb"\w[\w.]{0,80}\.weight": "another network, its first weight is '{}'",
    rb"": "no weights",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is "problem" or "problem: fix"."""


def save_checkpoint(path, model, classes, preprocessing, history=(), **training_state):
    """Write a checkpoint: one dict of tensors and plain values. Raises OSError.

    classes: names in the order of the logits. history: rows of log.csv, as dicts, or none.
    preprocessing: dict with image_size, crop (used share of the shorter side), channels (1 is
    grayscale), mean and std (of pixels in 0..1). training_state: optimizer and so on, to
    resume.
    """
    checkpoint = {
        "model": {key: tensor.cpu() for key, tensor in model.state_dict().items()},
        "arch": model.arch,
        "classes": list(classes),
        "preprocessing": preprocessing,
        "history": list(history),
        **training_state,
    }
    # torch.save stores the file's name inside the file. A buffer has none: equal runs, equal
    # bytes.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def write_file(path, contents):
    """Write bytes to a temporary file and rename it: never half a file. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed run
        with open(temporary, "xb") as file:  # x: never through a link to another file
            file.write(contents)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # Not every such error has the file's name.
        raise OSError(error.errno, error.strerror, str(path)) from error


def load_checkpoint(source, output_stride=None):
    """Load a network with its weights. Returns (float32 model in eval mode, checkpoint).

    source: path of a checkpoint, path of torchvision's weights, or 'imagenet'.
    output_stride: None keeps the checkpoint's. The weights fit all three values.
    Raises CheckpointError if the file is missing, damaged, unsafe or from another network.
    """
    try:
        checkpoint = read_checkpoint(source)
        check_entries(checkpoint, CHECKPOINT)
        check_entries(checkpoint["preprocessing"], PREPROCESSING)
        model = build_network(checkpoint, output_stride)
    except CheckpointError as error:
        problem, _, fix = str(error).partition(": ")
        fix = fix or "make a checkpoint with train.py or finetune.py, or use imagenet"
        fix = fix.replace("FILE", f'"{source}"')
        raise CheckpointError(f"cannot load '{source}' ({problem}): {fix}") from error
    return model, checkpoint


def read_checkpoint(source):
    """Read a file, or download 'imagenet'. Returns a checkpoint. Raises CheckpointError."""
    contents = read_file(source)
    if not isinstance(contents, dict):
        raise CheckpointError(f"the file has a {type(contents).__name__}, not a dict")
    if "preprocessing" in contents:
        return contents
    if "features.1.conv.0.0.weight" not in contents:  # then recognise raises the error
        recognise(Path(source).read_bytes(), OTHER_WEIGHTS)
    # torchvision's files have only weights. If one is missing, build_network says so.
    weights = from_torchvision(contents)
    bias = weights.get("classifier.bias")
    return {
        "model": weights,
        "arch": {
            "num_classes": 1000 if bias is None else len(bias),
            "width_mult": find_width(weights),
        },
        "classes": [],
        "preprocessing": IMAGENET_PREPROCESSING,
        "history": [],
    }


def read_file(source):
    """Read a file, or download 'imagenet'. Returns its contents. Raises CheckpointError."""
    # A pickle can run any code when it is loaded. weights_only=True accepts only data.
    safe = {"map_location": "cpu", "weights_only": True}
    if source == "imagenet":  # 13.6 MB, downloaded once
        try:
            return torch.hub.load_state_dict_from_url(IMAGENET_URL, check_hash=True, **safe)
        except Exception as error:  # no network, another hash, a damaged file
            fix = f"download {IMAGENET_URL} into '{torch.hub.get_dir()}/checkpoints'"
            raise CheckpointError(f"no download, or a damaged file: {fix}") from error
    try:
        if Path(source).is_fifo():  # it may never end
            raise OSError("a pipe, no regular file")
        contents = Path(source).read_bytes()
    except OSError as error:
        raise CheckpointError(error.strerror or error) from error
    try:
        if zipfile.is_zipfile(source) and zipfile.ZipFile(source).testzip():
            raise zipfile.BadZipFile("a checksum differs")
        return torch.load(source, **safe)
    except Exception:  # a damaged file makes torch raise almost anything
        recognise(contents, OTHER_FILES)  # always raises: its last pattern is in every file


def recognise(contents, kinds):
    """Raise CheckpointError with the message of the first pattern found in `contents`."""
    for pattern, message in kinds.items():
        found = re.search(pattern, contents, re.DOTALL)
        if found:
            raise CheckpointError(message.format(found[0].decode("latin-1")))


def find_width(weights):
    """Return the width multiplier of a network with these weights. Raises CheckpointError.

    Numbers of channels are multiples of 8, so several widths build the same network. The
    roundest one is returned: multiples of 0.05 come first, then of 0.01 and of 0.001.
    """
    ends = ("stem.norm.bias", "project.norm.bias", "head.norm.bias")
    found = Counter(len(bias) for key, bias in weights.items() if key.endswith(ends))
    rows = [STEM_CHANNELS, *(c for _, c, n, _ in BOTTLENECKS for _ in range(n))]
    for step in (50, 10, 1):
        for thousandths in range(50, 4001, step):
            width = thousandths / 1000
            channels = [make_divisible(c * width) for c in rows]
            channels.append(make_divisible(HEAD_CHANNELS * max(1.0, width)))
            if found <= Counter(
                channels
            ):  # a multiset in another; fewer if a weight is missing
                return width
    raise CheckpointError(f"no width from 0.05 to 4 gives {list(found)} channels")


def check_entries(values, kinds):
    """Raise CheckpointError if a dict lacks an entry, or has one of another type."""
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise CheckpointError(f"the file has no '{name}' of type {kind.__name__}")


def build_network(checkpoint, output_stride):
    """Build the network of a checkpoint. Returns it in eval mode. Raises CheckpointError."""
    arch = dict(checkpoint["arch"])
    if output_stride is not None:
        arch["output_stride"] = output_stride
    try:
        # A new network draws random weights. fork_rng restores the state of the generator.
        with torch.random.fork_rng(devices=[]):
            model = MobileNetV2(**arch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"no network has {list(arch.items())}") from error
    if model.arch["num_classes"] == 1:
        raise CheckpointError("one output, a sigmoid's: train one output per class")
    weights = checkpoint["model"]
    expected = model.state_dict()
    shapes = {key: getattr(tensor, "shape", None) for key, tensor in weights.items()}
    wrong = [key for key in expected if shapes.get(key) != expected[key].shape]
    wrong += [key for key in weights if key not in expected]
    if wrong:
        problem = f"'{wrong[0]}' is missing, unknown or of another shape"
        raise CheckpointError(f"{problem}, and so are {len(wrong) - 1} others")
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 8, 8))
    if not logits.isfinite().all():  # even zeros show infinity: 0 · inf = NaN
        raise CheckpointError("its weights contain NaN or infinity")
    names = len(checkpoint["classes"])
    if names not in (0, model.arch["num_classes"]):
        raise CheckpointError(f"{names} names, {model.arch['num_classes']} classes")
    return model


def load_pretrained(source, num_classes, output_stride=None):
    """Load a network for your own classes: load_pretrained("imagenet", num_classes=5).

    Like `load_checkpoint`, but a network for another number of classes gets a new classifier,
    and only the network is returned. For programs of your own; the scripts need the checkpoint
    as well.
    """
    model, _ = load_checkpoint(source, output_stride)
    if num_classes != model.arch["num_classes"]:
        replace_classifier(model, num_classes)
    return model


# --------------------------------------------------------------------------------------- costs
def count_parameters(model, batch_norm=True):
    """Count the parameters; batch_norm=False leaves out BatchNorm's, as TensorFlow does.

    At width 1.0 that is 3,504,872 or 3,470,760. Table 4 of the paper has 3.4M, the latter cut
    off.
    """
    count = 0
    for layer in model.modules():
        if batch_norm or not isinstance(layer, nn.BatchNorm2d):
            count += sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    return count


def measure_layers(module, shape):
    """Measure the convolutions and linear layers of `module`, for one input of this shape.

    Each output value has one product per weight of its filter. BatchNorm counts as zero,
    because it folds into the convolution. Returns [(input shape, output shape, multiply-adds)]
    without N.
    """
    measured = []

    def hook(layer, inputs, output):
        macs = output[0].numel() * layer.weight[0].numel()
        measured.append((tuple(inputs[0].shape[1:]), tuple(output.shape[1:]), macs))

    module = copy.deepcopy(module).to("meta").eval()  # the meta device computes only shapes
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(hook)
    module(torch.empty(1, *shape, device="meta"))
    return measured


def count_macs(model, image_size=224):
    """Count multiply-adds per image: 300,774,272 at width 1.0, 224 pixels (Table 4: 300M)."""
    return sum(macs for _, _, macs in measure_layers(model, (3, image_size, image_size)))


def table2(model, image_size):
    """Format Table 2 of the paper with the measured shapes and costs of `model`."""
    columns = "{:<15} {:>12} {:>12} {:>3} {:>5} {:>2} {:>2} {:>10} {:>13}"
    header = ("operator", "input", "output", "t", "c", "n", "s", "parameters", "multiply-adds")
    lines = [columns.format(*header)]
    rows = [("conv2d 3×3", "-", 1, model.stem)]  # operator, t, n, part of the network
    first = 0
    for t, _, n, _ in BOTTLENECKS:
        rows.append(("bottleneck", t, n, model.blocks[first : first + n]))
        first += n
    rows.append(("conv2d 1×1", "-", 1, model.head))
    shape = (3, image_size, image_size)
    for operator, t, n, part in rows:
        source = shape
        measured = measure_layers(part, source)
        _, shape, _ = measured[-1]
        sizes = ["×".join(map(str, source)), "×".join(map(str, shape))]
        stride = round(source[1] / shape[1])
        costs = format_costs(part, measured)
        lines.append(columns.format(operator, *sizes, t, shape[0], n, stride, *costs))
    measured = measure_layers(model.classifier, shape[:1])
    cells = ["avgpool, linear", shape[0], model.classifier.out_features, "-"]
    cells += [model.classifier.out_features, 1, "-", *format_costs(model.classifier, measured)]
    lines.append(columns.format(*cells))
    measured = measure_layers(model, (3, image_size, image_size))
    lines.append(columns.format("total", *[""] * 6, *format_costs(model, measured)))
    lines.append(
        f"parameters without BatchNorm: {count_parameters(model, batch_norm=False):,}"
    )
    return "\n".join(lines)


def format_costs(part, measured):
    return f"{count_parameters(part):,}", f"{sum(macs for _, _, macs in measured):,}"


def main():
    parser = argparse.ArgumentParser(
        description="Print Table 2 with measured shapes and costs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier")
    parser.add_argument("--image-size", type=int, default=224, help="image side in pixels")
    parser.add_argument(
        "--output-stride",
        type=int,
        default=32,
        help="ratio of image to last feature map: 32, 16 or 8",
    )
    args = parser.parse_args()
    try:
        model = MobileNetV2(width_mult=args.width, output_stride=args.output_stride)
        print(table2(model, args.image_size))
    except (
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:  # a size that PyTorch cannot represent
        parser.exit(2, f"mobilenetv2.py: {str(error).splitlines()[0]}: use another value\n")


if __name__ == "__main__":
    main()
