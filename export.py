"""Export a checkpoint to files that run without this project, and verify each of them.

    python export.py                                    # runs/finetune/best.pt -> runs/export/
    python export.py --checkpoint runs/train/best.pt --data glyphs --with-preprocessing

    torchscript   model.torchscript.pt   deprecated by PyTorch, but many courses use it
    pt2           model.pt2              torch.export, the successor of TorchScript
    onnx          model.onnx             for ONNX Runtime and others; usually fastest on a CPU
    int8          model.int8.onnx        8-bit weights and activations, a third of the size

The last two need the packages in requirements-onnx.txt. All files take float images (N, 3, S,
S), normalised as report.json says, and return logits (N, num_classes); with
--with-preprocessing they take uint8 images (N, channels, S, S) and return probabilities. Terms
used here:

    fold          move BatchNorm into the weights of the convolution before it
    quantise      round numbers to 8-bit integers with a common scale
    verify        load a file in another process, and compare it with the network
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
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

import cli
import data
from evaluate import CHECKPOINT_HELP, class_names, load_test, predict, write_text
from mobilenetv2 import CheckpointError, load_checkpoint, write_file

TOLERANCE = 1e-4  # largest difference of a float format's outputs, relative to their range
LOST_ACCURACY = 0.005  # int8 may lose this share of the images, or a single one
ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)  # the first input dimension has any size


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
        for name in ("mean", "std"):  # for pixels in 0..255
            values = 255 * torch.tensor(preprocessing[name])
            self.register_buffer(name, values.view(1, 3, 1, 1))

    def forward(self, images):
        return self.network((images.float() - self.mean) / self.std).softmax(dim=1)


# ------------------------------------------------------------------------------------- formats
# Each format has a function that writes a file. metadata: {"classes": ..., "preprocessing":
# ...} as JSON, stored in the file. calibration: batches of training images, for int8.
def export_torchscript(network, example, path, metadata, calibration):
    traced = torch.jit.trace(network, example)
    buffer = io.BytesIO()  # with a path, a full disk would abort the process
    torch.jit.save(traced, buffer, {f"{key}.json": text for key, text in metadata.items()})
    path.write_bytes(buffer.getvalue())


def export_pt2(network, example, path, metadata, calibration):
    program = torch.export.export(network, (example,), dynamic_shapes=ANY_BATCH)
    buffer = io.BytesIO()
    extra_files = {f"{key}.json": text for key, text in metadata.items()}
    torch.export.save(program, buffer, extra_files=extra_files)
    path.write_bytes(buffer.getvalue())


def export_onnx(network, example, path, metadata, calibration):
    import onnx

    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["input"],
        output_names=["probabilities" if isinstance(network, WithPreprocessing) else "logits"],
        dynamic_shapes=ANY_BATCH,
    )
    model = program.model_proto
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    onnx.save(model, path)


def export_int8(network, example, path, metadata, calibration):
    """Quantise after training (Jacob et al., arXiv:1712.05877, §2 and §3).

    A number r is stored as q = round(r / scale) + zero, in 0..255. The scale covers the range
    of the weights per output channel, or of the activations on some training images (at most
    0..6 after ReLU6: its purpose in the paper, §4). Weights are unsigned, because older CPUs
    add products of unsigned and signed numbers in 16 bits, which can overflow.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = ({"input": images.numpy()} for images in calibration)

        def get_next(self):
            return next(self.batches, None)

    plain = path.with_name("model.onnx")
    if not plain.exists():
        export_onnx(network, example, plain, metadata, calibration)
    quantize_static(
        plain,
        path,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
    )


def load_torchscript(path):
    # Freezing makes the weights constants, which is fast, but binds them to a device. So the
    # file is not frozen.
    return torch.jit.freeze(torch.jit.load(path).eval())


def load_pt2(path):
    return torch.export.load(path).module()


def load_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)

    def network(images):
        (outputs,) = session.run(None, {"input": images.numpy()})
        return torch.from_numpy(outputs)

    return network


FORMATS = {  # int8 comes after onnx, because it uses its file
    "torchscript": {
        "file": "model.torchscript.pt",
        "export": export_torchscript,
        "load": load_torchscript,
    },
    "pt2": {"file": "model.pt2", "export": export_pt2, "load": load_pt2},
    "onnx": {"file": "model.onnx", "export": export_onnx, "load": load_onnx},
    "int8": {"file": "model.int8.onnx", "export": export_int8, "load": load_onnx},
}


@contextmanager
def quiet_exporters():
    """Hide messages that nobody can act on."""

    def is_useful(record):
        # ONNX Runtime recommends a step that folds BatchNorm, which is done here already.
        return "before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_useful)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # its deprecation; see above
        warnings.filterwarnings("ignore", "No complete tensor found")  # channels last
        try:
            yield
        finally:
            root.removeFilter(is_useful)


# -------------------------------------------------------------------------------- verification
def to_input(images, preprocessing, pixels):
    """Return images as the file takes them: normalised float, or with `pixels` uint8."""
    if pixels:
        images = (255 * data.to_pixels(images, preprocessing)).round().byte()
        images = images[:, : preprocessing["channels"]]
    return images.contiguous()


def load_and_measure(load, path, threads, *task):
    """Measure a file, in a process that has not built the network."""
    torch.set_num_threads(threads)
    with quiet_exporters():
        return measure(load(path), *task)


@torch.inference_mode()
def measure(network, dataset, split, pixels):
    """Run a network on a split. Returns (outputs (N, num_classes), measurements)."""
    outputs = []
    labels = []
    for images, batch_labels in dataset.batches(split):
        images = to_input(images, dataset.preprocessing, pixels)
        if not outputs:
            first = images[:16]  # for the measurements below
        outputs.append(network(images))
        labels.append(batch_labels)
    outputs = torch.cat(outputs)
    correct = outputs.argmax(dim=1) == torch.cat(labels)
    # A batch size that export made a constant would show up with single images.
    single = torch.cat([network(image) for image in first.split(1)])
    # The first runs allocate memory, and TorchScript optimises itself.
    timer = timeit.Timer(lambda: network(first[:1]))
    seconds = timer.repeat(repeat=33, number=1)[3:]
    return outputs, {
        "accuracy": correct.double().mean().item(),
        "latency_ms": 1000 * statistics.median(seconds),
        "batch_difference": (outputs[:16] - single).abs().max().item(),
    }


def find_fault(name, result, limit, lost, images):
    """Return the fault of a file, or None.

    limit: largest difference of a float format. lost: images that the network has correct, but
    not the file (net), of all `images`.
    """
    if not result["batch_difference"] <= limit:  # NaN is a fault
        return "its outputs depend on the batch size"
    if name == "int8":
        if lost > max(LOST_ACCURACY * images, 1):
            return f"it loses {lost} of {images} images"
    elif not result["largest_difference"] <= limit:
        return f"its outputs differ by up to {result['largest_difference']:.1e}"
    return None


# ---------------------------------------------------------------------------------- the script
ROW = "{:<21} {:>6} {:>11} {:>9} {:>11}"


def export_formats(names, folded, example, metadata, calibration, task, reference, out):
    """Write and verify each format. Returns ({file: measurements}, list of faults).

    task: the arguments (dataset, split, pixels) of `measure`. reference: the result of
    `measure` for the network.
    """
    expected, measured = reference
    limit = TOLERANCE * max(expected.abs().max().item(), 1)
    formats = {}
    faults = []
    spawn = get_context("spawn")  # a process that has not built the network
    with ProcessPoolExecutor(1, spawn) as pool, tempfile.TemporaryDirectory() as folder:
        for name, entry in FORMATS.items():
            if name not in names:
                continue
            file = entry["file"]
            path = Path(folder, file)
            try:
                entry["export"](folded, example, path, metadata, calibration)
            except ImportError as error:
                fix = "pip install -r requirements-onnx.txt"
                print(f"no {name} ({error}): {fix}", file=sys.stderr)
                continue
            except Exception as error:  # an exporter may raise anything
                faults.append(f"{file} ({error})")
                continue
            try:
                load = (load_and_measure, entry["load"], path, torch.get_num_threads())
                outputs, result = pool.submit(*load, *task).result()
                result["bytes"] = path.stat().st_size
                result["largest_difference"] = (outputs - expected).abs().max().item()
                lost = round((measured["accuracy"] - result["accuracy"]) * len(outputs))
                fault = find_fault(name, result, limit, lost, len(outputs))
            except Exception as error:  # a runtime may also raise anything
                fault = error
            if fault is not None:
                faults.append(f"{file} ({fault})")
                (out / file).unlink(missing_ok=True)  # an older file has another network
                continue
            write_file(out / file, path.read_bytes())
            formats[file] = result
            megabytes = f"{result['bytes'] / 1e6:.2f}"
            print_row(file, result, megabytes, f"{result['largest_difference']:.1e}")
    return formats, faults


def print_row(file, result, megabytes="", difference=""):
    milliseconds = f"{result['latency_ms']:.2f}"
    accuracy = f"{result['accuracy']:.2%}"
    print(ROW.format(file, megabytes, milliseconds, accuracy, difference), flush=True)


def load_network(args):
    """Load the network of --checkpoint, and images: (network, dataset, split)."""
    if args.data != "none":
        network, _, dataset, split = load_test(args)
        return network, dataset, split
    network, checkpoint = load_checkpoint(args.checkpoint)
    preprocessing = {**data.PHOTO, **checkpoint["preprocessing"]}
    size = args.image_size or preprocessing["image_size"]
    preprocessing["image_size"] = size
    images = torch.randint(256, (64, preprocessing["channels"], size, size), dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.long)  # for `predict`; replaced below
    dataset = data.Data(class_names(checkpoint), preprocessing, {"random": (images, labels)})
    logits, _ = predict(network, dataset.batches("random"))
    # The labels are the network's predictions: "accuracy" is the share of equal predictions.
    dataset.splits["random"] = images, logits.argmax(dim=1)
    print(
        "--data none: files are compared on 64 random images, and their accuracy means nothing"
    )
    if "int8" in args.formats:
        args.formats.remove("int8")
        print("--data none: no int8, which has to see typical images")
    return network, dataset, "random"


def main():
    parser = cli.make_parser(__doc__, data="digits", out="runs/export", batch_size=64)
    parser.add_argument("--checkpoint", default="runs/finetune/best.pt", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats to write"
    )
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="take uint8 images, and return probabilities",
    )
    args = cli.parse(parser)
    network, dataset, split = load_network(args)
    pixels = args.with_preprocessing
    if pixels:
        network = WithPreprocessing(network, dataset.preprocessing).eval()
    network.to(memory_format=torch.channels_last)
    folded = fold_batch_norm(network)
    torch.manual_seed(args.seed)
    # Quantisation needs typical images: those of training, if they are there.
    source = "train" if "train" in dataset.splits else split
    some = dataset.choose(source, 256)
    calibration = []
    for images, _ in dataset.batches(source, indices=some):
        calibration.append(to_input(images, dataset.preprocessing, pixels))
    # Two images: of a batch size of 1, torch.export would make a constant. A copy: model.pt2
    # would contain the whole batch of a slice.
    example = calibration[0][:2].clone()
    about = {"classes": dataset.classes, "preprocessing": dataset.preprocessing}
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()}

    task = (dataset, split, pixels)
    reference = measure(network, *task)
    outputs, measured = reference
    verified_on = f"{len(outputs)} images of {args.data} ({split})"
    print(f"{verified_on}, threads: {torch.get_num_threads()}")
    print(ROW.format("file", "MB", "ms / image", "accuracy", "difference"))
    print_row("network", measured)
    with quiet_exporters():
        formats, faults = export_formats(
            args.formats, folded, example, metadata, calibration, task, reference, args.out
        )
    report = {
        **about,
        "verified_on": verified_on,
        "with_preprocessing": pixels,
        "network": measured,
        "formats": formats,
    }
    write_text(args.out / "labels.txt", "\n".join([*dataset.classes, ""]))
    write_text(args.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    print(f"wrote {', '.join([*formats, 'labels.txt', 'report.json'])} to {args.out}")
    if faults:
        raise data.DataError(f"not written: {'; '.join(faults)}")


if __name__ == "__main__":
    cli.run(main, CheckpointError)
