"""Train MobileNetV2 from scratch.

    python train.py                                # printed letters (glyphs), no download
    python train.py --data path/to/photos --recipe cosine --width 1.0 --output-stride 32
    python train.py --resume                       # continue an interrupted run
    torchrun --nproc-per-node 8 train.py ...       # on 8 GPUs, or in 8 processes on CPUs

Read `train_epoch` (the batches of an epoch), `fit` (the epochs of a run) and `main`.
The optimizer, the schedule and the losses follow, then the files of a run. Two functions come
from evaluate.py: `predict` runs the network on all images of a split, and `score` compares its
logits with the labels. Terms used here:

    epoch       one pass over the training images (several passes for small datasets)
    warm-up     the first steps, in which the learning rate rises to its peak
    top1        share of images whose most probable class is correct
    rank        number of a process of torchrun; rank 0 prints and writes the files
    best.pt     the last epoch within one standard error of the best validation top1
    last.pt     the latest epoch, with everything that --resume needs
"""

import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import cli
import data
from evaluate import plot_history, predict, print_next, score, write_table
from mobilenetv2 import CheckpointError, MobileNetV2, load_checkpoint, save_checkpoint

# The settings of a run. The command line overrides them.
RECIPES = {
    # For small images and few epochs; chosen on the validation letters.
    "small": {
        "optimizer": "sgd",
        "schedule": "cosine",
        "learning_rate": 0.1,
        "batch_size": 64,
        "epochs": 3,
        "warmup": 0.1,  # share of all steps
        "weight_decay": 4e-5,
        "loss": "cross-entropy",
        "label_smoothing": 0.1,
    },
    # The other recipes replace some of these settings.
    #
    # The paper, §6.1: 16 GPUs with asynchronous updates, 96 images per batch. The paper does
    # not give the number of epochs, or say whether labels were smoothed. 300 is torchvision's
    # number (references/classification). The exponential schedule has no warm-up.
    "paper": {
        "optimizer": "rmsprop",
        "schedule": "exponential",
        "learning_rate": 0.045,
        "batch_size": 96,
        "epochs": 300,
    },
    # 72% on ImageNet in https://github.com/d-li14/mobilenetv2.pytorch, which differs from this
    # script: no warm-up, no Nesterov momentum, no label smoothing, and weight decay also for
    # BatchNorm.
    "cosine": {
        "learning_rate": 0.05,
        "batch_size": 256,
        "epochs": 150,
    },
}
# A resumed run takes these options from the command line, and all others from last.pt.
NOT_IN_LAST = ("out", "data_dir", "device", "workers", "resume", "overwrite")


class DivergedError(cli.UserError):
    """The loss is not finite."""


def train_epoch(model, batches, optimizer, scheduler, loss_function):
    """Train for one epoch. The caller chooses which layers are in training mode.

    Args:
        batches: iterable of (inputs, labels (N,)), for example a DataLoader.
        scheduler: from torch.optim.lr_scheduler; it steps after every batch.
        loss_function: (logits (N, C), labels (N,)) -> scalar.
    Returns {"train_loss", "train_top1"}, means over the images (of this process).
    """
    device = next(model.parameters()).device
    # Keep the sums on the device: `.item()` in every step would make a GPU wait.
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    count = 0
    for inputs, labels in batches:
        inputs = inputs.to(device)
        labels = labels.to(device)
        logits = model(inputs)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
    return {"train_loss": loss_sum.item() / count, "train_top1": correct.item() / count}


def fit(
    model,
    train_batches,
    val_batches,
    optimizer,
    scheduler,
    loss_function,
    *,
    history,
    epochs,
    save,
    stage="scratch",
    seed=0,
    amp="off",
    training_mode=nn.Module.train,
):
    """Train until `history` has `epochs` epochs of this stage: train, validate, record, save.

    Args:
        history: list of the rows of log.csv, one dict per epoch. New rows are appended.
        save: function of (history, optimizer, scheduler), called after each epoch.
        stage: name of the stage in log.csv. A run has one stage here, and two in finetune.py.
        training_mode: function that calls model.train(), and perhaps keeps frozen layers in
            eval mode.
    Raises DivergedError if the loss is not finite.
    """
    wrapped = wrap(model, amp)  # the same weights, with mixed precision and torchrun
    done = [row["stage"] for row in history].count(stage)  # in a resumed run
    if done >= epochs:
        print(f"stage {stage} is complete: nothing to train; for more epochs, use a new --out")
    for _ in range(done, epochs):
        epoch = len(history) + 1
        set_epoch_seed(seed, epoch)
        training_mode(model)
        row = {"epoch": epoch, "stage": stage}
        batches = show_progress(train_batches, f"{stage} {epoch:3}")
        row.update(train_epoch(wrapped, batches, optimizer, scheduler, loss_function))
        row.update(validate(model, val_batches))
        row["learning_rate"] = scheduler.get_last_lr()[-1]  # of the last group, at the end
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise DivergedError(
                "the loss is not finite: lower --learning-rate and use --overwrite"
            )
        history.append(row)
        save(history, optimizer, scheduler)


def validate(model, batches):
    """Return the scores of the validation images: {"val_loss", "val_top1", ...}."""
    logits, labels = predict_together(model, batches)
    return {f"val_{name}": value for name, value in score(logits, labels).items()}


def main():
    parser = cli.make_parser(__doc__, data="glyphs", out="runs/train")
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default="small",
        help="optimizer, schedule and other defaults",
    )
    parser.add_argument(
        "--width", type=cli.in_range(float, 0.05, 4), default=0.5, help="width multiplier"
    )
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        default=16,
        help="ratio of image to last feature map",
    )
    add_training_options(parser)
    args = cli.parse(parser)
    last = read_last(parser, args)  # {} for a new run
    # The recipe of a resumed run may be gone, but `args` have its settings.
    recipe = {**RECIPES["small"], **RECIPES.get(args.recipe, {})}
    use_defaults(args, recipe)
    if args.epochs < 1:  # finetune.py accepts 0
        parser.error(f"argument --epochs: {args.epochs}: use at least 1")
    join_processes(args)
    torch.manual_seed(args.seed)

    dataset = data.load_for(args, classes=last.get("classes"))
    train_batches = dataset.batches("train", augmented=True)
    val_batches = dataset.batches("val")
    steps = len(train_batches)
    num_classes = len(dataset.classes)
    print(
        f"{args.data}: {num_classes} classes, {args.epochs} × {steps} steps, on {args.device}"
    )
    if args.batch_size != recipe["batch_size"]:
        factor = args.batch_size / recipe["batch_size"]
        print(
            f"batch size: {factor:g} times the recipe's. Consider {factor:g} times its "
            "learning rate (Goyal et al., arXiv:1706.02677, §2.1)"
        )
    model = MobileNetV2(num_classes, args.width, output_stride=args.output_stride)
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    groups = parameter_groups(model.parameters(), args.learning_rate, args.weight_decay)
    optimizer = make_optimizer(args.optimizer, groups)
    scheduler = make_scheduler(args.schedule, optimizer, steps, args.epochs, args.warmup)
    loss_function = make_loss(args.loss, args.label_smoothing)
    history = last.get("history", [])
    if last:
        check_data(last, dataset)
        restore(args, last, model, optimizer, scheduler)
    with reserved(args):  # keeps other runs out of the folder
        fit(
            model,
            train_batches,
            val_batches,
            optimizer,
            scheduler,
            loss_function,
            history=history,
            epochs=args.epochs,
            save=partial(save_epoch, args, model, dataset),
            seed=args.seed,
            amp=args.amp,
        )
    finish(args, dataset, history)


# ---------------------------------------------------------------- optimizer, schedule and loss
def parameter_groups(parameters, learning_rate, weight_decay):
    """Make two optimizer groups: weight decay only for convolutions and linear layers.

    Biases have none, nor do BatchNorm's scale and shift (Goyal et al., arXiv:1706.02677,
    §5.1).
    """
    decayed = {"params": [], "lr": learning_rate, "weight_decay": weight_decay}
    others = {"params": [], "lr": learning_rate, "weight_decay": 0.0}
    for parameter in parameters:
        group = decayed if parameter.dim() > 1 else others
        group["params"].append(parameter)
    return [decayed, others]


def make_optimizer(name, groups):
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    if name == "rmsprop":  # decay and momentum: §6.1; eps: TensorFlow's models/slim
        return torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, eps=1.0)
    raise cli.UserError(f"unknown optimizer '{name}': use sgd or rmsprop")


def make_scheduler(name, optimizer, steps_per_epoch, epochs, warmup=0.1):
    """Make a scheduler that multiplies the peak learning rate by a factor after every step."""
    if name == "cosine":
        factor = partial(cosine, steps=epochs * steps_per_epoch, warmup=warmup)
    elif name == "exponential":
        factor = partial(exponential, steps_per_epoch=steps_per_epoch)
    else:
        raise cli.UserError(f"unknown schedule '{name}': use cosine or exponential")
    return LambdaLR(optimizer, factor)


def cosine(step, steps, warmup=0.1):
    """Compute the learning-rate factor: linear warm-up to 1, then a cosine down to 0.

    steps: number of steps of the run. warmup: share of them in which the factor rises. The
    gradients of a new network change quickly, and large first steps could make it diverge
    (Goyal et al., arXiv:1706.02677, §2.2). The cosine is equation 5 of Loshchilov and Hutter,
    arXiv:1608.03983, without restarts.
    """
    warmup_steps = warmup * steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def exponential(step, steps_per_epoch):
    """Compute the learning-rate factor of the paper: 0.98 per epoch (§6.1)."""
    return 0.98 ** (step // steps_per_epoch)


def focal_loss(logits, labels, gamma=2.0):
    """FL = -(1 - p)^gamma · log p, with the probability p of the true class.

    Shape: (N, C), (N,) -> mean over the images.

    A well classified image (p near 1) counts little, so that many easy images do not outweigh
    a few hard ones. Lin et al., arXiv:1708.02002, equation 4, with their gamma.
    """
    log_p = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (N,)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def dice_loss(logits, labels):
    """1 - D, with D = (2 Σ p·g + 1) / (Σ p² + Σ g² + 1) per class.

    Shape: (N, C), (N,) -> mean over the classes.

    The sums run over the batch; g is 1 for the true class, else 0. D is the overlap of
    predicted and true class, so a rare class counts as much as a frequent one. The 1 keeps D
    defined for an absent class. Milletari et al., arXiv:1606.04797, §3.
    """
    p = logits.softmax(dim=1)  # (N, C)
    g = functional.one_hot(labels, logits.shape[1])  # (N, C)
    common = (p * g).sum(dim=0)  # (C,)
    total = p.square().sum(dim=0) + g.sum(dim=0)  # (C,); g² = g, because g is 0 or 1
    overlap = (2 * common + 1) / (total + 1)
    return 1 - overlap.mean()


LOSSES = {
    "cross-entropy": functional.cross_entropy,  # applies softmax itself
    "focal": focal_loss,
    "dice": dice_loss,
}


def make_loss(name, label_smoothing=0.0):
    """Return the loss function: (logits (N, C), labels (N,)) -> scalar."""
    if name not in LOSSES:
        raise cli.UserError(f"unknown loss '{name}': use {', '.join(LOSSES)}")
    if name == "cross-entropy":
        # Label smoothing s: 1 - s for the true class, and s shared by all classes, so that
        # logits need not grow without limit (Szegedy et al., arXiv:1512.00567, §7).
        return partial(functional.cross_entropy, label_smoothing=label_smoothing)
    return LOSSES[name]


# ---------------------------------------------------------------- mixed precision and torchrun
class MixedPrecision(nn.Module):
    """Run the forward pass of `network` in bfloat16 where autocast considers it safe."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x).float()


def wrap(network, amp):
    """Add mixed precision (--amp) and averaged gradients (torchrun) around `network`."""
    if amp == "bfloat16":
        network = MixedPrecision(network)
    _, processes = data.process_rank()
    if processes > 1:
        network = DistributedDataParallel(network)
    return network


def predict_together(model, batches):
    """Like `predict`, but each process predicts its share, and all get the whole result."""
    _, processes = data.process_rank()
    if processes == 1:
        return predict(model, batches)
    for buffer in model.buffers():  # running statistics: those of rank 0, which saves them
        distributed.broadcast(buffer, 0)
    shares = [None] * processes
    distributed.all_gather_object(shares, predict(model, batches))
    logits, labels = zip(*shares)
    return torch.cat(logits), torch.cat(labels)


def join_processes(args):
    """Join the processes of torchrun, if there are any."""
    if not distributed.is_torchelastic_launched():
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    # NCCL for tensors on GPUs, Gloo for the CPU. timeout: for waiting for the others.
    distributed.init_process_group(timeout=timedelta(minutes=10))
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  only rank 0 prints


def show_progress(batches, title):
    """Yield the batches of an iterable with a length. Prints a line every 15 seconds."""
    begun = shown = time.monotonic()
    images = 0
    for number, (inputs, labels) in enumerate(batches, start=1):
        yield inputs, labels
        images += len(labels)
        now = time.monotonic()
        if now - shown > 15:
            shown = now
            rate = images / (now - begun)
            print(
                f"{title}  {number} of {len(batches)} batches, {rate:.0f} images/s", flush=True
            )


def set_epoch_seed(seed, epoch):
    """Set a seed per epoch and process, for order, augmentation and dropout.

    So --resume repeats them. All seeds differ for fewer than 100,000 epochs and 1,000
    processes.
    """
    rank, _ = data.process_rank()
    torch.manual_seed(100_000_000 * seed + 1_000 * epoch + rank)


# --------------------------------------------------------------------- files of a run, options
def add_training_options(parser):
    """Add the options that train.py and finetune.py share."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add(
        "--epochs",
        type=cli.in_range(int, 0, 10**5),
        help="epochs; finetune.py: of stage blocks (default: by recipe or dataset)",
    )
    add(
        "--learning-rate",
        type=cli.in_range(float, 0, 100),
        help="peak learning rate (default: by recipe or dataset)",
    )
    add(
        "--weight-decay",
        type=cli.in_range(float, 0, 1),
        help="weight decay of convolutions and linear layers (default: by recipe or dataset)",
    )
    add(
        "--loss",
        choices=LOSSES,
        help="focal: for hard images; dice: for rare classes (default: by recipe or dataset)",
    )
    add(
        "--label-smoothing",
        type=cli.in_range(float, 0, 1),
        help="share of the target for all classes (default: by recipe or dataset)",
    )
    add(
        "--amp",
        choices=("off", "bfloat16"),
        default="off",
        help="mixed-precision type for the forward pass",
    )
    add(
        "--per-class",
        type=cli.in_range(int, 1, 10**6),
        help="training images per class (default: all)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the run in --out with its settings, or start it",
    )
    add("--overwrite", action="store_true", help="replace the run in --out")


def use_defaults(args, defaults):
    """Set the options that are None or absent: those that the command line does not set."""
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def read_last(parser, args):
    """Return last.pt of a resumed run, or {}. `args` get the run's settings."""
    path = args.out / "last.pt"
    if args.overwrite or not path.exists():
        return {}
    refuse_to_replace(args)
    _, last = load_checkpoint(path)
    settings = last.get("settings", {})
    missing = vars(args).keys() - settings.keys() - set(NOT_IN_LAST)
    if missing:
        raise cli.UserError(
            f"cannot use the settings of '{path}' (this script did not write it, "
            f"or an earlier version (no {min(missing)})); use another --out"
        )
    if args.data != parser.get_default("data"):
        settings["data"] = args.data  # it may have moved
    for name, value in settings.items():
        given = getattr(args, name, None)
        if given not in (value, parser.get_default(name)):
            option = name.replace("_", "-")
            print(f"--{option} {given} is ignored: a resumed run keeps its settings")
    vars(args).update(settings)
    print(f"{path}: resumes after epoch {len(last['history'])}, with the run's settings")
    return last


def refuse_to_replace(args):
    if (args.out / "last.pt").exists() and not (args.resume or args.overwrite):
        fix = "use --resume, --overwrite or another --out"
        raise cli.UserError(f"--out {args.out}: contains a run; {fix}")


@contextmanager
def reserved(args):
    """Create the folder of a run, and keep other runs out of it until the end.

    Raises UserError if another run writes there, and OSError if the folder cannot be written.
    """
    rank, _ = data.process_rank()
    if rank > 0:  # rank 0 does it
        yield
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ".lock"
    lock = open(path, "w")  # noqa: SIM115  open until the end
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        problem = f"--out {args.out}: another run writes there"
        raise cli.UserError(f"{problem}; wait for its end, or use another --out") from error
    except OSError:
        pass  # a network disk without locks
    try:
        refuse_to_replace(args)  # another run may have ended since the start
        if args.overwrite:  # else --resume would continue the old run, if this one ends early
            for name in ("last.pt", "best.pt", "log.csv"):
                (args.out / name).unlink(missing_ok=True)
        yield
    finally:
        lock.close()
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            args.out.rmdir()


def check_data(last, dataset):
    """Compare the data of a resumed run with those of its earlier epochs. Raises DataError."""
    if last["classes"] != dataset.classes:
        raise data.DataError("--resume: the classes of the data have changed; use --overwrite")
    before = last.get("data", {})
    for split, (_, labels) in dataset.splits.items():
        if before.get(split, len(labels)) != len(labels):
            raise data.DataError(
                f"--resume: {split} had {before[split]} images, and has {len(labels)} now; "
                "restore them, or use --overwrite"
            )


def restore(args, last, model, optimizer, scheduler):
    """Load the states in last.pt. Raises CheckpointError for one that does not fit."""
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for name, part in parts.items():
        try:
            part.load_state_dict(last[name])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            path = args.out / "last.pt"
            raise CheckpointError(
                f"'{path}': its {name} does not fit ({error}); use --overwrite"
            ) from error


def save_epoch(args, model, dataset, history, optimizer, scheduler):
    """Print the latest row of `history`; write log.csv, last.pt and, if chosen, best.pt.

    An epoch is chosen if its accuracy is within one standard error of the best accuracy p:
    √(p (1 - p) / n) for n validation images. So the later of two similar epochs wins, because
    its learning rate is usually lower.
    """
    row = history[-1]
    _, val_labels = dataset.splits["val"]
    best = max(earlier["val_top1"] for earlier in history)
    standard_error = math.sqrt(best * (1 - best) / len(val_labels))
    chosen = row["val_top1"] >= best - standard_error
    text = (
        "{stage} {epoch:3}  train loss {train_loss:.3f} top1 {train_top1:.2%}  "
        "val loss {val_loss:.3f} top1 {val_top1:.2%}"
    )
    if chosen:
        text += "  best.pt"
    print(text.format(**row), flush=True)
    rank, _ = data.process_rank()
    if rank > 0:
        return
    write_table(args.out / "log.csv", history)
    contents = (model, dataset.classes, dataset.preprocessing, history)
    about = {"data": {"name": args.data, **data.describe_training(dataset)}}
    if chosen:
        save_checkpoint(args.out / "best.pt", *contents, **about)
    # last.pt is written last: if the process ends before, --resume repeats the epoch.
    settings = {name: value for name, value in vars(args).items() if name not in NOT_IN_LAST}
    save_checkpoint(
        args.out / "last.pt",
        *contents,
        **about,
        epoch=len(history),
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
        settings=settings,
    )


def finish(args, dataset, history):
    """Draw the curves, and print the files and the next command."""
    rank, _ = data.process_rank()
    if rank > 0:
        return
    plot_history(history, args.out / "curves.png")
    if history[-1]["val_loss"] > math.log(len(dataset.classes)):
        print("warning: guessing has a lower loss; use more epochs or a lower --learning-rate")
    print(f"{args.out} has {', '.join(sorted(os.listdir(args.out)))}")
    best = args.out / "best.pt"
    print_next("evaluate.py", checkpoint=best, data=args.data, out=f"{args.out}-evaluation")


if __name__ == "__main__":
    cli.run(main, CheckpointError)
