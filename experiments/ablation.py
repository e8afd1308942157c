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

import copy
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from evaluate import predict, score, write_table  # noqa: E402
from mobilenetv2 import MobileNetV2  # noqa: E402

RECIPE = train.RECIPES["small"]  # the default of train.py


class WideShortcuts(nn.Sequential):
    """Blocks with shortcuts between their wide ends: the sum of this and the last expansion.

    Depthwise convolution, narrow end and expansion lie between two wide ends, as in a ResNet block.
    Ten pairs of neighbours have expanded maps of the same shape: as many as the paper's shortcuts.
    """

    def forward(self, x):
        wide = None
        for block in self:
            expanded = block.expand(x)  # (N, tk, H, W)
            if wide is not None and wide.shape == expanded.shape:
                expanded = expanded + wide
            wide = expanded
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


# change: function that changes a network. colour: of its line in the picture.
VARIANTS = {
    "the paper's": {"change": change_nothing, "colour": "#0969da"},
    "ReLU6 in bottlenecks": {"change": add_activations, "colour": "#bf8700"},
    "wide shortcuts": {"change": widen_shortcuts, "colour": "#8250df"},
    "no shortcuts": {"change": remove_shortcuts, "colour": "#8c959f"},
}


def keep_best(model, best, history, optimizer, scheduler):
    """Print the latest epoch. If it is the best one so far, copy the weights into the dict `best`.

    With `model` and `best` given, this is the function `save` of train.fit.
    """
    row = history[-1]
    print("{stage} {epoch}  validation accuracy {val_top1:.2%}".format(**row), flush=True)
    if row["val_top1"] == max(earlier["val_top1"] for earlier in history):
        best.update(copy.deepcopy(model.state_dict()))


def train_network(model, dataset, epochs, seed):
    """Train as train.py does with its defaults, and keep the best weights in `model`.

    Returns the validation accuracy of each epoch.
    """
    batches = dataset.batches("train", augmented=True)
    groups = train.parameter_groups(
        model.parameters(), RECIPE["learning_rate"], RECIPE["weight_decay"]
    )
    optimizer = train.make_optimizer(RECIPE["optimizer"], groups)
    scheduler = train.make_scheduler(
        RECIPE["schedule"], optimizer, len(batches), epochs, RECIPE["warmup"]
    )
    history = []
    best = {}
    train.fit(
        model,
        batches,
        dataset.batches("val"),
        optimizer,
        scheduler,
        train.make_loss(RECIPE["loss"], RECIPE["label_smoothing"]),
        history=history,
        epochs=epochs,
        save=partial(keep_best, model, best),
        seed=seed,
    )
    model.load_state_dict(best)
    return [row["val_top1"] for row in history]


def final_accuracy(model, dataset):
    """Return the accuracy on the test split, or on the validation split if there is no other."""
    split = "test" if "test" in dataset.splits else "val"
    return score(*predict(model, dataset.batches(split)))["top1"]


def measure(change, args, seed):
    """Train a changed network. Returns the validation accuracy per epoch, and the test accuracy."""
    dataset = data.load_data(
        args.data, data_dir=args.data_dir, batch_size=RECIPE["batch_size"]
    )
    torch.manual_seed(seed)
    model = MobileNetV2(len(dataset.classes), args.width, output_stride=16)
    model.to(memory_format=data.MEMORY_FORMAT)
    change(model)
    curve = train_network(model, dataset, args.epochs, seed)
    return curve, final_accuracy(model, dataset)


@data.picture_style()
def plot(curves, table, args):
    """Draw validation accuracy per epoch, one line per variant; bars show the std over seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(table):
        name = row["variant"]
        accuracy = float(row["test accuracy"])
        std = float(row["std"])
        percent = 100 * torch.tensor(curves[name])  # (seeds, epochs)
        places = torch.arange(args.epochs) + 0.94 + 0.04 * index  # side by side
        axes.errorbar(
            places.numpy(),
            percent.mean(dim=0).numpy(),
            percent.std(dim=0).numpy(),
            fmt=".-",
            color=VARIANTS[name]["colour"],
            capsize=3,
            label=f"{name}: test {accuracy:.1f} ± {std:.1f}%",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = f"{args.data}, width {args.width:g}: mean and std over {args.seeds} seeds"
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(args.out / "ablation.png", dpi=120)


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    add("--data", default="glyphs", help="dataset, or folder of images")
    add("--data-dir", type=Path, default=Path("datasets"), help="folder for downloads")
    add("--epochs", type=cli.in_range(int, 1, 10**5), default=3, help="epochs per network")
    add("--width", type=cli.in_range(float, 0.05, 4), default=0.5, help="width multiplier")
    add("--seeds", type=cli.in_range(int, 2, 100), default=3, help="number of seeds")
    add("--out", type=Path, default=Path("runs/ablation"), help="folder for the results")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    curves = {}
    table = []
    for name, variant in VARIANTS.items():
        print(f"\n{name}", flush=True)
        curves[name] = []
        percent = []
        for seed in range(args.seeds):
            curve, accuracy = measure(variant["change"], args, seed)
            curves[name].append(curve)
            percent.append(100 * accuracy)
        row = {
            "variant": name,
            "test accuracy": f"{statistics.mean(percent):.2f}",
            "std": f"{statistics.stdev(percent):.2f}",
        }
        table.append(row)
        write_table(args.out / "ablation.csv", table)
    plot(curves, table, args)
    print()
    for row in table:
        print("{variant:22}{test accuracy:>7} ± {std}%".format(**row))
    print(f"wrote ablation.csv and ablation.png to {args.out}")


if __name__ == "__main__":
    cli.run(main)
