"""Transfer a trained network to another data set, in two stages.

    python finetune.py                                   # letters (runs/train/best.pt) teach handwritten digits
    python finetune.py --data path/to/photos --checkpoint imagenet --image-size 160

Stage "head": the network is frozen and only a classifier is trained, on the feature vector of each image. Stage "blocks": the
last blocks are trained too, more carefully than the classifier. The first layers stay as they are: edges and strokes
are edges and strokes in any data set, and few labelled images would only spoil them. They give the same numbers for the
same picture in every epoch, so that what comes out of them can be kept (`Frozen`).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

import data
from mobilenetv2 import CheckpointError, load_pretrained, read_file, read_pretrained, replace_classifier
from train import Run, announce, begin, fit, parameter_groups

BACKBONE_RATE = 0.5  # learning rate of the last convolution, as a share of the classifier's
BLOCK_DECAY = 0.9  # that of each block, as a share of the rate of the layer behind it
KEEP_BYTES = 1e9  # of memory, for each split, to keep what comes out of the frozen layers; twice that while it is put together
# Both stages take AdamW (Loshchilov and Hutter, arXiv:1711.05101). What learning rate SGD bears depends on how large a network's
# features are; the steps of Adam do not depend on the size of the gradients, so that one default serves letters and photos.


@dataclass(kw_only=True)
class Frozen(data.Split):
    """A split as frozen layers hand it on: batches of maps (N, C, H, W) or of features (N, 1280), with labels (N,).

    images: the split that `layers` are shown. views: how many passes over it are kept for training, the first without
    augmentation; each epoch draws from all of them. With 0 nothing is kept, and every epoch has augmentations of its own.
    """

    layers: nn.Module
    views: int = 1
    kept: dict = field(default_factory=dict)

    def compute(self, epoch):
        for images, labels in self.images.batches(epoch):
            with torch.no_grad():  # no layer in front of the first that learns needs a gradient
                maps = self.layers(images)
            yield maps, labels  # outside, or the caller would have no gradients either

    def keep(self, epoch):
        """Maps and labels of a pass, on the CPU, computed once. Of several processes each does a share, and has them all."""
        if epoch not in self.kept:
            pairs = [(maps.cpu(), labels.cpu()) for maps, labels in self.compute(epoch)]
            self.kept[epoch] = [data.gather(torch.cat(parts)) for parts in zip(*pairs, strict=True)]
        return self.kept[epoch]

    def pool(self):
        """Maps and labels of all passes."""
        if "pool" not in self.kept:
            passes = [self.keep(view or None) for view in range(self.views)]  # None: as they are
            self.kept = {"pool": [torch.cat(parts) for parts in zip(*passes, strict=True)]}
        return self.kept["pool"]

    def batches(self, epoch=None):
        """As those of data.py: in order as they are, or for training, given the epoch's number."""
        if self.views == 0:
            yield from self.compute(epoch)
            return
        maps, labels = self.keep(None) if epoch is None else self.pool()
        shuffle = torch.Generator().manual_seed(data.mix(self.seed, epoch, "views"))
        order = torch.arange(len(maps)) if epoch is None else torch.randperm(len(maps), generator=shuffle)
        for indices in self.indices(epoch):
            indices = order[indices % len(order)]  # a single pass, over images as they are, has each once and no `repeats`
            yield maps[indices].to(self.device), labels[indices].to(self.device)


def freeze(layers, split, views=1):
    """`split` behind frozen `layers`, whose BatchNorm is in eval mode: an image gives the same in any batch."""
    shared = {"batch_size": split.batch_size, "seed": split.seed, "device": split.device, "repeats": split.repeats}
    return Frozen(images=split, labels=split.labels, layers=layers.eval(), views=views, **shared)


def divide(model, count):
    """Cut the network into front, backbone and head; one after the other, they are the whole of it.

        front       images (N, 3, S, S) -> maps (N, C, H, W)     what stays frozen in both stages: the stem, the first blocks
        backbone    maps                -> features (N, 1280)    the last `count` blocks (all: and the stem), the last convolution
        head        features            -> logits (N, classes)   dropout and classifier
    """
    layers = [model.stem, *model.blocks, model.head]
    cut = len(model.blocks) - count + 1 if count < len(model.blocks) else 0
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten()  # the .mean of MobileNetV2.features
    backbone = nn.Sequential(*layers[cut:], *pooling)
    return nn.Sequential(*layers[:cut]), backbone, nn.Sequential(model.dropout, model.classifier)


def views_that_fit(front, split, views):
    """How many passes over `split` can be kept in KEEP_BYTES, `views` at most, or 0: the first alone has no augmentation."""
    size = split.preprocessing["image_size"]
    with torch.no_grad():
        needed = front(torch.zeros(1, 3, size, size, device=split.device)).nbytes * split.epoch_size()
    room = int(KEEP_BYTES // needed)
    if room >= views:
        return views
    room = room if room > 1 else 0
    print(f"views kept: {room} of {views}, which would take {needed * views / 1e9:.1f} GB; 0: every epoch computes its own")
    return room


def train_head(run, backbone, head, train, val, args):
    """Stage "head": train the classifier on the features of the frozen network.

    Each image goes once through the 17 blocks, for 1280 numbers, and an epoch is one product of small matrices a batch: twenty
    cost hardly more than one. The price is that the classifier sees each image as it is, and no augmentation of it.
    """
    print("stage head: computing the features of all images, once", flush=True)
    train, val = freeze(backbone, train), freeze(backbone, val)
    optimizer = torch.optim.AdamW(parameter_groups(head.parameters(), args.learning_rate, args.weight_decay))
    fit(run, "head", head, [head], train, val, optimizer, args.head_epochs)


def block_groups(backbone, head, args):
    """Groups for the optimiser, from the input to the classifier: the nearer to the input, the lower the learning rate.

    First layers see what all images share, last layers what the old classes did (Yosinski et al., arXiv:1411.1792), and have
    the most to unlearn. Howard and Ruder (arXiv:1801.06146, §3.2) call this discriminative fine-tuning.
    """
    layers = [layer for layer in backbone if list(layer.parameters())]  # without the pooling
    rates = [args.learning_rate * BACKBONE_RATE * BLOCK_DECAY**depth for depth in reversed(range(len(layers)))]
    groups = []
    for layer, rate in (*zip(layers, rates, strict=True), (head, args.learning_rate)):
        groups += parameter_groups(layer.parameters(), rate, args.weight_decay)
    return groups


def train_blocks(run, backbone, head, train, val, args):
    """Stage "blocks": train the last blocks, the last convolution and the classifier, on the maps of the frozen front.

    BatchNorm stays in eval mode: it keeps the mean and deviation of the many images that the network was trained with,
    which the weights around it expect; of a batch of a few of yours they would be guesses. Its scale and shift do learn.
    --train-batch-norm: the statistics follow the new images, if these are many, or of quite another kind.
    """
    groups = block_groups(backbone, head, args)
    blocks = "the whole network" if len(run.model.blocks) <= args.unfreeze else f"the last {args.unfreeze} blocks and what follows"
    print(f"stage blocks: {blocks}, learning rates from {groups[0]['lr']:.1g} to {groups[-1]['lr']:g}", flush=True)
    trained = [backbone, head] if args.train_batch_norm else [head]
    fit(run, "blocks", nn.Sequential(backbone, head), trained, train, val, torch.optim.AdamW(groups), args.epochs)


def tune(run, model, dataset, args):
    """Both stages, or what is left of them in a run that was resumed; best.pt is then the best of both."""
    model.eval()
    front, backbone, head = divide(model, args.unfreeze)
    views = args.views
    if views is None:
        # What is in memory is augmented for next to nothing, and learns best from new images all the time (a loss of 0.19
        # instead of 0.21 on a third of the training digits, left out by writers); photos must be decoded, too.
        views = 4 if isinstance(dataset.train, data.FolderSplit) else 0
    train = freeze(front, dataset.train, views_that_fit(front, dataset.train, views))
    val = freeze(front, dataset.val, views_that_fit(front, dataset.val, 1))
    if run.state is None or run.state["stage"] == "head":
        train_head(run, backbone, head, train, val, args)
        # Stage "blocks" starts from the best head, and best.pt is replaced only by what is no worse.
        model.load_state_dict(read_file(args.out / "best.pt")["model"])
    if args.epochs:
        train_blocks(run, backbone, head, train, val, args)


def start(args, device):
    """Data set and network to start from: (Data, model). Raises CheckpointError or DataError."""
    source = read_pretrained(args.checkpoint)
    # The network goes on seeing images as it has learned to; whether they are grey is up to the new data.
    preprocessing = {key: source["preprocessing"][key] for key in ("image_size", "mean", "std")}
    dataset = data.load_for(args, preprocessing, device)
    model = load_pretrained(source, output_stride=args.output_stride)
    announce(args, dataset, device)
    arch = f"width {model.arch['width_mult']:g}, output stride {model.arch['output_stride']}"
    print(f"from {args.checkpoint}: stem, 17 blocks and last convolution, {arch}")
    if source["classes"] == dataset.classes:
        print(f"classifier: kept, it knows these {len(dataset.classes)} classes")
    else:
        replace_classifier(model, len(dataset.classes))
    return dataset, model.to(device, memory_format=data.memory_format(device))


def blocks_or_all(text):
    """The number of blocks that --unfreeze names."""
    return 17 if text == "all" else int(text)


def command_line():
    parser = data.command_line("Fine-tune a network on another data set.", "digits", "runs/finetune")
    data.add_training_options(parser, fewest_epochs=0)  # 0: only stage head
    parser.set_defaults(epochs=10, learning_rate=0.002, weight_decay=0.01, batch_size=64, schedule="cosine", patience=5)
    parser.add_argument("--checkpoint", default="runs/train/best.pt", help="to start from; or a torchvision .pth, or imagenet")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), help="None: as the checkpoint has it")
    data.add_number(parser, "--head-epochs", int, 1, 100_000, 20, "epochs of stage head")
    data.add_number(parser, "--unfreeze", blocks_or_all, 0, 17, 11, "last blocks to train in stage blocks; all: and the stem")
    text = "passes over the images that stage blocks keeps, augmented but the first; 0: new ones in every epoch; None: 4 of photos"
    data.add_number(parser, "--views", int, 0, 1000, None, text)
    parser.add_argument("--train-batch-norm", action="store_true", help="its statistics follow the new images")
    return parser


def main():
    args = command_line().parse_args()
    device = begin(args)
    dataset, model = start(args, device)
    run = Run(args, model, dataset)
    tune(run, model, dataset, args)
    run.finish()


if __name__ == "__main__":
    data.run(main, CheckpointError)
