"""Fine-tune a trained network on another dataset, in two stages.

    python finetune.py                           # letters (runs/train/best.pt) to digits
    python finetune.py --data path/to/photos --checkpoint imagenet --image-size 160

Stage "classifier" freezes the backbone and trains the classifier on its features. The
classifier is new, unless the checkpoint has the same classes as the dataset. Stage "blocks"
also trains the head and the last blocks: 8 of 17 for photos, all layers for small images. The
layers before them stay frozen, because edges look the same in any photo. Terms used here:

    front, rest       the frozen and the trained part of the backbone in stage "blocks"
    frozen            without updates; BatchNorm keeps its running statistics
"""

import argparse
from functools import partial

import torch
from torch import nn

import cli
import data
import train
from evaluate import CHECKPOINT_HELP
from mobilenetv2 import CheckpointError, load_checkpoint, replace_classifier

# Settings by the kind of data. The command line overrides them.
DEFAULTS = {
    # Weights from ImageNet fit photos: change little.
    "photos": {
        "epochs": 10,  # of stage blocks
        "learning_rate": 0.002,  # of the classifier; the head has half of it
        "block_decay": 0.9,  # learning rate of a layer, relative to that of the layer after it
        "unfreeze": 8,  # blocks
        "train_batch_norm": False,
        "weight_decay": 0.01,
        "loss": "cross-entropy",
        "label_smoothing": 0.1,
    },
    # Weights from letters are only a start: train all layers.
    "small images": {
        "epochs": 6,
        "learning_rate": 0.005,
        "block_decay": 1.0,
        "unfreeze": 17,
        "train_batch_norm": True,
        "weight_decay": 0.01,
        "loss": "cross-entropy",
        "label_smoothing": 0.1,
    },
}
HEAD_RATE = 0.5  # learning rate of the head, relative to that of the classifier


def extract_features(backbone, batches):
    """Run frozen layers over all images once: batches -> outputs, labels (N,), on the CPU.

    The outputs of a backbone are features (N, 1280). Eval mode: they do not depend on the
    batch.
    """
    backbone.eval()
    device = next(backbone.parameters()).device
    features = []
    labels = []
    with torch.no_grad():
        for images, batch_labels in batches:
            features.append(backbone(images.to(device)).cpu())
            labels.append(batch_labels.cpu())
    return torch.cat(features), torch.cat(labels)


def freeze_batch_norm(module):
    """Keep the running statistics of all BatchNorm layers. Call it after `module.train()`.

    They come from many pretraining images. A small batch gives only a noisy estimate of them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def main():
    parser = make_parser()
    args = cli.parse(parser)
    last = train.read_last(parser, args)  # {} for a new run
    train.join_processes(args)
    torch.manual_seed(args.seed)
    source = args.out / "last.pt" if last else args.checkpoint
    model, checkpoint = load_checkpoint(source, args.output_stride)
    # Image size, mean and std as in pretraining; crop and channels are the dataset's.
    preprocessing = checkpoint["preprocessing"]
    kept = {name: preprocessing[name] for name in ("image_size", "mean", "std")}
    dataset = data.load_for(args, kept, classes=checkpoint["classes"])
    train.use_defaults(args, DEFAULTS[dataset.kind])
    print(f"{args.data}: {len(dataset.classes)} classes, on {args.device}; from {source}")
    if last:
        train.check_data(last, dataset)
    elif checkpoint["classes"] != dataset.classes:
        replace_classifier(model, len(dataset.classes))
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    history = last.get("history", [])
    save = partial(train.save_epoch, args, model, dataset)
    with train.reserved(args):
        train_classifier(model, dataset, args, history, save, last)
        train_blocks(model, dataset, args, history, save, last)
    train.finish(args, dataset, history)


def train_classifier(model, dataset, args, history, save, last=None):
    """Stage "classifier": train the classifier on features of the frozen backbone.

    A frozen backbone maps an image to the same features in every epoch, so they are computed
    once, without augmentation. last: last.pt of a resumed run.
    """
    if len(history) >= args.classifier_epochs:  # a resumed run has finished this stage
        return
    # model.features as a module, because extract_features needs .eval() and .parameters().
    backbone = nn.Sequential(
        model.stem, model.blocks, model.head, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    cached = {}  # split: (features, labels)
    for split in ("train", "val"):
        images = train.show_progress(dataset.batches(split), f"features ({split})")
        cached[split] = extract_features(backbone, images)
    _, processes = data.process_rank()
    size = dataset.batch_size // processes
    batches = data.Batches(*cached["train"], size, shuffle=True, repeats=dataset.repeats)
    val_batches = data.Batches(*cached["val"], size)
    optimizer = make_optimizer(model.classifier, [], args)
    scheduler = train.make_scheduler("cosine", optimizer, len(batches), args.classifier_epochs)
    if history:  # of a resumed run
        train.restore(args, last, model, optimizer, scheduler)
    train.fit(
        nn.Sequential(model.dropout, model.classifier),
        batches,
        val_batches,
        optimizer,
        scheduler,
        train.make_loss(args.loss, args.label_smoothing),
        history=history,
        epochs=args.classifier_epochs,
        save=save,
        stage="classifier",
        seed=args.seed,
        amp=args.amp,
    )


def train_blocks(model, dataset, args, history, save, last=None):
    """Stage "blocks": also train the last blocks and the head, on augmented images."""
    if args.epochs == 0:
        return
    front, rest = divide(model, args.unfreeze)
    front.requires_grad_(False)

    def training_mode(network):
        network.train()
        freeze_batch_norm(front)
        if not args.train_batch_norm:
            freeze_batch_norm(rest)

    batches = dataset.batches("train", augmented=True)
    optimizer = make_optimizer(model.classifier, rest, args)
    scheduler = train.make_scheduler("cosine", optimizer, len(batches), args.epochs)
    if len(history) > args.classifier_epochs:  # a resumed run has begun this stage
        train.restore(args, last, model, optimizer, scheduler)
    train.fit(
        model,
        batches,
        dataset.batches("val"),
        optimizer,
        scheduler,
        train.make_loss(args.loss, args.label_smoothing),
        history=history,
        epochs=args.epochs,
        save=save,
        stage="blocks",
        seed=args.seed,
        amp=args.amp,
        training_mode=training_mode,
    )


def divide(model, count):
    """Cut the backbone into two parts, which follow each other:

        front   images (N, 3, S, S) -> feature maps (N, C, H, W)      stem and first blocks
        rest    feature maps        -> feature maps (N, 1280, h, w)   last `count` blocks, head

    If `count` is the number of all blocks, the stem belongs to the rest, and the front is
    empty.
    """
    layers = [model.stem, *model.blocks, model.head]
    cut = 0
    if count < len(model.blocks):
        cut = 1 + len(model.blocks) - count
    return nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])


def make_optimizer(classifier, layers, args):
    """Make an optimizer whose learning rate never rises from the classifier to the input.

    The first layers fit all images, the last ones the old classes (Yosinski et al.,
    arXiv:1411.1792). "Discriminative fine-tuning" in Howard and Ruder, arXiv:1801.06146, §3.2.
    The optimizer is AdamW: Loshchilov and Hutter, arXiv:1711.05101.
    """
    rate = args.learning_rate
    groups = train.parameter_groups(classifier.parameters(), rate, args.weight_decay)
    rate *= HEAD_RATE
    for layer in reversed(layers):
        # In front, because log.csv has the learning rate of the last group.
        groups = train.parameter_groups(layer.parameters(), rate, args.weight_decay) + groups
        rate *= args.block_decay  # relative to the layer after it
    return torch.optim.AdamW(groups)


def make_parser():
    parser = cli.make_parser(__doc__, data="digits", out="runs/finetune", batch_size=64)
    parser.add_argument("--checkpoint", default="runs/train/best.pt", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        help="ratio of image to last feature map (default: the checkpoint's)",
    )
    parser.add_argument(
        "--classifier-epochs",
        type=cli.in_range(int, 1, 10**5),
        default=20,
        help="epochs of stage classifier",
    )
    parser.add_argument(
        "--unfreeze",
        type=cli.in_range(int, 0, 17),
        help="last blocks to train; 17 includes the stem (default: photos 8, else 17)",
    )
    parser.add_argument(
        "--train-batch-norm",
        action=argparse.BooleanOptionalAction,
        help="update BatchNorm's statistics (default: no for photos, else yes)",
    )
    train.add_training_options(parser)
    return parser


if __name__ == "__main__":
    cli.run(main, CheckpointError)
