"""How fast? Each figure stands beside that of the usual way, taken in the same run on the same machine.

    python experiments/benchmark.py small --data-dir /usr/share/datasets/fashion-mnist
    python experiments/benchmark.py photos --photos path/to/class/folders
    python experiments/benchmark.py memory
    python experiments/benchmark.py training --data-dir /usr/share/datasets/fashion-mnist
    python experiments/benchmark.py finetuning --photos path/to/class/folders --checkpoint imagenet
    python experiments/benchmark.py shipping

Every row is the median of several rounds, and the ways take turns within a round: what else the machine does, it does to all.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import datasets, transforms
from torchvision.models import mobilenet_v2
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import export  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import MobileNetV2, load_pretrained, read_pretrained, to_torchvision  # noqa: E402

ROUNDS = 3


def images_per_second(batches):
    """Walk once through an iterable of (images, labels)."""
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - start)


def compare(title, ways):
    """Print the median rate of each way, {name: function -> batches}, and how the best of data.py stands to the best other."""
    rates = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, batches in ways.items():
            rates[name].append(images_per_second(batches()))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = max((name for name in medians if name.startswith("data.py")), key=medians.get)
    best = max((name for name in medians if not name.startswith("data.py")), key=medians.get)
    print(f"\n{title} ({torch.get_num_threads()} threads, images a second, median of {ROUNDS} and range)")
    for name, values in rates.items():
        print(f"  {name:58} {medians[name]:9,.0f}   {min(values):,.0f} to {max(values):,.0f}")
    print(f"  '{ours}' is {medians[ours] / medians[best]:.2f} times as fast as '{best}'", flush=True)


def write_idx(path, array):
    """The inverse of data.read_idx, of a tensor of numbers from 0 to 255."""
    head = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(head + array.to(torch.uint8).numpy().tobytes())


def write_fashion_mnist(folder, data_dir):
    """As torchvision wants it: unpacked, in a folder of its own."""
    raw = Path(folder, "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    (images, labels), test, _ = data.read_mnist(datasets.FashionMNIST, data_dir)
    for name, array in zip(data.IDX_FILES, (images[:, 0], labels, test[0][:, 0], test[1]), strict=True):
        write_idx(raw / name, array)


def fashion_mnist(folder, preprocessing, augmented):
    """torchvision's data set with the transforms of the tutorials."""
    random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augmented else []
    normalise = transforms.Normalize(preprocessing["mean"], preprocessing["std"])
    steps = [transforms.Resize(32), *random, transforms.Grayscale(3), transforms.ToTensor(), normalise]
    return datasets.FashionMNIST(folder, transform=transforms.Compose(steps))


def small(args):
    """Fashion-MNIST at 32 pixels with augmentation, beside torchvision's data set with the same transforms one by one."""
    split = data.load_data("fashion-mnist", batch_size=128, data_dir=args.data_dir).train
    with tempfile.TemporaryDirectory() as folder:
        write_fashion_mnist(folder, args.data_dir)
        plain = fashion_mnist(folder, split.preprocessing, augmented=False)
        usual = Subset(fashion_mnist(folder, split.preprocessing, augmented=True), range(len(split)))

        theirs = torch.stack([plain[index][0] for index in range(1000)])
        ours = next(replace(split, batch_size=1000).batches())[0]
        levels = ((ours - theirs).abs() * split.preprocessing["std"][0] * 255).max()
        if levels > 1.5:
            raise data.DataError(f"the two ways differ by {levels:.1f} of 255 grey levels")
        print(f"without augmentation both give the same 1,000 images to {levels:.1f} of 255 grey levels")

        def loader(workers):
            return lambda: DataLoader(usual, batch_size=128, shuffle=True, num_workers=workers)

        ways = {f"DataLoader(datasets.FashionMNIST), {n} workers": loader(n) for n in (0, 1, 2, 4)}
        compare("small images", ways | {"data.py": partial(split.batches, 0)})


def make_photos(folder, count, size):
    """Two classes of JPEG files with structure at all scales, as photos have it."""
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        picture = torch.zeros(3, *size)
        for scale in (4, 16, 64):
            noise = torch.rand(1, 3, size[0] // scale, size[1] // scale, generator=generator)
            picture += torch.nn.functional.interpolate(noise, size, mode="bilinear")[0] / 3
        path = Path(folder, "ab"[index % 2], f"{index}.jpg")
        path.parent.mkdir(exist_ok=True)
        v2.functional.to_pil_image(picture).save(path, quality=90)


def usual_images(folder, split, training):
    """torchvision's ImageFolder with the transforms of data.py, restricted to the files of `split`."""
    size, mean, deviation = (split.preprocessing[key] for key in ("image_size", "mean", "std"))
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)])
    usual = datasets.ImageFolder(folder, transform=v2.Compose([data.photo_transform(size, training), normalise]))
    chosen = {str(path) for path in split.images}
    return Subset(usual, [index for index, (path, _) in enumerate(usual.samples) if path in chosen])


def photo_ways(folder, size, batch_size):
    """The same files with the same transforms as torchvision's ImageFolder, and as a split of data.py."""
    split = data.load_data(folder, {"image_size": size}, batch_size=batch_size).train
    return usual_images(folder, split, training=True), split


def compare_photos(title, folder, repeats, batch_size):
    """Files -> augmented batches of 160 pixels, beside ImageFolder with the same transforms, files and workers."""
    usual, split = photo_ways(folder, 160, batch_size)
    usual, split, ways = ConcatDataset([usual] * repeats), replace(split, repeats=repeats), {}
    for workers in (0, 2):
        loader = DataLoader(usual, batch_size=batch_size, shuffle=True, num_workers=workers)
        ways[f"DataLoader(datasets.ImageFolder), {workers} workers"] = partial(iter, loader)
        ways[f"data.py, {workers} workers"] = partial(replace(split, workers=workers).batches, 0)
    compare(title, ways)


def photos(args):
    torch.set_num_threads(1)  # in the main process: the workers have the other core
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder, 60, (3000, 4000))
        if args.photos:
            compare_photos(f"photos of {args.photos}", args.photos, repeats=4, batch_size=64)
        compare_photos("photos of 12 megapixels", folder, repeats=1, batch_size=8)


MEASURE_MEMORY = """
import re
import sys
import torch, torchvision.datasets, matplotlib.figure
import data
memory = lambda kind: int(re.search(rf"{kind}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e6
held = memory("VmRSS")
split = data.load_data("mnist", data_dir=sys.argv[1]).train
loaded = memory("VmHWM") - held
for images, labels in split.batches(0):
    pass
print(f"{len(split)} training images of 28 × 28: at most {loaded:.0f} MB to load, {memory('VmHWM') - held:.0f} MB in an epoch")
"""


def memory(_):
    """Peak of process memory above what the libraries hold, in a fresh process, for 70,000 random images (Linux only)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in data.IDX_FILES:
            count = 60_000 if "train" in name else 10_000
            shape = (count, 28, 28) if "images" in name else (count,)
            write_idx(Path(folder, name), torch.randint(0, 10, shape))
        subprocess.run([sys.executable, "-c", MEASURE_MEMORY, folder], check=True, cwd=Path(data.__file__).parent)


def usual_training(loader, classes):
    """A generator of (images, labels) after a step with each: torchvision's network in the loop of the tutorials."""
    torch.manual_seed(0)
    network = mobilenet_v2(num_classes=classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_sum = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        yield images, labels


def our_network(classes):
    torch.manual_seed(0)
    network = MobileNetV2(classes).to(memory_format=torch.channels_last).train()
    train.pad_tiny_maps(network)
    return network


def our_training(batches, classes):
    """The same with train_epoch, on the same architecture."""
    network = our_network(classes)
    optimizer = torch.optim.SGD(train.parameter_groups(network.parameters(), 0.01, 0), momentum=0.9, nesterov=True)
    for images, labels in batches:
        train.train_epoch(
            network, [(images, labels)], optimizer, [1.0], torch.nn.functional.cross_entropy, lambda *_: None
        )
        yield images, labels


def shares_of_a_step(batches, classes):
    """Print where the time of our steps goes."""
    network = our_network(classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    spent, now = {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimiser": 0.0}, time.perf_counter()

    def note(part):
        nonlocal now
        spent[part], now = spent[part] + time.perf_counter() - now, time.perf_counter()

    for images, labels in batches:
        note("data")
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        note("forward")
        optimizer.zero_grad()
        loss.backward()
        note("backward")
        optimizer.step()
        note("optimiser")
    whole = sum(spent.values())
    print("  where our time goes: " + ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in spent.items()))


def training(args):
    """Whole training steps, data included, beside torchvision's network in the usual loop, width 1, output stride 32."""
    some = 64 * 20
    split = data.load_data("fashion-mnist", batch_size=64, data_dir=args.data_dir).train
    split = split.subset(torch.arange(some))
    with tempfile.TemporaryDirectory() as folder:
        write_fashion_mnist(folder, args.data_dir)
        usual = Subset(fashion_mnist(folder, split.preprocessing, augmented=True), range(some))
        ways = {}
        for workers in (0, 2):
            loader = DataLoader(usual, batch_size=64, shuffle=True, num_workers=workers)
            ways[f"torchvision, usual loop, {workers} workers"] = partial(usual_training, loader, 10)
        ways["data.py and train.py"] = lambda: our_training(split.batches(0), 10)
        compare("training at 32 pixels, batches of 64", ways)
        shares_of_a_step(split.batches(0), 10)
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder, 80, (256, 320))
        usual, split = photo_ways(folder, 224, 16)
        ways = {}
        for workers in (0, 2):
            loader = DataLoader(usual, batch_size=16, shuffle=True, num_workers=workers)
            ways[f"torchvision, usual loop, {workers} workers"] = partial(usual_training, loader, 2)
            batches = partial(replace(split, workers=workers).batches, 0)
            ways[f"data.py and train.py, {workers} workers"] = lambda batches=batches: our_training(batches(), 2)
        compare("training at 224 pixels, batches of 16", ways)
        shares_of_a_step(split.batches(0), 2)


def usual_stage(network, groups, loaders, epochs):
    """Train the parameters in `groups` in the loop of the tutorials; returns the best validation accuracy.

    Every epoch decodes and augments every image and sends it through the whole network; what is frozen gets no gradient.
    """
    optimizer, best = torch.optim.AdamW(groups), 0.0
    network.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    for epoch in range(epochs):
        network.eval()  # BatchNorm keeps its statistics, as in finetune.py
        network.classifier.train()
        factors = train.schedule("cosine", epoch, epochs, len(loaders[0]))
        for factor, (images, labels) in zip(factors, loaders[0], strict=True):
            for group in groups:
                group["lr"] = group["base_rate"] * factor
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            right = sum((network(images).argmax(dim=1) == labels).sum().item() for images, labels in loaders[1])
        best = max(best, right / len(loaders[1].dataset))
    return best


def usual_finetuning(args):
    """Both stages with torchvision's network, ImageFolder, and finetune.py's epochs, rates and schedule.

    Returns [(seconds since the start, best accuracy)] after each stage.
    """
    begun, dataset, results = time.perf_counter(), data.load_for(args), []
    loaders, best = [], 0.0
    for split, training in ((dataset.train, True), (dataset.val, False)):
        images = usual_images(args.data, split, training)
        loaders.append(DataLoader(images, batch_size=args.batch_size, shuffle=training))
    network = mobilenet_v2()
    network.load_state_dict(to_torchvision(read_pretrained(args.checkpoint)["model"]))
    network.classifier[1] = torch.nn.Linear(1280, len(dataset.classes))
    head, last = network.classifier, network.features[18 - args.unfreeze :]
    head_groups = train.parameter_groups(head.parameters(), args.learning_rate, args.weight_decay)
    for groups, epochs in (
        (head_groups, args.head_epochs),
        (finetune.block_groups(last, head, args), args.epochs),
    ):
        best = max(best, usual_stage(network, groups, loaders, epochs))
        results.append((time.perf_counter() - begun, best))
    return results


def our_finetuning(args, epochs):
    """finetune.py with so many epochs of its second stage: (seconds, best accuracy)."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = argparse.Namespace(**vars(args) | {"out": Path(folder), "epochs": epochs})
        dataset, model = finetune.start(args, "cpu")
        run = train.Run(args, model, dataset)
        finetune.tune(run, model, dataset, args)
    return time.perf_counter() - begun, run.best


def finetuning(args):
    """Fine-tuning at 160 pixels, five epochs a stage, beside the loop of the tutorials with the same settings."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.photos:
            make_photos(folder, 200, (256, 320))
        torch.save(mobilenet_v2().state_dict(), Path(folder, "random.pth"))  # the weights do not change the time
        start = args.checkpoint or Path(folder, "random.pth")
        options = ["--data", args.photos or folder, "--checkpoint", start, "--image-size", 160]
        options += ["--head-epochs", 5, "--epochs", 5]
        args = finetune.command_line().parse_args(list(map(str, options)))
        results = {"usual loop": [], "finetune.py": []}
        for seed in range(ROUNDS):
            args.seed = seed
            torch.manual_seed(seed)
            results["usual loop"].append(usual_finetuning(args))
            torch.manual_seed(seed)
            results["finetune.py"].append([our_finetuning(args, epochs) for epochs in (0, args.epochs)])
    print(f"\nfine-tuning, 5 epochs a stage ({torch.get_num_threads()} threads, seconds, median of {ROUNDS} and range)")
    for stage, name in enumerate(("stage head", "both stages")):
        medians = []
        for way, rounds in results.items():
            seconds, accuracies = zip(*(stages[stage] for stages in rounds), strict=True)
            medians.append(statistics.median(seconds))
            accuracy = f"validation accuracy {statistics.mean(accuracies):.1%}"
            print(f"  {name:11}  {way:11} {medians[-1]:6.1f}   {min(seconds):.1f} to {max(seconds):.1f}   {accuracy}")
        print(f"  {name:11}  finetune.py is {medians[0] / medians[1]:.2f} times as fast", flush=True)


def shipping(args):
    """One image of 224 pixels: the exported files beside the network in eager mode, torchvision's and ours."""
    theirs, image = mobilenet_v2().eval(), torch.randn(1, 3, 224, 224)
    ours = load_pretrained(args.checkpoint) if args.checkpoint else MobileNetV2().eval()
    folded = export.fold_batch_norm(ours).to(memory_format=torch.channels_last)
    ways = {"torchvision, eager": theirs, "mobilenetv2.py, eager": ours, "folded, channels last": folded}
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, write, read) in export.FORMATS.items():
            calibration = ({"input": torch.randn(8, 3, 224, 224).numpy()} for _ in range(4))
            write(folded, torch.randn(2, 3, 224, 224), Path(folder, file), {}, calibration)
            ways[f"{name}, {Path(folder, file).stat().st_size / 1e6:.2f} MB"] = read(Path(folder, file))
    times = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(10):
            for name, network in ways.items():
                times[name].append(1000 * export.time_batches(network, image, 10))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\none image of 224 pixels ({torch.get_num_threads()} threads, milliseconds, median of 10 rounds and range)")
    for name, values in times.items():
        ratio = medians["torchvision, eager"] / medians[name]
        print(f"  {name:28} {medians[name]:7.2f}   {min(values):.2f} to {max(values):.2f}   {ratio:.2f} times as fast")


def main():
    questions = {"small": small, "photos": photos, "memory": memory, "training": training}
    questions |= {"finetuning": finetuning, "shipping": shipping}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="what to measure; nothing: everything")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="where Fashion-MNIST is")
    parser.add_argument("--photos", type=Path, help="class folders of photos, measured beside made-up ones")
    parser.add_argument("--checkpoint", help="what finetuning starts from, and shipping takes; nothing: random weights, equally fast")
    args = parser.parse_args()
    unknown = set(args.questions) - set(questions)
    if unknown:
        parser.error(f"no such question: {', '.join(unknown)} (there are {', '.join(questions)})")
    for name in args.questions or questions:
        questions[name](args)


if __name__ == "__main__":
    data.run(main)
