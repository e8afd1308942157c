"""Train MobileNetV2 from scratch.

    python train.py                                # printed letters (glyphs), no download
    python train.py --data path/to/photos --recipe cosine --width 1.0 --output-stride 32
    python train.py --resume                       # continue an interrupted run
    torchrun --nproc-per-node 8 train.py ...       # on 8 GPUs, or in 8 processes on CPUs

`main` shows the whole training: each epoch trains, validates and saves. Terms used here:

    epoch       one pass over the training images (several passes for small datasets)
    warm-up     the first steps, in which the learning rate rises to its peak
    top1        share of images whose most probable class is correct
    best.pt     checkpoint of the last epoch within one standard error of the best validation top1
    last.pt     checkpoint of the latest epoch, with everything that --resume needs
"""

import copy
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import data
from evaluate import plot_history, predict, score, write_table
from mobilenetv2 import CheckpointError, MobileNetV2, load_checkpoint, save_checkpoint

DEFAULTS = {"data": "glyphs", "out": Path("runs/train"), "recipe": "small", "width": 0.5}
DEFAULTS |= {"output_stride": 16, "weight_decay": 4e-5}
RECIPE_OPTIONS = ("optimizer", "schedule", "learning_rate", "batch_size", "epochs")
RECIPES = {
    # For small images and few epochs; chosen on the validation letters.
    "small": ("sgd", "cosine", 0.1, 64, 3),
    # The paper, §6.1: 16 GPUs, each with updates of its own from batches of 96; no epochs given.
    "paper": ("rmsprop", "exponential", 0.045, 96, 300),
    # 72% on ImageNet in https://github.com/d-li14/mobilenetv2.pytorch, which differs from this
    # script: no warm-up, no Nesterov momentum, and weight decay also for BatchNorm.
    "cosine": ("sgd", "cosine", 0.05, 256, 150),
}


def train_epoch(model, batches, optimizer, scheduler, loss_function):
    """Train for one epoch. The caller chooses which layers are in training mode.

    Args:
        batches: iterable of (inputs, labels (N,)), for example a DataLoader.
        scheduler: from torch.optim.lr_scheduler; it steps after every batch.
        loss_function: (logits (N, C), labels (N,)) -> scalar.
    Returns {"train_loss", "train_top1"}, means over the images (of this process).
    """
    device = next(model.parameters()).device
    loss_sum, correct, count = torch.zeros((), device=device), 0, 0
    for inputs, labels in batches:
        inputs, labels = inputs.to(device), labels.to(device)
        logits = model(inputs)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        # Keep the sums on the device: `.item()` in every step would make a GPU wait.
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
    return {"train_loss": loss_sum.item() / count, "train_top1": correct.item() / count}


def validate(model, batches):
    """Return {"val_loss", "val_top1"}: cross-entropy, and share of correct predictions."""
    if data.PROCESSES > 1:
        for buffer in model.buffers():  # process 0 (rank 0) saves: all use its running statistics
            distributed.broadcast(buffer, 0)
    logits, labels = predict(model, batches)
    scores = score(logits, labels)
    sums = len(labels) * torch.tensor([scores["loss"], scores["top1"], 1], dtype=torch.double)
    if data.PROCESSES > 1:  # each process has validated its share
        distributed.all_reduce(sums)
    loss, correct, count = sums.tolist()
    return {"val_loss": loss / count, "val_top1": correct / count}


def main():
    args, last = parse_arguments("Train MobileNetV2 from scratch.", DEFAULTS)
    set_defaults(args, dict(zip(RECIPE_OPTIONS, RECIPES[args.recipe])))
    if args.epochs < 1:
        raise data.DataError(f"--epochs {args.epochs}: use at least 1")
    start(args)
    dataset = data.load_for(args)
    train_batches, val_batches = dataset.batches("train", augmented=True), dataset.batches("val")
    steps, classes = len(train_batches), len(dataset.classes)
    print(f"{args.data}: {classes} classes, {args.epochs} × {steps} steps, on {args.device}")
    model = MobileNetV2(classes, args.width, output_stride=args.output_stride)
    model.to(args.device, memory_format=data.MEMORY_FORMAT)
    wrapped = wrap(model, args)
    groups = parameter_groups(model.parameters(), args.learning_rate, args.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    if args.optimizer == "rmsprop":  # decay and momentum: §6.1; eps: TensorFlow's models/slim
        optimizer = torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, eps=1.0)
    factor = partial(cosine, steps=args.epochs * steps)
    if args.schedule == "exponential":
        factor = partial(exponential, steps_per_epoch=steps)
    scheduler = LambdaLR(optimizer, factor)  # multiplies the peak learning rate
    loss_function, history = make_loss(args), last["history"] if last else []
    if last:
        check_classes(last, dataset)
        restore(args, last, model, optimizer, scheduler)
    while len(history) < args.epochs:
        # A seed per epoch and process, for order, augmentation and dropout: --resume repeats them.
        torch.manual_seed(hash((args.seed, len(history), data.RANK)))
        model.train()
        row = train_epoch(wrapped, train_batches, optimizer, scheduler, loss_function)
        row |= validate(model, val_batches)
        row |= {"learning_rate": scheduler.get_last_lr()[-1]}  # at the end of the epoch
        history.append({"epoch": len(history) + 1, "stage": "scratch"} | row)
        save_epoch(args, model, dataset, history, optimizer, scheduler)
    finish(args, dataset, history)


# ------------------------------------------------------------------- optimizer, schedule and loss
def parameter_groups(parameters, learning_rate, weight_decay):
    """Make two optimizer groups: weight decay only for convolutions and linear layers.

    Biases have none, nor do BatchNorm's scale and shift (Goyal et al., arXiv:1706.02677, §5.1).
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        groups[0 if parameter.dim() > 1 else 1]["params"].append(parameter)
    return [group | {"lr": learning_rate} for group in groups if group["params"]]


def cosine(step, steps):
    """Compute the learning-rate factor: linear warm-up to 1, then a cosine down to 0.

    During the warm-up (Goyal et al., §2.2) the gradients of a new network change quickly. The
    cosine is equation 5 of Loshchilov and Hutter, arXiv:1608.03983, without restarts.
    """
    warmup = 0.1 * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = torch.tensor((step - warmup) / (steps - warmup), dtype=torch.double)
    return 0.5 * (1 + torch.cos(torch.pi * progress).item())


def exponential(step, steps_per_epoch):
    """Compute the learning-rate factor of the paper: 0.98 per epoch (§6.1)."""
    return 0.98 ** (step // steps_per_epoch)


def focal_loss(logits, labels, gamma=2.0):
    """FL = -(1 - p)^gamma · log p, with the probability p of the true class: (N, C), (N,) -> mean.

    A well classified image (p near 1) counts little, so that many easy images do not outweigh a
    few hard ones. Lin et al., arXiv:1708.02002, equation 4, with their gamma.
    """
    log_p = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (N,)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def dice_loss(logits, labels):
    """1 - D, with D = (2 Σ p·g + 1) / (Σ p² + Σ g² + 1) per class: (N, C), (N,) -> mean over C.

    The sums run over the batch; g is 1 for the true class, else 0. D is the overlap of predicted
    and true class, so a rare class counts as much as a frequent one. The 1 keeps D defined for an
    absent class. Milletari et al., arXiv:1606.04797, §3.
    """
    p, g = logits.softmax(dim=1), functional.one_hot(labels, logits.shape[1])  # (N, C) each
    overlap = (2 * (p * g).sum(dim=0) + 1) / (p.square().sum(dim=0) + g.sum(dim=0) + 1)  # (C,)
    return 1 - overlap.mean()


def make_loss(args):
    # Label smoothing s: 1 - s for the true class, and s shared by all classes, so that logits need
    # not grow without limit (Szegedy et al., arXiv:1512.00567, §7). cross_entropy applies softmax.
    cross_entropy = partial(functional.cross_entropy, label_smoothing=args.label_smoothing)
    return {"cross-entropy": cross_entropy, "focal": focal_loss, "dice": dice_loss}[args.loss]


# ------------------------------------------------------------------- mixed precision and torchrun
class MixedPrecision(nn.Module):
    """Run the forward pass of `network` in bfloat16 where autocast considers it safe."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x).float()


def wrap(network, args):
    """Add mixed precision (--amp) and the averaging of gradients (torchrun) around `network`."""
    if args.amp == "bfloat16":
        network = MixedPrecision(network)
    return DistributedDataParallel(network) if data.PROCESSES > 1 else network


def start(args):
    """Join the processes of torchrun, if there are any, and set the seed."""
    if data.PROCESSES > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        distributed.init_process_group()  # NCCL for tensors on GPUs, Gloo for the CPU
        if data.RANK > 0:
            sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    torch.manual_seed(args.seed)


# ------------------------------------------------------------------------ files of a run, options
def set_defaults(args, defaults):
    """Set the options that are None, that is, not set on the command line."""
    known = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(defaults | known)


def save_epoch(args, model, dataset, history, optimizer, scheduler):
    """Print the latest row of `history`; write log.csv, last.pt and, if chosen, best.pt."""
    row = history[-1]
    if not math.isfinite(row["train_loss"] + row["val_loss"]):
        raise data.DataError("the loss is not finite: lower --learning-rate and use --overwrite")
    # Within one standard error, √(p (1 - p) / n), the later epoch wins: often at a lower rate.
    best = max(row["val_top1"] for row in history)
    chosen = row["val_top1"] >= best - (best * (1 - best) / len(dataset.splits["val"][1])) ** 0.5
    text = "{stage} {epoch:3}  train loss {train_loss:.3f} top1 {train_top1:.2%}  "
    text += "val loss {val_loss:.3f} top1 {val_top1:.2%}" + ("  best.pt" if chosen else "")
    print(text.format(**row), flush=True)
    if data.RANK == 0:
        write_table(args.out / "log.csv", [list(row), *(row.values() for row in history)])
        about = (model, dataset.classes, dataset.preprocessing, history)
        if chosen:
            save_checkpoint(args.out / "best.pt", *about)
        # last.pt is written last: if the process ends before, --resume repeats the epoch.
        free = ("out", "data_dir", "device", "workers", "resume", "overwrite")  # may differ
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        state["settings"] = {key: value for key, value in vars(args).items() if key not in free}
        save_checkpoint(args.out / "last.pt", *about, epoch=len(history), **state)


def check_classes(last, dataset):
    if last["classes"] != dataset.classes:
        raise data.DataError("--resume: the classes of the data have changed; use --overwrite")


def restore(args, last, model, optimizer, scheduler):
    """Load the states in last.pt. A copy takes two steps, to find states that do not fit."""
    with data.reading(f"a state in '{args.out / 'last.pt'}' does not fit", "use --overwrite"):
        for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
            part.load_state_dict(last[name])
        trial, schedule = copy.deepcopy((optimizer, scheduler))  # the originals stay as saved
        trial.state.default_factory = None  # a missing state is a KeyError
        for parameter in (p for group in trial.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        trial.step()
        schedule.step()
        trial.step()


def finish(args, dataset, history):
    """Draw the curves, and print the files and the next command."""
    if data.RANK == 0:
        plot_history(history, args.out / "curves.png")
        if history[-1]["val_loss"] > math.log(len(dataset.classes)):
            print("warning: guessing has a lower loss; use more epochs or a lower --learning-rate")
        print(f"{args.out} has {', '.join(sorted(os.listdir(args.out)))}")
        options = f'--data "{args.data}" --out "{args.out}-evaluation"'
        print(f'next: python evaluate.py --checkpoint "{args.out}/best.pt" {options}')


def parse_arguments(description, defaults):
    """Parse the options. Returns (args, last.pt's checkpoint if the run is resumed, else None)."""
    shared = {"epochs": None, "batch_size": None, "learning_rate": None}
    shared |= {"loss": "cross-entropy", "label_smoothing": 0.1, "amp": "off"}
    shared |= {"per_class": None, "resume": False, "overwrite": False}
    args = data.parse_arguments(description, shared | defaults)
    path = args.out / "last.pt"
    if args.resume and path.exists():
        _, last = load_checkpoint(path)
        with data.reading(f"cannot use the settings of '{path}'", "use --overwrite"):
            own = {"recipe", "unfreeze"} & vars(args).keys()  # train.py's or finetune.py's option
            if not own <= {*last.get("settings", ())}:
                raise ValueError("this script did not write it")
            args = data.parse_arguments(description, shared | defaults, last["settings"])
            print(f"{path}: resumes after epoch {len(last['history'])}, with the run's settings")
        return args, last
    if path.exists() and not args.overwrite:
        fix = "use --resume, --overwrite or another --out"
        raise data.DataError(f"--out {args.out}: contains a run; {fix}")
    return args, None


if __name__ == "__main__":
    data.run(main, CheckpointError)
