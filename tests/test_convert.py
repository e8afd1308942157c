"""Tests of experiments/convert.py, and of load_checkpoint's messages about foreign files.

One table has a small generator per kind of file, as other projects write them. The networks of
timm, d-li14 and tonylins are built here again, from their published structure.
"""

import argparse
import json
import pickle
import re
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from grader import randomise
from processes import Python
from torch import nn
from torch.nn import functional
from torchvision.models._utils import _make_divisible

import mobilenetv2
from mobilenetv2 import (
    CheckpointError,
    MobileNetV2,
    find_width,
    load_checkpoint,
    make_divisible,
    save_checkpoint,
    to_torchvision,
)

sys.path.insert(0, str(ROOT / "experiments"))
import convert  # noqa: E402

FEW_BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 320, 1, 1))  # rows of Table 2: t, c, n, s
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PREPROCESSING = {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
OK = "converted"
SAVE = r"\): in the program that made it, call torch\.save\(model\.state_dict\(\), 'weights\.pth'\)"
# Parts of messages of Python and PyTorch.
FORBIDDEN = (
    "Error",
    "weights_only",
    "Traceback",
    "unsupported operand",
    "state_dict for",
    "\n",
)


# ------------------------------------------------------------------------------ files, one each


def prefixed(weights, prefix):
    return {f"{prefix}{key}": tensor for key, tensor in weights.items()}


def without(weights, part):
    return {key: tensor for key, tensor in weights.items() if part not in key}


def momentum():
    """Return the state of an optimizer after one step."""
    layer = nn.Conv2d(2, 2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def classifier(weights, *layers):
    """Replace the classifier: its weights get other names, and layers may be added."""
    renamed = without(weights, "classifier")
    for name, tensor in layers:
        renamed[name] = tensor
    return renamed


def replaced_classifier(weights, name="classifier"):
    old = weights["classifier.1.weight"], weights["classifier.1.bias"]
    return classifier(weights, (f"{name}.weight", old[0]), (f"{name}.bias", old[1]))


def deep_classifier(weights):
    return {
        **replaced_classifier(weights, "classifier.4"),
        "classifier.1.weight": torch.ones(1280, 1280),
        "classifier.1.bias": torch.ones(1280),
    }


def one_output(weights):
    names = ("classifier.1.weight", "classifier.1.bias")
    return {**weights, **{name: weights[name][:1] for name in names}}


def timm_weights(weights):
    return renamed(weights, convert.timm_names())


def renamed(weights, names):
    """Give weights with torchvision's names other names."""
    ours = mobilenetv2.from_torchvision(weights)
    return mobilenetv2.rename(ours, {**names, "classifier": "classifier"})


def imagenet_example(weights):
    """The checkpoint of pytorch/examples/imagenet/main.py."""
    return {
        "epoch": 3,
        "arch": "mobilenet_v2",
        "state_dict": prefixed(weights, "module."),
        "best_acc1": torch.tensor(71.9),
        "optimizer": momentum(),
        "scheduler": {"last_epoch": 3, "_last_lr": [0.1]},
    }


def torchvision_reference(weights, **entries):
    """The checkpoint of torchvision/references/classification/train.py."""
    args = argparse.Namespace(
        model="mobilenet_v2", output_dir=Path("."), device="cuda", lr=0.1
    )
    return {
        "model": weights,
        "optimizer": momentum(),
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": args,
        **entries,
    }


def averaged(weights):
    """The weights of torch.optim.swa_utils.AveragedModel."""
    return {"n_averaged": torch.tensor(8), **prefixed(weights, "module.")}


def other_weights(weights):
    return {key: torch.zeros_like(tensor) for key, tensor in weights.items()}


def lightning(weights, prefix="model."):
    return {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed(weights, prefix), "criterion.weight": torch.ones(3, 1)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [momentum()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }


def half(weights):
    return {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}


def counters(weights):
    """The package thop leaves counters in every module."""
    counted = {"total_ops": torch.zeros(1), "features.total_params": torch.zeros(1)}
    return {**weights, **counted}


def deeper(weights):
    """Weights of timm's mobilenetv2_110d, with more blocks in a row."""
    weights = timm_weights(weights)
    for key in list(weights):
        if key.startswith("blocks.1.1."):
            weights[key.replace("blocks.1.1.", "blocks.1.2.")] = weights[key]
    return weights


def rounded_otherwise(weights):
    """Weights of d-li14's network of width 0.1, with multiples of 4 in all layers."""
    weights = renamed(weights, convert.d_li14_names())
    return {
        key: tensor[:4] if tensor.dim() == 1 and len(tensor) == 8 else tensor
        for key, tensor in weights.items()
    }


def attention(weights):
    """A 'better' MobileNetV2 with one more layer."""
    return {**weights, "features.2.attention.fc.weight": torch.ones(8, 8)}


def efficientnet(weights):
    names = ("features.0.0.weight", "features.1.0.block.0.0.weight", "classifier.1.weight")
    return {name: torch.ones(8, 8, 3, 3) for name in names}


def resnet(weights):
    return {name: torch.ones(8, 8, 3, 3) for name in ("conv1.weight", "layer1.0.conv1.weight")}


def write_safetensors(path, weights):
    """Write the format of the package safetensors; it sorts by name."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header = {"__metadata__": {"format": "pt"}}
    contents = b""
    for name, tensor in sorted(weights.items()):
        values = tensor.numpy().tobytes()
        offsets = [len(contents), len(contents) + len(values)]
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        contents += values
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + contents)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


class Settings:
    """A class of the program that wrote the file."""


def save(change, **options):
    """Make a generator of a file: torch.save of changed weights."""
    return lambda path, weights: torch.save(change(weights), path, **options)


def write(contents):
    return lambda path, weights: path.write_bytes(contents)


def write_ours(path, weights):
    ours = mobilenetv2.from_torchvision(weights)
    torch.save(ours, path)


def write_torchscript(path, weights):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)


def write_export(path, weights):
    """The names of files inside an archive of torch.export."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/models/model.json", "{}")
        archive.writestr("model/data/weights/weight_0", b"1234")


def write_zip(path, weights):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "1 2 3")


def write_half_a_file(path, weights):
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:5000])


def write_half_a_safetensors_file(path, weights):
    write_safetensors(path, weights)
    path.write_bytes(path.read_bytes()[:-5000])


def write_nothing(path, weights):
    pass


# ----------------------------------------------------------------------- the table of all files

CONVERT = r'\): python experiments/convert\.py "FILE" weights\.pth$'
MAKE = r"\): make a checkpoint with train\.py or finetune\.py, or use imagenet$"
OTHER = r"\): use weights of the MobileNetV2 in Table 2 of the paper, or imagenet$"
NO_MORE = r"\(it contains {}, not only tensors and plain values" + SAVE

# name: (generator, message of load_checkpoint, message or first line of convert.py). Messages
# are regular expressions. OK means that the network has the same logits as the original.
FILES = {
    # torchvision's names, perhaps elsewhere
    "torchvision": (save(dict), OK, "FILE: torchvision's names$"),
    "half precision": (save(half), OK, "FILE: torchvision's names$"),
    "DataParallel": (
        save(partial(prefixed, prefix="module.")),
        r"\(weights with the prefix 'module\.'" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "torch.compile": (
        save(partial(prefixed, prefix="_orig_mod.")),
        r"\(weights with the prefix '_orig_mod\.'" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "DataParallel around a part": (
        save(lambda w: {k.replace("features.", "features.module."): w[k] for k in w}),
        r"\(another network, its first weight is 'features\.module\.0\.0\.weight'" + MAKE,
        "FILE: torchvision's names$",
    ),
    "pytorch/examples": (
        save(imagenet_example),
        r"\(weights with the prefix 'module\.'" + CONVERT,
        "FILE: torchvision's names, entry 'state_dict'$",
    ),
    "old format of torch.save": (
        save(imagenet_example, _use_new_zipfile_serialization=False),
        r"\(weights with the prefix 'module\.'" + CONVERT,
        "FILE: torchvision's names, entry 'state_dict'$",
    ),
    "torchvision's references": (
        save(torchvision_reference),
        r"\(more than tensors and plain values" + CONVERT,
        "FILE: torchvision's names, entry 'model'$",
    ),
    "references with an average": (
        save(lambda w: torchvision_reference(w, model_ema=averaged(other_weights(w)))),
        r"\(more than tensors and plain values" + CONVERT,
        "FILE: torchvision's names, entry 'model'$",
    ),
    "average before the weights": (
        save(lambda w: {"model_ema": averaged(other_weights(w)), "model": w}),
        r"\(weights with the prefix 'module\.'" + CONVERT,
        "FILE: torchvision's names, entry 'model'$",
    ),
    "average only": (
        save(lambda w: {"model_ema": averaged(w)}),
        r"\(weights with the prefix 'module\.'" + CONVERT,
        "FILE: torchvision's names, entry 'model_ema'$",
    ),
    "Lightning": (
        save(lightning),
        r"\(weights with the prefix 'model\.'" + CONVERT,
        r"FILE: torchvision's names, entry 'state_dict', prefix 'model\.'$",
    ),
    "Lightning, compiled": (
        save(partial(lightning, prefix="net._orig_mod.")),
        r"\(weights with the prefix 'net\._orig_mod\.'" + CONVERT,
        r"FILE: torchvision's names, entry 'state_dict', prefix 'net\.'$",
    ),
    "model_state_dict": (
        save(lambda w: {"model_state_dict": w, "loss": 0.3}),
        r"\(weights in another entry or with older names" + CONVERT,
        "FILE: torchvision's names, entry 'model_state_dict'$",
    ),
    "net": (
        save(lambda w: {"net": w, "acc": 93.1, "epoch": 20}),
        r"\(weights in another entry or with older names" + CONVERT,
        "FILE: torchvision's names, entry 'net'$",
    ),
    "two levels": (
        save(lambda w: {"checkpoint": {"model": w}}),
        r"\(weights in another entry or with older names" + CONVERT,
        r"FILE: torchvision's names, entry 'checkpoint\.model'$",
    ),
    "list": (
        save(lambda w: [7, w]),
        r"\(the file has a list, not a dict" + MAKE,
        "FILE: torchvision's names, entry '1'$",
    ),
    "NumPy scalars": (
        save(lambda w: {"state_dict": w, "best": np.float64(0.7), "step": np.int64(8)}),
        r"\(more than tensors and plain values" + CONVERT,
        "FILE: torchvision's names, entry 'state_dict'$",
    ),
    "replaced classifier": (
        save(replaced_classifier),
        r"\('classifier\.weight' is not a weight of MobileNetV2" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "replaced classifier in a list": (
        save(partial(replaced_classifier, name="classifier.0")),
        r"\('classifier\.0\.weight' is not a weight of MobileNetV2" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "deep classifier": (
        save(deep_classifier),
        r"\('classifier\.4\.weight' is not a weight of MobileNetV2" + CONVERT,
        r"\(a classifier of several layers, classifier\.1 and classifier\.4\): train one",
    ),
    "no classifier": (
        save(partial(without, part="classifier")),
        r"\('classifier\.weight' is missing, .* and so are 1 others" + MAKE,
        r"\(no classifier\): save the whole network",
    ),
    "classifier without bias": (
        save(partial(without, part="classifier.1.bias")),
        r"\('classifier\.weight' is missing, unknown or of another shape, and so are 1",
        r"\(the bias of the classifier is missing" + OTHER,
    ),
    "one output": (
        save(one_output),
        r"\(one output, a sigmoid's\): train one output per class$",
        r"\(one output, a sigmoid's\): train one output per class$",
    ),
    "no counters of batches": (
        save(partial(without, part="num_batches_tracked")),
        r"\('stem\.norm\.num_batches_tracked' is missing, .* and so are 12 others" + MAKE,
        "FILE: torchvision's names$",
    ),
    "counters of thop": (
        save(counters),
        r"\('total_ops' is not a weight of MobileNetV2" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "missing weight": (
        save(partial(without, part="features.2.conv.1.0.weight")),
        r"\('blocks\.1\.depthwise\.conv\.weight' is missing, .* are 0 others" + MAKE,
        r"\('blocks\.1\.depthwise\.conv\.weight' is missing, .* are 0 others" + OTHER,
    ),
    "missing norm": (
        save(partial(without, part="features.2.conv.3.bias")),
        r"\('blocks\.1\.project\.norm\.bias' is missing, .* are 0 others" + MAKE,
        r"\('blocks\.1\.project\.norm\.bias' is missing, .* are 0 others" + OTHER,
    ),
    "another shape": (
        save(lambda w: {**w, "features.18.0.weight": w["features.18.0.weight"][:, :4]}),
        r"\('head\.conv\.weight' is missing, unknown or of another shape" + ".*" + MAKE,
        r"\('head\.conv\.weight' is missing, unknown or of another shape" + ".*" + OTHER,
    ),
    "channels rounded otherwise": (
        save(rounded_otherwise),
        r"\(weights in another entry or with older names" + CONVERT,
        r"\(no width from 0\.05 to 4 gives \[.*\] channels" + OTHER,
    ),
    "one more layer": (
        save(attention),
        r"\('features\.2\.attention\.fc\.weight' is not a weight of MobileNetV2" + CONVERT,
        r"\('features\.2\.attention\.fc\.weight' is not a weight of MobileNetV2"
        + ".*"
        + OTHER,
    ),
    # names of other projects
    "timm": (save(timm_weights), r"\(timm's names" + CONVERT, "FILE: timm's names$"),
    "timm's training": (
        save(lambda w: {"state_dict": timm_weights(w), "arch": "mobilenetv2_050", "epoch": 3}),
        r"\(timm's names" + CONVERT,
        "FILE: timm's names, entry 'state_dict'$",
    ),
    "timm, more blocks": (
        save(deeper),
        r"\(timm's names" + CONVERT,
        r"\(5 blocks instead of 4, as in a network of another depth",
    ),
    "timm as safetensors": (
        lambda path, weights: write_safetensors(path, timm_weights(weights)),
        r"\(a safetensors file" + CONVERT,
        "FILE: timm's names$",
    ),
    "half precision as safetensors": (
        lambda path, weights: write_safetensors(path, half(weights)),
        r"\(a safetensors file" + CONVERT,
        "FILE: torchvision's names$",
    ),
    "half a safetensors file": (
        write_half_a_safetensors_file,
        r"\(a safetensors file" + CONVERT,
        r"\(a safetensors file, damaged or of unusual types" + OTHER,
    ),
    "d-li14": (
        save(lambda w: renamed(w, convert.d_li14_names())),
        r"\(weights in another entry or with older names" + CONVERT,
        "FILE: d-li14's names$",
    ),
    "tonylins": (
        save(lambda w: renamed(w, convert.tonylins_names())),
        r"\(weights in another entry or with older names" + CONVERT,
        "FILE: tonylins' names$",
    ),
    "this project's weights": (
        write_ours,
        r"\(weights without the other entries" + CONVERT,
        "FILE: this project's names$",
    ),
    # other networks
    "ResNet": (
        save(resnet),
        r"\(another network, its first weight is 'conv1\.weight'" + MAKE,
        r"\(another network, its first keys are conv1\.weight, layer1\.0\.conv1\.weight"
        + OTHER,
    ),
    "EfficientNet": (
        save(efficientnet),
        r"\(another network, its first weight is 'features\.0\.0\.weight'" + MAKE,
        r"\(another network, its first keys are features\.0\.0\.weight, " + ".*" + OTHER,
    ),
    "no weights": (
        save(lambda w: {"epoch": 3}),
        r"\(no weights" + MAKE,
        r"\(no weights" + OTHER,
    ),
    "number": (
        save(lambda w: 3),
        r"\(the file has a int, not a dict" + MAKE,
        r"\(it has a int, not a dict" + OTHER,
    ),
    # more than weights
    "whole model": (
        save(lambda w: nn.Sequential(nn.Linear(2, 2))),
        r"\(a whole pickled model" + SAVE,
        r"\(a whole pickled model" + SAVE,
    ),
    "whole model, old format": (
        save(lambda w: nn.Linear(2, 2), _use_new_zipfile_serialization=False),
        r"\(a whole pickled model" + SAVE,
        r"\(a whole pickled model" + SAVE,
    ),
    "class of the program": (
        save(lambda w: {"state_dict": w, "settings": Settings()}),
        r"\(damaged, or more than tensors and plain values" + MAKE,
        NO_MORE.format(r"test_convert\.Settings"),
    ),
    "arrays of NumPy": (
        save(lambda w: {key: tensor.numpy() for key, tensor in w.items()}),
        r"\(more than tensors and plain values" + CONVERT,
        NO_MORE.format(r"numpy\S+"),
    ),
    "hostile": (
        save(lambda w: {"state_dict": w, "extra": Hostile()}),
        r"\(damaged, or more than tensors and plain values" + MAKE,
        NO_MORE.format(r"(builtins\.)?print"),
    ),
    "hostile pickle": (
        write(pickle.dumps(Hostile(), protocol=2)),
        r"\(damaged, or more than tensors and plain values" + MAKE,
        NO_MORE.format(r"(builtins\.)?print"),
    ),
    # files of other kinds
    "TorchScript": (
        write_torchscript,
        r"\(a TorchScript or torch\.export file" + SAVE,
        r"\(a TorchScript or torch\.export file" + SAVE,
    ),
    "torch.export": (
        write_export,
        r"\(a TorchScript or torch\.export file" + SAVE,
        r"\(a TorchScript or torch\.export file" + SAVE,
    ),
    "ONNX": (
        write(b"\x08\x0a\x12\x07pytorch\x1a\x052.6.0:\xf2\x8a"),
        r"\(an ONNX file" + SAVE,
        r"\(an ONNX file" + SAVE,
    ),
    "HTML page": (
        write(b"\n<!DOCTYPE html><html><body>404</body></html>"),
        r"\(an HTML page\): download the file again$",
        r"\(an HTML page\): download the file again$",
    ),
    "Git LFS pointer": (
        write(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14214848\n"),
        r"\(a Git LFS pointer\): run `git lfs pull`$",
        r"\(a Git LFS pointer\): run `git lfs pull`$",
    ),
    "empty": (
        write(b""),
        r"\(damaged, or more than tensors and plain values" + MAKE,
        r"\(damaged, or more than tensors and plain values" + OTHER,
    ),
    "zip file": (
        write_zip,
        r"\(damaged, or more than tensors and plain values" + MAKE,
        r"\(damaged, or more than tensors and plain values" + OTHER,
    ),
    "half a file": (
        write_half_a_file,
        r"\(damaged, or more than tensors and plain values" + MAKE,
        r"\(damaged, or more than tensors and plain values" + OTHER,
    ),
    "missing": (
        write_nothing,
        r"\(No such file or directory" + MAKE,
        r"\(No such file.*" + OTHER,
    ),
}


@pytest.fixture(scope="module")
def original():
    """A small network, and its weights with torchvision's names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenetv2, "BOTTLENECKS", FEW_BLOCKS)
        torch.manual_seed(0)
        model = randomise(MobileNetV2(num_classes=3, width_mult=0.35)).eval()
        return model, to_torchvision(model.state_dict())


@pytest.fixture
def few_blocks(monkeypatch):
    monkeypatch.setattr(mobilenetv2, "BOTTLENECKS", FEW_BLOCKS)


def assert_matches(pattern, line, path):
    """Compare one line with a pattern, where FILE stands for the path."""
    pattern = pattern.replace("FILE", re.escape(str(path)))
    assert re.search(pattern, line), f"{line!r} has no {pattern!r}"
    assert [word for word in FORBIDDEN if word in line] == []


def assert_same_network(path, model, half):
    """The file must be torchvision's weights of this network."""
    found, _ = load_checkpoint(path)
    assert found.arch == model.arch
    if half:
        assert torch.allclose(found(IMAGES), model(IMAGES), rtol=0.01, atol=0.05)
    else:
        assert torch.equal(found(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_converted_or_named_with_a_fix(
    name, original, few_blocks, tmp_path, call, capsys
):
    generate, load_message, convert_message = FILES[name]
    model, weights = original
    path = tmp_path / "foreign file.pth"
    generate(path, weights)
    if load_message == OK:
        assert_same_network(path, model, "half" in name)
    else:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        line = str(caught.value)
        assert line.startswith(f"cannot load '{path}' (")
        assert_matches(load_message, line, path)

    target = tmp_path / "new" / "weights.pth"
    code, out, err = call(convert, path, target)
    assert "never be printed" not in out
    if convert_message.startswith("FILE: "):
        assert (code, err) == (0, "")
        assert_matches(convert_message, out.splitlines()[0], path)
        assert f"{target}: 3 classes, width 0.35, " in out
        assert_same_network(target, model, "half" in name)
        saved = torch.load(target, weights_only=True)
        assert saved.keys() == weights.keys()
        assert {w.dtype for w in saved.values()} == {torch.float32, torch.int64}
    else:
        assert code == 2 and out == "" and not target.exists()
        assert err.startswith(f"convert.py: cannot convert '{path}' (")
        assert_matches(convert_message, err.removesuffix("\n"), path)


def test_the_table_has_enough_rows():
    assert len(FILES) >= 25


# --------------------------------------------------------------------------- command line


def test_another_entry_can_be_chosen(original, few_blocks, tmp_path, call):
    model, weights = original
    path = tmp_path / "model_9.pth"
    average = averaged(other_weights(weights))
    torch.save(torchvision_reference(weights, model_ema=average), path)
    code, out, _ = call(convert, path, tmp_path / "weights.pth")
    assert code == 0 and "left out: other weights; choose with --entry model_ema\n" in out
    code, out, _ = call(convert, path, tmp_path / "ema.pth", "--entry", "model_ema")
    assert code == 0 and "left out: other weights" not in out
    assert load_checkpoint(tmp_path / "ema.pth")[0].head.conv.weight.abs().max() == 0
    code, _, err = call(convert, path, tmp_path / "no.pth", "--entry", "optimizer")
    assert code == 2 and "(--entry optimizer has no weights): use model or model_ema\n" in err


def test_tensors_outside_the_network_are_named(original, few_blocks, tmp_path, call):
    torch.save(lightning(original[1]), tmp_path / "last.ckpt")
    code, out, _ = call(convert, tmp_path / "last.ckpt", tmp_path / "weights.pth")
    assert code == 0 and "left out: 1 other tensors (criterion.weight, ...)\n" in out


def test_it_prints_classes_width_parameters_and_the_next_command(
    original, few_blocks, tmp_path, call
):
    torch.save(original[1], tmp_path / "source.pth")
    target = tmp_path / "my weights.pth"
    code, out, _ = call(convert, tmp_path / "source.pth", target)
    count = mobilenetv2.count_parameters(original[0])
    assert code == 0 and out.splitlines()[1:] == [
        f"{target}: 3 classes, width 0.35, {count:,} parameters",
        f"next: python finetune.py --data photos --checkpoint '{target}'",
    ]


def test_it_never_replaces_a_file(original, few_blocks, tmp_path, call):
    path = tmp_path / "weights.pth"
    torch.save(original[1], path)
    before = path.read_bytes()
    code, _, err = call(convert, path, path)
    assert (
        code == 2 and err == f"convert.py: '{path}' exists: use another name, or delete it\n"
    )
    assert path.read_bytes() == before


def test_a_checkpoint_of_this_project_is_no_case_for_it(original, few_blocks, tmp_path, call):
    """The output stride is not in the weights, so the converted network would differ."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, original[0], ["a", "b", "c"], PREPROCESSING)
    code, _, err = call(convert, path, tmp_path / "weights.pth")
    assert code == 2 and "(a checkpoint of this project): use --checkpoint " in err


def test_it_runs_as_a_script(tmp_path):
    script = ROOT / "experiments" / "convert.py"
    options = {"cwd": tmp_path, "path": (), "output": tmp_path / "output"}
    code, out, err = Python(script, "missing.pth", "new.pth", **options).wait()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("convert.py: cannot convert 'missing.pth' (No such file")


# ---------------------------------------------------------------- networks of other projects


class TimmBlock(nn.Module):
    """timm's InvertedResidual, and DepthwiseSeparableConv for t = 1."""

    def __init__(self, channels, out_channels, stride, t):
        super().__init__()
        wide = channels * t
        self.expands = t > 1
        self.has_skip = stride == 1 and channels == out_channels
        dw = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        if self.expands:
            self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(wide)
            self.conv_dw = dw
            self.bn2 = nn.BatchNorm2d(wide)
            self.conv_pwl = nn.Conv2d(wide, out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_channels)
        else:
            self.conv_dw = dw
            self.bn1 = nn.BatchNorm2d(wide)
            self.conv_pw = nn.Conv2d(wide, out_channels, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        if self.expands:
            out = functional.relu6(self.bn1(self.conv_pw(x)))
            out = functional.relu6(self.bn2(self.conv_dw(out)))
            out = self.bn3(self.conv_pwl(out))
        else:
            out = functional.relu6(self.bn1(self.conv_dw(x)))
            out = self.bn2(self.conv_pw(out))
        return out + x if self.has_skip else out


class Timm(nn.Module):
    """timm 1.0.31: models/efficientnet.py, _gen_mobilenet_v2."""

    def __init__(self, num_classes, width):
        super().__init__()
        channels = make_divisible(32 * width)
        self.conv_stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for t, c, n, s in mobilenetv2.BOTTLENECKS:
            row = nn.Sequential()
            for repeat in range(n):
                out_channels = make_divisible(c * width)
                row.append(TimmBlock(channels, out_channels, 1 if repeat else s, t))
                channels = out_channels
            self.blocks.append(row)
        features = max(1280, make_divisible(1280 * width))
        self.conv_head = nn.Conv2d(channels, features, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x):
        x = self.blocks(functional.relu6(self.bn1(self.conv_stem(x))))
        x = functional.relu6(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))


def numbered(*layers):
    """A convolution, a norm and ReLU6 for each layer, in one list."""
    parts = nn.Sequential()
    for channels, out_channels, kernel, stride, groups in layers:
        padding = kernel // 2
        parts.append(
            nn.Conv2d(
                channels, out_channels, kernel, stride, padding, groups=groups, bias=False
            )
        )
        parts.append(nn.BatchNorm2d(out_channels))
        parts.append(nn.ReLU6())
    return parts


class NumberedBlock(nn.Module):
    def __init__(self, channels, out_channels, stride, t):
        super().__init__()
        wide = channels * t
        layers = [(wide, wide, 3, stride, wide), (wide, out_channels, 1, 1, 1)]
        if t > 1:
            layers.insert(0, (channels, wide, 1, 1, 1))
        self.conv = numbered(*layers)[:-1]
        self.identity = stride == 1 and channels == out_channels

    def forward(self, x):
        return x + self.conv(x) if self.identity else self.conv(x)


class Numbered(nn.Module):
    """tonylins' MobileNetV2.py and d-li14's models/imagenet/mobilenetv2.py.

    tonylins averages columns, then rows, which rounds the last bit in another way.
    """

    def __init__(self, num_classes, width, round_channels, head_is_a_feature):
        super().__init__()
        channels = round_channels(32 * width)
        self.features = nn.Sequential(numbered((3, channels, 3, 2, 1)))
        for t, c, n, s in mobilenetv2.BOTTLENECKS:
            for repeat in range(n):
                out_channels = round_channels(c * width)
                stride = 1 if repeat else s
                self.features.append(NumberedBlock(channels, out_channels, stride, t))
                channels = out_channels
        head = numbered((channels, 1280, 1, 1, 1))
        self.conv = nn.Identity()
        if head_is_a_feature:
            self.features.append(head)
        else:
            self.conv = head
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x):
        return self.classifier(self.conv(self.features(x)).mean((2, 3)))


PUBLISHED = {
    "timm's mobilenetv2_035": (Timm, {"width": 0.35}),
    "timm's mobilenetv2_140": (Timm, {"width": 1.4}),
    "d-li14's mobilenetv2_0.35": (
        Numbered,
        {"width": 0.35, "round_channels": make_divisible, "head_is_a_feature": False},
    ),
    "tonylins'": (
        Numbered,
        {"width": 1.0, "round_channels": make_divisible, "head_is_a_feature": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_keeps_its_logits(name, tmp_path):
    kind, options = PUBLISHED[name]
    network = randomise(kind(num_classes=3, **options)).eval()
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    model, _ = convert.convert(tmp_path / "theirs.pth")
    assert model.arch["width_mult"] == options["width"]
    assert torch.equal(model(IMAGES), network(IMAGES))


def test_d_li14s_smallest_network_is_refused(tmp_path):
    rounding = partial(make_divisible, divisor=4)  # for width 0.1 only
    options = {"round_channels": rounding, "head_is_a_feature": False}
    network = Numbered(num_classes=3, width=0.1, **options)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="no width from 0.05 to 4 gives .* channels"):
        convert.convert(tmp_path / "theirs.pth")


# ------------------------------------------------------------------------------------- widths


def torchvision_channels(width):
    """Return the weights that find_width reads, for torchvision's rule."""
    weights = {"stem.norm.bias": _make_divisible(32 * width, 8)}
    index = 0
    for _, c, n, _ in mobilenetv2.BOTTLENECKS:
        for _ in range(n):
            weights[f"blocks.{index}.project.norm.bias"] = _make_divisible(c * width, 8)
            index += 1
    weights["head.norm.bias"] = _make_divisible(1280 * max(1.0, width), 8)
    return weights


def test_the_width_of_each_of_torchvisions_networks_is_found():
    for hundredths in range(5, 201):
        channels = torchvision_channels(hundredths / 100)
        width = find_width({name: range(count) for name, count in channels.items()})
        assert torchvision_channels(width) == channels
        assert round(100 * width) == pytest.approx(100 * width)
        if hundredths % 5 == 0:
            assert width == hundredths / 100


@pytest.mark.parametrize("width", (0.05, 0.13, 0.37, 1.01, 1.5))
def test_torchvisions_weights_of_any_width_give_the_same_logits(width, tmp_path):
    theirs = randomise(torchvision.models.mobilenet_v2(num_classes=2, width_mult=width)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert torch.equal(load_checkpoint(tmp_path / "theirs.pth")[0](IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("width", (0.02, 4.5))
def test_a_width_out_of_range_is_refused_in_one_line(width, tmp_path):
    channels = torchvision_channels(width)
    with pytest.raises(
        CheckpointError, match=r"no width from 0\.05 to 4 gives \[.*\] channels"
    ):
        find_width({name: range(count) for name, count in channels.items()})
