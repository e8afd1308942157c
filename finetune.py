"""Fine-tune a trained network on another dataset, in two stages.

    python finetune.py                                   # letters (runs/train/best.pt) to digits
    python finetune.py --data path/to/photos --checkpoint imagenet --image-size 160

Stage "classifier" freezes the backbone and trains a new classifier on its features. Stage "blocks"
also trains the last blocks, or all. With photos the first layers stay frozen, because edges look
the same in any photo, and their output can be cached. Terms used here:

    front             the part of the backbone that stays frozen in stage "blocks"
    feature maps      output of the front (N, C, H, W)
    frozen            without updates; BatchNorm keeps its running statistics
"""

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
DEFAULTS |= {"output_stride": None, "classifier_epochs": 20, "patience": 5, "batch_size": 64}
DEFAULTS |= {"weight_decay": 0.01, "unfreeze": None, "views": 4, "train_batch_norm": None}
# The dataset decides. ImageNet fits other photos: change little. Letters taught less: train all.
PHOTOS = {"epochs": 10, "learning_rate": 0.002, "block_decay": 0.9, "unfreeze": 11}
SMALL_IMAGES = {"epochs": 6, "learning_rate": 0.005, "block_decay": 1.0, "unfreeze": 17}
SMALL_IMAGES |= {"train_batch_norm": True}
HEAD_RATE = 0.5  # learning rate of the head, relative to that of the classifier
CACHE_BYTES = 1e9  # size of the largest cache; building it needs twice as much memory

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
    in_memory = isinstance(dataset.splits["train"][0], torch.Tensor)
    train.set_defaults(args, SMALL_IMAGES if in_memory else PHOTOS)
    print(f"{args.data}: {len(dataset.classes)} classes, on {args.device}; from {source}")
    if last:
        train.check_classes(last, dataset)
    elif checkpoint["classes"] != dataset.classes:
        replace_classifier(model, len(dataset.classes))
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    front, _, classifier = parts = divide(model, args.unfreeze)
    front.requires_grad_(False)
    loss_function, history = train.make_loss(args), last["history"] if last else []
    plain_maps = None  # the front's feature maps of the plain images (no augmentation), if cached
    for stage, epochs in (("classifier", args.classifier_epochs), ("blocks", args.epochs)):
        if train.is_finished(history, stage, epochs, args.patience):
            continue
        if fits_in_cache(front, dataset, args.views):
            plain_maps = plain_maps or plain_outputs(front, dataset)
        torch.manual_seed(args.seed)  # a resumed run caches the same augmented images
        prepared = prepare_stage(stage, parts, dataset, args.views, plain_maps)
        network, tuned, train_batches, val_batches = prepared
        optimizer = torch.optim.AdamW(layer_groups(tuned, classifier, args))  # arXiv:1711.05101
        scheduler = LambdaLR(optimizer, partial(train.cosine, steps=epochs * len(train_batches)))
        if last and history[-1]["stage"] == stage:
            optimizer.load_state_dict(last["optimizer"])
            scheduler.load_state_dict(last["scheduler"])
        wrapped = train.wrap(network, args)
        while not train.is_finished(history, stage, epochs, args.patience):
            torch.manual_seed(hash((args.seed, len(history), data.RANK)))
            network.train()
            freeze_batch_norm(front if args.train_batch_norm else network)
            row = train.train_epoch(wrapped, train_batches, optimizer, scheduler, loss_function)
            row |= train.validate(network, val_batches)
            row |= {"learning_rate": scheduler.get_last_lr()[-1]}
            history.append({"epoch": len(history) + 1, "stage": stage} | row)
            train.save_epoch(args, model, dataset, history, optimizer, scheduler)
    train.finish(args, history)

def divide(model, count):
    """Cut the network into three parts, which follow each other:

        front        images (N, 3, S, S) -> feature maps (N, C, H, W)   stem and first blocks
        rest         feature maps        -> features (N, 1280)          last `count` blocks, head
        classifier   features            -> logits (N, num_classes)     dropout, linear layer

    If `count` is the number of all blocks, the stem belongs to the rest, and the front is empty.
    """
    layers = [model.stem, *model.blocks, model.head]
    cut = len(model.blocks) - count + 1 if count < len(model.blocks) else 0
    rest = nn.Sequential(*layers[cut:], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers[:cut]), rest, nn.Sequential(model.dropout, model.classifier)

def layer_groups(tuned, classifier, args):
    """Make optimizer groups whose learning rate never rises from the classifier to the input.

    The first layers fit all images, the last ones the old classes (Yosinski et al.,
    arXiv:1411.1792). "Discriminative fine-tuning" in Howard and Ruder, arXiv:1801.06146, §3.2.
    """
    rate, decay = args.learning_rate, args.weight_decay
    groups = train.parameter_groups(classifier.parameters(), rate, decay)
    rate *= HEAD_RATE
    for layer in reversed([layer for layer in tuned if list(layer.parameters())]):  # no pooling
        groups = train.parameter_groups(layer.parameters(), rate, decay) + groups
        rate *= args.block_decay  # relative to the layer after it
    return groups

def prepare_stage(stage, parts, dataset, views, plain_maps):
    """Return (network, trained layers before the classifier, training and validation batches)."""
    front, rest, classifier = parts
    if stage == "classifier":
        backbone = rest if plain_maps else nn.Sequential(front, rest)
        features = plain_outputs(backbone, dataset, plain_maps)
        return classifier, (), *cache(None, dataset, 1, features)
    if plain_maps:
        return nn.Sequential(rest, classifier), rest, *cache(front, dataset, views, plain_maps)
    batches = dataset.batches("train", augmented=True), dataset.batches("val")
    return nn.Sequential(front, rest, classifier), rest, *batches

def plain_outputs(layers, dataset, inputs=None):
    """Run frozen layers over the plain train and val images, or over earlier outputs (`inputs`)."""
    batches = [dataset.batches(split) for split in ("train", "val")]
    if inputs:
        batches = [zip(maps.split(64), labels.split(64)) for maps, labels in inputs]
    return [extract_features(layers, some) for some in batches]

def cache(layers, dataset, views, plain):
    """Cache outputs of frozen layers. Returns (training batches, validation batches).

    plain: their `plain_outputs`. views - 1 augmented epochs are added; an epoch draws from all.
    """
    passes = [dataset.batches("train", augmented=True) for _ in range(views - 1)]
    outputs, labels = zip(plain[0], *(extract_features(layers, batches) for batches in passes))
    cached = TensorDataset(torch.cat(outputs), torch.cat(labels))
    size = dataset.batch_size // data.PROCESSES
    steps = len(dataset.batches("train", augmented=True))
    order = BatchSampler(RandomSampler(cached, num_samples=steps * size), size, drop_last=True)
    train_batches = DataLoader(cached, batch_size=None, sampler=order)  # `order` yields batches
    return train_batches, DataLoader(TensorDataset(*plain[1]), size)

def fits_in_cache(front, dataset, views):
    """Tell whether to cache maps: only of photos, as images in memory are augmented quickly."""
    images, size = dataset.splits["train"][0], dataset.preprocessing["image_size"]
    if isinstance(images, torch.Tensor) or len(front) == 0:
        return False
    maps = front(next(front.parameters()).new_zeros(1, 3, size, size))
    return 0 < maps.nbytes * len(images) * dataset.repeats * views <= CACHE_BYTES

if __name__ == "__main__":
    data.run(main, CheckpointError)
