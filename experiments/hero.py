"""Draw the picture at the top of the README: letters, accuracy over labels, digits.

    python train.py && python experiments/few_labels.py     # measures the accuracies
    python experiments/hero.py                              # draws runs/few_labels/hero.png

The accuracies are those of few_labels.csv. The letters are training images with augmentation, and
the digits are test images with their 8 × 8 pixels.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy
import torch
from few_labels import draw_lines
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

SIDE = 4  # images per row and column of a mosaic


def read_results(path):
    """Read few_labels.csv. Returns {(way, budget): (mean, std)} and the budgets; None is all."""
    results = {}
    with data.reading(f"'{path}' cannot be used", "run experiments/few_labels.py first"):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                budget = None if row["labels per class"] == "all" else int(row["labels per class"])
                results[row["way"], budget] = float(row["accuracy"]), float(row["std"])
    return results, list(dict.fromkeys(budget for _, budget in results))


def draw_letters():
    """Return SIDE² augmented training letters of different classes: (N, 64, 64) in 0..1."""
    dataset = data.load_data("glyphs", {"image_size": 64})
    images, labels = dataset.splits["train"]
    classes = torch.randperm(len(dataset.classes))[: SIDE**2]
    fonts = [(labels == label).nonzero().flatten() for label in classes]  # indices of its images
    chosen = [indices[torch.randint(len(indices), ())] for indices in fonts]
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


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    path = Path("runs/few_labels/few_labels.csv")
    parser.add_argument("--csv", type=Path, default=path, help=f"measured (default: {path})")
    out = path.with_name("hero.png")
    parser.add_argument("--out", type=Path, default=out, help=f"picture (default: {out})")
    args = parser.parse_args()

    results, budgets = read_results(args.csv)
    torch.manual_seed(1)
    figure = Figure(figsize=(14, 4.6), layout="constrained", facecolor="white")
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.run(main)
