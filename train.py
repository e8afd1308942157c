"""Train MobileNetV2 from scratch.

    python train.py                                # letters (glyphs), nothing to download
    python train.py --data path/to/folder --recipe cosine --width 1.0 --output-stride 32 --image-size 160
    python train.py --resume                       # goes on where a run was interrupted
    torchrun --nproc-per-node 8 train.py ...       # on 8 GPUs, or in 8 processes on CPUs

The loop is `train_epoch`; `Run` is what a run leaves behind; `main` is the story of a training, from top to bottom.
"""

import math
import os
import shlex
import sys
import time
from functools import partial

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import data
from evaluate import plot_history, predict, score, write_table
from mobilenetv2 import CheckpointError, MobileNetV2, load_checkpoint, save_checkpoint

# --recipe chooses one; every option given beside it overrides its own. All have a weight decay of 4e-5, as the paper (§6.1).
RECIPES = {
    # For small images and few epochs; chosen on the validation letters.
    "small": {"optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.1, "batch_size": 64, "epochs": 5},
    # The paper, §6.1: RMSProp with decay and momentum of 0.9, batches of 96 (on each of 16 GPUs). The epochs are not given there.
    "paper": {"optimizer": "rmsprop", "schedule": "exponential", "learning_rate": 0.045, "batch_size": 96, "epochs": 300},
    # Rate, batch, epochs and cosine of https://github.com/d-li14/mobilenetv2.pytorch, which reports 72% on ImageNet with them;
    # the warm-up, Nesterov's momentum and BatchNorm without weight decay are added here, its augmentation is another one.
    "cosine": {"optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.05, "batch_size": 256, "epochs": 150},
}
WARMUP = 0.1  # share of all steps
DECAY = 0.98  # of the learning rate, an epoch (§6.1)


def cosine(step, steps):
    """Factor of the learning rate at `step` of `steps`: a linear warm-up to 1, then half a cosine down to 0.

    The warm-up (Goyal et al., arXiv:1706.02677, §2.2) spares a fresh network full steps while its gradients still change fast;
    the cosine is Loshchilov and Hutter's (arXiv:1608.03983, equation 5, without restarts).
    """
    warmup = WARMUP * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def schedule(name, epoch, epochs, steps):
    """Factors of the learning rate for the `steps` steps of an epoch (from 0), by 'cosine' or 'exponential'."""
    if name == "exponential":
        return [DECAY**epoch] * steps
    return [cosine(epoch * steps + step, epochs * steps) for step in range(steps)]


def focal_loss(logits, labels, gamma=2.0):
    """FL = -(1 - p)^gamma · log p, p being the probability of the true class; (N, C), (N,) -> the mean of N.

    What is recognised already (p near 1) hardly counts, so that few hard images are not drowned by many easy ones.
    Lin et al., arXiv:1708.02002, equation 4, with their gamma.
    """
    log_p = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]  # (N,)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def dice_loss(logits, labels):
    """1 - D, D = (2 Σ p·g + 1) / (Σ p² + Σ g² + 1) of each class, sums over the batch, g being 1 for the true class, else 0.

    D is the overlap of what is called a class with what is one: a rare class counts as much as a frequent one. Shapes
    (N, C), (N,) -> the mean over C. Milletari et al., arXiv:1606.04797, §3; the 1 keeps it defined for an absent class.
    """
    p, g = logits.softmax(dim=1), functional.one_hot(labels, logits.shape[1])  # (N, C) each
    overlap = (2 * (p * g).sum(dim=0) + 1) / (p.square().sum(dim=0) + g.sum(dim=0) + 1)  # (C,)
    return 1 - overlap.mean()


def choose_loss(args):
    """The function (logits (N, C), labels (N,)) -> loss that --loss names."""
    # PyTorch's applies the softmax itself. Smoothing asks for 1 - s on the true class and shares s among all
    # (Szegedy et al., arXiv:1512.00567, §7), so that logits need not grow for ever.
    cross_entropy = partial(functional.cross_entropy, label_smoothing=args.label_smoothing)
    return {"cross-entropy": cross_entropy, "focal": focal_loss, "dice": dice_loss}[args.loss]


def parameter_groups(parameters, learning_rate, weight_decay):
    """Two groups for the optimiser: weight decay for the weights of convolutions and linear layers, none for the rest.

    BatchNorm's scale and shift, and biases, are vectors, few and not what overfits (Goyal et al., §5.1, for BatchNorm).
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        groups[0 if parameter.dim() > 1 else 1]["params"].append(parameter)
    # base_rate: what the schedule multiplies. It is in the group so that groups may have different ones.
    return [group | {"lr": learning_rate, "base_rate": learning_rate} for group in groups if group["params"]]


def train_epoch(model, batches, optimizer, factors, loss_function, progress, amp=None):
    """One pass over `batches`, an iterable of (inputs, labels). The caller decides which layers are in training mode.

    factors: for each step, what the schedule multiplies the learning rates with; progress(step, loss) is called after
    each step; amp: None, or the type in which convolutions and matrix products compute: torch.bfloat16 or torch.float16.
    Returns {"train_loss", "train_top1"}: means over the epoch, the loss being what is minimised, label smoothing included.
    """
    device, processes = next(model.parameters()).device, data.processes()[1]
    # float16 ends at 6e-8: gradients are computed of a loss so much larger, and divided again before the step.
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    # Sums stay tensors until the end: .item() would make a GPU wait at every step.
    sums = torch.zeros(3, device=device)  # of loss, right ones, images
    for step, ((inputs, labels), factor) in enumerate(zip(batches, factors, strict=True), start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = model(inputs)
        loss = loss_function(logits.float(), labels)
        count = torch.tensor(float(len(labels)), device=device)
        together = count.clone()
        if processes > 1:  # gradients are averaged over processes: a process with fewer images must count less
            distributed.all_reduce(together)
        optimizer.zero_grad()
        scaler.scale(loss * (processes * count / together)).backward()
        scaler.step(optimizer)
        scaler.update()
        loss, right = loss.detach(), (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([loss * count, right, count])
        progress(step, loss)
    if processes > 1:
        distributed.all_reduce(sums)
    loss_sum, right, count = sums.tolist()
    return {"train_loss": loss_sum / count, "train_top1": right / count}


class Run:
    """What a run leaves in its folder: last.pt and log.csv after every epoch, best.pt when it is the best, curves.png.

    best.pt is the epoch of the highest validation accuracy, and among equals the latest, which learned at the lowest rate.
    last.pt is the latest epoch, with what --resume needs: the optimiser's state and the settings. No random state: every
    epoch draws from seeds of its own, so that a run which goes on ends in the same bits as one that was never interrupted.
    """

    def __init__(self, args, model, dataset):
        self.args, self.model, self.dataset, self.folder = args, model, dataset, args.out
        self.history, self.state, self.started = [], None, time.perf_counter()
        passing = ("out", "resume", "overwrite", "workers", "data_dir")  # what does not change the result
        self.settings = {name: str(value) for name, value in vars(args).items() if name not in passing}
        self.settings["nproc_per_node"] = str(data.processes()[1])  # torchrun's option
        if args.resume:
            self.restore(self.folder / "last.pt")
        self.folder.mkdir(parents=True, exist_ok=True)

    def restore(self, path):
        """Go back to where `path` was written. Raises DataError unless it was written with the same settings."""
        model, checkpoint = load_checkpoint(path)
        settings = checkpoint.get("settings", self.settings)
        names = [name for name in self.settings | settings if self.settings.get(name) != settings.get(name)]
        if names:
            was = ", ".join(f"--{name.replace('_', '-')} {settings.get(name)}" for name in names)
            raise data.DataError(f"'{path}' was made with {was}: give the same to --resume it, or --overwrite it")
        if "state" not in checkpoint or (model.arch, checkpoint["classes"]) != (self.model.arch, self.dataset.classes):
            other = "has other classes or another network than --data and --checkpoint"
            raise data.DataError(f"'{path}' is not the last.pt of a run, or {other}: --overwrite it")
        self.model.load_state_dict(model.state_dict())
        self.history, self.state = checkpoint["history"], checkpoint["state"]
        self.keep_best()

    def keep_best(self):
        """Write best.pt if the latest epoch is the best. After last.pt, never ahead of it: `restore` can do it again."""
        self.best = max(row["val_top1"] for row in self.history)
        if self.history[-1]["val_top1"] == self.best:
            self.save("best.pt")

    def begin_stage(self, stage, epochs, optimizer):
        """Begin a stage of `epochs` epochs, called `stage` in the log. Returns how many of them are done already."""
        self.stage, self.epochs, self.done, self.optimizer = stage, epochs, 0, optimizer
        if self.state and self.state["stage"] == stage:
            optimizer.load_state_dict(self.state["optimizer"])
            self.done = self.state["done"]
        self.begun, self.stage_started = self.done, time.perf_counter()
        return self.done

    def is_stale(self):
        """Whether the validation accuracy of this stage last rose --patience epochs ago."""
        scores = [row["val_top1"] for row in self.history if row["stage"] == self.stage]
        return bool(scores and self.args.patience) and len(scores) > scores.index(max(scores)) + self.args.patience

    def begin_epoch(self, images, steps):
        self.images, self.steps, self.epoch_started = images, steps, time.perf_counter()

    def save(self, name, **more):
        if data.processes()[0] == 0:
            classes, preprocessing = self.dataset.classes, self.dataset.preprocessing
            save_checkpoint(self.folder / name, self.model, classes, preprocessing, self.history, **more)

    def eta(self, part=0.0):
        """Time left in the stage, as its epochs so far and the `part` of the one that runs lead to expect."""
        done = self.done + part
        left = (time.perf_counter() - self.stage_started) / (done - self.begun) * (self.epochs - done)
        return f"ETA {int(left) // 60}:{int(left) % 60:02d}"

    def progress(self, step, loss):
        """A line that overwrites itself, on a terminal only. Raises DataError when a loss is not finite."""
        # Not at every step, for which a GPU would have to wait; the loss of a network that has lost itself stays NaN.
        if (step % 50 == 0 or step == self.steps) and not loss.isfinite():
            self.stop(f"step {step}")
        if sys.stdout.isatty():
            part = step / self.steps
            rate = part * self.images / (time.perf_counter() - self.epoch_started)
            where = f"{self.stage} {self.done + 1}/{self.epochs}  {part:4.0%}"
            print(f"\r{where}  {rate:.0f} images/s  {self.eta(part)} ", end="", flush=True)

    def stop(self, where):
        where, mend = f"{self.stage} {self.done + 1}/{self.epochs}, {where},", "with --overwrite or another --out"
        raise data.DataError(f"the loss of {where} is not finite: lower --learning-rate, {mend}")

    def end_epoch(self, row, seconds):
        """Record an epoch: its scores, and the seconds that its training took."""
        if not math.isfinite(row["val_loss"]):
            self.stop("validation")
        self.done += 1
        self.history.append({"epoch": len(self.history) + 1, "stage": self.stage} | row)
        if data.processes()[0] == 0:
            write_table(self.folder / "log.csv", [self.history[0], *(row.values() for row in self.history)])
        state = {"stage": self.stage, "done": self.done, "optimizer": self.optimizer.state_dict()}
        self.save("last.pt", settings=self.settings, state=state)
        self.keep_best()
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        scores = [f"{part} loss {row[f'{part}_loss']:.3f} top1 {row[f'{part}_top1']:.2%}" for part in ("train", "val")]
        where = f"{clear}{self.stage} {self.done}/{self.epochs}"
        print(where, *scores, f"{self.images / seconds:.0f} images/s", self.eta(), sep="  ", flush=True)
        if data.processes()[1] > 1:
            distributed.barrier()  # nobody reads what is still being written

    def finish(self):
        if data.processes()[0] == 0:
            plot_history(self.history, self.folder / "curves.png")
        print(f"best validation accuracy {self.best:.2%}, {time.perf_counter() - self.started:.0f} s")
        print(f"wrote best.pt, last.pt, log.csv and curves.png to {self.folder}")
        best = shlex.quote(str(self.folder / "best.pt"))
        print(f"next: python evaluate.py --checkpoint {best} {data.data_options(self.args)}")


def pad_tiny_maps(network):
    """Give depthwise convolutions their border of zeros with the input, where the map has 1 or 2 pixels a side.

    On CPUs with AVX2 and no AVX-512, oneDNN (3.12, 3.13) takes 10 to 30 times as long for the same gradient if it adds the
    border itself: steps at 32 pixels and output stride 32 are 2.7 times as fast so, those at output stride 16 by a sixth.
    """

    def forward(layer, x):
        if x.shape[-1] > 2:
            return nn.Conv2d.forward(layer, x)
        return functional.conv2d(functional.pad(x, [1] * 4), layer.weight, None, layer.stride, groups=layer.groups)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.forward = partial(forward, layer)


def fit(run, stage, network, trained, train, val, optimizer, epochs):
    """Train `network` for `epochs` epochs, which the log calls `stage`, and record each of them in `run`.

    Only the modules in `trained` are in training mode (dropout drops, BatchNorm looks at the batch). train and val are
    splits in the form that the network takes; the optimiser's groups come from `parameter_groups`.
    """
    steps, args, count = train.steps(), run.args, data.processes()[1]
    if count > 1 and min(len(train), len(val)) < 2 * count:
        raise data.DataError("too few images for so many processes: lower --nproc-per-node")
    pad_tiny_maps(network)
    loss_function, amp = choose_loss(args), None if args.amp == "off" else getattr(torch, args.amp)
    parallel = DistributedDataParallel(network) if count > 1 else network
    for epoch in range(run.begin_stage(stage, epochs, optimizer), epochs):
        if run.is_stale():
            print(f"{stage} ends early: validation accuracy last rose {args.patience} epochs ago", flush=True)
            break
        run.begin_epoch(train.epoch_size(), steps)
        torch.manual_seed(data.mix(args.seed, stage, epoch, data.processes(), "dropout"))
        network.eval()
        for module in trained:
            module.train()
        factors = schedule(args.schedule, epoch, epochs, steps)
        row = train_epoch(parallel, train.batches(epoch), optimizer, factors, loss_function, run.progress, amp)
        average_statistics(network)
        seconds = time.perf_counter() - run.epoch_started
        scores = score(*predict(network, val))
        rate = optimizer.param_groups[-1]["lr"]
        run.end_epoch(row | {"val_loss": scores["loss"], "val_top1": scores["top1"], "learning_rate": rate}, seconds)


def average_statistics(network):
    """Give all processes the mean of their BatchNorm statistics, which differ by what each has seen in the last step."""
    count = data.processes()[1]
    for layer in network.modules() if count > 1 else ():
        for buffer in layer.buffers(recurse=False):
            if layer.training and buffer.is_floating_point():  # what is frozen is equal, and stays so to the bit
                distributed.all_reduce(buffer)
                buffer /= count


def begin(args):
    """Join torchrun's processes, if it has started any, and seed the first weights. Returns the device. Raises DataError."""
    if args.resume and not (args.out / "last.pt").exists():
        raise data.DataError(f"there is no run to resume in '{args.out}': name its folder with --out")
    if (args.out / "last.pt").exists() and not (args.resume or args.overwrite):
        raise data.DataError(f"'{args.out}' holds a run: --resume it, --overwrite it, or name another --out")
    torch.manual_seed(args.seed)
    device = data.choose_device(args.device)
    if "LOCAL_RANK" in os.environ and data.processes() == (0, 1):
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if args.batch_size < 2 * data.processes()[1]:
            raise data.DataError("--batch-size is that of all processes together: at least two images for each")
        if data.processes()[0] > 0:
            sys.stdout = open(os.devnull, "w")  # the first one speaks for all
    return device


def announce(args, dataset, device):
    """Say what will be trained on."""
    counts = f"{len(dataset.classes)} classes, {len(dataset.train)} training and {len(dataset.val)} validation images"
    print(f"{args.data}: {counts} of {dataset.preprocessing['image_size']} pixels, on {device}")


def parse_arguments(arguments=None):
    """The options, those of the command line if no list of them is given."""
    parser = data.command_line("Train MobileNetV2 from scratch.", "glyphs", "runs/train")
    data.add_training_options(parser)
    parser.add_argument("--recipe", choices=RECIPES, default="small", help="what the options in it are by default")
    parser.add_argument("--optimizer", choices=("sgd", "rmsprop"), help="sgd: with Nesterov's momentum")
    parser.add_argument("--schedule", choices=("cosine", "exponential"), help="of the learning rate")
    data.add_number(parser, "--width", float, 0.05, 4, 0.5, "width multiplier")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), default=16, help="32 is for photos")
    parser.set_defaults(weight_decay=4e-5, **RECIPES["small"])  # what --help shows
    parser.set_defaults(**RECIPES[parser.parse_known_args(arguments)[0].recipe])
    return parser.parse_args(arguments)


def train_network(args, model, dataset):
    """Train `model` on `dataset` as the options ask for. Returns the Run."""
    groups = parameter_groups(model.parameters(), args.learning_rate, args.weight_decay)
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, eps=1.0)  # eps as in TensorFlow's models/slim
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    run = Run(args, model, dataset)
    fit(run, "scratch", model, [model], dataset.train, dataset.val, optimizer, args.epochs)
    return run


def main():
    args = parse_arguments()
    device = begin(args)
    dataset = data.load_for(args, device=device)
    announce(args, dataset, device)
    model = MobileNetV2(len(dataset.classes), args.width, output_stride=args.output_stride)
    model.to(device, memory_format=data.memory_format(device))
    run = train_network(args, model, dataset)
    run.finish()
    print(f"  or: python finetune.py --checkpoint {shlex.quote(str(args.out / 'best.pt'))} --data NAME_OR_FOLDER")


if __name__ == "__main__":
    data.run(main, CheckpointError)
