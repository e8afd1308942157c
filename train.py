"""Train MobileNetV2 from scratch.

    python train.py                                # letters (glyphs), nothing to download
    python train.py --data path/to/folder --width 1.0 --output-stride 32 --image-size 160

The loop is in `train_epoch`; around it stand the learning rate (`cosine`), what a run leaves behind (`Run`), and
`main`, which reads from top to bottom as the story of a training.

The recipe is SGD with Nesterov momentum and a cosine, which small data sets and few epochs ask for. The paper's own (§6.1) is
another: RMSProp, decay and momentum 0.9, learning rate 0.045 times 0.98 an epoch, batches of 96 on each of 16 GPUs. The
weight decay, 4e-5, is the paper's.
"""

import csv
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

import data
from evaluate import plot_history, predict, score
from mobilenetv2 import MobileNetV2, save_checkpoint

WARMUP = 0.1  # share of all steps


def cosine(step, steps):
    """Factor of the learning rate at `step` of `steps`: a linear warm-up to 1, then half a cosine down to 0.

    The warm-up (Goyal et al., arXiv:1706.02677, §2.2) spares a fresh network full steps while its gradients still change fast;
    the cosine is Loshchilov and Hutter's (arXiv:1608.03983, equation 5, without restarts).
    """
    warmup = WARMUP * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(parameters, learning_rate, weight_decay):
    """Two groups for the optimiser: weight decay for the weights of convolutions and linear layers, none for the rest.

    BatchNorm's scale and shift, and biases, are vectors, few and not what overfits (Goyal et al., §5.1, for BatchNorm).
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        groups[0 if parameter.dim() > 1 else 1]["params"].append(parameter)
    # base_rate: what the schedule multiplies. It is in the group so that groups may have different ones.
    return [group | {"lr": learning_rate, "base_rate": learning_rate} for group in groups if group["params"]]


def train_epoch(model, batches, optimizer, factors, label_smoothing, progress):
    """One pass over `batches`, an iterable of (inputs, labels). The caller decides which layers are in training mode.

    factors: for each step, what the schedule multiplies the learning rates with; progress(step) is called after each step.
    Returns {"train_loss", "train_top1"}: means over the epoch, the loss being what is minimised, label smoothing included.
    """
    loss_sum, right, count = 0.0, 0, 0
    for step, ((inputs, labels), factor) in enumerate(zip(batches, factors, strict=True), start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        logits = model(inputs)
        # cross_entropy applies the softmax itself: its input is logits. Smoothing asks for 1 - s on the true class and
        # shares s among all (Szegedy et al., arXiv:1512.00567, §7), so that logits need not grow for ever.
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Sums stay tensors until the end: .item() would make a GPU wait at every step.
        loss_sum += loss.detach() * len(labels)
        right += (logits.detach().argmax(dim=1) == labels).sum()
        count += len(labels)
        progress(step)
    return {"train_loss": float(loss_sum) / count, "train_top1": int(right) / count}


class Run:
    """What a run leaves in its folder: last.pt and log.csv after every epoch, best.pt when it is the best, curves.png.

    best.pt is what the next script takes: the epoch of the highest validation accuracy, and among equals the latest, which
    learned at the lowest rate. last.pt is the latest epoch, good or bad.
    """

    def __init__(self, folder, model, dataset):
        self.folder, self.model, self.dataset = Path(folder), model, dataset
        self.history = []
        self.best = 0.0
        self.started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin_stage(self, stage, epochs):
        """Begin a stage of `epochs` epochs; what the log calls them is `stage`."""
        self.stage, self.epochs, self.done, self.stage_started = stage, epochs, 0, time.perf_counter()

    def begin_epoch(self, images, steps):
        """Begin an epoch that trains on so many images in so many steps."""
        self.images, self.steps, self.epoch_started = images, steps, time.perf_counter()

    def save(self, name):
        save_checkpoint(self.folder / name, self.model, self.dataset.classes, self.dataset.preprocessing, self.history)

    def eta(self, part=0.0):
        """Time left in the stage, as its epochs so far and the `part` of the one that runs lead to expect."""
        done = self.done + part
        left = (time.perf_counter() - self.stage_started) / done * (self.epochs - done)
        return f"ETA {int(left) // 60}:{int(left) % 60:02d}"

    def progress(self, step):
        """A line that overwrites itself, on a terminal only: a file gets one line an epoch."""
        if sys.stdout.isatty():
            part = step / self.steps
            rate = part * self.images / (time.perf_counter() - self.epoch_started)
            where = f"{self.stage} {self.done + 1}/{self.epochs}  {part:4.0%}"
            print(f"\r{where}  {rate:.0f} images/s  {self.eta(part)} ", end="", flush=True)

    def end_epoch(self, row, seconds):
        """Record an epoch: its scores, and the seconds that its training took.

        Raises DataError, and writes nothing, when a loss is not finite.
        """
        if not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])):
            where = f"{self.stage} {self.done + 1}/{self.epochs}"
            raise data.DataError(f"the loss of {where} is not finite: lower --learning-rate (what was saved is kept)")
        self.done += 1
        row = {"epoch": len(self.history) + 1, "stage": self.stage} | row
        self.history.append(row)
        if row["val_top1"] >= self.best:
            self.best = row["val_top1"]
            self.save("best.pt")
        self.save("last.pt")
        # Seconds are in the log only: checkpoints of equal runs are equal.
        first = len(self.history) == 1
        with open(self.folder / "log.csv", "w" if first else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([[*row, "seconds"]] if first else [])
            writer.writerow([*row.values(), f"{seconds:.2f}"])
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        print(
            f"{clear}{self.stage} {self.done}/{self.epochs}"
            f"  train loss {row['train_loss']:.3f} top1 {row['train_top1']:.2%}"
            f"  val loss {row['val_loss']:.3f} top1 {row['val_top1']:.2%}  {self.images / seconds:.0f} images/s  {self.eta()}",
            flush=True,
        )

    def finish(self):
        plot_history(self.history, self.folder / "curves.png")
        print(f"best validation accuracy {self.best:.2%}, {time.perf_counter() - self.started:.0f} s")
        print(f"wrote best.pt, last.pt, log.csv and curves.png to {self.folder}")


def fit(run, stage, network, trained, train, val, optimizer, args, epochs):
    """Train `network` for some epochs and record each of them in `run`.

    Args:
        stage: what the log calls these epochs.
        trained: the modules that are in training mode (dropout drops, BatchNorm looks at the batch); all others are not.
        train, val: splits, in what form the network takes them.
        optimizer: its groups come from `parameter_groups`.
    """
    steps = train.steps()
    run.begin_stage(stage, epochs)
    for epoch in range(epochs):
        run.begin_epoch(train.epoch_size(), steps)
        network.eval()
        for module in trained:
            module.train()
        factors = [cosine(epoch * steps + step, epochs * steps) for step in range(steps)]
        row = train_epoch(network, train.batches(epoch), optimizer, factors, args.label_smoothing, run.progress)
        seconds = time.perf_counter() - run.epoch_started
        scores = score(*predict(network, val))
        run.end_epoch(row | {"val_loss": scores["loss"], "val_top1": scores["top1"]}, seconds)


def main():
    parser = data.command_line("Train MobileNetV2 from scratch.", "glyphs", "runs/train", batch_size=64)
    data.add_training_options(parser, epochs=5, learning_rate=0.1, weight_decay=4e-5)
    data.add_number(parser, "--width", float, 0.05, 4, 0.5, "width multiplier")
    text = "32 for photos, less for small images"
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), default=16, help=text)
    args = parser.parse_args()
    device = data.choose_device(args.device)
    torch.manual_seed(args.seed)

    dataset = data.load_for(args, device=device)
    print(
        f"{args.data}: {len(dataset.classes)} classes, {len(dataset.train)} training and {len(dataset.val)} validation"
        f" images of {dataset.preprocessing['image_size']} pixels, on {device}"
    )
    model = MobileNetV2(len(dataset.classes), args.width, output_stride=args.output_stride)
    model.to(device, memory_format=torch.channels_last)
    groups = parameter_groups(model.parameters(), args.learning_rate, args.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    run = Run(args.out, model, dataset)
    fit(run, "scratch", model, [model], dataset.train, dataset.val, optimizer, args, args.epochs)
    run.finish()
    print(f"next: python evaluate.py --checkpoint {shlex.quote(str(args.out / 'best.pt'))} {data.data_options(args)}")
    print(f"  or: python finetune.py --checkpoint {shlex.quote(str(args.out / 'best.pt'))} --data NAME_OR_FOLDER")


if __name__ == "__main__":
    data.run(main)
