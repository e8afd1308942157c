"""Load a dataset by name or folder, as batches that are ready for the network.

An image takes this path: file or array -> uint8 (C, H, W) -> augmentation (training only) ->
normalisation -> float (N, 3, S, S).

    glyphs                           37 classes of printed letters, drawn from matplotlib's fonts
    digits                           1,797 handwritten digits of 8 × 8 pixels, from digits.npz
    mnist, fashion-mnist, cifar10    60,000 or 70,000 small images, in --data-dir or downloaded
    flowers                          3,670 photos of five kinds, likewise
    a folder                         path/<class>/*.jpg, or path/{train,val,test}/<class>/*.jpg

`ArrayDataset` keeps small images in memory and augments a whole batch at once. `PhotoDataset`
decodes photos one by one. Terms used here:

    split            train, val (validation, for all choices) or test (for final results only)
    preprocessing    image size, crop, channels, and the mean and std that normalise pixels
    augmentation     random changes of training images that keep their class

    python data.py --data photos                     # count the images and draw some of them
"""

import argparse
import ctypes
import gzip
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unicodedata import normalize

import matplotlib
import numpy
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision import datasets
from torchvision.transforms import v2

# Mean and std are for pixels in 0..1: measured on augmented glyphs (also used for digits), on the
# training images of MNIST, Fashion-MNIST and CIFAR-10, and ImageNet's for photos.
# crop: used share of the shorter side; 224 / 256 is usual for ImageNet.
SMALL = {"image_size": 32, "crop": 1.0, "channels": 1, "mean": [0.25] * 3, "std": [0.3] * 3}
PHOTOS = {"image_size": 224, "crop": 0.875, "channels": 3}
PHOTOS |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR10 = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616], "channels": 3}
PREPROCESSING = {
    "glyphs": SMALL,
    "digits": SMALL,
    "mnist": SMALL | {"mean": [0.1307] * 3, "std": [0.3081] * 3},  # LeCun et al., 1998
    "fashion-mnist": SMALL | {"mean": [0.2860] * 3, "std": [0.3530] * 3},  # arXiv:1708.07747
    "cifar10": SMALL | CIFAR10,  # Krizhevsky, 2009
    "flowers": PHOTOS,
}
REPEATS = {"glyphs": 32, "digits": 4}  # passes per epoch, each with new augmentations
FOLDER_EPOCH = 320  # a small folder is repeated until an epoch has this many images
# Channels last is faster; on Apple's GPUs, gradients are 30 times slower (pytorch/pytorch#193349).
APPLE = torch.backends.mps.is_available()
MEMORY_FORMAT = torch.contiguous_format if APPLE else torch.channels_last
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun


class DataError(ValueError):
    """Data or an option that cannot be used. The message names the problem and the fix."""


@contextmanager
def reading(problem, fix):
    """Turn any exception into a DataError: a damaged file makes libraries raise almost anything."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{problem} ({str(error)[:200]}); {fix}") from error


@dataclass
class Data:
    """A dataset. Its images are uint8 (N, C, H, W) in memory, or a numpy array of N paths."""

    classes: list  # names, in the order of the labels
    preprocessing: dict
    splits: dict  # "train", "val" and perhaps "test": (images, labels (N,))
    augment: object = None  # function for images in memory; None: photos on disk
    repeats: int = 1  # passes over the training images per epoch
    batch_size: int = 128  # of all processes together
    workers: int = 0  # processes that decode photos
    device: str = "cpu"  # where images in memory are augmented

    def batches(self, split, augmented=False, indices=None):
        """Return a DataLoader of (images float (N, 3, S, S), labels (N,)).

        augmented: also shuffle, and drop a last incomplete batch (BatchNorm needs two images).
        indices: use only these images, in this order; None uses all.
        """
        images, labels = self.splits[split]
        if PROCESSES > 1 and min(len(labels), self.batch_size) < 2 * PROCESSES:
            raise DataError("too few images for all processes: use fewer, or raise --batch-size")
        if indices is None:
            # Each process has its own share. Equal shares of "train" give equal numbers of steps.
            end = len(labels) - len(labels) % PROCESSES if split == "train" else len(labels)
            indices = torch.arange(RANK, end, PROCESSES)
        source = (images[indices.numpy()], labels[indices], self.preprocessing)
        batch_size, count, order = self.batch_size // PROCESSES, len(indices), range(len(indices))
        if augmented:
            count = count * self.repeats
            order = RandomSampler(order, num_samples=count)
        batches = BatchSampler(order, batch_size, drop_last=augmented and count >= batch_size)
        if self.augment:
            dataset = ArrayDataset(*source, self.augment if augmented else resize, self.device)
            return DataLoader(dataset, batch_size=None, sampler=batches)  # an item is a batch
        dataset = PhotoDataset(*source, augmented)
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.workers)


def load_data(name, preprocessing=None, per_class=None, seed=0, data_dir="datasets", **options):
    """Load a dataset by name (a key of PREPROCESSING) or folder. Returns Data; raises DataError.

    preprocessing: values that replace the dataset's own, for example a checkpoint's.
    per_class: training images per class, chosen by `seed`. options: fields of `Data`.
    """
    preprocessing = PREPROCESSING.get(name, PHOTOS) | (preprocessing or {})
    size, augment, repeats = preprocessing["image_size"], distort, REPEATS.get(name, 1)
    if name in ("glyphs", "digits"):
        classes, splits = (load_glyphs if name == "glyphs" else load_digits)(size)
    elif name in PUBLISHED:
        classes, splits = load_published(name, Path(data_dir), size)
        augment = PUBLISHED[name][1]
    else:
        root = fetch_flowers(Path(data_dir)) if name == "flowers" else Path(name)
        (classes, splits), augment = load_folder(root), None
        repeats = -(-FOLDER_EPOCH // len(splits["train"][1]))  # rounded up
    if per_class is not None:
        images, labels = splits["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        kept = [order[labels[order] == label][:per_class] for label in range(len(classes))]
        if (smallest := min(map(len, kept))) < per_class:
            raise DataError(f"--per-class {per_class}: a class has {smallest} images; use fewer")
        kept = torch.cat(kept).sort().values
        splits["train"] = images[kept.numpy()], labels[kept]
        repeats = max(repeats * len(labels) // len(kept), 1)  # an epoch keeps its size
    return Data(classes, preprocessing, splits, augment, repeats, **options)


class ArrayDataset(Dataset):
    """Images in memory: uint8 (N, C, H, W). An item is a whole batch, which is fast to augment."""

    def __init__(self, images, labels, preprocessing, augment, device):
        self.images, self.labels, self.preprocessing = images, labels, preprocessing
        self.augment, self.device = augment, device

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        images = self.images[indices].to(self.device)
        images = self.augment(images, self.preprocessing["image_size"])
        return normalise(images, self.preprocessing), self.labels[indices].to(self.device)


def normalise(images, preprocessing):
    """Subtract mean, divide by std: (N, 1 or 3, S, S) in 0..255 -> float (N, 3, S, S)."""
    mean = 255 * torch.tensor(preprocessing["mean"], device=images.device).view(3, 1, 1)
    std = 255 * torch.tensor(preprocessing["std"], device=images.device).view(3, 1, 1)
    return (images - mean) / std  # a grayscale image fills all three channels


def resize(images, size):
    """Resize (N, C, H, W) of any type -> float (N, C, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)


def crop_and_flip(images, size, shift=1 / 8):
    """Shift each image by up to a share `shift` of its side, and mirror half of them.

    He et al. (arXiv:1512.03385, §4.2) do so with CIFAR-10, by up to 4 of 32 pixels. torchvision's
    transforms would change all images of a batch in the same way.
    Shape: uint8 (N, C, H, H) -> float (N, C, size, size) in 0..255.
    """
    count, side = len(images), images.shape[-1]
    border = round(side * shift)
    # All windows, as a view without copies: (N, C, 2b + 1, 2b + 1, H, H) with the border b
    windows = functional.pad(images, [border] * 4).unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(2 * border + 1, (2, count), device=images.device)
    images = windows[torch.arange(count, device=images.device), :, top, left]  # (N, C, H, H)
    mirrored = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    return resize(torch.where(mirrored, images.flip(3), images), size)


def distort(images, size):
    """Give each letter or digit a new shape, as if another hand or font had drawn it.

    A sampling grid applies shift, scale, rotation, shear and a smooth warp; stroke width, blur and
    noise follow. There is no flip: a mirrored letter is a different letter, or none.
    Shape: (N, C, H, W) in 0..255, background 0 -> float (N, C, size, size) in 0..255.
    """
    images, count = images.float() / 255, len(images)

    def uniform(limit, *shape):  # one value (or `shape` values) per image, from -limit to limit
        return (2 * torch.rand(count, *shape, device=images.device) - 1) * limit

    angle, shear = uniform(0.25), uniform(0.35)  # radians; tangent of the slant
    scale_x, scale_y = uniform(0.25).exp(), uniform(0.25).exp()
    cos, sin = angle.cos(), angle.sin()
    # Maps output to input coordinates: rotation · shear · scale, then shift. (N, 2, 3)
    to_x = torch.stack([scale_x * cos, scale_y * (cos * shear - sin), uniform(0.15)], dim=1)
    to_y = torch.stack([scale_x * sin, scale_y * (sin * shear + cos), uniform(0.15)], dim=1)
    matrix = torch.stack([to_x, to_y], dim=1)
    grid = functional.affine_grid(matrix, (count, 1, size, size), align_corners=False)
    warp = functional.interpolate(uniform(0.12, 2, 4, 4), size=(size, size), mode="bicubic")
    grid = grid + warp.permute(0, 2, 3, 1)  # (N, S, S, 2), from -1 to 1
    images = functional.grid_sample(images, grid, align_corners=False)
    # Stroke width: mix with the maximum (thicker) or minimum (thinner) of each 3 × 3 area.
    stroke = uniform(0.6, 1, 1, 1)
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    images = images + stroke.clamp(min=0) * (thick - images) - stroke.clamp(max=0) * (thin - images)
    # Blur: mix with a quarter of the resolution, similar to the 8 × 8 digits.
    coarse = functional.adaptive_avg_pool2d(images, max(size // 4, 1))
    coarse = functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = torch.lerp(images, coarse, uniform(1.5, 1, 1, 1).abs().clamp(max=1))
    images = images / images.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)  # full contrast
    noise = torch.randn(images.shape, device=images.device) * uniform(0.1, 1, 1, 1)
    return (images + noise).clamp(0, 1) * 255


# ------------------------------------------------------------------------------- glyphs and digits
# As in EMNIST "balanced" (arXiv:1702.05373): no lower-case letter that looks like its capital.
GLYPH_CLASSES = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt")
# Validation and test use held-out fonts, to measure accuracy on unknown fonts.
SANS = ("", "-Bold", "-Oblique", "-BoldOblique")
GLYPH_FONTS = {
    "train": [f"DejaVuSans{mono}{style}" for mono in ("", "Mono") for style in SANS]
    + [f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")]
    + [f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")],
    "val": ["cmr10", "cmmi10"],
    "test": ["cmb10", "cmss10", "cmtt10"],
}


def draw_glyph(character, font):
    """Draw a letter, white on black, centred: uint8 (1, 64, 64)."""
    left, top, right, bottom = font.getbbox(character)
    letter = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letter).text((-left, -top), character, fill=255, font=font)
    letter = ImageOps.contain(letter, (54, 54), Image.Resampling.LANCZOS)
    return v2.functional.center_crop(v2.functional.pil_to_tensor(letter), [64, 64])


def load_glyphs(size):
    """Draw all letters in all fonts. Validation and test letters are distorted once, here."""
    folder, splits = Path(matplotlib.get_data_path(), "fonts", "ttf"), {}
    for seed, (split, names) in enumerate(GLYPH_FONTS.items()):
        fonts = [ImageFont.truetype(folder / f"{name}.ttf", size=216) for name in names]
        images = torch.stack([draw_glyph(glyph, font) for font in fonts for glyph in GLYPH_CLASSES])
        labels = torch.arange(len(GLYPH_CLASSES)).repeat(len(fonts))
        if split != "train":
            images, labels = images.repeat(32, 1, 1, 1), labels.repeat(32)  # 32 shapes of each
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # the same images in every run
                images = distort(images, size).round().byte()
        splits[split] = images, labels
    return GLYPH_CLASSES, splits


def load_digits(size):
    """Read 1,797 digits by 13 writers: the test part of UCI's Optical Recognition of Handwritten
    Digits (E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0), as
    scikit-learn distributes it. Each of the 8 × 8 values counts the ink in a 4 × 4 area, 0 to 16.
    The order seems to follow the writers. The second half is the test split (899), as in
    scikit-learn's example. In the first half, every fifth image of a digit is for validation (184),
    the others for training (714). These share writers: validation accuracy is a little too high.
    """
    path = Path(__file__).with_name("digits.npz")
    with reading(f"'{path}' is damaged", "clone the project again"), numpy.load(path) as file:
        counts, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = resize((counts[:, None] * (255 / 16)).round(), size).round().byte()  # (1797, 1, S, S)
    test = torch.arange(len(labels)) >= 898
    val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        val[((labels == digit) & ~test).nonzero().flatten()[::5]] = True
    masks = {"train": ~val & ~test, "val": val, "test": test}
    return list("0123456789"), {key: (images[mask], labels[mask]) for key, mask in masks.items()}


PUBLISHED = {  # torchvision's class, which can download the files, and the augmentation
    "mnist": (datasets.MNIST, distort),
    "fashion-mnist": (datasets.FashionMNIST, partial(crop_and_flip, shift=1 / 16)),
    "cifar10": (datasets.CIFAR10, crop_and_flip),
}


def load_published(name, data_dir, size):
    """Load MNIST, Fashion-MNIST or CIFAR-10; the last tenth of train is the validation split."""
    kind, _ = PUBLISHED[name]
    names = ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1")
    found = [sorted(filter(Path.is_file, data_dir.glob(f"{part}-ubyte*"))) for part in names]
    if all(found) and name != "cifar10":  # in data_dir itself, compressed or not
        arrays, classes = [read_idx(paths[0]) for paths in found], kind.classes
    else:
        source = kind.url if name == "cifar10" else f"the four .gz files of {kind.mirrors[0]}"
        fix = f"download {source} into '{data_dir}/{name}', and use it as --data-dir"
        with reading(f"--data {name}: no files, and no download", fix):
            parts = [kind(data_dir, train, download=True) for train in (True, False)]
            arrays = [torch.as_tensor(a) for part in parts for a in (part.data, part.targets)]
            classes = parts[0].classes
    cut = len(arrays[0]) - max(len(arrays[0]) // 10, 1)
    splits = {"train": [a[:cut] for a in arrays[:2]], "val": [a[cut:] for a in arrays[:2]]}
    for split, (images, labels) in (splits | {"test": arrays[2:]}).items():
        if images.shape[:1] != labels.shape:
            problem = f"{split} has {len(images)} images, {len(labels)} labels"
            raise DataError(f"'{data_dir}': {problem}: replace it")
        # (N, H, W), or (N, H, W, 3) in CIFAR-10 -> (N, C, H, W)
        images = images[:, None] if images.dim() == 3 else images.movedim(3, 1)
        if size <= 64:  # resize once, not in every epoch; larger images would fill the memory
            images = torch.cat([resize(x, size).round().byte() for x in images.split(1024)])
        splits[split] = images, labels.long()
    return [label.partition(" - ")[0] for label in classes], splits  # not "0 - zero"


def read_idx(path):
    """Read LeCun's IDX format: 2 zeros, type 8 (uint8), dimensions, sizes (big-endian), bytes."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with reading(f"'{path}' is damaged", "download it again"), unpack(path, "rb") as file:
        shape = numpy.frombuffer(file.read(4 * file.read(4)[3]), ">u4")
        contents = file.read(int(min(shape.prod(dtype=float), 1e9)) + 1)  # the end has a checksum
        return torch.from_numpy(numpy.frombuffer(contents, numpy.uint8).reshape(shape).copy())


FLOWERS = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def fetch_flowers(data_dir):
    """Return the folder of TensorFlow's flower photos (229 MB), downloaded and unpacked once."""
    folder, archive = data_dir / "flower_photos", data_dir / "flower_photos.tgz"
    if folder.is_dir():
        return folder
    with reading("--data flowers: no photos", f"download {FLOWERS} to '{archive}'"):
        data_dir.mkdir(parents=True, exist_ok=True)
        if not archive.is_file():
            torch.hub.download_url_to_file(FLOWERS, archive, FLOWERS_SHA256)
        with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
            shutil.unpack_archive(archive, temporary, filter="data")  # stays in `temporary`
            return Path(temporary, folder.name).rename(folder)


# ------------------------------------------------------------------------------- folders of photos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
warnings.filterwarnings("ignore", module="PIL")  # large images and unusual EXIF data are readable
Image.MAX_IMAGE_PIXELS = 60 * 10**6  # PIL raises an error for more than twice as many


class PhotoDataset(Dataset):
    """Photos on disk: `paths` (N,) and labels int64 (N,)."""

    def __init__(self, paths, labels, preprocessing, augmented):
        self.paths, self.labels, self.preprocessing = paths, labels, preprocessing
        size, mean, std = (preprocessing[key] for key in ("image_size", "mean", "std"))
        # Crop the centre: `bleed` is the share to cut off at each side.
        bleed, method = (1 - preprocessing["crop"]) / 2, Image.Resampling.BILINEAR
        changes = [partial(ImageOps.fit, size=(size, size), method=method, bleed=bleed)]
        if augmented:
            changes = [v2.RandomRotation(10), v2.RandomResizedCrop(size, scale=(0.35, 1))]
            changes += [v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2)]
        changes += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*changes, v2.Normalize(mean, std)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Return (image float (3, S, S), label). Raises DataError for an unreadable file."""
        image = open_image(self.paths[index], self.preprocessing)
        return self.transform(image), self.labels[index]


def open_image(path, preprocessing):
    """Decode a file to an upright PIL image in RGB. Raises DataError."""
    with reading(f"'{path}': cannot read this image", "remove it"):
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise ValueError("it is no regular file")
        # Without `formats`, PIL would also open an EPS file, and start Ghostscript for it.
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "WEBP", "GIF")) as image:
            # Decode a JPEG at 1/2, 1/4 or 1/8 if that leaves twice the image size, enough for the
            # smallest random crop: photos of 12 megapixels load three times as fast.
            image.draft("RGB", [2 * preprocessing["image_size"]] * 2)
            image.load()
            with suppress(Exception):  # damaged EXIF data do not harm the pixels
                image = ImageOps.exif_transpose(image)  # EXIF has the orientation of a phone
            if image.mode.startswith("I"):  # 16 bits: 65535 is white, but PIL would cut at 255
                image = Image.fromarray((numpy.asarray(image) // 257).astype(numpy.uint8))
            if "A" in image.mode or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("L" if preprocessing["channels"] == 1 else "RGB").convert("RGB")


def is_readable(path):
    """Tell whether a file is an image. Only decoding shows whether a JPEG is complete."""
    try:
        str(path).encode()  # predictions.csv can only hold UTF-8 names
        open_image(path, SMALL)
    except (DataError, UnicodeError) as error:
        sys.stderr.write(f"skipping {str(path)!a}: {str(error.__cause__ or error)!a}\n")
        return False
    return True


def find_images(folder):
    """List the readable images below `folder`, sorted. Hidden files and folders are left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    files = [path for path in files if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [path for path, ok in zip(files, threads.map(is_readable, files)) if ok]


def list_folder(root):
    """List root/<class>/...: (sorted class names, paths (N,), labels (N,)). Raises DataError."""
    if not root.is_dir():
        raise DataError(f"'{root}': no such folder or dataset ({', '.join(PREPROCESSING)})")
    print(f"'{root}': decoding all images once, to find damaged ones", flush=True)
    images = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and path.name[0] not in "._":
            # Systems store é or 한 in different ways. NFC makes a name the same on all of them.
            name = normalize("NFC", path.name)
            images[name] = images.get(name, []) + find_images(path)
    if len(images) < 2 or not all(images.values()):
        found = ", ".join(f"{name} ({len(paths)} images)" for name, paths in images.items())
        fix = "at least two class folders with readable images are needed"
        raise DataError(f"'{root}': found {found or 'no folder'}; {fix}")
    classes = sorted(images)
    labels = [label for label, name in enumerate(classes) for _ in images[name]]
    paths = numpy.array([path for name in classes for path in images[name]])
    return classes, paths, torch.tensor(labels)


def split_folder(root, paths, labels, shares=(0.2,), salt=""):
    """Split each class in the order of path hashes, so that a moved folder keeps its split."""
    names = [normalize("NFC", path.relative_to(root).as_posix()) for path in paths]
    hashes = [hashlib.sha256(f"{salt}{name}".encode()).digest() for name in names]
    parts = []  # per class: one index array per share, and the rest
    for label in labels.unique():
        indices = sorted((labels == label).nonzero().flatten().tolist(), key=hashes.__getitem__)
        counts = [max(round(len(indices) * share), 1) if share else 0 for share in shares]
        if sum(counts) >= len(indices):
            name = paths[indices[0]].parent
            raise DataError(f"'{name}': too few images ({len(indices)}); add some")
        parts.append(numpy.split(numpy.array(indices), numpy.cumsum(counts)))
    return [numpy.sort(numpy.concatenate(part)) for part in zip(*parts)]  # shares, training


def load_folder(root):
    """Return (classes, splits) of a folder; without val, a fifth of each class of train is val."""
    there = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    folders = {split: p for name, split in SPLITS.items() for p in there if p.name.lower() == name}
    if "train" not in folders:
        if folders and len(folders) == len(there):
            raise DataError(f"'{root}' has {', '.join(folders)}, but no train: add this folder")
        folders = {"train": root}
    splits, found = {}, {split: list_folder(folder) for split, folder in folders.items()}
    for split, (classes, paths, labels) in found.items():
        splits[split] = paths, labels
        if classes != found["train"][0]:
            names = ", ".join(sorted(set(classes) ^ set(found["train"][0])))
            raise DataError(f"'{root}': only one of train and {split} has {names}; add the other")
    if "val" not in splits:
        paths, labels = splits["train"]
        val, train = split_folder(root, paths, labels)
        splits |= {"train": (paths[train], labels[train]), "val": (paths[val], labels[val])}
    return classes, splits


# ---------------------------------------------------------------------------------------- pictures
# Class names may be Chinese, Japanese or Korean: add the fonts of this computer that have them.
CJK = "Noto Sans CJK SC,Noto Sans CJK JP,WenQuanYi Zen Hei,Microsoft YaHei,SimHei,PingFang SC"
INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
FONTS = ["DejaVu Sans", *(name for name in CJK.split(",") if name in INSTALLED)]
matplotlib.rcParams.update({"font.family": FONTS, "text.parse_math": False})  # $5 is no formula


def to_pixels(images, preprocessing):
    """Undo `normalise`: float (N, 3, S, S) -> float (N, 3, S, S) in 0..1, on the CPU."""
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images.cpu() * std + mean).clamp(0, 1)


def plot_grid(path, title, images, names, colours=None, columns=8):
    """Draw images (N, 3, S, S) in 0..1 as a grid, each with its name above it."""
    columns = min(columns, max(len(images), 4))  # fewer would leave no space for the title
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for index, axes in zip(range(len(images)), figure.axes):
        axes.imshow(images[index].permute(1, 2, 0).numpy(), interpolation="nearest")
        lines = [s if len(s) < 19 else f"{s[:11]}…{s[-6:]}" for s in names[index].splitlines()]
        axes.set_title("\n".join(lines), color=colours[index] if colours else "black", fontsize=8)
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------- shared by the scripts
OPTIONS = {  # name: (type, (lowest, highest) or [choices], help, meaning of None)
    "data": (str, None, f"dataset: {', '.join(PREPROCESSING)}, or a folder of images"),
    "data_dir": (Path, None, "folder for downloaded datasets"),
    "out": (Path, None, "folder for the results"),
    "checkpoint": (str, None, "checkpoint, file with torchvision's weights, or imagenet"),
    "image_size": (int, (8, 1024), "image side in pixels", "the checkpoint's, or the dataset's"),
    "batch_size": (int, (2, 65536), "images per step, all processes together", "the recipe's"),
    "workers": (int, (0, 64), "processes that decode photos"),
    "device": (str, None, "auto, cpu, cuda, cuda:1 or mps"),
    "seed": (int, (0, 10**6), "seed of all random choices"),
    "recipe": (str, ["small", "paper", "cosine"], "optimizer, schedule and other defaults"),
    "width": (float, (0.05, 4), "width multiplier"),
    "output_stride": (int, [8, 16, 32], "ratio of image to last feature map", "the checkpoint's"),
    "epochs": (int, (0, 10**5), "epochs (finetune.py: of stage blocks)", "by recipe or dataset"),
    "classifier_epochs": (int, (1, 10**5), "epochs of stage classifier"),
    "learning_rate": (float, (0, 100), "peak learning rate", "by recipe or dataset"),
    "weight_decay": (float, (0, 1), "weight decay of convolutions and linear layers"),
    "loss": (str, ["cross-entropy", "focal", "dice"], "focal: hard images; dice: rare classes"),
    "label_smoothing": (float, (0, 1), "share of the target for all classes (cross-entropy only)"),
    "amp": (str, ["off", "bfloat16"], "mixed-precision type for the forward pass"),
    "per_class": (int, (1, 10**6), "training images per class", "all"),
    "unfreeze": (int, (0, 17), "last blocks to train; 17 includes the stem", "photos 8, else 17"),
    "train_batch_norm": (bool, None, "update BatchNorm's statistics", "no for photos, else yes"),
    "resume": (bool, None, "continue the run in --out with its settings, or start it"),
    "overwrite": (bool, None, "replace the run in --out"),
    "images": ([Path], None, "images and folders to classify without labels", "none"),
    "explain": (bool, None, "draw where the network sees the predicted class"),
    "formats": ([str], ["torchscript", "pt2", "onnx", "int8"], "formats to write (default: all)"),
    "with_preprocessing": (bool, None, "take uint8 images, and return probabilities"),
}


def parse_arguments(description, defaults, saved=()):
    """Parse the options in `defaults`, and five more; `saved` has the settings of a resumed run."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line
    workers = 4 if torch.cuda.is_available() else 0  # on a CPU they would compete with the network
    common = {"data_dir": Path("datasets"), "image_size": None, "workers": workers, "seed": 0}
    for name, default in (defaults | common | {"device": "auto"}).items():
        kind, allowed, text, *unset = OPTIONS[name]
        settings = {"choices": allowed} if isinstance(allowed, list) else {}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction if unset else "store_true"}
        else:
            settings |= {"type": kind[0], "nargs": "+"} if type(kind) is list else {"type": kind}
        if unset or kind in (str, int, float, Path):
            text += f" (default: {unset[0] if default is None else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **settings)
    args = parser.parse_args()
    vars(args).update({name: saved[name] for name in vars(args).keys() & saved})
    for name, value in vars(args).items():
        kind, allowed, *_ = OPTIONS[name]
        low, high = allowed if isinstance(allowed, tuple) else (value, value)
        choices = allowed if isinstance(allowed, list) else [value]
        if isinstance(kind, list) or (value is None and parser.get_default(name) is None):
            continue
        if not isinstance(value, kind) or value not in choices or not low <= value <= high:
            raise DataError(f"--{name.replace('_', '-')} {value}: use a value from {low} to {high}")
    if args.out.resolve().is_relative_to(Path(args.data).resolve()):
        parser.error(f"--out {args.out}: is inside --data {args.data}; use another folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if APPLE else "cpu"
    with reading(f"--device {args.device}: not available on this machine", "use auto or cpu"):
        torch.ones(1, device=args.device).item()
    return args


def load_for(args, preprocessing=None):
    """Call `load_data` with the options of the command line, which override `preprocessing`."""
    names = {"per_class", "seed", "data_dir", "batch_size", "workers", "device"} & vars(args).keys()
    options = {name: getattr(args, name) for name in names}
    size = {"image_size": args.image_size} if args.image_size else {}
    return load_data(args.data, (preprocessing or {}) | size, **options)


def run(main, *errors):
    """Run a script. An error that the user can fix ends in one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` works like Ctrl-C
    with suppress(AttributeError, TypeError):  # a notebook's output, a system without glibc
        sys.stdout.reconfigure(errors="replace")  # a console may lack the letters of a class name
        # glibc would return the memory of each feature map to the system, and request it again.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no separate memory for large tensors
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    try:
        return main()
    except KeyboardInterrupt:
        message = "interrupted; a run with a last.pt continues with --resume"
    except (DataError, *errors) as error:
        message = str(error).rpartition("DataError: ")[2]  # after the traceback of a worker
    except BrokenPipeError:  # `| head` has read enough
        os._exit(0)
    except OSError as error:
        message = f"{error}: check permissions and free space, or use another folder"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "not enough memory: lower --batch-size or --image-size"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------- the script
def describe(dataset):
    """Format the image counts per class and split."""
    bins = [n.bincount(minlength=len(dataset.classes)).tolist() for _, n in dataset.splits.values()]
    table = [("", *dataset.splits), *zip(dataset.classes, *bins), ("total", *map(sum, bins))]
    width = max(len(name) for name, *_ in table)
    return "\n".join(f"{name:{width}}" + "".join(map("{:>8}".format, row)) for name, *row in table)


def main():
    defaults = {"data": "glyphs", "out": Path("runs/data"), "batch_size": 256}
    args = parse_arguments("Count the images of a dataset, and draw some of them.", defaults)
    dataset = load_for(args)
    print(f"{args.data}: {len(dataset.classes)} classes\n{describe(dataset)}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    some = torch.randperm(len(dataset.splits["train"][1]))[:32]
    images, labels = next(iter(dataset.batches("train", indices=some)))
    images, names = to_pixels(images, dataset.preprocessing), [dataset.classes[n] for n in labels]
    plot_grid(args.out / "samples.png", f"training images of {args.data}", images, names)
    dataset.batch_size = dataset.repeats = 9  # one batch: nine augmentations of one image
    augmented, _ = next(iter(dataset.batches("train", augmented=True, indices=some[:1])))
    images = torch.cat([images[:1], to_pixels(augmented, dataset.preprocessing)])
    names = [names[0], *["augmented"] * 9]
    plot_grid(args.out / "augmented.png", "one image, nine augmentations", images, names, columns=5)
    print(f"wrote samples.png and augmented.png to {args.out}")


if __name__ == "__main__":
    run(main)
