"""Draw the picture at the top of the README: letters, accuracy over labels, digits.

    python train.py && python experiments/few_labels.py     # measures the accuracies
    python experiments/hero.py                              # draws runs/few_labels/hero.png

The accuracies are those of few_labels.csv. The letters are training images with augmentation, and
the digits are test images with their 8 × 8 pixels.
"""

import csv
import sys
from pathlib import Path

import numpy
import torch
from few_labels import draw_lines
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402

SIDE = 4  # images per row and column of a mosaic


def read_results(path):
    """Read few_labels.csv. Returns {(way, budget): (mean, std)} and the budgets; None is all."""
    results = {}
    with data.reading(f"'{path}' cannot be used", "run experiments/few_labels.py first"):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            budget = row["labels per class"]
            budget = None if budget == "all" else int(budget)
            results[row["way"], budget] = float(row["accuracy"]), float(row["std"])
    return results, list(dict.fromkeys(budget for _, budget in results))


def draw_letters():
    """Return SIDE² augmented training letters of different classes: (N, 64, 64) in 0..1."""
    dataset = data.load_data("glyphs", {"image_size": 64})
    images, labels = dataset.splits["train"]
    chosen = []
    for label in torch.randperm(len(dataset.classes))[: SIDE**2]:
        indices = (labels == label).nonzero().flatten()
        chosen.append(indices[torch.randint(len(indices), ())])
    return data.distort(images[torch.stack(chosen)], 64)[:, 0] / 255


def draw_digits():
    """Return SIDE² test digits, every digit at least once: (N, 8, 8) in 0..1."""
    dataset = data.load_data("digits", {"image_size": 8})
    images, labels = dataset.splits["test"]
    order = torch.randperm(len(labels))
    firsts = [order[labels[order] == digit][0].item() for digit in range(10)]
    others = [index for index in order.tolist() if index not in firsts]
    chosen = torch.tensor(firsts + others)[: SIDE**2]
    return images[chosen[torch.randperm(SIDE**2)], 0] / 255


def draw_mosaic(axes, images, title):
    """Draw images (SIDE², S, S) in 0..1 as squares with white lines between them."""
    scale = 64 // images.shape[-1]  # nearest neighbour: a pixel stays a square
    images = images.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    images = torch.nn.functional.pad(images, [2] * 4, value=1.0)
    rows = [torch.cat(list(row), dim=1) for row in images.split(SIDE)]
    mosaic = numpy.asarray(torch.cat(rows))
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=15)
    axes.axis("off")


@data.picture_style()
def draw(path, results, budgets):
    """Draw letters, accuracy over labels, and digits beside each other."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.3, 1))
    draw_mosaic(left, draw_letters(), "train.py: printed letters")
    draw_mosaic(right, draw_digits(), "finetune.py: handwritten digits")
    draw_lines(middle, results, budgets)
    middle.set_title("accuracy on digits, by number of labels", fontsize=15)
    middle.set_xlabel("labels per digit", fontsize=13)
    middle.set_ylabel("test accuracy (%)", fontsize=13)
    middle.tick_params(labelsize=12)
    lowest, highest = middle.get_ylim()
    middle.set_ylim(lowest - 0.25 * (highest - lowest), highest)  # space for the legend
    middle.legend(fontsize=12, ncols=2, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    folder = Path("runs/few_labels")
    parser.add_argument(
        "--csv", type=Path, default=folder / "few_labels.csv", help="measured accuracies"
    )
    parser.add_argument("--out", type=Path, default=folder / "hero.png", help="picture")
    args = parser.parse_args()
    results, budgets = read_results(args.csv)
    torch.manual_seed(1)
    draw(args.out, results, budgets)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
