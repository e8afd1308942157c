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

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ablation import final_accuracy
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402
from evaluate import write_table  # noqa: E402
from mobilenetv2 import CheckpointError, load_checkpoint  # noqa: E402

COLOURS = {
    "from scratch": "#8c959f",
    "classifier only": "#bf8700",
    "last 11 blocks": "#0969da",
    "whole network": "#8250df",
}
BUDGETS = (10, 50, None)  # labels per class; None: all. Skips those above the smallest class.


def commands(args):
    """Return the script and the special options of each way."""
    network = ["--width", str(args.width), "--output-stride", str(args.output_stride)]
    start = ["--checkpoint", args.checkpoint]
    epochs = ["--epochs", str(args.epochs)]
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
    if args.image_size is not None:
        options += ["--image-size", str(args.image_size)]
    if budget is not None:
        options += ["--per-class", str(budget)]
    path = Path(__file__).resolve().parent.parent / script
    with tempfile.TemporaryDirectory() as folder:
        full = [sys.executable, path, *options, "--out", folder]
        begun = time.perf_counter()
        if subprocess.run(full, stdout=subprocess.DEVNULL).returncode != 0:
            raise data.DataError(f"{script} failed: see the message above")
        seconds = time.perf_counter() - begun
        model, checkpoint = load_checkpoint(Path(folder, "best.pt"))
    dataset = data.load_data(args.data, checkpoint["preprocessing"], data_dir=args.data_dir)
    return final_accuracy(model, dataset), seconds


def draw_lines(axes, results, budgets):
    """Draw accuracy over the number of labels, one line per way; bars show the std over seeds."""
    for (way, colour), shift in zip(COLOURS.items(), (-0.06, -0.02, 0.02, 0.06)):
        means, stds = zip(*[results[way, budget] for budget in budgets])
        places = [position + shift for position in range(len(budgets))]
        axes.errorbar(places, means, stds, fmt=".-", color=colour, capsize=3, label=way)
    axes.set_xticks(range(len(budgets)), [str(budget or "all") for budget in budgets])
    axes.set(xlabel="labels per class", ylabel="accuracy (%)")
    axes.grid(alpha=0.3)


@data.picture_style()
def plot(results, budgets, args):
    """Draw the lines as a picture of their own."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_lines(axes, results, budgets)
    axes.set_title(f"{args.data}: mean and std over {args.seeds} seeds")
    axes.legend()
    figure.savefig(args.out / "few_labels.png", dpi=120)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    add("--data", default="digits", help="dataset, or folder of images")
    add("--data-dir", type=Path, default=Path("datasets"), help="folder for downloads")
    add("--checkpoint", default="runs/train/best.pt", help="start of finetune.py")
    add(
        "--image-size",
        type=cli.in_range(int, 8, 1024),
        help="image side in pixels (default: the scripts')",
    )
    add(
        "--epochs",
        type=cli.in_range(int, 1, 10**5),
        default=6,
        help="epochs of train.py, and of stage blocks in finetune.py",
    )
    add(
        "--width",
        type=cli.in_range(float, 0.05, 4),
        default=0.5,
        help="width multiplier of the network from scratch",
    )
    add(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        default=16,
        help="output stride of the network from scratch",
    )
    add("--seeds", type=cli.in_range(int, 2, 100), default=5, help="number of seeds")
    add("--out", type=Path, default=Path("runs/few_labels"), help="folder for the results")
    args = parser.parse_args()

    load_checkpoint(args.checkpoint)  # an unusable one fails now, not after the first way
    dataset = data.load_data(args.data, data_dir=args.data_dir)
    _, labels = dataset.splits["train"]
    smallest = labels.bincount().min()
    budgets = [budget for budget in BUDGETS if budget is None or budget < smallest]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    table = []
    print(f"{'':16}{'labels per class':>16}{'accuracy':>18}{'time':>10}")
    for way, command in commands(args).items():
        for budget in budgets:
            runs = [measure(command, args, budget, seed) for seed in range(args.seeds)]
            percent = [100 * accuracy for accuracy, _ in runs]
            mean = statistics.mean(percent)
            std = statistics.stdev(percent)
            results[way, budget] = mean, std
            row = {
                "way": way,
                "labels per class": budget or "all",
                "accuracy": f"{mean:.2f}",
                "std": f"{std:.2f}",
                "seconds": f"{statistics.mean(seconds for _, seconds in runs):.0f}",
            }
            table.append(row)
            print("{:16}{:>16}{:>10} ± {:>4}%{:>8} s".format(*row.values()), flush=True)
            write_table(args.out / "few_labels.csv", table)
    plot(results, budgets, args)
    print(f"wrote few_labels.csv and few_labels.png to {args.out}")


if __name__ == "__main__":
    cli.run(main, CheckpointError)
