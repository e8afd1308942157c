"""Transfer a trained network to another data set, in two stages.

    python finetune.py                                   # letters (runs/train/best.pt) teach handwritten digits
    python finetune.py --data path/to/photos --checkpoint imagenet --image-size 160

Stage "head": the network is frozen and only a classifier is trained, on the feature vector of each image. Stage "blocks": the
last blocks are trained too, more carefully than the classifier. The first layers stay as they are: edges and strokes
are edges and strokes in any data set, and few labelled images would only spoil them.
"""

import shlex

import torch
from torch import nn

import data
from mobilenetv2 import CheckpointError, load_checkpoint, load_pretrained, read_pretrained, replace_classifier
from train import Run, begin, fit, parameter_groups

FEATURE_PASSES = 4  # stage "head" learns from the images as they are, and from three epochs of augmented ones
BACKBONE_RATE = 0.5  # learning rate of the blocks in stage "blocks", as a share of the classifier's
# The optimiser of both stages is AdamW (Loshchilov and Hutter, arXiv:1711.05101). How large the features are differs from
# network to network, and with it the learning rate that SGD can bear; Adam's steps do not depend on the size of the
# gradients, so that one default serves letters and photos alike.


class Features(data.Split):
    """A split like those of data.py, with feature vectors (N, 1280) for images."""

    def batches(self, epoch=None):
        for indices in self.indices(epoch):
            yield self.images[indices], self.labels[indices]


def compute_features(model, split, passes=1):
    """Show a split to the frozen network, once as it is, then for `passes` - 1 epochs of training, augmented.

    A frozen network is a fixed function: the same image gives the same 1280 numbers in every epoch. So they are computed
    once, and an epoch of stage "head" is a few small matrix products instead of a walk through 17 blocks. The
    augmented passes are what remains of augmentation here.
    """
    model.eval()  # BatchNorm uses, and keeps, the statistics that the network was trained with
    features, labels = [], []
    with torch.no_grad():
        for number in range(passes):
            for images, targets in split.batches(epoch=number if number > 0 else None):  # None: in order, as they are
                features.append(model.features(images))
                labels.append(targets)
    images, labels = (data.gather(torch.cat(parts).cpu()).to(split.device) for parts in (features, labels))
    return Features(images=images, labels=labels, batch_size=split.batch_size, seed=split.seed)


def train_head(run, model, dataset, args):
    """Stage "head": train the classifier on the features of the frozen network."""
    print("stage head: computing the features of all images, once", flush=True)
    train, val = compute_features(model, dataset.train, FEATURE_PASSES), compute_features(model, dataset.val)
    head = nn.Sequential(model.dropout, model.classifier)  # (N, 1280) -> (N, classes)
    optimizer = torch.optim.AdamW(parameter_groups(head.parameters(), args.learning_rate, args.weight_decay))
    fit(run, "head", head, [head], train, val, optimizer, args.head_epochs)


def unfreeze(model, count):
    """Freeze all but the last `count` blocks, the head and the classifier; 17 blocks are all there are, and free the stem, too.

    Returns the modules that are free, as two lists: backbone, classifier.
    """
    model.requires_grad_(False)
    backbone = [model.blocks[len(model.blocks) - count :], model.head]
    if count == len(model.blocks):
        backbone.append(model.stem)
    for module in (*backbone, model.classifier):
        module.requires_grad_(True)
    return nn.ModuleList(backbone), model.classifier


def train_blocks(run, model, dataset, args):
    """Stage "blocks": train the last blocks, the head and the classifier together, on the images themselves.

    Nothing in front of the first unfrozen block needs a gradient, so none is computed there. BatchNorm is frozen in front of
    it, too: eval mode keeps the mean and deviation that the next layers expect. In the unfrozen blocks it is in training mode
    and learns those of the new images, which are blurred digits now and no longer sharp letters.
    """
    backbone, classifier = unfreeze(model, args.unfreeze)
    groups = parameter_groups(backbone.parameters(), BACKBONE_RATE * args.learning_rate, args.weight_decay)
    groups += parameter_groups(classifier.parameters(), args.learning_rate, args.weight_decay)
    print(
        f"stage blocks: the last {args.unfreeze} of {len(model.blocks)} blocks, the head and the classifier", flush=True
    )
    trained = [backbone, model.dropout, classifier]
    fit(run, "blocks", model, trained, dataset.train, dataset.val, torch.optim.AdamW(groups), args.epochs)


def main():
    parser = data.command_line("Fine-tune a network on another data set.", "digits", "runs/finetune")
    data.add_training_options(parser)
    parser.set_defaults(epochs=10, learning_rate=0.002, weight_decay=0.01, batch_size=64, schedule="cosine")
    text = "start: a checkpoint, a torchvision .pth, or imagenet"
    parser.add_argument("--checkpoint", default="runs/train/best.pt", help=text)
    data.add_number(parser, "--head-epochs", int, 1, 100_000, 20, "epochs of stage head")
    data.add_number(parser, "--unfreeze", int, 0, 17, 14, "blocks that stage blocks trains")
    args = parser.parse_args()
    device = begin(args)

    start = read_pretrained(args.checkpoint)
    # The network goes on seeing images as it has learned to; whether they are grey is up to the new data.
    preprocessing = {key: start["preprocessing"][key] for key in ("image_size", "mean", "std")}
    dataset = data.load_for(args, preprocessing, device)
    model = load_pretrained(start)
    if start["classes"] != dataset.classes:
        replace_classifier(model, len(dataset.classes))
    model.to(device, memory_format=data.memory_format(device))
    print(
        f"{args.data}: {len(dataset.classes)} classes, {len(dataset.train)} training and {len(dataset.val)} validation"
        f" images of {dataset.preprocessing['image_size']} pixels, on {device}; from {args.checkpoint}, width"
        f" {model.arch['width_mult']:g}"
    )

    run = Run(args, model, dataset)
    if run.state is None or run.state["stage"] == "head":
        train_head(run, model, dataset, args)
        # Stage "blocks" starts from the best head, and best.pt is replaced only by something better.
        model.load_state_dict(load_checkpoint(args.out / "best.pt")[1]["model"])
    train_blocks(run, model, dataset, args)
    run.finish()
    print(f"next: python evaluate.py --checkpoint {shlex.quote(str(args.out / 'best.pt'))} {data.data_options(args)}")


if __name__ == "__main__":
    data.run(main, CheckpointError)
