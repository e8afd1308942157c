"""Fine-tune a trained network on another dataset, in two stages.

    python finetune.py                                   # letters (runs/train/best.pt) to digits
    python finetune.py --data path/to/photos --checkpoint imagenet --image-size 160

Stage "classifier" freezes the backbone and trains a new classifier on its features. Stage "blocks"
also trains the head and the last blocks: 8 of 17 for photos, all layers for small images. The
layers before them stay frozen, because edges look the same in any photo. Terms used here:

    front, rest       the frozen and the trained part of the backbone in stage "blocks"
    frozen            without updates; BatchNorm keeps its running statistics
"""

import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import data
import train
from mobilenetv2 import CheckpointError, load_checkpoint, replace_classifier

DEFAULTS = {"data": "digits", "out": Path("runs/finetune"), "checkpoint": "runs/train/best.pt"}
DEFAULTS |= {"output_stride": None, "classifier_epochs": 20, "batch_size": 64}
DEFAULTS |= {"weight_decay": 0.01, "unfreeze": None, "train_batch_norm": None}
# Weights from ImageNet fit photos: change little. Weights from letters: train all layers.
# block_decay: learning rate of a layer, relative to that of the layer after it.
PHOTOS = {"epochs": 10, "learning_rate": 0.002, "block_decay": 0.9, "unfreeze": 8}
SMALL_IMAGES = {"epochs": 6, "learning_rate": 0.005, "block_decay": 1.0, "unfreeze": 17}
SMALL_IMAGES |= {"train_batch_norm": True}
HEAD_RATE = 0.5  # learning rate of the head, relative to that of the classifier


def extract_features(backbone, batches):
    """Run frozen layers over all images once: batches -> outputs, labels (N,), on the CPU.

    The outputs of a backbone are features (N, 1280). Eval mode: they do not depend on the batch.
    """
    backbone.eval()
    device, pairs = next(backbone.parameters()).device, []
    with torch.no_grad():
        for images, labels in batches:
            pairs.append((backbone(images.to(device)).cpu(), labels.cpu()))
    features, labels = zip(*pairs)
    return torch.cat(features), torch.cat(labels)


def freeze_batch_norm(module):
    """Keep the running statistics of all BatchNorm layers. Call it after `module.train()`.

    They come from many pretraining images. A small batch gives only a noisy estimate of them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def main():
    args, last = train.parse_arguments("Fine-tune a trained network.", DEFAULTS)
    train.start(args)
    source = args.out / "last.pt" if last else args.checkpoint
    model, checkpoint = load_checkpoint(source, args.output_stride)
    # Image size, mean and std as in pretraining; crop and channels are the dataset's.
    known = {key: checkpoint["preprocessing"][key] for key in ("image_size", "mean", "std")}
    dataset = data.load_for(args, known)
    train.set_defaults(args, SMALL_IMAGES if dataset.augment else PHOTOS)  # photos: augment is None
    print(f"{args.data}: {len(dataset.classes)} classes, on {args.device}; from {source}")
    if last:
        train.check_classes(last, dataset)
    elif checkpoint["classes"] != dataset.classes:
        replace_classifier(model, len(dataset.classes))
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    front, rest = divide(model, args.unfreeze)
    front.requires_grad_(False)
    loss_function, history = train.make_loss(args), last["history"] if last else []
    for stage, epochs in (("classifier", args.classifier_epochs), ("blocks", args.epochs)):
        remaining = epochs - sum(row["stage"] == stage for row in history)
        if remaining < 1:
            continue
        if stage == "classifier":
            network, tuned = nn.Sequential(model.dropout, model.classifier), ()
            train_batches, val_batches = cache_features(nn.Sequential(front, rest), dataset)
        else:
            network, tuned, val_batches = model, rest, dataset.batches("val")
            train_batches = dataset.batches("train", augmented=True)
        groups = layer_groups(tuned, model.classifier, args)
        optimizer = torch.optim.AdamW(groups)  # Loshchilov and Hutter, arXiv:1711.05101
        scheduler = LambdaLR(optimizer, partial(train.cosine, steps=epochs * len(train_batches)))
        if last and history[-1]["stage"] == stage:
            train.restore(args, last, model, optimizer, scheduler)
        wrapped = train.wrap(network, args)
        for _ in range(remaining):
            torch.manual_seed(hash((args.seed, len(history), data.RANK)))
            network.train()
            freeze_batch_norm(front if args.train_batch_norm else network)  # network: all layers
            batches = show_progress(train_batches, f"{stage} {len(history) + 1:3}")
            row = train.train_epoch(wrapped, batches, optimizer, scheduler, loss_function)
            row |= train.validate(network, val_batches)
            row |= {"learning_rate": scheduler.get_last_lr()[-1]}  # the classifier's
            history.append({"epoch": len(history) + 1, "stage": stage} | row)
            train.save_epoch(args, model, dataset, history, optimizer, scheduler)
    train.finish(args, dataset, history)


def divide(model, count):
    """Cut the backbone into two parts, which follow each other:

        front   images (N, 3, S, S) -> feature maps (N, C, H, W)      stem and first blocks
        rest    feature maps        -> feature maps (N, 1280, h, w)   last `count` blocks, head

    If `count` is the number of all blocks, the stem belongs to the rest, and the front is empty.
    """
    layers = [model.stem, *model.blocks, model.head]
    cut = len(model.blocks) - count + 1 if count < len(model.blocks) else 0
    return nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])


def layer_groups(tuned, classifier, args):
    """Make optimizer groups whose learning rate never rises from the classifier to the input.

    The first layers fit all images, the last ones the old classes (Yosinski et al.,
    arXiv:1411.1792). "Discriminative fine-tuning" in Howard and Ruder, arXiv:1801.06146, §3.2.
    """
    rate, decay = args.learning_rate, args.weight_decay
    groups = train.parameter_groups(classifier.parameters(), rate, decay)
    rate *= HEAD_RATE
    for layer in reversed(tuned):
        groups = train.parameter_groups(layer.parameters(), rate, decay) + groups
        rate *= args.block_decay  # relative to the layer after it
    return groups


def cache_features(backbone, dataset):
    """Return training and validation batches of features (N, 1280), without augmentation.

    A frozen backbone maps an image to the same features in every epoch: compute them once.
    """
    backbone, cached = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten()), []
    for split in ("train", "val"):
        batches = show_progress(dataset.batches(split), f"features ({split})")
        cached.append(TensorDataset(*extract_features(backbone, batches)))
    size, count = dataset.batch_size // data.PROCESSES, len(cached[0]) * dataset.repeats
    order = RandomSampler(cached[0], num_samples=count)
    batches = BatchSampler(order, size, drop_last=count >= size)  # an item is a batch: faster
    return DataLoader(cached[0], batch_size=None, sampler=batches), DataLoader(cached[1], size)


def show_progress(batches, title):
    """Yield the batches of a DataLoader. Prints a line every 15 seconds."""
    begun = shown = time.monotonic()
    images = 0
    for number, (inputs, labels) in enumerate(batches, start=1):
        yield inputs, labels
        images, now = images + len(labels), time.monotonic()
        if now - shown > 15:
            shown, rate = now, images / (now - begun)
            print(f"{title}  {number} of {len(batches)} batches, {rate:.0f} images/s", flush=True)


if __name__ == "__main__":
    data.run(main, CheckpointError)
