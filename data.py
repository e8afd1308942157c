"""Load a dataset by name or folder, as batches that are ready for the network.

An image takes this path: file or array -> uint8 (C, H, W) -> augmentation (training only) ->
normalisation -> float (N, 3, S, S).

    glyphs                           37 classes of letters, drawn from matplotlib's fonts
    digits                           1,797 handwritten digits of 8 × 8 pixels, from digits.npz
    mnist, fashion-mnist, cifar10    60,000 or 70,000 small images, in --data-dir or downloaded
    flowers                          3,670 photos of five kinds, likewise
    a folder                         path/<class>/*.jpg, or path/{train,val,test}/<class>/*.jpg

Small images stay in memory, and a whole batch is augmented at once (`Batches`). Photos are
decoded one by one (`PhotoDataset`). `DATASETS` lists all datasets by name. Terms used here:

    split            train, val (validation, for all choices) or test (for final results only)
    preprocessing    image size, crop, channels, and the mean and std that normalise pixels
    augmentation     random changes of training images that keep their class

    python data.py --data photos                     # count the images and draw some of them
"""

import cli  # before matplotlib, because it checks the backend

# isort: split
import gzip
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unicodedata import normalize

import matplotlib
import numpy
import torch
from matplotlib import font_manager, style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import datasets
from torchvision.transforms import v2

# Preprocessing. Mean and std are for pixels in 0..1. crop: share of the shorter side to keep.
SMALL_IMAGE = {
    "image_size": 32,
    "crop": 1.0,
    "channels": 1,  # grayscale
    "mean": [0.25] * 3,  # mean and std of augmented glyphs, also used for digits
    "std": [0.3] * 3,
}
PHOTO = {
    "image_size": 224,
    "crop": 0.875,  # 224 / 256, usual for ImageNet
    "channels": 3,
    "mean": [0.485, 0.456, 0.406],  # ImageNet's
    "std": [0.229, 0.224, 0.225],
}
FOLDER_EPOCH = 320  # a small folder is repeated until an epoch has this many images
# The order of numbers in memory. Channels last makes convolutions faster, except on Apple's
# GPUs: there, gradients become 30 times slower (pytorch/pytorch#193349).
MEMORY_FORMAT = torch.channels_last
if torch.backends.mps.is_available():
    MEMORY_FORMAT = torch.contiguous_format


class DataError(cli.UserError):
    """Data that cannot be used. The message names the problem and the fix."""


@contextmanager
def reading(problem, fix):
    """Turn any exception into a DataError, around the one call of a library that reads a file.

    A damaged file makes libraries raise almost anything.
    """
    try:
        yield
    except Exception as error:
        raise DataError(f"{problem} ({str(error)[:200]}); {fix}") from error


# --------------------------------------------------------------------- one image, or one batch
def mean_and_std(preprocessing, device):
    """Return both as one tensor (2, 3, 1, 1): a value per channel, for pixels in 0..1."""
    values = [preprocessing["mean"], preprocessing["std"]]
    return torch.tensor(values, device=device).view(2, 3, 1, 1)


def normalise(images, preprocessing):
    """Subtract mean, divide by std: (N, 1 or 3, S, S) in 0..255 -> float (N, 3, S, S)."""
    mean, std = 255 * mean_and_std(preprocessing, images.device)
    return (images - mean) / std  # a grayscale image fills all three channels


def to_pixels(images, preprocessing):
    """Undo `normalise`: float (N, 3, S, S) -> float (N, 3, S, S) in 0..1, on the CPU."""
    mean, std = mean_and_std(preprocessing, "cpu")
    return (images.cpu() * std + mean).clamp(0, 1)


def resize(images, size):
    """Resize (N, C, H, W) of any type -> float (N, C, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return functional.interpolate(images.float(), size, mode="bilinear", antialias=True)


def shift_and_flip(images, size, shift=1 / 8):
    """Shift each image by up to a share `shift` of its side, and mirror half of them.

    He et al. (arXiv:1512.03385, §4.2) do so with CIFAR-10, by up to 4 of 32 pixels.
    torchvision's transforms would change all images of a batch in the same way.
    Shape: uint8 (N, C, H, H) -> float (N, C, size, size) in 0..255.
    """
    count, _, side, _ = images.shape
    device = images.device
    border = round(side * shift)
    padded = functional.pad(images, [border] * 4)
    # A view of all windows of H × H pixels in the padded images. windows[i, :, y, x] begins
    # in row y and column x of image i.
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(2 * border + 1, (2, count), device=device)
    shifted = windows[torch.arange(count, device=device), :, top, left]  # (N, C, H, H)
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    return resize(torch.where(mirrored, shifted.flip(3), shifted), size)


# Largest random change of each kind in `distort`, in training.
DISTORTION = {
    "rotation": 0.25,  # radians, 14 degrees
    "slant": 0.35,  # tangent of the angle, 19 degrees: italic and left-leaning writing
    "scale": 0.25,  # of width and height, each: from e^-0.25 = 78% to e^0.25 = 128%
    "shift": 0.15,  # of half the side: 2.4 of 32 pixels
    "warp": 0.12,  # of half the side: 1.9 of 32 pixels, differently in each part of the image
    "stroke": 0.6,  # share of the way to strokes that are 2 pixels thicker or thinner
    "blur": 1.5,  # share of the way to a quarter of the resolution; above 1 counts as 1
    "noise": 0.1,  # std, for pixels in 0..1
}
# Validation and test letters keep these limits, so that new limits for training change no
# result.
HELD_OUT_DISTORTION = {
    "rotation": 0.25,
    "slant": 0.35,
    "scale": 0.25,
    "shift": 0.15,
    "warp": 0.12,
    "stroke": 0.6,
    "blur": 1.5,
    "noise": 0.1,
}


def distort(images, size, limits=DISTORTION):
    """Give each letter or digit a new shape, as if another hand or font had drawn it.

    A sampling grid applies shift, scale, rotation, slant and a smooth warp; stroke width, blur
    and noise follow. There is no flip: a mirrored letter is a different letter, or none.
    Shape: (N, C, H, W) in 0..255, background 0 -> float (N, C, size, size) in 0..255.
    """
    images = images.float() / 255
    count = len(images)

    def random(name, *shape):
        """One value per image (or one array of this shape), from -limit to limit."""
        return (2 * torch.rand(count, *shape, device=images.device) - 1) * limits[name]

    # Each image has its own 2 × 3 matrix, which maps output to input coordinates (from -1 to
    # 1). Its last column is a shift. The others are a product of rotation, slant and scale:
    #     [cos  -sin]   [1  slant]   [scale_x     0   ]
    #     [sin   cos] · [0    1  ] · [   0     scale_y]
    angle = random("rotation")
    slant = random("slant")
    scale_x = random("scale").exp()
    scale_y = random("scale").exp()
    cos = angle.cos()
    sin = angle.sin()
    first_row = [cos * scale_x, (cos * slant - sin) * scale_y, random("shift")]
    second_row = [sin * scale_x, (sin * slant + cos) * scale_y, random("shift")]
    matrix = torch.stack(first_row + second_row, dim=1).view(count, 2, 3)  # from (N, 6)
    grid = functional.affine_grid(matrix, (count, 1, size, size), align_corners=False)
    # A smooth warp: 4 × 4 random vectors, interpolated to one per pixel.
    warp = functional.interpolate(random("warp", 2, 4, 4), size, mode="bicubic")
    grid = grid + warp.permute(0, 2, 3, 1)  # (N, S, S, 2)
    images = functional.grid_sample(images, grid, align_corners=False)
    # Stroke width: mix with the maximum (thicker) or minimum (thinner) of each 3 × 3 area.
    stroke = random("stroke", 1, 1, 1)
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    extreme = torch.where(stroke > 0, thick, thin)
    images = images + stroke.abs() * (extreme - images)
    # Blur: mix with a quarter of the resolution, similar to the 8 × 8 digits.
    coarse = functional.adaptive_avg_pool2d(images, max(size // 4, 1))
    coarse = functional.interpolate(coarse, size, mode="bilinear")
    blur = random("blur", 1, 1, 1).abs().clamp(max=1)
    images = torch.lerp(images, coarse, blur)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    images = images / brightest.clamp(min=0.1)  # full contrast
    noise = torch.randn(images.shape, device=images.device) * random("noise", 1, 1, 1)
    return (images + noise).clamp(0, 1) * 255


def fit_photo(photo, preprocessing):
    """Crop the centre and resize it: PIL image -> PIL image of S × S pixels."""
    size = preprocessing["image_size"]
    cut_off = (1 - preprocessing["crop"]) / 2  # share at each side
    return ImageOps.fit(photo, (size, size), Image.Resampling.BILINEAR, bleed=cut_off)


def augment_photo(photo, size):
    """Rotate, crop, mirror and recolour a photo at random: PIL image -> PIL image (S, S).

    The crop has 35 to 100% of the area (Szegedy et al., arXiv:1409.4842, §6, with 8 to 100%).
    """
    changes = [
        v2.RandomRotation(10),  # degrees
        v2.RandomResizedCrop(size, scale=(0.35, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    ]
    return v2.Compose(changes)(photo)


# ------------------------------------------------------------------------------------- batches
def process_rank():
    """Return the number of this process and of all processes: 0 and 1 without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@dataclass
class Batches:
    """Batches of tensors in memory: an iterable of (inputs, labels), like a DataLoader.

    A DataLoader fetches items one by one. For small images it is much faster to slice and
    augment a whole batch.
    """

    inputs: torch.Tensor  # (N, ...)
    labels: torch.Tensor  # (N,)
    batch_size: int
    transform: object = None  # function of a batch of inputs
    # In training. It also leaves out an incomplete last batch: BatchNorm needs two images.
    shuffle: bool = False
    repeats: int = 1  # passes over all items per epoch

    def __len__(self):
        count = self.repeats * len(self.labels)
        if self.shuffle and count > self.batch_size:  # otherwise keep the only batch
            return count // self.batch_size
        return math.ceil(count / self.batch_size)

    def __iter__(self):
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = torch.cat([torch.randperm(len(self.labels)) for _ in range(self.repeats)])
        for indices in order.split(self.batch_size)[: len(self)]:
            inputs = self.inputs[indices]
            if self.transform is not None:
                inputs = self.transform(inputs)
            yield inputs, self.labels[indices]


class PhotoDataset(Dataset):
    """Photos on disk: paths (N,) and labels int64 (N,). augment: None, or like augment_photo.

    The next readable photo, with its label, takes the place of an unreadable one.
    """

    def __init__(self, paths, labels, preprocessing, augment=None):
        self.paths = paths
        self.labels = labels
        self.preprocessing = preprocessing
        self.augment = augment
        # Shared with the workers of a DataLoader, so that each unreadable photo is named once.
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Return (image float (3, S, S), label). Raises DataError: see MOST_UNREADABLE."""
        for _ in range(MOST_UNREADABLE):
            try:
                return self.load(index), self.labels[index]
            except DataError as error:
                if not self.unreadable[index]:
                    self.unreadable[index] = True
                    report_unreadable(error, number=self.unreadable.sum())
                index = (index + 1) % len(self)
        raise DataError(f"{MOST_UNREADABLE} unreadable photos in a row: check the folder")

    def load(self, index):
        photo = open_image(self.paths[index], self.preprocessing)
        if self.augment is None:
            photo = fit_photo(photo, self.preprocessing)
        else:
            photo = self.augment(photo, self.preprocessing["image_size"])
        return normalise(v2.functional.pil_to_tensor(photo), self.preprocessing)


def report_unreadable(error, number):
    """Print the message of an unreadable photo. A closed stderr must not end a run."""
    with suppress(OSError, ValueError):
        print(f"unreadable photo {number}, left out: {error}", file=sys.stderr, flush=True)


@dataclass
class Data:
    """A dataset. Its images are uint8 (N, C, H, W) in memory, or a numpy array of N paths."""

    classes: list  # names, in the order of the labels
    preprocessing: dict
    splits: dict  # "train", "val" and perhaps "test": (images, labels (N,))
    kind: str = "small images"  # or "photos"
    augment: object = None  # function of training images: see DATASETS
    repeats: int = 1  # passes over the training images per epoch
    batch_size: int = 128  # of all processes together
    workers: int = 0  # processes that decode photos
    device: str = "cpu"  # where small images are augmented
    fingerprint: str | None = None  # of the photos for training and validation
    # split -> bool (N,): photos that could not be read. The workers share it.
    unreadable: dict = field(default_factory=dict)

    def batches(self, split, augmented=False, indices=None):
        """Return an iterable of (images float (N, 3, S, S), labels (N,)), and with a length.

        augmented: for training: shuffled, repeated, without an incomplete last batch.
        indices: use only these images, in this order (default: all images of the split,
        divided among the processes of torchrun).
        """
        images, labels = self.splits[split]
        rank, processes = process_rank()
        if min(len(labels), self.batch_size) < 2 * processes and processes > 1:
            # BatchNorm needs two images in each process.
            problem = f"{split}: too few images for {processes} processes"
            raise DataError(f"{problem}; use fewer processes, or raise --batch-size")
        whole = indices is None
        if whole:
            end = len(labels)
            if split == "train":
                # Equal shares, so that all processes take the same number of steps.
                end -= end % processes
            indices = torch.arange(rank, end, processes)
        images = images[indices.numpy()]
        labels = labels[indices]
        batch_size = self.batch_size // processes
        repeats = self.repeats if augmented else 1
        if self.kind == "photos":
            photos = PhotoDataset(images, labels, self.preprocessing)
            if whole:
                # A photo that an earlier epoch has reported is not reported again.
                photos.unreadable = self.unreadable.setdefault(split, photos.unreadable)
            sampler = None  # in order
            count = repeats * len(labels)
            if augmented:
                photos.augment = self.augment
                sampler = RandomSampler(photos, num_samples=count)
            context = None  # the system's default way to start workers
            if self.workers > 0 and sys.platform == "linux":
                context = "fork"  # each epoch starts new workers: a copy takes only 0.1 s
            return DataLoader(
                photos,
                batch_size,
                sampler=sampler,
                drop_last=augmented and count > batch_size,
                num_workers=self.workers,
                multiprocessing_context=context,
                pin_memory=self.device.startswith("cuda"),
            )

        def transform(batch):
            change = self.augment if augmented else resize
            batch = change(batch.to(self.device), self.preprocessing["image_size"])
            return normalise(batch, self.preprocessing)

        return Batches(
            images, labels, batch_size, transform, shuffle=augmented, repeats=repeats
        )

    def choose(self, split, count):
        """Return the indices of some images of a split, chosen at random."""
        _, labels = self.splits[split]
        return torch.randperm(len(labels))[:count]

    def keep_readable(self, split):
        """Decode all photos of a split, and leave out those that cannot be read."""
        if self.kind != "photos":
            return
        paths, labels = self.splits[split]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            errors = list(threads.map(find_error, paths))
        kept = torch.tensor([error is None for error in errors])
        if not kept.any():
            raise DataError(f"no readable image for {split}: {errors[0]}")
        for number, error in enumerate(filter(None, errors), start=1):
            report_unreadable(error, number)
        self.splits[split] = paths[kept.numpy()], labels[kept]


# --------------------------------------------------------------------------- glyphs and digits
# As in EMNIST "balanced" (arXiv:1702.05373): no lower-case letter that looks like its capital.
GLYPH_CLASSES = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt")
# Validation and test use held-out fonts, to measure accuracy on unknown fonts.
SANS_STYLES = ("", "-Bold", "-Oblique", "-BoldOblique")
GLYPH_FONTS = {
    "train": [
        *[f"DejaVuSans{style}" for style in SANS_STYLES],
        *[f"DejaVuSansMono{style}" for style in SANS_STYLES],
        *[f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")],
        *[f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")],
    ],
    "val": ["cmr10", "cmmi10"],
    "test": ["cmb10", "cmss10", "cmtt10"],
}
HELD_OUT_SEEDS = {"val": 1, "test": 2}
HELD_OUT_SHAPES = 32  # of each letter in each font


def draw_glyph(character, font):
    """Draw a letter, white on black, centred: uint8 (1, 64, 64).

    It fills 54 of 64 pixels, whatever its size in the font: c would look like C. It is drawn
    four times as large first, which makes smooth edges.
    """
    left, top, right, bottom = font.getbbox(character)
    letter = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letter).text((-left, -top), character, fill=255, font=font)
    letter = ImageOps.contain(letter, (54, 54), Image.Resampling.LANCZOS)
    return v2.functional.center_crop(v2.functional.pil_to_tensor(letter), [64, 64])


def load_glyphs(size, data_dir=None):
    """Draw all letters in all fonts. Validation and test letters are distorted once, here."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    splits = {}
    for split, names in GLYPH_FONTS.items():
        fonts = [ImageFont.truetype(folder / f"{name}.ttf", size=216) for name in names]
        images = torch.stack(
            [draw_glyph(glyph, font) for font in fonts for glyph in GLYPH_CLASSES]
        )
        labels = torch.arange(len(GLYPH_CLASSES)).repeat(len(fonts))
        if split in HELD_OUT_SEEDS:
            labels = labels.repeat(HELD_OUT_SHAPES)
            images = images.repeat(HELD_OUT_SHAPES, 1, 1, 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(HELD_OUT_SEEDS[split])  # the same images in every run
                images = distort(images, size, HELD_OUT_DISTORTION).round().byte()
        splits[split] = images, labels
    return GLYPH_CLASSES, splits


def load_digits(size, data_dir=None):
    """Read 1,797 digits by 13 writers from digits.npz.

    They are the test part of UCI's Optical Recognition of Handwritten Digits (E. Alpaydin and
    C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0), as scikit-learn
    distributes it. Each of the 8 × 8 values counts the ink in a 4 × 4 area, 0 to 16. The order
    seems to follow the writers. The second half is the test split (899), as in scikit-learn's
    example. In the first half, every fifth image of a digit is for validation (184), the
    others for training (714). Both have the same writers, so validation accuracy is a little
    too high.
    """
    path = Path(__file__).with_name("digits.npz")
    with reading(f"'{path}' is damaged", "clone the project again"), numpy.load(path) as file:
        counts = torch.from_numpy(file["images"])
        labels = torch.from_numpy(file["labels"]).long()
    grey = (counts[:, None] * (255 / 16)).round()
    images = resize(grey, size).round().byte()  # (1797, 1, S, S)
    first_half = torch.arange(len(labels)) < 898
    val = torch.zeros_like(first_half)
    for digit in range(10):
        indices = (first_half & (labels == digit)).nonzero().flatten()
        val[indices[::5]] = True
    masks = {"train": first_half & ~val, "val": val, "test": ~first_half}
    splits = {split: (images[mask], labels[mask]) for split, mask in masks.items()}
    return list("0123456789"), splits


# ----------------------------------------------------------------- MNIST and CIFAR-10, flowers
# In file names, "-" or "." takes the place of "?".
IDX_FILES = ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1")


def load_idx(kind, size, data_dir):
    """Load MNIST or Fashion-MNIST. kind: torchvision's class, which can download the files."""
    found = []
    for name in IDX_FILES:  # in data_dir itself, compressed or not
        paths = sorted(data_dir.glob(f"{name}-ubyte*"))
        found += [path for path in paths if path.is_file()][:1]
    if len(found) == len(IDX_FILES):
        arrays = [read_idx(path) for path in found]
    else:
        train, test = download(kind, data_dir, f"the four .gz files of {kind.mirrors[0]}")
        arrays = [train.data, train.targets, test.data, test.targets]
    classes = [name.partition(" - ")[0] for name in kind.classes]  # not "0 - zero"
    return classes, make_splits(*arrays, size, data_dir)


def read_idx(path):
    """Read LeCun's IDX format: 2 zeros, type 8 (uint8), dimensions, sizes, bytes."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with reading(f"'{path}' is damaged", "download it again"), unpack(path, "rb") as file:
        _, _, _, dimensions = file.read(4)
        shape = numpy.frombuffer(file.read(4 * dimensions), ">u4")
        contents = numpy.frombuffer(file.read(), numpy.uint8)
        return torch.from_numpy(contents.reshape(shape).copy())


def load_cifar10(size, data_dir):
    """Load CIFAR-10: 32 × 32 pixels in colour."""
    train, test = download(datasets.CIFAR10, data_dir, datasets.CIFAR10.url)
    arrays = []
    for part in (train, test):
        images = torch.from_numpy(part.data).movedim(3, 1)  # (N, H, W, 3) -> (N, 3, H, W)
        arrays += [images, torch.tensor(part.targets)]
    return train.classes, make_splits(*arrays, size, data_dir)


def download(kind, data_dir, source):
    """Return torchvision's training and test dataset, from data_dir or downloaded into it."""
    name = kind.__name__.lower()
    if kind is datasets.FashionMNIST:
        name = "fashion-mnist"
    fix = f"download {source} into '{data_dir}/{name}', and use it as --data-dir"
    with reading(f"--data {name}: no files, and no download", fix):
        return [kind(data_dir, train=train, download=True) for train in (True, False)]


def make_splits(train_images, train_labels, test_images, test_labels, size, data_dir):
    """Use the last tenth of the training images for validation. Returns the splits.

    Shape of images: (N, C, H, W), or (N, H, W) in grayscale.
    """
    cut = len(train_images) - max(len(train_images) // 10, 1)
    splits = {
        "train": (train_images[:cut], train_labels[:cut]),
        "val": (train_images[cut:], train_labels[cut:]),
        "test": (test_images, test_labels),
    }
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            problem = f"{split} has {len(images)} images, {len(labels)} labels"
            raise DataError(f"'{data_dir}': {problem}: replace it")
        if images.dim() == 3:
            images = images[:, None]
        if size <= 64:  # resize once, not in every epoch; larger images would fill the memory
            parts = [resize(part, size).round().byte() for part in images.split(1024)]
            images = torch.cat(parts)
        splits[split] = images, labels.long()
    return splits


FLOWERS = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def load_flowers(size, data_dir, **how):
    """Load TensorFlow's flower photos (229 MB), downloaded and unpacked once."""
    folder = data_dir / "flower_photos"
    archive = data_dir / "flower_photos.tgz"
    if not folder.is_dir():
        with reading("--data flowers: no photos", f"download {FLOWERS} to '{archive}'"):
            data_dir.mkdir(parents=True, exist_ok=True)
            if not archive.is_file():
                torch.hub.download_url_to_file(FLOWERS, archive, FLOWERS_SHA256)
            with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
                # The filter refuses files outside the temporary folder.
                shutil.unpack_archive(archive, temporary, filter="data")
                Path(temporary, folder.name).rename(folder)
    return load_folder(size, folder, **how)


# --------------------------------------------------------------------------- folders of photos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif")
# Without `formats`, PIL would also open an EPS file, and start Ghostscript for it.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
MAX_PIXELS = 120 * 10**6  # per image; four bytes each
SYSTEM_FOLDERS = {
    "@eadir",
    "__macosx",
    "lost+found",
    "$recycle.bin",
    "#recycle",
    "__pycache__",
}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "eval": "val",
    "evaluation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# "train_set" and "Training images" are also names of a split; "train_station" is none.
FILLER_WORDS = {"set", "data", "dataset", "images", "imgs", "photos", "split", "folder", "seg"}
UNLABELLED = "images in '{}', without class folders (see evaluate.py --images)"
MOST_UNREADABLE = 100  # photos in a row, before a run stops


def open_image(path, preprocessing):
    """Decode a file to an upright PIL image in RGB. Raises DataError."""
    size = preprocessing["image_size"]
    with reading(f"'{printable(str(path))}': cannot read this image", "remove it"):
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe might never end
            raise ValueError("it is no regular file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its size exceeds the limit of {MAX_PIXELS} pixels")
            # Decode a JPEG at 1/2, 1/4 or 1/8 if that leaves twice the image size, enough for
            # the smallest random crop: photos of 12 megapixels load three times as fast.
            image.draft("RGB", (2 * size, 2 * size))
            image.load()
    with suppress(Exception):  # PIL on damaged EXIF data, which do not harm the pixels
        image = ImageOps.exif_transpose(image)  # EXIF has the orientation of a phone
    if image.mode.startswith("I"):  # 16 bits, of which a camera may use 10, 12 or 14
        pixels = numpy.asarray(image)
        bits = max(int(pixels.max()).bit_length(), 8)  # that this image uses
        image = Image.fromarray((pixels >> (bits - 8)).astype(numpy.uint8))
    if "A" in image.mode or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if preprocessing["channels"] == 1:
        image = image.convert("L")
    return image.convert("RGB")


def find_error(path):
    """Return the error of an unreadable image, else None. Only decoding finds damage."""
    try:
        open_image(path, SMALL_IMAGE)
    except DataError as error:
        return error
    return None


def is_hidden(name):
    """Check whether a name belongs to the system or a tool, not to the dataset."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def list_inside(folder, left_out):
    """List a folder: (names of its subfolders, names of its images), sorted.

    left_out: a Counter, to which the numbers of all other files are added.
    """
    folders = []
    images = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            left_out["hidden folders" if entry.is_dir() else "hidden files"] += 1
        elif entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            images.append(entry.name)
        else:
            suffix = os.path.splitext(entry.name)[1].lower()
            left_out[f"{suffix or 'nameless'} files"] += 1
    return folders, images


def has_folders(folder):
    """Check whether a folder has visible subfolders: a split has, a class usually has not."""
    folders, _ = list_inside(folder, Counter())
    return len(folders) > 0


def list_images(folder, left_out):
    """List the images in a folder and its subfolders: sorted paths. See `list_inside`."""
    folders, images = list_inside(folder, left_out)
    paths = [os.path.join(folder, name) for name in images]
    for name in folders:
        subfolder = os.path.join(folder, name)
        if not os.path.islink(subfolder):  # a link may lead to a folder that contains it
            paths += list_images(subfolder, left_out)
    return sorted(paths)


def split_of(name):
    """Return "train", "val" or "test" for the name of such a folder, else None."""
    words = re.findall("[a-z]+", name.lower())
    words = [word for word in words if word not in FILLER_WORDS]
    if len(words) != 1:
        return None
    return SPLIT_WORDS.get(words[0])


def unwrap(folder, split=None):
    """Enter a folder whose only content is a folder: photos/photos/<class> -> photos/photos.

    Archives often have such a folder. The only folder is not entered if it is a class, or if
    its name is that of another split than `split`.
    """
    folders, images = list_inside(folder, Counter())
    if len(folders) != 1 or images or split_of(folders[0]) not in (None, split):
        return folder
    if not has_folders(folder / folders[0]):  # a class
        return folder
    return unwrap(folder / folders[0], split)


def find_splits(root, left_out):
    """Find the folders of splits: {"train": path, ...}, or {} if root holds class folders.

    Folders with names such as train, Validation or test_set are splits if they hold folders.
    """
    splits = {}
    others = []
    hidden = Counter()
    names, _ = list_inside(root, hidden)
    for name in names:
        split = split_of(name)
        if split is None or not has_folders(root / name):
            others.append(name)
        elif split in splits:
            problem = f"both '{splits[split].name}' and '{name}' are folders for {split}"
            raise DataError(f"'{root}': {problem}; keep one")
        else:
            splits[split] = unwrap(root / name, split)
    if splits:  # else list_classes lists root, and counts these files
        left_out.update(hidden)
        for name in others:
            images = list_images(root / name, Counter())
            left_out[UNLABELLED.format(root / name)] = len(images)
    return splits


def list_classes(root, left_out):
    """List root/<class>/...: {class name: paths}."""
    names, images = list_inside(root, left_out)
    left_out[f"images outside class folders in '{root}'"] = len(images)
    classes = {}
    for name in names:
        subfolders, images = list_inside(root / name, Counter())
        if split_of(name) == "test" and len(names) > 2 and not subfolders:
            left_out[UNLABELLED.format(root / name)] = len(images)
            continue
        if subfolders and not images:
            print(f"warning: class '{name}' has only folders: {', '.join(subfolders[:5])}")
        # Systems store é or 한 in different ways. NFC makes a name the same on all of them.
        key = printable(normalize("NFC", name))
        classes[key] = classes.get(key, []) + list_images(root / name, left_out)
    return classes


def printable(name):
    """Replace control characters, and bytes that are not UTF-8, by their numbers."""
    return "".join(letter if letter.isprintable() else f"<{ord(letter)}>" for letter in name)


def load_folder(size, root, training=True, trained_on=None):
    """Load a folder of photos, and print what was found. Returns (class names, splits).

    training: there must be images for it; without val, a fifth of each class is for
    validation. Otherwise, without val and test, all images are a test split, unless
    `trained_on` is their fingerprint. Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"'{root}': no such folder or dataset ({', '.join(DATASETS)})")
    root = unwrap(root)
    left_out = Counter()
    folders = find_splits(root, left_out) or {"train": root}
    found = {}
    for split in ("train", "val", "test"):
        if split in folders:
            found[split] = list_classes(folders[split], left_out)
    classes = sort_names({name for images in found.values() for name in images})
    if len(classes) < 2 and training:
        raise DataError(f"'{root}': training needs at least two class folders with images")
    splits = {}
    for split, images in found.items():
        splits[split] = index_images(images, classes)
        check_classes(folders[split], images, classes, required=split == "train")
    reasons = [f"{reason}: {count}" for reason, count in left_out.items() if count]
    if reasons:
        print(f"left out: {', '.join(reasons)}")
    splits = choose_splits(root, folders, splits, training, trained_on)
    for split, (paths, _) in splits.items():
        folder = folders.get(split) or folders["train"]  # others are made from train
        print(f"{split}: {len(paths)} images of '{folder}'")
    names = ", ".join(classes[:5])
    if len(classes) > 5:
        names += ", ..."
    print(f"{len(classes)} classes: {names}")
    return classes, splits


def sort_names(names):
    """Sort class names. Numbers are sorted as numbers: 9 comes before 10."""
    if names and all(name.isdecimal() for name in names):
        print("class names are numbers: they are in numeric order")
        return sorted(names, key=int)
    return sorted(names)


def index_images(images, classes):
    """Return (paths (N,), labels (N,)) of {class name: paths}."""
    paths = []
    labels = []
    for label, name in enumerate(classes):
        found = images.get(name, [])
        paths += found
        labels += [label] * len(found)
    return numpy.array(paths, dtype=object), torch.tensor(labels, dtype=torch.long)


def check_classes(folder, images, classes, required):
    """Warn of classes without images, or raise DataError if images of all are `required`."""
    if not any(images.values()):
        raise DataError(f"'{folder}' has no images; add some, or remove the folder")
    missing = [name for name in classes if not images.get(name)]
    if not missing:
        return
    problem = f"'{folder}' has no images of {', '.join(missing[:5])}"
    if required:
        raise DataError(f"{problem}; add images, or remove the class everywhere")
    print(f"warning: {problem}")


def choose_splits(root, folders, splits, training, trained_on):
    """Choose among the splits of a folder, and make val or test from train if one is missing.

    Training needs train and val. Evaluation needs test, or else val: see `load_folder`.
    """
    if "train" not in splits:
        if training:
            raise DataError(f"'{root}' has {', '.join(splits)}, but no train: add this folder")
        return splits
    paths, labels = splits["train"]
    if not training and len(splits) == 1 and fingerprint(paths) != trained_on:
        return {"test": splits["train"]}
    if "val" in splits or ("test" in splits and not training):
        return splits
    print("no val folder: a fifth of each class in train is for validation, always the same")
    train, val = split_folder(folders["train"], paths, labels)
    del splits["train"]
    return {
        "train": (paths[train], labels[train]),
        "val": (paths[val], labels[val]),
        **splits,  # perhaps test
    }


def compute_hash(text):
    """Compute the SHA-256 of a text, which may have bytes of file names that are not UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def fingerprint(paths):
    """Compute a text from the names of photos and the sizes of up to 1,000 of them."""
    # By the reversed path: the file's name decides first, and the place of the folder hardly.
    paths = sorted(paths, key=lambda path: path[::-1])
    names = "/".join(os.path.basename(path) for path in paths)
    sizes = [os.path.getsize(path) for path in paths[:: len(paths) // 1000 + 1]]
    return compute_hash(f"{names}{sizes}")


def describe_training(dataset):
    """Describe the images that a network is trained on, for its checkpoint."""
    about = {split: len(labels) for split, (_, labels) in dataset.splits.items()}
    if dataset.fingerprint is not None:
        about["fingerprint"] = dataset.fingerprint
    return about


def split_folder(root, paths, labels, share=0.2, salt=""):
    """Choose a share of each class. Returns (indices of the others, indices of the share).

    The photos of a class are sorted by a hash of their path in `root`, and the first ones are
    chosen. So a moved folder keeps its split, and a new photo hardly changes it. Another
    `salt` gives another split (experiments/split_photos.py). Raises DataError for a small
    class.
    """

    prefix = os.path.join(root, "")

    def path_hash(index):
        inside = paths[index].removeprefix(prefix).replace(os.sep, "/")
        return compute_hash(salt + normalize("NFC", inside))

    others = []
    chosen = []
    for label in labels.unique():
        order = sorted((labels == label).nonzero().flatten().tolist(), key=path_hash)
        count = max(round(share * len(order)), 1)
        if count >= len(order):
            name = Path(paths[order[0]]).parent
            raise DataError(f"'{name}': too few images ({len(order)}); add some")
        chosen += order[:count]
        others += order[count:]
    return numpy.sort(others), numpy.sort(chosen)


# ----------------------------------------------------------------------- the table of datasets
# load: function (image size, folder) -> (class names, {split: (images, labels)}). augment:
# function of training images: (N, C, H, W) in memory, or one photo; and the image size.
# repeats: passes over the training images per epoch, each with new augmentations.
DATASETS = {
    "glyphs": {
        "load": load_glyphs,
        "kind": "small images",
        "preprocessing": SMALL_IMAGE,
        "augment": distort,
        "repeats": 32,
    },
    "digits": {
        "load": load_digits,
        "kind": "small images",
        "preprocessing": SMALL_IMAGE,
        "augment": distort,
        "repeats": 4,
    },
    "mnist": {
        "load": partial(load_idx, datasets.MNIST),
        "kind": "small images",
        # Mean and std of this dataset and the next two: measured on their training images.
        "preprocessing": {**SMALL_IMAGE, "mean": [0.1307] * 3, "std": [0.3081] * 3},
        "augment": distort,
        "repeats": 1,
    },
    "fashion-mnist": {
        "load": partial(load_idx, datasets.FashionMNIST),
        "kind": "small images",
        "preprocessing": {**SMALL_IMAGE, "mean": [0.2860] * 3, "std": [0.3530] * 3},
        "augment": partial(shift_and_flip, shift=1 / 16),
        "repeats": 1,
    },
    "cifar10": {
        "load": load_cifar10,
        "kind": "small images",
        "preprocessing": {
            **SMALL_IMAGE,
            "channels": 3,
            "mean": [0.4914, 0.4822, 0.4465],
            "std": [0.2470, 0.2435, 0.2616],
        },
        "augment": shift_and_flip,
        "repeats": 1,
    },
    "flowers": {
        "load": load_flowers,
        "kind": "photos",
        "preprocessing": PHOTO,
        "augment": augment_photo,
        "repeats": 1,
    },
}
FOLDER = {**DATASETS["flowers"], "load": load_folder}


def load_data(
    name,
    preprocessing=None,
    per_class=None,
    seed=0,
    data_dir="datasets",
    classes=None,
    training=True,
    trained_on=None,
    **options,
):
    """Load a dataset by name (a key of DATASETS) or folder. Returns Data; raises DataError.

    preprocessing: values that replace the dataset's own, for example a checkpoint's.
    per_class: training images per class, chosen by `seed`.
    classes: names in the order that a network knows; labels follow it if it has all names
    found.
    training, trained_on: see `load_folder`. options: fields of `Data`.
    """
    if name in DATASETS:
        entry = DATASETS[name]
        folder = Path(data_dir)
    else:
        entry = FOLDER
        folder = Path(name)
    preprocessing = {**entry["preprocessing"], **(preprocessing or {})}
    load = entry["load"]
    if entry["kind"] == "photos":
        load = partial(load, training=training, trained_on=trained_on)
    names, splits = load(preprocessing["image_size"], folder)
    # A network that is trained must have the same classes, one that is evaluated may have
    # more.
    known = set(classes or ())
    if set(names) == known or not training and set(names) < known:
        numbers = torch.tensor([classes.index(name) for name in names])
        splits = {
            split: (images, numbers[labels]) for split, (images, labels) in splits.items()
        }
        names = list(classes)
    repeats = entry["repeats"]
    if "train" in splits and training:
        images, labels = splits["train"]
        if entry["kind"] == "photos":
            repeats = math.ceil(FOLDER_EPOCH / len(labels))
            val_paths, _ = splits["val"]
            options["fingerprint"] = fingerprint([*images, *val_paths])
        if per_class is not None:
            kept = choose_per_class(labels, per_class, seed)
            splits["train"] = images[kept.numpy()], labels[kept]
            repeats = max(repeats * len(labels) // len(kept), 1)  # an epoch keeps its size
    return Data(
        names,
        preprocessing,
        splits,
        kind=entry["kind"],
        augment=entry["augment"],
        repeats=repeats,
        **options,
    )


def choose_per_class(labels, per_class, seed):
    """Choose this number of images per class at random. Returns sorted indices."""
    smallest = labels.bincount().min().item()
    if smallest < per_class:
        raise DataError(f"--per-class {per_class}: a class has {smallest} images; use fewer")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = [order[labels[order] == label][:per_class] for label in labels.unique()]
    return torch.cat(kept).sort().values


def load_for(args, preprocessing=None, **how):
    """Call `load_data` with the options of the command line, which have priority."""
    preprocessing = dict(preprocessing or {})
    if args.image_size is not None:
        preprocessing["image_size"] = args.image_size
    for name in ("seed", "data_dir", "batch_size", "workers", "device", "per_class"):
        if name in args:  # not every script has all of them
            how[name] = getattr(args, name)
    return load_data(args.data, preprocessing, **how)


# ------------------------------------------------------------------------------------ pictures
# Class names may be Chinese, Japanese or Korean: add the fonts of this computer that have
# them.
CJK_FONTS = [
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
]


@contextmanager
def picture_style():
    """Draw with matplotlib's defaults and our fonts, whatever the user's settings are."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed]]
    own = {"font.family": fonts, "text.parse_math": False}  # $5 is no formula
    with style.context(["default", own]), warnings.catch_warnings(record=True) as caught:
        yield
    if any("missing from font" in str(warning.message) for warning in caught):
        print("pictures: no installed font has all letters of the names (docs/install.md)")


def shorten(text):
    """Cut a long name in the middle."""
    if len(text) < 19:
        return text
    return f"{text[:11]}…{text[-6:]}"


@picture_style()
def plot_grid(path, title, images, names, colours=None, columns=8):
    """Draw images (N, 3, S, S) in 0..1 as a grid, each with its name above it."""
    columns = min(columns, max(len(images), 4))  # fewer would leave no space for the title
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    colours = colours or ["black"] * len(images)
    for number, (image, name, colour) in enumerate(zip(images, names, colours), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axis("off")
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        lines = [shorten(line) for line in name.splitlines()]
        axes.set_title("\n".join(lines), color=colour, fontsize=8)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------- the script
def main():
    parser = cli.make_parser(__doc__, data="glyphs", out="runs/data", batch_size=256)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    args = cli.parse(parser)
    dataset = load_for(args)
    print(f"{args.data}: {len(dataset.classes)} classes")
    for split in dataset.splits:
        dataset.keep_readable(split)
        _, labels = dataset.splits[split]
        print(f"{split}: {len(labels)} images")
        counts = labels.bincount(minlength=len(dataset.classes)).tolist()
        for name, count in zip(dataset.classes, counts):
            print(f"    {count:6}  {name}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    some = dataset.choose("train", 32)
    images, labels = next(iter(dataset.batches("train", indices=some)))
    images = to_pixels(images, dataset.preprocessing)
    names = [dataset.classes[label] for label in labels]
    plot_grid(args.out / "samples.png", f"training images of {args.data}", images, names)
    # An epoch of one image, repeated nine times, is one batch of nine augmentations.
    dataset.batch_size = 9
    dataset.repeats = 9
    augmented, _ = next(iter(dataset.batches("train", augmented=True, indices=some[:1])))
    images = torch.cat([images[:1], to_pixels(augmented, dataset.preprocessing)])
    names = [names[0], *["augmented"] * 9]
    plot_grid(
        args.out / "augmented.png", "one image, nine augmentations", images, names, columns=5
    )
    print(f"wrote samples.png and augmented.png to {args.out}")


if __name__ == "__main__":
    cli.run(main)
