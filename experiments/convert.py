"""Convert weights of other projects: TARGET gets torchvision's names, which all scripts read.

    python experiments/convert.py checkpoint.pth.tar weights.pth
    python finetune.py --data photos --checkpoint weights.pth

Names of layers: torchvision's, also behind prefixes of DataParallel (`module.`), torch.compile
(`_orig_mod.`) or Lightning (`model.`); timm's, for mobilenetv2_035 to mobilenetv2_140; those of
d-li14/mobilenetv2.pytorch and tonylins/pytorch-mobilenet-v2; and this project's.
Files: those of torch.save, and safetensors. The weights may be an entry such as `state_dict`,
`model`, `model_state_dict`, `net` or `model_ema`. Optimizer states and arguments are left out.
Only tensors, plain values, NumPy's scalars, argparse's arguments and paths are read, so no code
in the file can run.

The result has no class names and no preprocessing: the scripts assume torchvision's. All these
projects have the same mean and std. But timm, d-li14 and tonylins crop 224 of 256 pixels (0.875)
where torchvision crops 224 of 232, and timm resizes with bicubic interpolation.
"""

import argparse
import io
import json
import pathlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import mobilenetv2  # noqa: E402
from mobilenetv2 import CONVERT, SAVE, CheckpointError, torchvision_names  # noqa: E402

# Parts of a key that wrappers of PyTorch add, anywhere in it.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Last parts of keys that are no weights: counters of AveragedModel and of the package thop.
COUNTERS = ("n_averaged", "total_ops", "total_params")
FIX = "use weights of the MobileNetV2 in Table 2 of the paper, or imagenet"

# Values beside the weights that torch.load may read: they cannot run code.
SCALAR = np.float64(0).__reduce__()[0]  # the function that makes a scalar
SAFE = [
    (SCALAR, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
    (SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"pathlib{place}.PosixPath") for place in ("", "._local")),
    *((pathlib.PureWindowsPath, f"pathlib{place}.WindowsPath") for place in ("", "._local")),
]
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


# ----------------------------------------------------------------------------- tables of names
def list_blocks():
    """List the blocks of Table 2: (row, number in its row, names of our convolutions)."""
    blocks = []
    for row, (t, _, n, _) in enumerate(mobilenetv2.BOTTLENECKS):
        parts = ["depthwise", "project"]
        if t > 1:
            parts.insert(0, "expand")
        blocks += [(row, repeat, parts) for repeat in range(n)]
    return blocks


def our_names():
    return {name: name for name in torchvision_names()}


def timm_names():
    """Map our layers to timm's (timm/models/_efficientnet_blocks.py).

    A block numbers its norms. `conv_pw` is the expansion, but in the first block, which has
    none, it is the projection.
    """
    names = {"stem.conv": "conv_stem", "stem.norm": "bn1"}
    for index, (row, repeat, parts) in enumerate(list_blocks()):
        convs = ["conv_pw", "conv_dw", "conv_pwl"]
        if len(parts) == 2:
            convs = ["conv_dw", "conv_pw"]
        for number, (part, conv) in enumerate(zip(parts, convs), start=1):
            names[f"blocks.{index}.{part}.conv"] = f"blocks.{row}.{repeat}.{conv}"
            names[f"blocks.{index}.{part}.norm"] = f"blocks.{row}.{repeat}.bn{number}"
    names["head.conv"] = "conv_head"
    names["head.norm"] = "bn2"
    return names


def tonylins_names():
    """Map our layers to those of tonylins/pytorch-mobilenet-v2.

    Like torchvision's, but a block numbers convolutions, norms and activations in one list.
    """
    names = {"stem.conv": "features.0.0", "stem.norm": "features.0.1"}
    blocks = list_blocks()
    for index, (_, _, parts) in enumerate(blocks):
        for number, part in enumerate(parts):
            theirs = f"features.{index + 1}.conv"
            names[f"blocks.{index}.{part}.conv"] = f"{theirs}.{3 * number}"
            names[f"blocks.{index}.{part}.norm"] = f"{theirs}.{3 * number + 1}"
    names["head.conv"] = f"features.{len(blocks) + 1}.0"
    names["head.norm"] = f"features.{len(blocks) + 1}.1"
    return names


def d_li14_names():
    """Map our layers to those of d-li14/mobilenetv2.pytorch: tonylins', but for the head."""
    return {**tonylins_names(), "head.conv": "conv.0", "head.norm": "conv.1"}


TABLES = {
    "torchvision's names": torchvision_names,
    "timm's names": timm_names,
    "tonylins' names": tonylins_names,
    "d-li14's names": d_li14_names,
    "this project's names": our_names,
}


# ------------------------------------------------------------------------------- reading files
def read_source(path):
    """Return the contents of a file. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals(SAFE):
            return mobilenetv2.read_file(path)
    except CheckpointError as error:
        problem = str(error)
        if problem.startswith("a safetensors file"):
            return read_safetensors(path)
        unsafe = re.search(r"GLOBAL (\S+)", str(error.__context__))
        if unsafe and "pickled model" not in problem:
            problem = f"it contains {unsafe[1]}, not only tensors and plain values: {SAVE}"
        elif CONVERT in problem:
            problem = "damaged"
        raise CheckpointError(problem) from error


def read_safetensors(path):
    """Read a safetensors file: length of the header, header in JSON, bytes of all tensors."""
    contents = path.read_bytes()
    start = 8 + int.from_bytes(contents[:8], "little")
    tensors = {}
    try:
        header = json.loads(contents[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            values = bytearray(contents[start + first : start + last])
            kind = SAFETENSORS_TYPES[entry["dtype"]]
            tensors[name] = torch.frombuffer(values, dtype=kind).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError("a safetensors file, damaged or of unusual types") from error
    return tensors


# ----------------------------------------------------------------------------- finding weights
def list_entries(contents, place="", depth=4):
    """List all dicts and lists inside a file: (place, tensors in it)."""
    if isinstance(contents, list | tuple):
        contents = dict(enumerate(contents))
    tensors = {}
    entries = [(place, tensors)]
    for name, value in contents.items():
        if isinstance(value, torch.Tensor):
            parts = [part for part in str(name).split(".") if part not in WRAPPERS]
            tensors[".".join(parts)] = value
        elif isinstance(value, dict | list | tuple) and depth > 0:
            entries += list_entries(value, f"{place}.{name}".lstrip("."), depth - 1)
    return entries


def find_weights(tensors):
    """Find a MobileNetV2 among tensors. Returns (table of names, prefix), or None."""
    matches = []
    for table, make_names in TABLES.items():
        names = make_names()
        first_block = names["blocks.0.depthwise.conv"] + ".weight"
        for key in tensors:
            if f".{key}".endswith(f".{first_block}"):
                prefix = key.removesuffix(first_block)
                count = sum(f"{prefix}{name}.weight" in tensors for name in names.values())
                matches.append((count, table, prefix))
    if not matches:
        return None
    _, table, prefix = max(matches, key=lambda match: match[0])
    return table, prefix


def choose_entry(contents, wanted):
    """Choose the entry with the weights, an average of weights only if there is no other.

    Returns (place, tensors, table, prefix), and places of other entries with weights.
    """
    if not isinstance(contents, dict | list | tuple):
        raise CheckpointError(f"it has a {type(contents).__name__}, not a dict")
    entries = list_entries(contents)
    found = []
    for place, tensors in entries:
        match = find_weights(tensors)
        if match:
            found.append((place, tensors, *match))
    found.sort(key=lambda entry: "ema" in entry[0])  # False sorts before True
    places = [place for place, *_ in found]
    if not found:
        keys = [key for _, tensors in entries for key in tensors]
        if not keys:
            raise CheckpointError("no weights")
        raise CheckpointError(f"another network, its first keys are {', '.join(keys[:3])}")
    if wanted is None:
        return found[0], places[1:]
    if wanted not in places:
        raise CheckpointError(f"--entry {wanted} has no weights: use {' or '.join(places)}")
    return found[places.index(wanted)], []


# ---------------------------------------------------------------------------------- converting
def rename(tensors, table, prefix):
    """Return weights with our names. Raises CheckpointError."""
    inside = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix) and key.rpartition(".")[2] not in COUNTERS:
            inside[key.removeprefix(prefix)] = tensor
    blocks = sum(tensor.dim() == 4 and tensor.shape[1] == 1 for tensor in inside.values())
    if blocks > len(list_blocks()):
        problem = f"{blocks} blocks instead of {len(list_blocks())}"
        raise CheckpointError(
            f"{problem}, as in a network of another depth (timm's 110d, 120d)"
        )

    ours = {theirs: name for name, theirs in TABLES[table]().items()}
    layers = {key.rpartition(".")[0] for key in inside if f"{key}.".startswith("classifier.")}
    if len(layers) > 1:
        problem = f"a classifier of several layers, {' and '.join(sorted(layers))}"
        raise CheckpointError(f"{problem}: train one linear layer, as finetune.py does")
    if not layers:
        raise CheckpointError("no classifier: save the whole network, or use imagenet")
    ours[layers.pop()] = "classifier"
    weights = {}
    unknown = []
    for key, tensor in inside.items():
        layer, _, kind = key.rpartition(".")
        if layer in ours:
            weights[f"{ours[layer]}.{kind}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        problem = f"'{unknown[0]}' is not a weight of MobileNetV2"
        raise CheckpointError(f"{problem}, nor are {len(unknown) - 1} others")
    if "classifier.bias" not in weights:
        raise CheckpointError("the bias of the classifier is missing")
    for name in torchvision_names():
        if name.endswith("norm"):  # PyTorch 0.4 and some exporters have no such counter
            weights.setdefault(f"{name}.num_batches_tracked", torch.tensor(0))
    return weights


def convert(source, entry=None):
    """Return (network with the weights of a file, lines to print). Raises CheckpointError."""
    contents = read_source(source)
    if isinstance(contents, dict) and "preprocessing" in contents:
        raise CheckpointError(f"a checkpoint of this project: use --checkpoint {source}")
    chosen, others = choose_entry(contents, entry)
    place, tensors, table, prefix = chosen
    weights = rename(tensors, table, prefix)
    line = f"{source}: {table}"
    if place:
        line += f", entry '{place}'"
    if prefix:
        line += f", prefix '{prefix}'"
    lines = [line]
    left_out = [key for key in tensors if not key.startswith(prefix)]
    if left_out:
        lines.append(f"left out: {len(left_out)} other tensors ({left_out[0]}, ...)")
    if others:
        lines.append(f"left out: other weights; choose with --entry {' or '.join(others)}")
    arch = {
        "num_classes": weights["classifier.bias"].numel(),
        "width_mult": mobilenetv2.find_width(weights),  # fails for d-li14's 0.1, rounded to 4
    }
    checkpoint = {"model": weights, "arch": arch, "classes": []}
    return mobilenetv2.build_network(checkpoint, output_stride=None), lines


def main():
    parser = cli.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="file with weights")
    parser.add_argument("target", type=Path, help="new file, for example weights.pth")
    parser.add_argument("--entry", help="entry of the file that has the weights")
    args = parser.parse_args()
    if args.target.exists():
        raise cli.UserError(f"'{args.target}' exists: use another name, or delete it")
    try:
        model, lines = convert(args.source, args.entry)
    except CheckpointError as error:
        problem, _, fix = str(error).partition(": ")
        raise CheckpointError(
            f"cannot convert '{args.source}' ({problem}): {fix or FIX}"
        ) from error
    print("\n".join(lines))
    buffer = io.BytesIO()
    torch.save(mobilenetv2.to_torchvision(model.state_dict()), buffer)
    mobilenetv2.write_file(args.target, buffer.getvalue())
    classes = model.arch["num_classes"]
    width = model.arch["width_mult"]
    parameters = mobilenetv2.count_parameters(model)
    print(f"{args.target}: {classes} classes, width {width:g}, {parameters:,} parameters")
    checkpoint = shlex.quote(str(args.target))
    print(f"next: python finetune.py --data photos --checkpoint {checkpoint}")


if __name__ == "__main__":
    cli.run(main, CheckpointError)
