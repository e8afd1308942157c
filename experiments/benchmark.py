"""Measure the speed of the scripts beside the usual way, in the same run on the same machine.

    python experiments/benchmark.py small --data-dir /usr/share/datasets/fashion-mnist
    python experiments/benchmark.py photos --photos path/to/class/folders
    python experiments/benchmark.py memory
    python experiments/benchmark.py training --data-dir /usr/share/datasets/fashion-mnist
    python experiments/benchmark.py finetuning --photos path/to/class/folders --checkpoint imagenet
    python experiments/benchmark.py shipping
    python experiments/benchmark.py start              # listing 1,000, 20,000 and 200,000 files

Each row is the median of several rounds. The ways take turns within a round, so that other load on
the machine affects all of them.
"""

import argparse
import gc
import io
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import datasets, transforms
from torchvision.models import mobilenet_v2
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import (  # noqa: E402
    CheckpointError,
    MobileNetV2,
    load_checkpoint,
    to_torchvision,
)

ROUNDS = 3


def count_images(batches):
    """Pass once through batches of (images, labels)."""
    return sum(len(labels) for _, labels in batches)


def images_per_second(epoch):
    """Time one call of `epoch`, which returns its number of images."""
    begun = time.perf_counter()
    count = epoch()
    return count / (time.perf_counter() - begun)


def compare(title, ways):
    """Print the median rate of each way, and the ratio of the best of ours to the best other.

    ways: {name: function that returns its number of images}; our names start with "data.py".
    """
    rates = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, epoch in ways.items():
            rates[name].append(images_per_second(epoch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = max((name for name in medians if name.startswith("data.py")), key=medians.get)
    best = max((name for name in medians if not name.startswith("data.py")), key=medians.get)
    threads = torch.get_num_threads()
    print(f"\n{title} ({threads} threads, images per second, median of {ROUNDS} and range)")
    for name, values in rates.items():
        print(f"  {name:58} {medians[name]:9,.0f}   {min(values):,.0f} to {max(values):,.0f}")
    ratio = medians[ours] / medians[best]
    print(f"  '{ours}' is {ratio:.2f} times as fast as '{best}'", flush=True)


def write_idx(path, array):
    """Write integers from 0 to 255 as an IDX file: the inverse of data.read_idx."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    pixels = array.to(torch.uint8).numpy().tobytes()
    path.write_bytes(bytes([0, 0, 8, array.dim()]) + sizes + pixels)


def write_mnist(folder, train, test):
    """Write (images (N, 28, 28), labels (N,)) of both parts, with the names of MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (images, labels) in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)


def fashion_mnist(folder, preprocessing, augmented):
    """Return torchvision's dataset with the transforms of the tutorials."""
    steps = [transforms.Resize(32)]
    if augmented:
        steps += [transforms.RandomCrop(32, padding=2), transforms.RandomHorizontalFlip()]
    steps += [
        transforms.Grayscale(3),
        transforms.ToTensor(),
        transforms.Normalize(preprocessing["mean"], preprocessing["std"]),
    ]
    return datasets.FashionMNIST(folder, transform=transforms.Compose(steps))


def fashion_mnist_ways(folder, data_dir, batch_size):
    """Return the same images as torchvision's dataset (plain, augmented), and as ours."""
    _, splits = data.DATASETS["fashion-mnist"]["load"](28, data_dir)
    images = torch.cat([splits["train"][0], splits["val"][0]])
    labels = torch.cat([splits["train"][1], splits["val"][1]])
    test_images, test_labels = splits["test"]
    # torchvision reads unpacked files.
    raw = Path(folder, "FashionMNIST", "raw")
    write_mnist(raw, (images[:, 0], labels), (test_images[:, 0], test_labels))
    ours = data.load_data("fashion-mnist", batch_size=batch_size, data_dir=data_dir)
    plain = fashion_mnist(folder, ours.preprocessing, augmented=False)
    augmented = fashion_mnist(folder, ours.preprocessing, augmented=True)
    return plain, Subset(augmented, range(len(ours.splits["train"][1]))), ours


def small(args):
    """Compare augmented Fashion-MNIST at 32 pixels with torchvision's dataset and transforms."""
    with tempfile.TemporaryDirectory() as folder:
        plain, usual, dataset = fashion_mnist_ways(folder, args.data_dir, 128)
        theirs = torch.stack([plain[index][0] for index in range(1000)])
        batches = dataset.batches("train", indices=torch.arange(1000))
        ours = torch.cat([images for images, _ in batches])
        levels = ((ours - theirs).abs() * dataset.preprocessing["std"][0] * 255).max()
        if levels > 1.5:
            raise data.DataError(f"the two ways differ by {levels:.1f} of 255 grey levels")
        text = "without augmentation the two ways differ by at most"
        print(f"{text} {levels:.1f} of 255 grey levels, in 1,000 images")
        ways = {}
        for workers in (0, 1, 2, 4):
            loader = DataLoader(usual, batch_size=128, shuffle=True, num_workers=workers)
            name = f"DataLoader(datasets.FashionMNIST), {workers} workers"
            ways[name] = partial(count_images, loader)
        ways["data.py"] = partial(count_images, dataset.batches("train", augmented=True))
        compare("small images", ways)


def make_photos(folder, count, size):
    """Write JPEG files of two classes, with structure at all scales, like photos."""
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        picture = torch.zeros(3, *size)
        for scale in (4, 16, 64):
            noise = torch.rand(1, 3, size[0] // scale, size[1] // scale, generator=generator)
            picture += functional.interpolate(noise, size, mode="bilinear")[0] / 3
        path = Path(folder, "ab"[index % 2], f"{index}.jpg")
        path.parent.mkdir(exist_ok=True)
        v2.functional.to_pil_image(picture).save(path, quality=90)


def photo_transform(preprocessing, augmented):
    """Return the steps of our `PhotoDataset` as transforms of torchvision, in the usual way."""
    size = preprocessing["image_size"]
    steps = [partial(data.fit_photo, preprocessing=preprocessing)]
    if augmented:  # as in data.augment_photo
        steps = [
            v2.RandomRotation(10),
            v2.RandomResizedCrop(size, scale=(0.35, 1)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing["mean"], preprocessing["std"]),
    ]
    return v2.Compose(steps)


def usual_images(folder, dataset, split, augmented):
    """Return torchvision's ImageFolder with the transforms and the files of a split of ours."""
    transform = photo_transform(dataset.preprocessing, augmented)
    usual = datasets.ImageFolder(Path(folder), transform=transform)
    paths, _ = dataset.splits[split]
    chosen = {str(path) for path in paths}
    kept = [index for index, (path, _) in enumerate(usual.samples) if path in chosen]
    return Subset(usual, kept)


def photo_ways(folder, size, batch_size, repeats=1):
    """Return the same augmented files as torchvision's ImageFolder, and as a dataset of ours."""
    dataset = data.load_data(str(folder), {"image_size": size}, batch_size=batch_size)
    dataset.repeats = repeats
    usual = usual_images(folder, dataset, "train", augmented=True)
    return ConcatDataset([usual] * repeats), dataset


def compare_photos(title, folder, repeats, batch_size):
    """Compare files -> augmented batches of 160 pixels, with the same files and workers."""
    usual, dataset = photo_ways(folder, 160, batch_size, repeats)
    ways = {}
    for workers in (0, 2):
        dataset.workers = workers
        loader = DataLoader(usual, batch_size=batch_size, shuffle=True, num_workers=workers)
        name = f"DataLoader(datasets.ImageFolder), {workers} workers"
        ways[name] = partial(count_images, loader)
        ours = dataset.batches("train", augmented=True)
        ways[f"data.py, {workers} workers"] = partial(count_images, ours)
    compare(title, ways)


def photos(args):
    torch.set_num_threads(1)  # in the main process: the workers use the other core
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder, 60, (3000, 4000))
        if args.photos:
            compare_photos(f"photos of {args.photos}", args.photos, repeats=4, batch_size=64)
        compare_photos("photos of 12 megapixels", folder, repeats=1, batch_size=8)


MEASURE_MEMORY = r"""
import re
import sys
import torch, torchvision.datasets, matplotlib.figure
import data

def megabytes(kind):
    status = open("/proc/self/status").read()
    return int(re.search(rf"{kind}:\s+(\d+)", status)[1]) * 1024 / 1e6

libraries = megabytes("VmRSS")
dataset = data.load_data("mnist", data_dir=sys.argv[1])
loaded = megabytes("VmHWM") - libraries
for images, labels in dataset.batches("train", augmented=True):
    pass
epoch = megabytes("VmHWM") - libraries
images = len(dataset.splits["train"][1])
print(f"{images} training images of 28 × 28: {loaded:.0f} MB to load, {epoch:.0f} MB in an epoch")
"""


def memory(_):
    """Measure peak memory above that of the libraries, in a new process (Linux only)."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for count in (60_000, 10_000):
            images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
            parts.append((images, torch.randint(0, 10, (count,))))
        write_mnist(Path(folder), *parts)
        root = Path(data.__file__).parent
        subprocess.run([sys.executable, "-c", MEASURE_MEMORY, folder], check=True, cwd=root)


def usual_training(loader, classes):
    """Train torchvision's network for one epoch, in the loop of the tutorials."""
    torch.manual_seed(0)
    network = mobilenet_v2(num_classes=classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_sum = 0.0
    count = 0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        count += len(labels)
    return count


def our_network(classes):
    torch.manual_seed(0)
    network = MobileNetV2(classes).to(memory_format=data.MEMORY_FORMAT)
    groups = train.parameter_groups(network.parameters(), 0.01, 0)
    return network.train(), train.make_optimizer("sgd", groups)


def our_training(batches, batch_size, classes):
    """Train the same architecture for one epoch, with train_epoch."""
    network, optimizer = our_network(classes)
    constant = LambdaLR(optimizer, lambda step: 1.0)
    train.train_epoch(network, batches, optimizer, constant, functional.cross_entropy)
    return len(batches) * batch_size


def shares_of_a_step(batches, classes):
    """Print the shares of data, forward, backward and optimizer in the time of our steps."""
    network, optimizer = our_network(classes)
    spent = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    now = time.perf_counter()

    def note(part):
        nonlocal now
        before = now
        now = time.perf_counter()
        spent[part] += now - before

    for images, labels in batches:
        note("data")
        loss = functional.cross_entropy(network(images), labels)
        note("forward")
        optimizer.zero_grad()
        loss.backward()
        note("backward")
        optimizer.step()
        note("optimizer")
    whole = sum(spent.values())
    shares = (f"{part} {seconds / whole:.1%}" for part, seconds in spent.items())
    print(f"  shares of our time: {', '.join(shares)}")


KINDS = ("convolution", "batch_norm", "hardtanh")  # hardtanh: ReLU6


class Traffic(TorchDispatchMode):
    """Record the seconds of each operator, and the bytes of its inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.seconds = Counter()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        begun = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        seconds = time.perf_counter() - begun
        if not function.is_view:  # views move no data
            name = function.overloadpacket.__name__
            kind = next((kind for kind in KINDS if kind in name), "other")
            leaves = tree_leaves((args, kwargs, result))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
            self.seconds[kind] += seconds
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors.values())
        return result


def traffic_of_a_step(batches, classes):
    """Print the data rate of the operators in one training step, beside that of a copy.

    An operator near the rate of a copy is bound by memory, not by arithmetic. The bytes are a lower
    bound: BatchNorm reads its input twice in training. Maps that fit in the CPU's cache can exceed
    the rate of a large copy.
    """
    network, optimizer = our_network(classes)
    images, labels = next(iter(batches))
    for recorder in (nullcontext(), Traffic()):  # the first step allocates memory
        with recorder:
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    source, target = torch.ones(2, 64 * 2**20)  # 256 MB each
    seconds = min(timeit.repeat(lambda: target.copy_(source), number=1))
    rate = 2 * source.nbytes / seconds / 1e9
    whole = sum(recorder.seconds.values())
    moved = sum(recorder.bytes.values()) / 1e9
    print(f"  a step moves {moved:.2f} GB; a copy moves {rate:.1f} GB/s")
    for kind in (*KINDS, "other"):
        moved = recorder.bytes[kind] / 1e9
        seconds = recorder.seconds[kind]
        share = f"{seconds / whole:4.0%} of the time"
        print(f"    {kind:12} {share}, {moved:.2f} GB, {moved / seconds:.1f} GB/s")


def training(args):
    """Compare whole training steps, with data, at width 1 and output stride 32."""
    some = 64 * 20
    with tempfile.TemporaryDirectory() as folder:
        _, usual, dataset = fashion_mnist_ways(folder, args.data_dir, 64)
        usual = Subset(usual, range(some))
        ways = {}
        for workers in (0, 2):
            loader = DataLoader(usual, batch_size=64, shuffle=True, num_workers=workers)
            name = f"torchvision, usual loop, {workers} workers"
            ways[name] = partial(usual_training, loader, 10)
        batches = dataset.batches("train", augmented=True, indices=torch.arange(some))
        ways["data.py and train.py"] = partial(our_training, batches, 64, 10)
        compare("training at 32 pixels, batches of 64", ways)
        shares_of_a_step(batches, 10)
        traffic_of_a_step(batches, 10)
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder, 80, (256, 320))
        usual, dataset = photo_ways(folder, 224, 16)
        ways = {}
        for workers in (0, 2):
            dataset.workers = workers
            loader = DataLoader(usual, batch_size=16, shuffle=True, num_workers=workers)
            name = f"torchvision, usual loop, {workers} workers"
            ways[name] = partial(usual_training, loader, 2)
            batches = dataset.batches("train", augmented=True)
            name = f"data.py and train.py, {workers} workers"
            ways[name] = partial(our_training, batches, 16, 2)
        compare("training at 224 pixels, batches of 16", ways)
        dataset.workers = 0
        batches = dataset.batches("train", augmented=True)
        shares_of_a_step(batches, 2)
        traffic_of_a_step(batches, 2)


def usual_stage(network, optimizer, train_loader, val_loader, epochs):
    """Train the parameters of `optimizer` in the loop of the tutorials. Returns the best accuracy.

    Each epoch decodes and augments all images and sends them through the whole network. Frozen
    parameters get no gradient.
    """
    scheduler = train.make_scheduler("cosine", optimizer, len(train_loader), epochs)
    network.requires_grad_(False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    best = 0.0
    for _ in range(epochs):
        network.eval()  # BatchNorm keeps its running statistics, as in finetune.py
        network.classifier.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            logits = network(images)
            functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            scheduler.step()
        network.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                correct += (network(images).argmax(dim=1) == labels).sum().item()
        best = max(best, correct / len(val_loader.dataset))
    return best


def usual_finetuning(args):
    """Run both stages with torchvision's network, ImageFolder, and the settings of finetune.py.

    Returns [(seconds since the start, best accuracy)] after each stage.
    """
    begun = time.perf_counter()
    dataset = data.load_for(args)
    loaders = []
    for split, augmented in (("train", True), ("val", False)):
        images = usual_images(args.data, dataset, split, augmented)
        loaders.append(DataLoader(images, batch_size=args.batch_size, shuffle=augmented))
    model, _ = load_checkpoint(args.checkpoint)
    network = mobilenet_v2()
    network.load_state_dict(to_torchvision(model.state_dict()))
    network.classifier[1] = torch.nn.Linear(1280, len(dataset.classes))
    last = network.features[18 - args.unfreeze :]
    best = 0.0
    results = []
    for layers, epochs in (((), args.classifier_epochs), (last, args.epochs)):
        optimizer = finetune.make_optimizer(network.classifier, layers, args)
        best = max(best, usual_stage(network, optimizer, *loaders, epochs))
        results.append((time.perf_counter() - begun, best))
    return results


def our_finetuning(args, epochs):
    """Run finetune.py with some epochs of stage blocks. Returns (seconds, best accuracy)."""
    options = {
        "--data": args.data,
        "--checkpoint": args.checkpoint,
        "--seed": args.seed,
        "--image-size": args.image_size,
        "--classifier-epochs": args.classifier_epochs,
        "--epochs": epochs,
        "--device": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        words = ["finetune.py", "--out", folder]
        for name, value in options.items():
            words += [name, str(value)]
        with (
            patch.object(sys, "argv", words),
            patch.object(train, "plot_history"),  # the usual way draws no curves
            redirect_stdout(io.StringIO()),
        ):
            begun = time.perf_counter()
            finetune.main()
            seconds = time.perf_counter() - begun
        _, best = load_checkpoint(Path(folder, "best.pt"))
    return seconds, best["history"][-1]["val_top1"]


def finetuning(args):
    """Compare fine-tuning at 160 pixels, five epochs per stage, with the loop of the tutorials."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.photos:
            make_photos(folder, 400, (256, 320))  # fewer would be repeated in an epoch of ours
        random = Path(folder, "random.pth")  # the weights do not change the time
        torch.save(mobilenet_v2().state_dict(), random)
        settings = argparse.Namespace(
            data=str(args.photos or folder),
            data_dir=args.data_dir,
            checkpoint=args.checkpoint or random,
            image_size=160,
            batch_size=64,
            workers=0,
            classifier_epochs=5,
            epochs=5,
        )
        train.use_defaults(settings, finetune.DEFAULTS["photos"])
        results = {"usual loop": [], "finetune.py": []}
        for seed in range(ROUNDS):
            settings.seed = seed
            torch.manual_seed(seed)
            results["usual loop"].append(usual_finetuning(settings))
            both = [our_finetuning(settings, epochs) for epochs in (0, settings.epochs)]
            results["finetune.py"].append(both)
    how = f"{torch.get_num_threads()} threads, seconds, median of {ROUNDS} and range"
    print(f"\nfine-tuning, 5 epochs per stage ({how})")
    for stage, name in enumerate(("stage classifier", "both stages")):
        medians = []
        for way, rounds in results.items():
            seconds, accuracies = zip(*(stages[stage] for stages in rounds))
            medians.append(statistics.median(seconds))
            times = f"{medians[-1]:6.1f}   {min(seconds):.1f} to {max(seconds):.1f}"
            accuracy = f"validation accuracy {statistics.mean(accuracies):.1%}"
            print(f"  {name:16}  {way:11} {times}   {accuracy}")
        ratio = medians[0] / medians[1]
        print(f"  {name:16}  finetune.py is {ratio:.2f} times as fast", flush=True)


def shipping(args):
    """Compare the exported files with the networks in eager mode, on one image of 224 pixels."""
    ours = MobileNetV2().eval()
    if args.checkpoint:
        ours, _ = load_checkpoint(args.checkpoint)
    folded = export.fold_batch_norm(ours).to(memory_format=torch.channels_last)
    ways = {
        "torchvision, eager": mobilenet_v2().eval(),
        "mobilenetv2.py, eager": ours,
        "folded, channels last": folded,
    }
    image = torch.randn(1, 3, 224, 224)
    example = torch.randn(2, 3, 224, 224)
    calibration = [torch.randn(8, 3, 224, 224) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder, export.quiet_exporters():
        for name, entry in export.FORMATS.items():
            path = Path(folder, entry["file"])
            entry["export"](folded, example, path, {}, calibration)
            ways[f"{name}, {path.stat().st_size / 1e6:.2f} MB"] = entry["load"](path)
    times = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(10):
            for name, network in ways.items():
                seconds = timeit.repeat(partial(network, image), number=1, repeat=13)[3:]
                times[name].append(1000 * statistics.median(seconds))
    medians = {name: statistics.median(values) for name, values in times.items()}
    how = f"{torch.get_num_threads()} threads, milliseconds, median of 10 rounds and range"
    print(f"\none image of 224 pixels ({how})")
    for name, values in times.items():
        text = f"{medians[name]:7.2f}   {min(values):.2f} to {max(values):.2f}"
        ratio = medians["torchvision, eager"] / medians[name]
        print(f"  {name:28} {text}   {ratio:.2f} times as fast")


def make_files(folder, count):
    """Make empty files named like ImageNet's: 100 class folders. Listing reads no image."""
    for number in range(count):
        name = f"n{1440764 + number % 100:08}"
        path = folder / "train" / name / f"{name}_{number}.JPEG"
        if number < 100:
            path.parent.mkdir(parents=True)
        path.touch()


def measure_start(list_files):
    """Return the seconds and the bytes that are kept after listing a folder."""
    gc.collect()
    begun = time.perf_counter()
    listed = list_files()
    seconds = time.perf_counter() - begun
    tracemalloc.start()  # makes everything slower, so it has a second call of its own
    listed = list_files()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del listed
    return seconds, kept


def start(_):
    """Compare the listing of a folder with torchvision's ImageFolder."""
    print("\nlisting a folder of class folders, without reading an image")
    print(f"  {'files':>8}  {'':12}{'µs per file':>12}{'bytes per file':>16}")
    for count in (1_000, 20_000, 200_000):
        with tempfile.TemporaryDirectory() as folder:
            make_files(Path(folder), count)
            ways = {
                "data.py": partial(data.load_data, folder),
                "ImageFolder": partial(datasets.ImageFolder, Path(folder, "train")),
            }
            for name, list_files in ways.items():
                with redirect_stdout(io.StringIO()):
                    seconds, kept = measure_start(list_files)
                micros = 1e6 * seconds / count
                print(f"  {count:8}  {name:12}{micros:12.1f}{kept / count:16.0f}", flush=True)


QUESTIONS = {
    "start": start,
    "small": small,
    "photos": photos,
    "memory": memory,
    "training": training,
    "finetuning": finetuning,
    "shipping": shipping,
}


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    add(
        "questions",
        nargs="*",
        help=f"measurements: {', '.join(QUESTIONS)} (default: all)",
    )
    add("--data-dir", type=Path, default=Path("datasets"), help="folder with Fashion-MNIST")
    add(
        "--photos",
        type=Path,
        help="class folders of photos, for photos and finetuning (default: generated images)",
    )
    add(
        "--checkpoint",
        help="weights for finetuning and shipping (default: random, with the same speed)",
    )
    args = parser.parse_args()
    unknown = set(args.questions) - set(QUESTIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; use {', '.join(QUESTIONS)}")
    for name in args.questions or QUESTIONS:
        QUESTIONS[name](args)


if __name__ == "__main__":
    cli.run(main, CheckpointError)
