"""Measure the value of transfer with few and with many labels. Four ways to train:

    python train.py && python experiments/few_labels.py     # from letters to digits
    python experiments/few_labels.py --data photos --checkpoint imagenet --image-size 160 \\
        --width 1.0 --output-stride 32

    from scratch      train.py: all weights start at random and see only these images
    classifier only   finetune.py --epochs 0: a new classifier on the features of a frozen backbone
    last 11 blocks    finetune.py --unfreeze 11: the same, then also the last blocks and the head
    whole network     finetune.py --unfreeze 17: the same, then also all blocks and the stem

All ways get the same labels. An epoch always has the same number of images: few images are repeated
more often. The best epoch is chosen on the validation split. The accuracy is that on the test
split, or on the validation split if there is no other. Mean and standard deviation (std) over
seeds, which also choose the labels. The time is that of the whole command.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ablation import final_accuracy
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from evaluate import write_table  # noqa: E402
from mobilenetv2 import CheckpointError, load_checkpoint  # noqa: E402

COLOURS = {"from scratch": "#8c959f", "classifier only": "#bf8700"}
COLOURS |= {"last 11 blocks": "#0969da", "whole network": "#8250df"}
BUDGETS = (10, 50, None)  # labels per class; None: all. Skips those above the smallest class.


def commands(args):
    """Return the script and the special options of each way."""
    network = ["--width", str(args.width), "--output-stride", str(args.output_stride)]
    start, epochs = ["--checkpoint", args.checkpoint], ["--epochs", str(args.epochs)]
    return {
        "from scratch": ["train.py", *network, *epochs],
        "classifier only": ["finetune.py", *start, "--epochs", "0"],
        "last 11 blocks": ["finetune.py", *start, *epochs, "--unfreeze", "11"],
        "whole network": ["finetune.py", *start, *epochs, "--unfreeze", "17"],
    }


def measure(command, args, budget, seed):
    """Run one command. Returns the accuracy of its best epoch, and its seconds."""
    script, *options = command
    options += ["--data", args.data, "--data-dir", str(args.data_dir), "--seed", str(seed)]
    options += [] if args.image_size is None else ["--image-size", str(args.image_size)]
    options += [] if budget is None else ["--per-class", str(budget)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(__file__).resolve().parent.parent / script
        begun, full = time.perf_counter(), [sys.executable, path, *options, "--out", folder]
        if subprocess.run(full, stdout=subprocess.DEVNULL).returncode:
            raise data.DataError(f"{script} failed: see the message above")
        seconds = time.perf_counter() - begun
        model, checkpoint = load_checkpoint(Path(folder, "best.pt"))
    dataset = data.load_data(args.data, checkpoint["preprocessing"], data_dir=args.data_dir)
    return final_accuracy(model, dataset), seconds


def draw_lines(axes, results, budgets):
    """Draw accuracy over the number of labels, one line per way; bars show the std over seeds."""
    positions = range(len(budgets))
    for (way, colour), shift in zip(COLOURS.items(), (-0.06, -0.02, 0.02, 0.06)):
        means, stds = zip(*[results[way, budget] for budget in budgets])
        places = [position + shift for position in positions]
        axes.errorbar(places, means, stds, fmt=".-", color=colour, capsize=3, label=way)
    axes.set_xticks(positions, ["all" if budget is None else str(budget) for budget in budgets])
    axes.set(xlabel="labels per class", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)


def plot(results, budgets, args):
    """Draw the lines as a picture of their own."""
    figure = Figure(figsize=(7, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    draw_lines(axes, results, budgets)
    axes.set_title(f"{args.data}: mean and std over {args.seeds} seeds")
    axes.legend()
    figure.savefig(args.out / "few_labels.png", dpi=120)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", default="digits", help="dataset, or folder of images")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="downloads")
    parser.add_argument("--checkpoint", default="runs/train/best.pt", help="start of finetune.py")
    parser.add_argument("--image-size", type=int, help="image side (default: the scripts')")
    text = "epochs of train.py, and of stage blocks in finetune.py (default: 6)"
    parser.add_argument("--epochs", type=int, default=6, help=text)
    text = "width multiplier of the network from scratch (default: 0.5)"
    parser.add_argument("--width", type=float, default=0.5, help=text)
    text = "output stride of the network from scratch (default: 16)"
    parser.add_argument("--output-stride", type=int, default=16, help=text)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"), help="results")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 2:
        parser.error("use --epochs 1 or more, and --seeds 2 or more")

    load_checkpoint(args.checkpoint)  # an unusable checkpoint fails now, not after the first way
    dataset = data.load_data(args.data, data_dir=args.data_dir)
    smallest = torch.bincount(dataset.splits["train"][1]).min()
    budgets = [budget for budget in BUDGETS if budget is None or budget < smallest]
    args.out.mkdir(parents=True, exist_ok=True)
    results, table = {}, [["way", "labels per class", "accuracy", "std", "seconds"]]
    print(f"{'':16}{'labels per class':>16}{'accuracy':>18}{'time':>10}")
    for way, command in commands(args).items():
        for budget in budgets:
            runs = [measure(command, args, budget, seed) for seed in range(args.seeds)]
            accuracies, seconds = zip(*runs)
            mean, std = 100 * statistics.mean(accuracies), 100 * statistics.stdev(accuracies)
            results[way, budget] = mean, std
            row = [way, budget or "all", f"{mean:.2f}", f"{std:.2f}"]
            table.append([*row, f"{statistics.mean(seconds):.0f}"])
            print("{:16}{:>16}{:>10} ± {:>4}%{:>8} s".format(*table[-1]), flush=True)
            write_table(args.out / "few_labels.csv", table)
    plot(results, budgets, args)
    print(f"wrote few_labels.csv and few_labels.png to {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
