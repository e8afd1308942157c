"""Compare MobileNetV2 with ResNet18, the network of most courses: same data, same two stages.

    python experiments/resnet18.py --data mnist              # both learn letters, then MNIST
    python experiments/resnet18.py --data mnist --imagenet   # both start from torchvision's weights

The ImageNet weights are V2 for MobileNetV2, and V1 for ResNet18, which has no others. ResNet18 is
torchvision's (He et al., arXiv:1512.03385, Table 1), with its parts renamed for finetune.py. The
best epoch is chosen on the validation split. The accuracy is that on the test split, or on the
validation split if there is no other.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from ablation import RECIPE, final_accuracy, keep_best, train_network
from torch import nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import (  # noqa: E402
    BOTTLENECKS,
    CheckpointError,
    MobileNetV2,
    count_macs,
    count_parameters,
    load_checkpoint,
    replace_classifier,
)


class ResNet18(nn.Module):
    """torchvision's ResNet18 as .stem, .blocks (8), .head, .dropout and .classifier.

    small: leave out the first pooling, for images of 32 pixels, like output_stride=16.
    Shape: (N, 3, S, S) -> (N, num_classes).
    """

    def __init__(self, num_classes, small, weights=None):
        super().__init__()
        try:
            network = models.resnet18(weights=weights)
        except OSError as error:
            fix = f"download {weights.url} into '{torch.hub.get_dir()}/checkpoints'"
            raise data.DataError(f"no ImageNet weights ({error}): {fix}") from error
        pooling = nn.Identity() if small else network.maxpool
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, pooling)
        self.blocks = nn.Sequential(
            *network.layer1, *network.layer2, *network.layer3, *network.layer4
        )
        self.head = nn.Identity()  # the last block gives the 512 features
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(512, num_classes)
        self.arch = {"num_classes": num_classes}

    def features(self, x):
        x = self.head(self.blocks(self.stem(x)))  # (N, 512, S/32, S/32), or S/16 if small
        return x.mean(dim=(2, 3))

    def forward(self, x):
        return self.classifier(self.dropout(self.features(x)))


def transfer(model, preprocessing, args):
    """Run both stages of finetune.py. Returns the accuracy of the best epoch, and the seconds."""
    dataset = data.load_data(
        args.data,
        preprocessing,
        data_dir=args.data_dir,
        batch_size=64,  # the default of finetune.py
    )
    settings = argparse.Namespace(
        classifier_epochs=args.classifier_epochs,
        epochs=args.epochs,
        seed=args.seed,
        amp="off",
    )
    train.use_defaults(settings, finetune.DEFAULTS[dataset.kind])
    # The same share of the blocks for both networks. The defaults count those of MobileNetV2.
    blocks = sum(n for _, _, n, _ in BOTTLENECKS)
    settings.unfreeze = round(settings.unfreeze / blocks * len(model.blocks))
    replace_classifier(model, len(dataset.classes))
    history = []
    best = {}
    save = partial(keep_best, model, best)
    begun = time.perf_counter()
    finetune.train_classifier(model, dataset, settings, history, save)
    finetune.train_blocks(model, dataset, settings, history, save)
    seconds = time.perf_counter() - begun
    model.load_state_dict(best)
    return final_accuracy(model, dataset), seconds


def networks(args):
    """Yield the name of each network, the network, and the preprocessing of its pretraining."""
    small = args.image_size <= 64
    stride = 16 if small else 32
    source = data.PHOTO if args.imagenet else data.SMALL_IMAGE
    preprocessing = {
        "image_size": args.image_size,
        "mean": source["mean"],
        "std": source["std"],
    }
    torch.manual_seed(args.seed)
    if args.imagenet:
        ours, _ = load_checkpoint("imagenet", output_stride=stride)
        resnet = ResNet18(1000, small, models.ResNet18_Weights.IMAGENET1K_V1)
    else:
        letters = len(data.GLYPH_CLASSES)
        ours = MobileNetV2(letters, output_stride=stride)
        resnet = ResNet18(letters, small)
    for name, model in (("MobileNetV2", ours), ("ResNet18", resnet)):
        yield name, model.to(memory_format=data.MEMORY_FORMAT), preprocessing


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    epochs = cli.in_range(int, 1, 10**5)
    add("--data", default="mnist", help="dataset, or folder of images")
    add("--data-dir", type=Path, default=Path("datasets"), help="folder for downloads")
    add(
        "--imagenet",
        action="store_true",
        help="start from torchvision's ImageNet weights, not from letters",
    )
    add(
        "--image-size",
        type=cli.in_range(int, 8, 1024),
        default=32,
        help="image side in pixels",
    )
    add("--letter-epochs", type=epochs, default=2, help="epochs on the letters")
    add("--classifier-epochs", type=epochs, default=5, help="epochs of stage classifier")
    add("--epochs", type=epochs, default=2, help="epochs of stage blocks")
    add(
        "--seed",
        type=cli.in_range(int, 0, 10**6),
        default=0,
        help="seed of all random choices",
    )
    args = parser.parse_args()

    line = "{:<12} {:>9} {:>12} {:>14} {:>8}".format
    rows = [line("network", "accuracy", "parameters", "multiply-adds", "time")]
    for name, model, preprocessing in networks(args):
        print(f"\n{name}", flush=True)
        if not args.imagenet:
            letters = data.load_data("glyphs", batch_size=RECIPE["batch_size"])
            train_network(model, letters, args.letter_epochs, args.seed)
        accuracy, seconds = transfer(model, preprocessing, args)
        parameters = f"{count_parameters(model):,}"
        macs = f"{count_macs(model, args.image_size):,}"
        rows.append(line(name, f"{accuracy:.2%}", parameters, macs, f"{seconds:.0f} s"))
    print()
    print("\n".join(rows))


if __name__ == "__main__":
    cli.run(main, CheckpointError)
