"""How fast? Each figure stands beside that of the usual way, taken in the same run on the same machine.

    python experiments/benchmark.py small --data-dir /usr/share/datasets/fashion-mnist
    python experiments/benchmark.py photos --photos path/to/class/folders
    python experiments/benchmark.py memory

Every row is the median of several rounds, and the ways take turns within a round: what else the machine does, it does to all.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import datasets, transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402

ROUNDS = 3


def images_per_second(batches):
    """Walk once through an iterable of (images, labels)."""
    start = time.perf_counter()
    count = sum(len(images) for images, _ in batches)
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


def small(args):
    """Fashion-MNIST at 32 pixels with augmentation, beside torchvision's data set with the same transforms one by one."""
    split = data.load_data("fashion-mnist", batch_size=128, data_dir=args.data_dir).train
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        (images, labels), test, _ = data.read_mnist(datasets.FashionMNIST, args.data_dir)
        for name, array in zip(data.IDX_FILES, (images[:, 0], labels, test[0][:, 0], test[1]), strict=True):
            write_idx(raw / name, array)  # torchvision wants them unpacked, in a folder of its own
        mean, deviation = split.preprocessing["mean"], split.preprocessing["std"]
        tail = [transforms.Grayscale(3), transforms.ToTensor(), transforms.Normalize(mean, deviation)]
        random = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        augmented = transforms.Compose([transforms.Resize(32), *random, *tail])
        plain = datasets.FashionMNIST(folder, transform=transforms.Compose([transforms.Resize(32), *tail]))
        usual = Subset(datasets.FashionMNIST(folder, transform=augmented), range(len(split)))

        theirs = torch.stack([plain[index][0] for index in range(1000)])
        ours = next(replace(split, batch_size=1000).batches())[0]
        levels = ((ours - theirs).abs() * deviation[0] * 255).max()
        if levels > 1.5:
            raise data.DataError(f"the two ways differ by {levels:.1f} of 255 grey levels")
        print(f"without augmentation both give the same 1,000 images to {levels:.1f} of 255 grey levels")

        def loader(workers):
            return lambda: DataLoader(usual, batch_size=128, shuffle=True, num_workers=workers)

        ways = {f"DataLoader(datasets.FashionMNIST), {n} workers": loader(n) for n in (0, 1, 2, 4)}
        compare("small images", ways | {"data.py": lambda: split.batches(0)})


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


def compare_photos(title, folder, repeats, batch_size):
    """Files -> augmented batches of 160 pixels, beside ImageFolder with the same transforms, files and workers."""
    split = replace(data.load_data(folder, {"image_size": 160}, batch_size=batch_size).train, repeats=repeats)
    normalise = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(split.preprocessing.get, ("mean", "std")))]
    )
    usual = datasets.ImageFolder(folder, transform=v2.Compose([data.photo_transform(160, training=True), normalise]))
    chosen = {str(path) for path in split.images}
    usual = Subset(usual, [index for index, (path, _) in enumerate(usual.samples) if path in chosen])
    usual = ConcatDataset([usual] * repeats)
    ways = {}
    for workers in (0, 2):
        ways[f"DataLoader(datasets.ImageFolder), {workers} workers"] = lambda workers=workers: DataLoader(
            usual, batch_size=batch_size, shuffle=True, num_workers=workers
        )
        ways[f"data.py, {workers} workers"] = lambda workers=workers: replace(split, workers=workers).batches(0)
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


def main():
    questions = {"small": small, "photos": photos, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="what to measure; nothing: everything")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="where Fashion-MNIST is")
    parser.add_argument("--photos", type=Path, help="class folders of photos, measured beside made-up ones")
    args = parser.parse_args()
    unknown = set(args.questions) - set(questions)
    if unknown:
        parser.error(f"no such question: {', '.join(unknown)} (there are {', '.join(questions)})")
    for name in args.questions or questions:
        questions[name](args)


if __name__ == "__main__":
    data.run(main)
