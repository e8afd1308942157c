"""The paper's claims, live: what becomes of the accuracy when a block is built otherwise? Figure 6 of the paper, in small.

    python experiments/ablation.py                       # letters, three seeds, the settings of train.py
    python experiments/ablation.py --epochs 3            # the table and the picture in the README

    the paper's            linear bottlenecks, and shortcuts between them
    ReLU6 in bottlenecks   an activation after each projection (§3.2 and Figure 6a: it destroys information)
    wide shortcuts         as many, but between the expanded ends of the blocks, behind their ReLU6 (§3.3 and Figure 6b)
    no shortcuts           (Figure 6b)

Each changes a network that is built already, and none its weights: all begin with the same ones, and see the same images. The
best epoch is chosen on the validation split; the accuracy is that on the test split, or where there is none on the validation
split. All on the CPU, with the rate that was chosen for the paper's block. Mean and standard deviation over seeds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from evaluate import predict, score, write_table  # noqa: E402
from mobilenetv2 import CheckpointError, MobileNetV2, read_file  # noqa: E402


class WideShortcuts(nn.Sequential):
    """The blocks, with shortcuts between their wide ends: what a block's expansion gives is added to the next one's.

    Between two of them lie a depthwise convolution, the narrow end, and an expansion: a ResNet's block. Where the expanded maps
    of neighbours have the same shape there is one, which makes ten, as in the paper's network.
    """

    def forward(self, x):
        wide = None
        for block in self:
            expanded = block.expand(x)  # (N, tk, H, W)
            joined = wide is not None and wide.shape == expanded.shape
            wide = expanded + wide if joined else expanded
            x = block.project(block.depthwise(wide))
        return x


def leave(model):
    pass


def add_activations(model):
    for block in model.blocks:
        block.project.add_module("activation", nn.ReLU6(inplace=True))


def widen_shortcuts(model):
    model.blocks = WideShortcuts(*model.blocks)


def drop_shortcuts(model):
    for block in model.blocks:
        block.use_residual = False


VARIANTS = {  # how it is built, and the colour of its line
    "the paper's": (leave, "#0969da"),
    "ReLU6 in bottlenecks": (add_activations, "#bf8700"),
    "wide shortcuts": (widen_shortcuts, "#8250df"),
    "no shortcuts": (drop_shortcuts, "#8c959f"),
}


def measure(change, args, seed):
    """Train a network that `change` has changed. Returns the validation accuracy of each epoch, and the test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data", args.data, "--data-dir", str(args.data_dir), "--epochs", str(args.epochs), "--seed", str(seed)]
        settings = train.parse_arguments([*options, "--out", folder])
        dataset = data.load_for(settings)
        torch.manual_seed(seed)
        model = MobileNetV2(len(dataset.classes), args.width, output_stride=16).to(memory_format=torch.channels_last)
        change(model)
        history = train.train_network(settings, model, dataset).history
        model.load_state_dict(read_file(Path(folder, "best.pt"))["model"])
    return [row["val_top1"] for row in history], score(*predict(model, dataset.test or dataset.val))["top1"]


def plot(curves, accuracies, args):
    """Validation accuracy epoch by epoch, a line a variant, with the deviation over seeds as a bar."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, (_, colour)) in enumerate(VARIANTS.items()):
        columns = [[100 * value for value in column] for column in zip(*curves[name], strict=True)]  # (epochs, seeds)
        places = [epoch + 0.94 + 0.04 * index for epoch in range(args.epochs)]  # beside each other
        label = "{}: test {:.1f} ± {:.1f}%".format(name, *accuracies[name])
        means, deviations = map(statistics.mean, columns), map(statistics.stdev, columns)
        axes.errorbar(places, list(means), list(deviations), fmt=".-", color=colour, capsize=3, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = f"{args.data}, width {args.width:g}: mean and deviation over {args.seeds} seeds"
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(args.out / "ablation.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="glyphs", help="as train.py's, and so is the next")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"))
    data.add_number(parser, "--epochs", int, 1, 100_000, 5, "of train.py")
    data.add_number(parser, "--width", float, 0.05, 4, 0.5, "width multiplier")
    data.add_number(parser, "--seeds", int, 2, 1000, 3, "how many")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder for the table and the picture")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    curves, accuracies, table = {}, {}, [["variant", "test accuracy", "deviation"]]
    for name, (change, _) in VARIANTS.items():
        print(f"\n{name}", flush=True)
        curves[name], tested = zip(*[measure(change, args, seed) for seed in range(args.seeds)], strict=True)
        accuracies[name] = 100 * statistics.mean(tested), 100 * statistics.stdev(tested)
        table.append([name, *(f"{value:.2f}" for value in accuracies[name])])
        write_table(args.out / "ablation.csv", table)
    plot(curves, accuracies, args)
    print()
    for name, accuracy, deviation in table[1:]:
        print(f"{name:22}{accuracy:>7} ± {deviation}%")
    print(f"wrote ablation.csv and ablation.png to {args.out}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
