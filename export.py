"""Export a checkpoint to files that run without this project, and verify each of them.

    python export.py                                    # runs/finetune/best.pt -> runs/export/
    python export.py --checkpoint runs/train/best.pt --data glyphs --with-preprocessing

    torchscript   model.torchscript.pt   deprecated by PyTorch, but many courses use it
    pt2           model.pt2              torch.export, the successor of TorchScript
    onnx          model.onnx             for ONNX Runtime and others; usually the fastest on a CPU
    int8          model.int8.onnx        8-bit weights and activations, a third of the size

The last two need the packages in requirements-onnx.txt. All files take float images (N, 3, S, S),
normalised as report.json says, and return logits (N, num_classes); with --with-preprocessing they
take uint8 images (N, channels, S, S) and return probabilities. Terms used here:

    fold          move BatchNorm into the weights of the convolution before it
    quantise      round numbers to 8-bit integers with a common scale
    verify        load a file in another process, and compare it with the network on all test images
"""

import copy
import io
import json
import logging
import statistics
import sys
import tempfile
import timeit
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

import data
from evaluate import load_test
from mobilenetv2 import CheckpointError, write_file

TOLERANCE = 1e-4  # largest difference of a float format's output from the network's
LOST_ACCURACY = 0.005  # int8 may lose this share of the images, or a single one
BATCH = ({0: torch.export.Dim("batch", min=1)},)  # the first input dimension has any size
warnings.filterwarnings("ignore", "`torch.jit")  # its deprecation; see above
warnings.filterwarnings("ignore", "No complete tensor found")  # torch.export, channels last
# ONNX Runtime recommends a preprocessing step that folds BatchNorm, which is done here already.
logging.getLogger().addFilter(lambda record: "before quantization" not in record.getMessage())


def fold_batch_norm(model):
    """Return a copy of the network whose BatchNorm layers are folded into the convolutions.

    In eval mode BatchNorm is a multiplication and an addition, so the result is a convolution:

        y = γ · (W ∗ x - μ) / √(σ² + ε) + β  =  (s · W) ∗ x + (β - s · μ),    s = γ / √(σ² + ε)
    """
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if hasattr(layer, "conv") and hasattr(layer, "norm"):
            norm = layer.norm
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # s, (out_channels,)
            layer.conv.weight = nn.Parameter(layer.conv.weight * scale[:, None, None, None])
            layer.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
            layer.norm = nn.Identity()
    return model


class WithPreprocessing(nn.Module):
    """Normalisation, network and softmax: uint8 (N, 1 or 3, S, S) -> probabilities."""

    def __init__(self, network, preprocessing):
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocessing["std"]).view(1, 3, 1, 1))

    def forward(self, images):
        return self.network((images.float() - self.mean) / self.std).softmax(dim=1)


# ------------------------------------------------------------------------------------------ formats
def export_torchscript(network, example, path, metadata, _):
    traced = torch.jit.freeze(torch.jit.trace(network, example))
    buffer, texts = io.BytesIO(), {f"{key}.json": text for key, text in metadata.items()}
    torch.jit.save(traced, buffer, texts)  # with a path, a full disk would abort the process
    path.write_bytes(buffer.getvalue())


def export_pt2(network, example, path, metadata, _):
    program = torch.export.export(network, (example,), dynamic_shapes=BATCH)
    buffer, texts = io.BytesIO(), {f"{key}.json": text for key, text in metadata.items()}
    torch.export.save(program, buffer, extra_files=texts)
    path.write_bytes(buffer.getvalue())


def export_onnx(network, example, path, metadata, _):
    import onnx

    output = "probabilities" if isinstance(network, WithPreprocessing) else "logits"
    names = {"input_names": ["input"], "output_names": [output], "dynamic_shapes": BATCH}
    model = torch.onnx.export(network, (example,), dynamo=True, verbose=False, **names).model_proto
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    onnx.save(model, path)


def export_int8(network, example, path, metadata, calibration):
    """Quantise after training (Jacob et al., arXiv:1712.05877, §2 and §3).

    A number r is stored as q = round(r / scale) + zero, in 0..255. The scale covers the range of
    the weights per output channel, or of the activations on some training images (at most 0..6
    after ReLU6: its purpose in the paper, §4). Weights are unsigned, because older CPUs add
    products of unsigned and signed numbers in 16 bits, which can overflow.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = ({"input": images.numpy()} for images in calibration)

        def get_next(self):
            return next(self.batches, None)

    plain = path.with_name("model.onnx")
    if not plain.exists():
        export_onnx(network, example, plain, metadata, None)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
    quantize_static(plain, path, Reader(), per_channel=True, **types)


def load_pt2(path):
    return torch.export.load(path).module()


def load_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


FORMATS = {  # name: (file, export function, load function)
    "torchscript": ("model.torchscript.pt", export_torchscript, torch.jit.load),
    "pt2": ("model.pt2", export_pt2, load_pt2),
    "onnx": ("model.onnx", export_onnx, load_onnx),
    "int8": ("model.int8.onnx", export_int8, load_onnx),
}


# ----------------------------------------------------------------------------------- verification
def inputs(dataset, batches, pixels):
    """Yield images as the file takes them: normalised float, or with `pixels` uint8."""
    for images, _ in batches:
        if pixels:
            images = (255 * data.to_pixels(images, dataset.preprocessing)).round().byte()
            images = images[:, : dataset.preprocessing["channels"]]
        yield images.contiguous()


def measure(load, path, dataset, split, pixels, threads):
    """Load a network and run it on a split. Returns (outputs (N, num_classes), measurements)."""
    torch.set_num_threads(threads)
    network = load(path)
    with torch.inference_mode():
        batches = list(inputs(dataset, dataset.batches(split), pixels))
        outputs = torch.cat([network(images) for images in batches])
        # A batch size that export made a constant would show up with single images.
        images = batches[0][:16]
        single = torch.cat([network(image) for image in images.split(1)])
        # The first runs allocate memory, and TorchScript optimises itself.
        seconds = timeit.repeat(lambda: network(images[:1]), number=1, repeat=33)[3:]
    correct = (outputs.argmax(dim=1) == dataset.splits[split][1]).double()
    result = {"accuracy": correct.mean().item(), "latency_ms": 1000 * statistics.median(seconds)}
    return outputs, result | {"batch_difference": (outputs[:16] - single).abs().max().item()}


def verify(name, load, path, expected, accuracy, pool, *how):
    """Measure a file in the process of `pool`. Returns a dict; raises ValueError for a fault."""
    outputs, result = pool.submit(measure, load, path, *how).result()
    result["bytes"] = path.stat().st_size
    result["largest_difference"] = (outputs - expected).abs().max().item()
    lost = round((accuracy - result["accuracy"]) * len(outputs))
    if not result["batch_difference"] <= TOLERANCE:  # NaN is a fault
        raise ValueError("its outputs depend on the batch size")
    if name != "int8" and not result["largest_difference"] <= TOLERANCE:
        raise ValueError(f"its outputs differ by up to {result['largest_difference']:.1e}")
    if name == "int8" and lost > max(LOST_ACCURACY * len(outputs), 1):
        raise ValueError(f"it loses {lost} of {len(outputs)} images")
    return result


def main():
    defaults = {"data": "digits", "checkpoint": "runs/finetune/best.pt", "out": Path("runs/export")}
    defaults |= {"batch_size": 64, "formats": list(FORMATS), "with_preprocessing": False}
    args = data.parse_arguments("Export and verify a checkpoint.", defaults)
    args.device = "cpu"  # the files are for any device
    network, _, dataset, split = load_test(args)
    folded, pixels = fold_batch_norm(network), args.with_preprocessing
    if pixels:
        network = WithPreprocessing(network, dataset.preprocessing).eval()
        folded = WithPreprocessing(folded, dataset.preprocessing).eval()
    folded.to(memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    some = torch.randperm(len(dataset.splits["train"][1]))[:256]
    calibration = list(inputs(dataset, dataset.batches("train", indices=some), pixels))
    example = calibration[0][:2].clone()  # torch.export would make a batch size of 1 a constant
    report = {"classes": dataset.classes, "preprocessing": dataset.preprocessing}
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in report.items()}
    how = (dataset, split, pixels, torch.get_num_threads())
    expected, reference = measure(lambda _: network, None, *how)
    accuracy, made, faults = reference["accuracy"], [], []
    report["verified_on"] = f"{len(expected)} images of {args.data} ({split})"
    report |= {"with_preprocessing": pixels, "network": reference, "formats": {}}
    row = "{:<21} {:>6} {:>11} {:>9} {:>11}".format
    print(f"{report['verified_on']}, threads: {how[-1]}")
    print(row("file", "MB", "ms / image", "accuracy", "difference"))
    print(row("network", "", f"{reference['latency_ms']:.2f}", f"{accuracy:.2%}", ""))
    spawn = get_context("spawn")  # a process that has not built the network
    with ProcessPoolExecutor(1, spawn) as pool, tempfile.TemporaryDirectory() as folder:
        for name, (file, export, load) in FORMATS.items():  # in this order: int8 uses onnx's file
            if name not in args.formats:
                continue
            path = Path(folder, file)
            try:
                export(folded, example, path, metadata, calibration)
                made.append(file)
                result = verify(name, load, path, expected, accuracy, pool, *how)
            except ImportError as error:
                print(f"no {name} ({error}): pip install -r requirements-onnx.txt", file=sys.stderr)
                continue
            except Exception as error:  # an exporter or a runtime may raise anything
                faults.append(f"{file} ({error})")
                if file in made:  # and faulty: an older file has another network
                    (args.out / file).unlink(missing_ok=True)
                continue
            write_file(args.out / file, path.read_bytes())
            report["formats"][file] = result
            size, latency = f"{result['bytes'] / 1e6:.2f}", f"{result['latency_ms']:.2f}"
            difference = f"{result['largest_difference']:.1e}"
            print(row(file, size, latency, f"{result['accuracy']:.2%}", difference), flush=True)
    write_file(args.out / "labels.txt", "\n".join([*dataset.classes, ""]).encode())
    write_file(args.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    print(f"wrote {', '.join([*report['formats'], 'labels.txt', 'report.json'])} to {args.out}")
    if faults:
        raise data.DataError(f"not written: {'; '.join(faults)}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
