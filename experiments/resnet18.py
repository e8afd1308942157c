"""MobileNetV2 beside ResNet18, the network of most courses: the same data, the same two stages of finetune.py.

    python experiments/resnet18.py --data mnist                # both learn letters first, then MNIST: nothing but MNIST is downloaded
    python experiments/resnet18.py --data mnist --imagenet     # both start from torchvision's ImageNet weights,
                                                               V2 for MobileNetV2, V1 for ResNet18, which has no other

ResNet18 is torchvision's (He et al., arXiv:1512.03385, Table 1) behind an adapter with the names of our network's parts: that is
all that finetune.py asks of a network. Accuracy is that of the best epoch (chosen on validation) on the test split, or
where there is none on the validation split.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from evaluate import predict, score  # noqa: E402
from mobilenetv2 import (  # noqa: E402
    CheckpointError,
    MobileNetV2,
    count_macs,
    count_parameters,
    load_pretrained,
    read_file,
    replace_classifier,
)


class ResNet18(nn.Module):
    """torchvision's ResNet18 with the parts that finetune.py divides: .stem, .blocks (8), .head, .dropout, .classifier.

    small: without the first pooling, for images of 32 pixels, as output_stride=16 is for MobileNetV2. Shape:
    (N, 3, S, S) -> (N, num_classes).
    """

    def __init__(self, num_classes, small, weights=None):
        super().__init__()
        try:
            network = models.resnet18(weights=weights)
        except OSError as error:
            folder = Path(torch.hub.get_dir(), "checkpoints")
            raise data.DataError(f"no ImageNet weights ({error}): fetch {weights.url} and put it into '{folder}'") from error
        pooling = nn.Identity() if small else network.maxpool
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, pooling)
        self.blocks = nn.Sequential(*network.layer1, *network.layer2, *network.layer3, *network.layer4)
        self.head = nn.Identity()  # its last block gives the 512 features
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(512, num_classes)
        self.arch = {"num_classes": num_classes}

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))  # (N, 512, S/32, S/32), or S/16 if small
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))


def learn_letters(model, args, folder):
    """Train `model` on the glyphs, as train.py does by default, for --letter-epochs."""
    options = ["--out", str(folder), "--seed", str(args.seed), "--epochs", str(args.letter_epochs)]
    settings = train.parse_arguments(options)
    train.train_network(settings, model, data.load_for(settings))
    model.load_state_dict(read_file(folder / "best.pt")["model"])


def transfer(model, preprocessing, args, folder):
    """Both stages. Returns the accuracy of the best epoch, and the seconds that both took."""
    options = ["--data", args.data, "--data-dir", str(args.data_dir), "--out", str(folder), "--seed", str(args.seed)]
    options += ["--head-epochs", str(args.head_epochs), "--epochs", str(args.epochs)]
    settings = finetune.command_line().parse_args(options)
    settings.unfreeze = round(settings.unfreeze / 17 * len(model.blocks))  # the same share of either network
    dataset = data.load_for(settings, preprocessing)
    replace_classifier(model, len(dataset.classes))
    run = train.Run(settings, model, dataset)
    begun = time.perf_counter()
    finetune.tune(run, model, dataset, settings)
    seconds = time.perf_counter() - begun
    model.load_state_dict(read_file(folder / "best.pt")["model"])
    return score(*predict(model, dataset.test or dataset.val))["top1"], seconds


def networks(args):
    """Yield each network's name, the network, and the preprocessing that it learned with."""
    small = args.image_size <= 64
    stride = 16 if small else 32
    torch.manual_seed(args.seed)
    if args.imagenet:
        preprocessing = {key: data.PREPROCESSING["flowers"][key] for key in ("mean", "std")}
        resnet = ResNet18(1000, small, models.ResNet18_Weights.IMAGENET1K_V1)
        pairs = ("MobileNetV2", load_pretrained("imagenet", output_stride=stride)), ("ResNet18", resnet)
    else:
        preprocessing = {key: data.SMALL[key] for key in ("mean", "std")}
        letters = len(data.GLYPH_CLASSES)
        pairs = ("MobileNetV2", MobileNetV2(letters, output_stride=stride)), ("ResNet18", ResNet18(letters, small))
    for name, model in pairs:
        yield name, model.to(memory_format=torch.channels_last), preprocessing | {"image_size": args.image_size}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="as finetune.py's")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="where downloads are, or go")
    parser.add_argument("--imagenet", action="store_true", help="start from torchvision's weights, not from letters")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side")
    parser.add_argument("--letter-epochs", type=int, default=2)
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="of stage blocks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name, model, preprocessing in networks(args):
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if not args.imagenet:
                learn_letters(model, args, Path(folder, "letters"))
            accuracy, seconds = transfer(model, preprocessing, args, Path(folder, "transfer"))
        parameters, macs = count_parameters(model), count_macs(model, args.image_size)
        rows.append((name, f"{accuracy:.2%}", f"{parameters:,}", f"{macs:,}", f"{seconds:.0f} s"))
    line = "{:<12} {:>9} {:>12} {:>14} {:>8}".format
    print("\n" + line("network", "accuracy", "parameters", "multiply-adds", "time"))
    print("\n".join(line(*row) for row in rows))


if __name__ == "__main__":
    data.run(main, CheckpointError)
