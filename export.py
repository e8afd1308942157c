"""Turn a checkpoint into files that run without this project, and check each one against the network.

    python export.py                                    # runs/finetune/best.pt -> runs/export/
    python export.py --checkpoint runs/train/best.pt --data glyphs

    model.torchscript.pt   TorchScript, what most courses use; PyTorch has deprecated it in favour of torch.export
    model.pt2              torch.export: the graph as data, the way PyTorch goes on

Both take float images (N, 3, S, S), normalised as report.json says, for any N, and give logits (N, classes).
"""

import io
import json
import warnings
from pathlib import Path

import torch

import data
from evaluate import load_for_evaluation
from mobilenetv2 import CheckpointError, write_file

TOLERANCE = 1e-4  # of a logit
BATCH_SIZES = (1, 3, 16)  # each file is tried with all of them: a batch size must not have become a constant
warnings.filterwarnings("ignore", "`torch.jit")  # its deprecation is told above


def export_torchscript(model, images, file):
    """Trace the network: record what it does with `images`. Right for a network without branches on its input."""
    torch.jit.save(torch.jit.trace(model, images), file)


def export_pt2(model, images, file):
    """torch.export: the graph of the network, with the size of the batch left open."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)


def load_pt2(file):
    return torch.export.load(file).module()


FORMATS = {
    "torchscript": ("model.torchscript.pt", export_torchscript, torch.jit.load),
    "pt2": ("model.pt2", export_pt2, load_pt2),
}


def verify(model, exported, images):
    """Compare an exported network with the original on `images` (N, 3, S, S), in batches of each size in BATCH_SIZES.

    Returns {"largest_difference": of any logit, "agreement": share of images with the same predicted class}.
    """
    differences, agreements = [], []
    with torch.inference_mode():
        for size in BATCH_SIZES:
            batches = images.split(size)
            expected = torch.cat([model(batch) for batch in batches])
            given = torch.cat([exported(batch) for batch in batches])
            differences.append((expected - given).abs().max().item())
            agreements.append((expected.argmax(dim=1) == given.argmax(dim=1)).double().mean().item())
    return {"largest_difference": max(differences), "agreement": min(agreements)}


def main():
    parser = data.command_line("Export a checkpoint and verify the files.", "digits", "runs/export", batch_size=64)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/finetune/best.pt"), help="network to export")
    args = parser.parse_args()
    model, checkpoint, split, split_name = load_for_evaluation(args, "cpu")
    model = model.to(memory_format=torch.contiguous_format)
    images, _ = next(split.batches())

    report = {
        "checkpoint": str(args.checkpoint),
        "classes": checkpoint["classes"],
        "preprocessing": checkpoint["preprocessing"],
        "verified_on": f"{len(images)} images of {args.data} ({split_name})",
        "formats": {},
    }
    failed = []
    for name, (file_name, export, load) in FORMATS.items():
        # In memory first: what stands in --out is replaced only by what has been verified. Two images, not one:
        # torch.export takes a size of 1 for a constant.
        file = io.BytesIO()
        export(model, images[:2], file)
        contents = file.getvalue()
        result = {"file": file_name, "bytes": len(contents)} | verify(model, load(io.BytesIO(contents)), images)
        if result["largest_difference"] < TOLERANCE and result["agreement"] == 1:
            write_file(args.out / file_name, contents)
            report["formats"][name] = result
        else:
            (args.out / file_name).unlink(missing_ok=True)  # an older one would be of another network
            failed.append(name)
        print(f"{name:12} {len(contents) / 1e6:.1f} MB  largest difference {result['largest_difference']:.1e}")
    write_file(args.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    if failed:
        raise SystemExit(f"not written, for they differ from the network: {', '.join(failed)}")
    print(f"wrote {', '.join(result['file'] for result in report['formats'].values())} and report.json to {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
