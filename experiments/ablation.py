"""Test the paper's claims: change the block, and measure the accuracy (Figure 6, at small scale).

    python experiments/ablation.py     # letters, three seeds, the settings of train.py

    the paper's            linear bottlenecks, and shortcuts between them
    ReLU6 in bottlenecks   an activation after each projection (§3.2, Figure 6a)
    wide shortcuts         as many, between the wide ends of the blocks (§3.3, Figure 6b)
    no shortcuts           (Figure 6b)

A variant changes a network that is already built, but not its weights: all variants start with the
same weights and see the same images, on the CPU. The learning rate was chosen for the paper's
block. The best epoch is chosen on the validation split. The accuracy is that on the test split, or
on the validation split if there is no other. Mean and standard deviation (std) over seeds.
"""

import argparse
import copy
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from evaluate import write_table  # noqa: E402
from mobilenetv2 import MobileNetV2  # noqa: E402


class WideShortcuts(nn.Sequential):
    """Blocks with shortcuts between their wide ends: the sum of this and the last expansion.

    Depthwise convolution, narrow end and expansion lie between two wide ends, as in a ResNet block.
    Ten pairs of neighbours have expanded maps of the same shape: as many as the paper's shortcuts.
    """

    def forward(self, x):
        wide = None
        for block in self:
            expanded = block.expand(x)  # (N, tk, H, W)
            joined = wide is not None and wide.shape == expanded.shape
            wide = expanded + wide if joined else expanded
            x = block.project(block.depthwise(wide))
        return x


def change_nothing(model):
    pass


def add_activations(model):
    for block in model.blocks:
        block.project.activation = nn.ReLU6(inplace=True)


def widen_shortcuts(model):
    model.blocks = WideShortcuts(*model.blocks)


def remove_shortcuts(model):
    for block in model.blocks:
        block.use_residual = False


VARIANTS = {  # name: (function that changes the network, colour of its line)
    "the paper's": (change_nothing, "#0969da"),
    "ReLU6 in bottlenecks": (add_activations, "#bf8700"),
    "wide shortcuts": (widen_shortcuts, "#8250df"),
    "no shortcuts": (remove_shortcuts, "#8c959f"),
}


def train_network(model, dataset, epochs, seed):
    """Train as train.py does with its defaults, and keep the best weights in `model`.

    Returns the validation accuracy of each epoch.
    """
    groups = train.parameter_groups(model.parameters(), learning_rate=0.1, weight_decay=4e-5)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    batches, val_batches = dataset.batches("train", augmented=True), dataset.batches("val")
    scheduler = train.LambdaLR(optimizer, partial(train.cosine, steps=epochs * len(batches)))
    loss_function = partial(functional.cross_entropy, label_smoothing=0.1)
    accuracies = []
    for epoch in range(epochs):
        torch.manual_seed(hash((seed, epoch, 0)))
        model.train()
        train.train_epoch(model, batches, optimizer, scheduler, loss_function)
        accuracies.append(train.validate(model, val_batches)["val_top1"])
        print(f"epoch {epoch + 1}  validation accuracy {accuracies[-1]:.2%}", flush=True)
        if accuracies[-1] == max(accuracies):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return accuracies


def final_accuracy(model, dataset):
    """Return the accuracy on the test split, or on the validation split if there is no other."""
    split = "test" if "test" in dataset.splits else "val"
    return train.validate(model, dataset.batches(split))["val_top1"]


def measure(change, args, seed):
    """Train a changed network. Returns the validation accuracy per epoch, and the test accuracy."""
    dataset = data.load_data(args.data, data_dir=args.data_dir, batch_size=64)
    torch.manual_seed(seed)
    model = MobileNetV2(len(dataset.classes), args.width, output_stride=16)
    model.to(memory_format=data.MEMORY_FORMAT)
    change(model)
    curve = train_network(model, dataset, args.epochs, seed)
    return curve, final_accuracy(model, dataset)


def plot(curves, accuracies, args):
    """Draw validation accuracy per epoch, one line per variant; bars show the std over seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for index, (name, (_, colour)) in enumerate(VARIANTS.items()):
        columns = [[100 * value for value in column] for column in zip(*curves[name])]  # per epoch
        places = [epoch + 0.94 + 0.04 * index for epoch in range(args.epochs)]  # side by side
        label = "{}: test {:.1f} ± {:.1f}%".format(name, *accuracies[name])
        means, stds = [list(map(f, columns)) for f in (statistics.mean, statistics.stdev)]
        axes.errorbar(places, means, stds, fmt=".-", color=colour, capsize=3, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = f"{args.data}, width {args.width:g}: mean and std over {args.seeds} seeds"
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(args.out / "ablation.png", dpi=120)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", default="glyphs", help="dataset, or folder of images")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="downloads")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per network (default: 3)")
    parser.add_argument("--width", type=float, default=0.5, help="width multiplier (default: 0.5)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="results")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 2:
        parser.error("use --epochs 1 or more, and --seeds 2 or more")

    args.out.mkdir(parents=True, exist_ok=True)
    curves, accuracies, table = {}, {}, [["variant", "test accuracy", "std"]]
    for name, (change, _) in VARIANTS.items():
        print(f"\n{name}", flush=True)
        curves[name], tested = zip(*(measure(change, args, seed) for seed in range(args.seeds)))
        accuracies[name] = 100 * statistics.mean(tested), 100 * statistics.stdev(tested)
        table.append([name, *(f"{value:.2f}" for value in accuracies[name])])
        write_table(args.out / "ablation.csv", table)
    plot(curves, accuracies, args)
    print()
    for name, accuracy, std in table[1:]:
        print(f"{name:22}{accuracy:>7} ± {std}%")
    print(f"wrote ablation.csv and ablation.png to {args.out}")


if __name__ == "__main__":
    data.run(main)
