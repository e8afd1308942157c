"""MobileNetV2, written by hand from the paper.

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    CVPR 2018, https://arxiv.org/abs/1801.04381 ("the paper" in every comment below)

Read in this order: `BOTTLENECKS` (Table 2), `InvertedResidual` (Table 1, §3.1 to §3.3),
`MobileNetV2` (§4). Three sections follow: weight names, checkpoints, and costs (Table 4). This file
imports no other script, so you can copy it into another project. Terms used here:

    backbone     stem, blocks and head: an image becomes 1280 features
    head         the last 1×1 convolution, before pooling
    classifier   the linear layer that turns features into logits
    checkpoint   a file with the weights and everything needed to use them

    python mobilenetv2.py --width 0.5      # print Table 2 with measured shapes and costs
"""

import argparse
import copy
import io
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

# The middle rows of Table 2. Each row is a group of n blocks (inverted residuals). Only the first
# block of a group has stride s and changes the number of channels.
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

# Output stride: image size divided by size of the last feature map, 224 / 7 = 32 in Table 2. An
# image of 32 pixels would end as a single pixel. Output stride 16 or 8 sets the first one or two
# strides of 2 after the stem to 1. The stem's stays 2: 1 was slower and less accurate on digits.
STRIDES_DROPPED = {32: 0, 16: 1, 8: 2}  # output stride -> number of strides replaced by 1


def make_divisible(value, divisor=8):
    """Round a number of channels to the nearest multiple of `divisor`, never below 90% of `value`.

    Vector units process 8 numbers at a time, so 35 channels would cost as much as 40. The nearest
    multiple is 32. By the 90% rule, 11.2 becomes 16, not 8. Source: TensorFlow (models, slim/nets).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def convolution(in_channels, out_channels, kernel_size, stride=1, groups=1, activation=True):
    """Build convolution, batch normalisation and ReLU6: (N, in, H, W) -> (N, out, H/s, W/s).

    The convolution has no bias, because the normalisation would subtract it again.
    ReLU6(x) = min(max(x, 0), 6). A known range loses little accuracy in 8-bit arithmetic (§4).
    """
    layers = nn.Sequential()
    options = {"stride": stride, "padding": kernel_size // 2, "groups": groups, "bias": False}
    layers.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
    layers.norm = nn.BatchNorm2d(out_channels)
    if activation:
        layers.activation = nn.ReLU6(inplace=True)
    return layers


class InvertedResidual(nn.Module):
    """The bottleneck block (Table 1 of the paper): expand, filter, project.

        input              operator                          output
        h × w × k          1×1 convolution, ReLU6            h × w × tk          .expand
        h × w × tk         3×3 depthwise, stride s, ReLU6    h/s × w/s × tk      .depthwise
        h/s × w/s × tk     1×1 convolution, linear           h/s × w/s × k'      .project

    Depthwise separable (§3.1): a dense 3×3 convolution from d to d' channels costs 9 · d · d'
    multiply-adds per pixel. A depthwise and a 1×1 convolution cost d · (9 + d'), 6 to 9 times less.

    Inverted (§3.3): a ResNet block is narrow inside, and its shortcut connects the wide ends.
    Here the block is wide inside, and the shortcut connects the narrow ends. This saves memory,
    because only the narrow ends must be kept between blocks.

    Linear (§3.2): no activation follows the projection. ReLU sets negative values to zero. With
    many channels the others still carry the information; with few channels it is lost.

    Arguments: in_channels k, out_channels k', stride s (1 or 2, else ValueError), expansion t.
    Shape: (N, k, H, W) -> (N, k', H/s, W/s).
    """

    def __init__(self, in_channels, out_channels, stride, expansion):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride is {stride}: use 1 or 2")
        wide = in_channels * expansion
        # The first block has t = 1 and no expansion, as in TensorFlow's and torchvision's code.
        self.expand = nn.Identity() if expansion == 1 else convolution(in_channels, wide, 1)
        # groups = channels: one 3×3 filter per channel.
        self.depthwise = convolution(wide, wide, 3, stride, groups=wide)
        self.project = convolution(wide, out_channels, 1, activation=False)
        self.use_residual = stride == 1 and in_channels == out_channels

    def forward(self, x):
        # The shapes are those of blocks[1], the first block with stride 2, at 224 pixels.
        out = self.expand(x)  #         (N, 16, 112, 112) -> (N, 96, 112, 112)
        out = self.depthwise(out)  #    (N, 96, 112, 112) -> (N, 96, 56, 56)
        out = self.project(out)  #      (N, 96, 56, 56)   -> (N, 24, 56, 56)
        return x + out if self.use_residual else out


class MobileNetV2(nn.Module):
    """The whole network (Table 2 of the paper): stem, 17 blocks, head, pooling, classifier.

    The text of §4 counts 19 blocks. The column n of Table 2 adds up to 17, as in all code.

    Args:
        num_classes: number of logits.
        width_mult: width multiplier (§4) of all channels, from 0.05 to 4. Below 1.0 the head
            keeps 1280 channels, because a thin network still has to separate as many classes.
        dropout: probability before the classifier. The paper gives none; torchvision has 0.2.
        output_stride: ratio of image size to the size of the last feature map: 32 (the paper),
            16 or 8. An image of 32 pixels ends as 1×1, 2×2 or 4×4, each step costs 3 to 4 times
            the multiply-adds, and the weights keep their shapes.
    Shape: (N, 3, S, S) -> (N, num_classes) logits; S is 224 in the paper.
    Raises ValueError for an argument out of range.
    """

    def __init__(self, num_classes=1000, width_mult=1.0, dropout=0.2, output_stride=32):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: use 1 or more")
        if not 0.05 <= width_mult <= 4:
            raise ValueError(f"width_mult is {width_mult}: use a value from 0.05 to 4")
        if output_stride not in STRIDES_DROPPED:
            raise ValueError(f"output_stride is {output_stride}: use 32, 16 or 8")
        # A checkpoint stores these arguments, so that it can rebuild the network.
        self.arch = {"num_classes": num_classes, "width_mult": width_mult}
        self.arch |= {"dropout": dropout, "output_stride": output_stride}
        strides = [2] + [stride for _, _, _, stride in BOTTLENECKS]  # the stem's, then the rows'
        reductions = [index for index, stride in enumerate(strides) if stride == 2]
        for index in reductions[1 : 1 + STRIDES_DROPPED[output_stride]]:
            strides[index] = 1  # differs from Table 2: less shrinking
        channels = make_divisible(STEM_CHANNELS * width_mult)
        self.stem = convolution(3, channels, 3, strides[0])
        self.blocks = nn.Sequential()
        for (expansion, row_channels, repeats, _), row_stride in zip(BOTTLENECKS, strides[1:]):
            out_channels = make_divisible(row_channels * width_mult)
            for repeat in range(repeats):
                stride = row_stride if repeat == 0 else 1
                self.blocks.append(InvertedResidual(channels, out_channels, stride, expansion))
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

    Convolutions: normal with variance 2 / (kernel area · output channels), the "fan out" of He et
    al. (arXiv:1502.01852), which keeps gradients of similar size in all layers. A depthwise
    convolution is counted as a dense one. Classifier: std 0.01. BatchNorm keeps PyTorch's 1 and 0.
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


# ------------------------------------------------------------ weight names: torchvision's and ours
def torchvision_names():
    """Map each layer with weights: our name -> torchvision's name, in forward order.

    torchvision numbers them: features.0 is the stem, 1 to 17 are the blocks, 18 is the head. In a
    block, `conv` lists expansion (not in the first block), depthwise, projection and its norm.
    """
    names = {"stem.conv": "features.0.0", "stem.norm": "features.0.1"}
    expansions = [expansion for expansion, _, repeats, _ in BOTTLENECKS for _ in range(repeats)]
    for index, expansion in enumerate(expansions):
        ours, theirs = f"blocks.{index}", f"features.{index + 1}.conv"
        parts = ["depthwise"] if expansion == 1 else ["expand", "depthwise"]
        for position, part in enumerate(parts):
            names[f"{ours}.{part}.conv"] = f"{theirs}.{position}.0"
            names[f"{ours}.{part}.norm"] = f"{theirs}.{position}.1"
        names[f"{ours}.project.conv"] = f"{theirs}.{len(parts)}"
        names[f"{ours}.project.norm"] = f"{theirs}.{len(parts) + 1}"
    names |= {"head.conv": "features.18.0", "head.norm": "features.18.1"}
    return names | {"classifier": "classifier.1"}


def rename(state_dict, names):
    """Rename the layer in each key: 'stem.conv.weight' -> 'features.0.0.weight'."""
    renamed = {}
    for key, tensor in state_dict.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise CheckpointError(f"'{key}' is not a weight of MobileNetV2: use another file")
        renamed[f"{names[layer]}.{kind}"] = tensor
    return renamed


def from_torchvision(state_dict):
    """Rename torchvision's weights to ours. Raises CheckpointError for an unknown key."""
    return rename(state_dict, {theirs: ours for ours, theirs in torchvision_names().items()})


def to_torchvision(state_dict):
    """Rename our weights to torchvision's: the inverse of `from_torchvision`."""
    return rename(state_dict, torchvision_names())


# ------------------------------------------------------------------------------------- checkpoints
IMAGENET_URL = "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"
# torchvision's for MobileNet_V2_Weights.IMAGENET1K_V2: shorter side 232 pixels, the central 224.
IMAGENET_PREPROCESSING = {"image_size": 224, "crop": 224 / 232, "channels": 3}
IMAGENET_PREPROCESSING |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
warnings.filterwarnings("ignore", "Detected pickle protocol")  # the CheckpointError is enough


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the problem and the fix."""


def save_checkpoint(path, model, classes, preprocessing, history=(), **training_state):
    """Write a checkpoint: one dict of tensors and plain values. Raises OSError.

    classes: names in the order of the logits. history: rows of log.csv, as dicts, or none.
    preprocessing: dict with image_size, crop (used share of the shorter side), channels (1 is
    grayscale), mean and std (of pixels in 0..1). training_state: optimizer and so on, to resume.
    """
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    checkpoint = {"model": weights, "arch": dict(model.arch), "classes": list(classes)}
    checkpoint |= {"preprocessing": dict(preprocessing), "history": list(history)}
    # torch.save stores the file's name inside the file. A buffer has none: equal runs, equal bytes.
    buffer = io.BytesIO()
    torch.save(checkpoint | training_state, buffer)
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
        raise OSError(error.errno, error.strerror, str(path)) from error  # adds the file's name


def read_checkpoint(source):
    """Read a file, or download 'imagenet'. A damaged file may raise any exception."""
    # A pickle can run any code when it is loaded. weights_only=True accepts only data.
    safe = {"map_location": "cpu", "weights_only": True}
    if source == "imagenet":  # 13.6 MB, downloaded once
        checkpoint = torch.hub.load_state_dict_from_url(IMAGENET_URL, check_hash=True, **safe)
    else:
        if Path(source).exists() and not Path(source).is_file():  # a pipe may never end
            raise ValueError("no regular file")
        if zipfile.is_zipfile(source) and zipfile.ZipFile(source).testzip():
            raise ValueError("damaged: a checksum differs")
        checkpoint = torch.load(source, **safe)
    if "features.0.0.weight" not in checkpoint:
        return checkpoint
    weights = from_torchvision(checkpoint)  # torchvision's files have only weights
    width_mult = len(weights["blocks.16.project.norm.bias"]) / BOTTLENECKS[-1][1]
    arch = {"num_classes": len(weights["classifier.bias"]), "width_mult": width_mult}
    about = {"classes": [], "preprocessing": IMAGENET_PREPROCESSING, "history": []}
    return {"model": weights, "arch": arch} | about


def check_values(model, checkpoint):
    """Raise ValueError, with the part of the checkpoint, for values that no script can use."""
    part = "model"
    try:  # `format` in the last check fails for a missing key, and for a value of another type
        weights = checkpoint["model"].values()
        if any(w.is_meta or w.untyped_storage().nbytes() < w.nbytes for w in weights):
            raise ValueError("weights that are larger than the file")
        logits = model.float().eval()(torch.zeros(1, 3, 8, 8))  # fails for unusual tensors
        if not logits.isfinite().all() or not 0 <= model.dropout.p <= 1:
            raise ValueError("NaN or infinity")
        part, names, count = "classes", checkpoint["classes"], model.arch["num_classes"]
        if names != [str(name).encode().decode() for name in names] or len(names) not in (0, count):
            raise ValueError(f"{len(names)} names, {count} classes")
        part, values = "preprocessing", {"crop": 1, "channels": 3} | checkpoint["preprocessing"]
        size, crop, channels, *scale = (values[key] for key in IMAGENET_PREPROCESSING)
        mean, std = torch.tensor(scale).view(2, 3)
        usable = type(size) is type(channels) is int and 8 <= size <= 1024 and channels in (1, 3)
        if not (usable and 0 < crop <= 1 and std.min() > 0 and (mean / std + std).isfinite().all()):
            raise ValueError("a value is out of range")
        part, row = "history", "{stage:s} {epoch:f} {train_loss:f} {train_top1:f} {val_loss:f}"
        if not all(row.format(**r) and 0 <= r["val_top1"] <= 1 for r in checkpoint["history"]):
            raise ValueError("a value is out of range")
    except Exception as error:
        raise ValueError(f"{part}: {type(error).__name__}: {error}") from error


def load_checkpoint(source, output_stride=None):
    """Load a network with its weights. Returns (model in eval mode on the CPU, checkpoint dict).

    source: path of a checkpoint, path of torchvision's weights, or 'imagenet'.
    output_stride: None keeps the checkpoint's. The weights fit all three values.
    Raises CheckpointError if the file is missing, damaged, unsafe or from another network.
    """
    try:
        checkpoint = read_checkpoint(source)
        arch = checkpoint["arch"] | ({"output_stride": output_stride} if output_stride else {})
        with torch.device("meta"):  # no memory and no random numbers until the file's tensors come
            model = MobileNetV2(**arch)
        model.load_state_dict(checkpoint["model"], strict=True, assign=True)
        check_values(model, checkpoint)
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):  # torch would suggest weights_only=False
            reason = "damaged, or more than tensors and plain values"
        fix = "make a checkpoint with train.py or finetune.py, or use imagenet"
        if source == "imagenet":
            fix = f"download {IMAGENET_URL} into '{torch.hub.get_dir()}/checkpoints'"
        message = f"cannot load '{source}' ({reason[:300]}): {fix}"
        raise CheckpointError(" ".join(message.split())) from error
    return model, checkpoint


def load_pretrained(source, num_classes, output_stride=None):
    """Load a network as `load_checkpoint` does; another `num_classes` gets a new classifier."""
    model, _ = load_checkpoint(source, output_stride)
    if num_classes != model.arch["num_classes"]:
        replace_classifier(model, num_classes)
    return model


# ------------------------------------------------------------------------------------------- costs
def count_parameters(model, batch_norm=True):
    """Count the parameters; batch_norm=False leaves out BatchNorm's, as TensorFlow does.

    At width 1.0 that is 3,504,872 or 3,470,760. Table 4 of the paper has 3.4M, the latter cut off.
    """
    layers = [m for m in model.modules() if batch_norm or not isinstance(m, nn.BatchNorm2d)]
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))


def measure_layers(module, shape):
    """Measure the convolutions and linear layers of `module`, for one input of this shape.

    Each output value has one product per weight of its filter. BatchNorm counts as zero, because it
    folds into the convolution. Returns [(input shape, output shape, multiply-adds)] without N.
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
    """Count multiply-adds per image: 300,774,272 at width 1.0 and 224 pixels (Table 4: 300M)."""
    return sum(macs for _, _, macs in measure_layers(model, (3, image_size, image_size)))


def table2(model, image_size):
    """Format Table 2 of the paper with the measured shapes and costs of `model`."""
    rows = [("conv2d 3×3", "-", 1, model.stem)]  # operator, t, n, part of the network
    first = 0
    for expansion, _, repeats, _ in BOTTLENECKS:
        rows.append(("bottleneck", expansion, repeats, model.blocks[first : first + repeats]))
        first += repeats
    rows += [("conv2d 1×1", "-", 1, model.head), ("avgpool, linear", "-", 1, model.classifier)]
    line = "{:<15} {:>12} {:>12} {:>3} {:>5} {:>2} {:>2} {:>10} {:>13}".format
    text = [line("operator", "input", "output", "t", "c", "n", "s", "parameters", "multiply-adds")]
    shape = (3, image_size, image_size)
    for operator, expansion, repeats, part in rows:
        measured = measure_layers(part, shape[:1] if part is model.classifier else shape)
        source, shape = measured[0][0], measured[-1][1]  # (C, H, W), or (C) for the classifier
        stride = round(source[1] / shape[1]) if len(shape) == 3 else "-"
        shapes = ["×".join(map(str, sizes)) for sizes in (source, shape)]
        costs = f"{count_parameters(part):,}", f"{sum(macs for _, _, macs in measured):,}"
        text.append(line(operator, *shapes, expansion, shape[0], repeats, stride, *costs))
    total = f"{count_parameters(model):,}", f"{count_macs(model, image_size):,}"
    text.append(line("total", *[""] * 6, *total))
    text.append(f"parameters without BatchNorm: {count_parameters(model, batch_norm=False):,}")
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description="Print Table 2 with measured shapes and costs.")
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier (default: 1.0)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    text = "ratio of image to last feature map: 32, 16 or 8 (default: 32)"
    parser.add_argument("--output-stride", type=int, default=32, help=text)
    parser.error = lambda message: parser.exit(2, f"mobilenetv2.py: {message}\n")  # one line
    args = parser.parse_args()
    try:
        model = MobileNetV2(width_mult=args.width, output_stride=args.output_stride)
        print(table2(model, args.image_size))
    except Exception as error:  # a size may be too large for PyTorch, or for Python
        parser.error(f"{str(error).splitlines()[0]}: use another value")


if __name__ == "__main__":
    main()
