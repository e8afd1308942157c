"""Turn a checkpoint into files that run without this project, and check each one against the network.

    python export.py                                    # runs/finetune/best.pt -> runs/export/
    python export.py --checkpoint runs/train/best.pt --data glyphs --with-preprocessing

    torchscript   model.torchscript.pt   what most courses use; PyTorch has deprecated it in favour of torch.export
    pt2           model.pt2              torch.export: the graph as data, the way PyTorch goes on
    onnx          model.onnx             for ONNX Runtime and many others, and the fastest of these on a CPU
    int8          model.int8.onnx        the same with weights and activations of 8 bits, a third of the size

The last two need the packages in requirements-onnx.txt. All take float images (N, 3, S, S), normalised as report.json says, and give
logits (N, classes); with --with-preprocessing they take uint8 images (N, channels, S, S) and give probabilities. Every file
is read back in a fresh process and must say of all test images what the network says; int8 may miss a few.
"""

import copy
import json
import logging
import statistics
import sys
import tempfile
import time
import timeit
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

import data
from evaluate import load_for_evaluation
from mobilenetv2 import CheckpointError, write_file

TOLERANCE = 1e-4  # of an output of a float format
LOST = 0.005  # share of the images that int8 may get wrong and the network does not; a single one is forgiven
BATCH = ({0: torch.export.Dim("batch", min=1)},)  # for torch.export: the first dimension of the first input may have any size
CALIBRATION = 256  # training images that show int8 how large activations become
warnings.filterwarnings("ignore", "`torch.jit")  # its deprecation is told above
warnings.filterwarnings("ignore", "No complete tensor found")  # torch.export's, of weights with channels last
# ONNX Runtime advises a preprocessing, which would fold BatchNorm, too.
logging.getLogger().addFilter(lambda record: "pre-processing before quantization" not in record.getMessage())


def fold_batch_norm(model):
    """A copy of the network whose BatchNorm layers are part of the convolutions in front of them.

    In eval mode BatchNorm multiplies a channel by a constant and adds another:

        y = γ · (W ∗ x - μ) / √(σ² + ε) + β  =  (s · W) ∗ x + (β - s · μ),    s = γ / √(σ² + ε)

    which is a convolution with other weights, and a bias. One pass over the maps instead of two.
    """
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if hasattr(layer, "conv") and hasattr(layer, "norm"):
            norm, scale = layer.norm, layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()  # (out,)
            layer.conv.weight = nn.Parameter(layer.conv.weight * scale[:, None, None, None])
            layer.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
            layer.norm = nn.Identity()
    return model


class Whole(nn.Module):
    """The network with what stands before and behind it: uint8 (N, 1 or 3, S, S) -> probabilities (N, classes)."""

    def __init__(self, network, preprocessing):
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(preprocessing[name]).view(1, 3, 1, 1))

    def forward(self, images):
        return self.network((images.float() - self.mean) / self.std).softmax(dim=1)  # one channel becomes three


def input_batches(split, channels):
    """The images of a split in batches, as an exported file takes them: float, or uint8 of so many channels."""
    if channels:  # the pixels, as they are before `normalise`
        split = replace(split, preprocessing=split.preprocessing | {"mean": [0.0] * 3, "std": [1.0] * 3})
    for images, _ in split.batches():
        if channels:
            images = (255 * images[:, :channels]).round().byte()
        yield images.contiguous()


# ------------------------------------------------------------------------------------------------- the formats


def export_torchscript(network, example, path, about, _):
    """Trace the network: record what it does with `example`. Right for a network without branches on its input."""
    traced = torch.jit.freeze(torch.jit.trace(network, example))
    torch.jit.save(traced, path, _extra_files={f"{key}.json": text for key, text in about.items()})


def export_pt2(network, example, path, about, _):
    """torch.export: the graph of the network, with the size of the batch left open."""
    program = torch.export.export(network, (example,), dynamic_shapes=BATCH)
    torch.export.save(program, path, extra_files={f"{key}.json": text for key, text in about.items()})


def export_onnx(network, example, path, about, _):
    """ONNX, by way of torch.export, with "input" and "logits" (or "probabilities") as names."""
    import onnx

    names = {"input_names": ["input"], "output_names": ["probabilities" if isinstance(network, Whole) else "logits"]}
    model = torch.onnx.export(network, (example,), dynamo=True, verbose=False, dynamic_shapes=BATCH, **names).model_proto
    for key, text in about.items():
        model.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def export_int8(network, example, path, about, calibration):
    """ONNX with 8-bit integers: static quantisation after training (Jacob et al., arXiv:1712.05877, §2 and §3).

    A number r is kept as q = round(r / scale) + zero, cut to 0..255. The scale is a 255th of a range: for weights that of their
    output channel, for activations what they reach on the `calibration` images (at most 0..6 behind a ReLU6, which the
    paper chose for this, §4). Weights are unsigned, too: CPUs without VNNI add up products of unsigned and signed numbers
    in 16 bits, which overflow unless the weights have 7 bits only, and those lost images that 8 unsigned bits do not.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def get_next(self):
            return next(calibration, None)

    plain = path.with_name("model.onnx")
    if not plain.exists():
        export_onnx(network, example, plain, about, None)
    quantize_static(plain, path, Images(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8)


def load_pt2(path):
    return torch.export.load(path).module()


def load_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


FORMATS = {  # file, how it is written, how it is read
    "torchscript": ("model.torchscript.pt", export_torchscript, torch.jit.load),
    "pt2": ("model.pt2", export_pt2, load_pt2),
    "onnx": ("model.onnx", export_onnx, load_onnx),
    "int8": ("model.int8.onnx", export_int8, load_onnx),
}

# -------------------------------------------------------------------------------------------- the verification


def time_batches(network, images, rounds):
    """Median seconds for `images`."""
    # The first three find memory, and let TorchScript optimise.
    return statistics.median(timeit.repeat(lambda: network(images), number=1, repeat=3 + rounds)[3:])


def measure(load, path, split, channels, threads):
    """Load a network and show it a split. Returns (outputs (N, classes), what it took and how it did, as a dict)."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    network = load(path)
    took = {"load_seconds": time.perf_counter() - begun}
    with torch.inference_mode():
        outputs = torch.cat([network(part) for images in input_batches(split, channels) for part in images.split(16)])
        took["accuracy"] = (outputs.argmax(dim=1) == split.labels).double().mean().item()
        images = next(input_batches(split, channels))[:16]
        # The size of the batch must not have become a constant.
        tried = [torch.cat([network(part) for part in images.split(size)]) for size in (1, 3)]
        took["batch_difference"] = max((outputs[: len(images)] - other).abs().max().item() for other in tried)
        took["latency_ms"] = 1000 * time_batches(network, images[:1], 30)
        took["images_per_second"] = 16 / time_batches(network, images.repeat(16, 1, 1, 1)[:16], 10)
    return outputs, took


def measure_afresh(*arguments):
    """`measure` in a process of its own, which knows nothing of this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def find_fault(name, result, images):
    """Why a file must not be shipped, or None."""
    if not result["batch_difference"] <= TOLERANCE:  # NaN neither
        return "its outputs depend on the size of the batch"
    if name == "int8" and (lost := round(result["accuracy_lost"] * images)) > max(LOST * images, 1):
        return f"it gets {lost} more of {images} images wrong than the network"
    if name != "int8" and not result["largest_difference"] < TOLERANCE:
        return f"its outputs differ by up to {result['largest_difference']:.1e}"


ROW = "{:<12} {:<21} {:>6} {:>7} {:>8} {:>9} {:>9} {:>11} {:>9}".format


def main():
    parser = data.command_line("Export a checkpoint and verify the files.", "digits", "runs/export", batch_size=64)
    parser.add_argument("--checkpoint", default="runs/finetune/best.pt", help="a torchvision .pth, or imagenet, will do, too")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="what to write")
    parser.add_argument("--with-preprocessing", action="store_true", help="uint8 images in, probabilities out")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise data.DataError(f"--out {args.out} is a file: name a folder")
    model, checkpoint, dataset, split, split_name = load_for_evaluation(args, "cpu")
    preprocessing, threads = dataset.preprocessing, torch.get_num_threads()
    channels = preprocessing["channels"] if args.with_preprocessing else None
    plain, folded = model, fold_batch_norm(model)
    if args.with_preprocessing:
        plain, folded = (Whole(network, preprocessing).eval() for network in (plain, folded))
    folded = folded.to(memory_format=torch.channels_last)
    about = {"classes": checkpoint["classes"], "preprocessing": preprocessing, "with_preprocessing": args.with_preprocessing}
    verified_on = f"{len(split)} images of {args.data} ({split_name})"
    report = {"checkpoint": args.checkpoint, **about, "verified_on": verified_on, "threads": threads, "network": {}, "formats": {}}
    about = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}

    print(f"{threads} threads, {verified_on}")
    print(ROW("", "file", "MB", "load s", "1 in ms", "16: per s", "accuracy", "difference", "agreement"))
    expected, eager = measure(lambda _: plain, None, split, channels, threads)

    def compare(name, outputs, result, file="-", size="-"):
        """Add to `result` how the outputs differ from the network's, print it as a row of the table, and return it."""
        result["accuracy_lost"] = eager["accuracy"] - result["accuracy"]
        result["largest_difference"] = (outputs - expected).abs().max().item()
        result["agreement"] = (outputs.argmax(dim=1) == expected.argmax(dim=1)).double().mean().item()
        speed = f"{result['load_seconds']:.2f}", f"{result['latency_ms']:.2f}", f"{result['images_per_second']:.0f}"
        right = f"{result['accuracy']:.2%}", f"{result['largest_difference']:.1e}", f"{result['agreement']:.2%}"
        print(ROW(name, file, size, *speed, *right), flush=True)
        return result

    report["network"]["eager"] = compare("eager", expected, eager)
    report["network"]["folded"] = compare("folded", *measure(lambda _: folded, None, split, channels, threads))
    # Not one: torch.export takes a size of 1 for a constant. A clone: it saves the example, and with a view all that is behind it.
    example = next(input_batches(split, channels))[:2].clone()
    some = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, export, load) in FORMATS.items():  # in this order: int8 starts from the file of onnx
            if name not in args.formats:
                continue
            path = Path(folder, file)
            calibration = ({"input": images.numpy()} for images in input_batches(dataset.train.subset(some), channels))
            try:
                export(folded, example, path, about, calibration)
                outputs, result = measure_afresh(load, path, replace(split), channels, threads)
                result |= {"file": file, "bytes": path.stat().st_size}
                compare(name, outputs, result, file, f"{result['bytes'] / 1e6:.2f}")
                fault = find_fault(name, result, len(split))
            except ImportError as error:
                data.warn(f"no {name} ({error}): pip install -r requirements-onnx.txt")
                continue
            except Exception as error:  # whatever an exporter or a runtime raises for what it does not like
                fault = f"it cannot be made or run ({type(error).__name__}: {error})"
            if fault:
                (args.out / file).unlink(missing_ok=True)  # an older one would be of another network
                faults.append(f"{file}: {fault}")
            else:
                write_file(args.out / file, path.read_bytes())
                report["formats"][name] = result
    write_file(args.out / "labels.txt", "\n".join([*checkpoint["classes"], ""]).encode())
    write_file(args.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    if faults:
        data.warn(f"export.py: not written, for {'; '.join(faults)}")
        sys.exit(1)
    written = [result["file"] for result in report["formats"].values()]
    old = [file for file, *_ in FORMATS.values() if file not in written and (args.out / file).exists()]
    if old:
        data.warn(f"{', '.join(old)} in {args.out} from an earlier export: report.json and labels.txt do not speak of them")
    print(f"wrote {', '.join([*written, 'labels.txt', 'report.json'])} to {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
