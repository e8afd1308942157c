"""Draw predictions of digits, each beside its original 8 × 8 pixels.

    python train.py && python finetune.py
    python experiments/samples.py     # runs/finetune/best.pt -> runs/evaluate/digits.png

The first row has the most confident mistakes. The other digits are random test images.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from evaluate import GREEN, RED, predict  # noqa: E402
from mobilenetv2 import CheckpointError, load_checkpoint  # noqa: E402

ROWS, COLUMNS = 3, 4  # pairs of pictures


def choose(logits, labels):
    """Return indices of the most confident mistakes, then of random images."""
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    confidences = confidences.masked_fill(predictions == labels, -1)
    mistakes = confidences.argsort(descending=True)[: (predictions != labels).sum()][:COLUMNS]
    others = torch.randperm(len(labels))
    others = others[~torch.isin(others, mistakes)]
    return torch.cat([mistakes, others])[: ROWS * COLUMNS]


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--checkpoint", default="runs/finetune/best.pt", help="network for digits")
    out = Path("runs/evaluate/digits.png")
    parser.add_argument("--out", type=Path, default=out, help=f"picture (default: {out})")
    args = parser.parse_args()

    model, checkpoint = load_checkpoint(args.checkpoint)
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    if checkpoint["classes"] != dataset.classes:
        raise data.DataError(f"'{args.checkpoint}' has other classes: use a network for digits")
    logits, labels = predict(model, dataset.batches("test"))
    torch.manual_seed(0)
    indices = choose(logits, labels)
    originals = data.load_data("digits", {"image_size": 8}).splits["test"][0][indices, 0]
    resized = dataset.splits["test"][0][indices, 0]
    confidences, predictions = logits[indices].softmax(dim=1).max(dim=1)

    figure = Figure(figsize=(2.9 * COLUMNS, 2 * ROWS), layout="constrained", facecolor="white")
    pairs = figure.subfigures(ROWS, COLUMNS, wspace=0.06).flat
    rows = zip(pairs, originals, resized, labels[indices], predictions, confidences)
    for pair, original, image, label, prediction, confidence in rows:
        title, colour = f"{prediction} · {confidence:.0%}", GREEN
        if label != prediction:
            title, colour = f"{label} → {title}", RED
        pair.suptitle(title, color=colour, fontsize=14)
        for axes, pixels in zip(pair.subplots(1, 2), (original, image)):
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.axis("off")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
