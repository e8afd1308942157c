"""Compare MobileNetV2 with ResNet18, the network of most courses: same data, same two stages.

    python experiments/resnet18.py --data mnist              # both learn letters, then MNIST
    python experiments/resnet18.py --data mnist --imagenet   # both start from torchvision's weights

The ImageNet weights are V2 for MobileNetV2, and V1 for ResNet18, which has no others. ResNet18 is
torchvision's (He et al., arXiv:1512.03385, Table 1), with its parts renamed for finetune.py. The
best epoch is chosen on the validation split. The accuracy is that on the test split, or on the
validation split if there is no other.
"""

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
from ablation import final_accuracy, train_network
from torch import nn
from torch.nn import functional
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import (  # noqa: E402
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
        groups = (network.layer1, network.layer2, network.layer3, network.layer4)
        self.blocks = nn.Sequential(*(block for group in groups for block in group))
        self.head = nn.Identity()  # the last block gives the 512 features
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(512, num_classes)
        self.arch = {"num_classes": num_classes}

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))  # (N, 512, S/32, S/32), or S/16 if small
        return self.classifier(self.dropout(x.mean(dim=(2, 3))))


def transfer(model, preprocessing, args):
    """Run both stages of finetune.py. Returns the accuracy of the best epoch, and the seconds."""
    options = {"data_dir": args.data_dir, "batch_size": finetune.DEFAULTS["batch_size"]}
    dataset = data.load_data(args.data, preprocessing, **options)
    recipe = finetune.SMALL_IMAGES if dataset.augment else finetune.PHOTOS
    settings = argparse.Namespace(**finetune.DEFAULTS | recipe)
    replace_classifier(model, len(dataset.classes))
    begun, accuracies = time.perf_counter(), []
    share = settings.unfreeze / 17  # the same for both networks
    front, rest = finetune.divide(model, round(share * len(model.blocks)))
    front.requires_grad_(False)
    loss_function = partial(functional.cross_entropy, label_smoothing=0.1)
    for stage, epochs in (("classifier", args.classifier_epochs), ("blocks", args.epochs)):
        if stage == "classifier":
            network, tuned = nn.Sequential(model.dropout, model.classifier), ()
            batches, val_batches = finetune.cache_features(nn.Sequential(front, rest), dataset)
        else:
            network, tuned, val_batches = model, rest, dataset.batches("val")
            batches = dataset.batches("train", augmented=True)
        groups = finetune.layer_groups(tuned, model.classifier, settings)
        optimizer = torch.optim.AdamW(groups)
        scheduler = train.LambdaLR(optimizer, partial(train.cosine, steps=epochs * len(batches)))
        for epoch in range(epochs):
            torch.manual_seed(hash((args.seed, len(accuracies), 0)))
            network.train()
            finetune.freeze_batch_norm(front if settings.train_batch_norm else network)
            train.train_epoch(network, batches, optimizer, scheduler, loss_function)
            accuracies.append(train.validate(network, val_batches)["val_top1"])
            print(f"{stage} {epoch + 1}  validation accuracy {accuracies[-1]:.2%}", flush=True)
            if accuracies[-1] == max(accuracies):
                best = copy.deepcopy(model.state_dict())
    seconds = time.perf_counter() - begun
    model.load_state_dict(best)
    return final_accuracy(model, dataset), seconds


def networks(args):
    """Yield the name of each network, the network, and the preprocessing of its pretraining."""
    small, source = args.image_size <= 64, data.PHOTOS if args.imagenet else data.SMALL
    stride = 16 if small else 32
    preprocessing = {key: source[key] for key in ("mean", "std")} | {"image_size": args.image_size}
    torch.manual_seed(args.seed)
    if args.imagenet:
        ours, _ = load_checkpoint("imagenet", output_stride=stride)
        resnet = ResNet18(1000, small, models.ResNet18_Weights.IMAGENET1K_V1)
    else:
        letters = len(data.GLYPH_CLASSES)
        ours, resnet = MobileNetV2(letters, output_stride=stride), ResNet18(letters, small)
    for name, model in (("MobileNetV2", ours), ("ResNet18", resnet)):
        yield name, model.to(memory_format=data.MEMORY_FORMAT), preprocessing


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", default="mnist", help="dataset, or folder of images")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="downloads")
    text = "start from torchvision's ImageNet weights, not from letters"
    parser.add_argument("--imagenet", action="store_true", help=text)
    parser.add_argument("--image-size", type=int, default=32, help="image side (default: 32)")
    text = "epochs on the letters (default: 2)"
    parser.add_argument("--letter-epochs", type=int, default=2, help=text)
    text = "epochs of stage classifier (default: 5)"
    parser.add_argument("--classifier-epochs", type=int, default=5, help=text)
    text = "epochs of stage blocks (default: 2)"
    parser.add_argument("--epochs", type=int, default=2, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    args = parser.parse_args()
    if min(args.letter_epochs, args.classifier_epochs, args.epochs) < 1:
        parser.error("use 1 or more epochs in each stage")

    rows = []
    for name, model, preprocessing in networks(args):
        print(f"\n{name}", flush=True)
        if not args.imagenet:
            letters = data.load_data("glyphs", batch_size=64)
            train_network(model, letters, args.letter_epochs, args.seed)
        accuracy, seconds = transfer(model, preprocessing, args)
        parameters, macs = count_parameters(model), count_macs(model, args.image_size)
        rows.append((name, f"{accuracy:.2%}", f"{parameters:,}", f"{macs:,}", f"{seconds:.0f} s"))
    line = "{:<12} {:>9} {:>12} {:>14} {:>8}".format
    print("\n" + line("network", "accuracy", "parameters", "multiply-adds", "time"))
    print("\n".join(line(*row) for row in rows))


if __name__ == "__main__":
    data.run(main, CheckpointError)
