"""Draw predictions of digits, each beside its original 8 × 8 pixels.

    python train.py && python finetune.py
    python experiments/samples.py     # runs/finetune/best.pt -> runs/evaluate/digits.png

The first row has the most confident mistakes. The other digits are random test images.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402
from evaluate import GREEN, RED, predict  # noqa: E402
from mobilenetv2 import CheckpointError, load_checkpoint  # noqa: E402

ROWS = 3  # of pairs of pictures
COLUMNS = 4


def choose(logits, labels):
    """Return indices of the most confident mistakes, then of random images."""
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    mistakes = (predictions != labels).nonzero().flatten()
    order = confidences[mistakes].argsort(descending=True)
    mistakes = mistakes[order][:COLUMNS]
    others = torch.randperm(len(labels))
    others = others[~torch.isin(others, mistakes)]
    return torch.cat([mistakes, others])[: ROWS * COLUMNS]


@data.picture_style()
def draw(path, originals, resized, labels, logits):
    """Draw each image twice: its original pixels, and as the network sees it. (N, H, W) each."""
    figure = Figure(figsize=(2.9 * COLUMNS, 2 * ROWS), layout="constrained")
    pairs = figure.subfigures(ROWS, COLUMNS, wspace=0.06, squeeze=False).flat
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    for index, pair in enumerate(pairs):
        title = f"{predictions[index]} · {confidences[index]:.0%}"
        colour = GREEN
        if labels[index] != predictions[index]:
            title = f"{labels[index]} → {title}"
            colour = RED
        pair.suptitle(title, color=colour, fontsize=14)
        for axes, pixels in zip(pair.subplots(1, 2), (originals[index], resized[index])):
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    add("--checkpoint", default="runs/finetune/best.pt", help="network for digits")
    add("--out", type=Path, default=Path("runs/evaluate/digits.png"), help="picture")
    args = parser.parse_args()

    model, checkpoint = load_checkpoint(args.checkpoint)
    dataset = data.load_data("digits", checkpoint["preprocessing"])
    if checkpoint["classes"] != dataset.classes:
        fix = "use a network for digits"
        raise data.DataError(f"'{args.checkpoint}' has other classes: {fix}")
    logits, labels = predict(model, dataset.batches("test"))
    torch.manual_seed(0)
    indices = choose(logits, labels)
    resized, _ = dataset.splits["test"]
    originals, _ = data.load_data("digits", {"image_size": 8}).splits["test"]
    draw(
        args.out,
        originals[indices, 0],
        resized[indices, 0],
        labels[indices],
        logits[indices],
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main, CheckpointError)
