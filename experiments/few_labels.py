"""What is transfer worth, and when? Four ways to train, with few labels and with many.

    python train.py && python experiments/few_labels.py              # the letters teach the digits
    python experiments/few_labels.py --data photos --checkpoint imagenet --image-size 160 --width 1.0 --output-stride 32

    from scratch    train.py: all weights start at random and learn from these images only
    frozen head     finetune.py --epochs 0: a new classifier on the features of the frozen network
    last blocks     finetune.py: then its last blocks, too
    everything      finetune.py --unfreeze all: then all blocks and the stem

All ways get the same labels, and in each epoch as many images as all labels would give: few are shown more often. The best
epoch is chosen on the validation split; the accuracy is that on the test split, or where there is none on the validation
split. Mean and standard deviation over seeds, which choose the labels, too; seconds are those of the whole command.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from evaluate import predict, score, write_table  # noqa: E402
from mobilenetv2 import CheckpointError, load_checkpoint, read_pretrained  # noqa: E402

COLOURS = {"from scratch": "#8c959f", "frozen head": "#bf8700", "last blocks": "#0969da", "everything": "#8250df"}
BUDGETS = (10, 50, None)  # labels a class; None: all. What the smallest class does not have is left out.


def commands(args):
    """Each way's script and the options that are its own."""
    network = ["--width", str(args.width), "--output-stride", str(args.output_stride)]
    start = ["--checkpoint", str(args.checkpoint)]
    return {
        "from scratch": ["train.py", *network, "--epochs", str(args.epochs)],
        "frozen head": ["finetune.py", *start, "--epochs", "0"],
        "last blocks": ["finetune.py", *start, "--epochs", str(args.epochs)],
        "everything": ["finetune.py", *start, "--epochs", str(args.epochs), "--unfreeze", "all"],
    }


def measure(command, args, budget, seed):
    """Accuracy of the best epoch, and seconds."""
    script, *options = command
    options += ["--data", args.data, "--data-dir", str(args.data_dir), "--seed", str(seed)]
    options += [] if args.image_size is None else ["--image-size", str(args.image_size)]
    options += [] if budget is None else ["--per-class", str(budget)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(__file__).resolve().parent.parent / script
        begun = time.perf_counter()
        if subprocess.run([sys.executable, path, *options, "--out", folder], stdout=subprocess.DEVNULL).returncode:
            raise data.DataError(f"{script} failed, see above")
        seconds = time.perf_counter() - begun
        model, checkpoint = load_checkpoint(Path(folder, "best.pt"))
    dataset = data.load_data(args.data, checkpoint["preprocessing"], data_dir=args.data_dir)
    return score(*predict(model, dataset.test or dataset.val))["top1"], seconds


def plot(results, budgets, args):
    """Accuracy over the number of labels, a line a way, with the deviation over seeds as a bar."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    positions = range(len(budgets))
    for (way, colour), shift in zip(COLOURS.items(), (-0.06, -0.02, 0.02, 0.06), strict=True):
        means, deviations = zip(*[results[way, budget] for budget in budgets], strict=True)
        places = [position + shift for position in positions]
        axes.errorbar(places, means, deviations, fmt=".-", color=colour, capsize=3, label=way)
    axes.set_xticks(positions, ["all" if budget is None else str(budget) for budget in budgets])
    title = f"{args.data}: mean and deviation over {args.seeds} seeds"
    axes.set(xlabel="labels a class", ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out / "few_labels.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as finetune.py's, and so are the next three")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"))
    parser.add_argument("--checkpoint", default="runs/train/best.pt")
    parser.add_argument("--image-size", type=int)
    data.add_number(parser, "--epochs", int, 1, 100_000, 10, "of train.py, and of finetune.py's second stage")
    parser.add_argument("--width", type=float, default=0.5, help="of the network from scratch")
    parser.add_argument("--output-stride", type=int, default=16, help="of that one, too")
    data.add_number(parser, "--seeds", int, 2, 1000, 3, "how many")
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"), help="folder for the table and the picture")
    args = parser.parse_args()

    read_pretrained(args.checkpoint)  # what is missing is told now, not after the first way
    smallest = torch.bincount(data.load_data(args.data, data_dir=args.data_dir).train.labels).min()
    budgets = [budget for budget in BUDGETS if budget is None or budget < smallest]
    args.out.mkdir(parents=True, exist_ok=True)
    results, table = {}, [["way", "labels a class", "accuracy", "deviation", "seconds"]]
    print(f"{'':14}{'labels a class':>16}{'accuracy':>18}{'time':>10}")
    for way, command in commands(args).items():
        for budget in budgets:
            accuracies, seconds = zip(*[measure(command, args, budget, seed) for seed in range(args.seeds)], strict=True)
            mean, deviation = 100 * statistics.mean(accuracies), 100 * statistics.stdev(accuracies)
            results[way, budget] = mean, deviation
            table.append([way, budget or "all", f"{mean:.2f}", f"{deviation:.2f}", f"{statistics.mean(seconds):.0f}"])
            print("{:14}{:>16}{:>10} ± {:>4}%{:>8} s".format(*table[-1]), flush=True)
            write_table(args.out / "few_labels.csv", table)
    plot(results, budgets, args)
    print(f"wrote few_labels.csv and few_labels.png to {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
