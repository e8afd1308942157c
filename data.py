"""Load a dataset by name or folder, as batches that are ready for the network.

An image takes this path: file or array -> uint8 (C, H, W) -> augmentation (training only) ->
normalisation -> float (N, 3, S, S).

    glyphs                           37 classes of printed letters, drawn from matplotlib's fonts
    digits                           1,797 handwritten digits of 8 × 8 pixels, from digits.npz
    mnist, fashion-mnist, cifar10    60,000 or 70,000 small images, in --data-dir or downloaded
    flowers                          3,670 photos of five kinds, likewise
    a folder                         path/<class>/*.jpg, or path/{train,val,test}/<class>/*.jpg

Small images stay in memory, and a whole batch is augmented at once (`Batches`). Photos are decoded
one by one (`PhotoDataset`). `DATASETS` lists all datasets by name. Terms used here:

    split            train, val (validation, for all choices) or test (for final results only)
    preprocessing    image size, crop, channels, and the mean and std that normalise pixels
    augmentation     random changes of training images that keep their class

    python data.py --data photos                     # count the images and draw some of them
"""

import gzip
import hashlib
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

import cli

# Preprocessing. Mean and std are for pixels in 0..1. crop: used share of the shorter side.
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
# Channels last is faster; on Apple's GPUs, gradients are 30 times slower (pytorch/pytorch#193349).
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


# ------------------------------------------------------------------------- one image, or one batch
def normalise(images, preprocessing):
    """Subtract mean, divide by std: (N, 1 or 3, S, S) in 0..255 -> float (N, 3, S, S)."""
    mean = 255 * torch.tensor(preprocessing["mean"], device=images.device).view(3, 1, 1)
    std = 255 * torch.tensor(preprocessing["std"], device=images.device).view(3, 1, 1)
    return (images - mean) / std  # a grayscale image fills all three channels


def to_pixels(images, preprocessing):
    """Undo `normalise`: float (N, 3, S, S) -> float (N, 3, S, S) in 0..1, on the CPU."""
    mean = torch.tensor(preprocessing["mean"]).view(3, 1, 1)
    std = torch.tensor(preprocessing["std"]).view(3, 1, 1)
    return (images.cpu() * std + mean).clamp(0, 1)


def resize(images, size):
    """Resize (N, C, H, W) of any type -> float (N, C, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return functional.interpolate(
        images.float(), (size, size), mode="bilinear", antialias=True
    )


def shift_and_flip(images, size, shift=1 / 8):
    """Shift each image by up to a share `shift` of its side, and mirror half of them.

    He et al. (arXiv:1512.03385, §4.2) do so with CIFAR-10, by up to 4 of 32 pixels. torchvision's
    transforms would change all images of a batch in the same way.
    Shape: uint8 (N, C, H, H) -> float (N, C, size, size) in 0..255.
    """
    count, _, side, _ = images.shape
    border = round(side * shift)
    padded = functional.pad(images, [border] * 4)
    pixels = torch.arange(side, device=images.device)
    # Pixel (y, x) of image i comes from row y + top[i] and column x + left[i] of the padded image.
    top, left = torch.randint(2 * border + 1, (2, count, 1), device=images.device)
    rows = top + pixels  # (N, H)
    columns = left + pixels  # (N, H)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    numbers = torch.arange(count, device=images.device)[:, None, None]
    shifted = padded.movedim(1, 3)[
        numbers, rows[:, :, None], columns[:, None, :]
    ]  # (N, H, H, C)
    return resize(shifted.movedim(3, 1), size)


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
# Validation and test letters keep these limits, so that new limits for training change no result.
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

    A sampling grid applies shift, scale, rotation, slant and a smooth warp; stroke width, blur and
    noise follow. There is no flip: a mirrored letter is a different letter, or none.
    Shape: (N, C, H, W) in 0..255, background 0 -> float (N, C, size, size) in 0..255.
    """
    images = images.float() / 255
    count = len(images)

    def random(name, *shape):
        """One value per image (or one array of this shape), from -limit to limit."""
        return (2 * torch.rand(count, *shape, device=images.device) - 1) * limits[name]

    # Each image has its own matrix, which maps output to input coordinates (from -1 to 1):
    # rotation · slant · scale, then shift.
    angle = random("rotation")
    slant = random("slant")
    scale_x = random("scale").exp()
    scale_y = random("scale").exp()
    zero = torch.zeros_like(angle)
    one = torch.ones_like(angle)
    rotate = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    lean = torch.stack([one, slant, zero, one], dim=1)
    stretch = torch.stack([scale_x, zero, zero, scale_y], dim=1)
    linear = rotate.view(-1, 2, 2) @ lean.view(-1, 2, 2) @ stretch.view(-1, 2, 2)
    shift = torch.stack([random("shift"), random("shift")], dim=1)
    matrix = torch.cat([linear, shift[:, :, None]], dim=2)  # (N, 2, 3)
    grid = functional.affine_grid(matrix, (count, 1, size, size), align_corners=False)
    # A smooth warp: 4 × 4 random vectors, interpolated to one per pixel.
    warp = functional.interpolate(random("warp", 2, 4, 4), size=(size, size), mode="bicubic")
    grid = grid + warp.permute(0, 2, 3, 1)  # (N, S, S, 2)
    images = functional.grid_sample(images, grid, align_corners=False)
    # Stroke width: mix with the maximum (thicker) or minimum (thinner) of each 3 × 3 area.
    stroke = random("stroke", 1, 1, 1)
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    images = (
        images + stroke.clamp(min=0) * (thick - images) - stroke.clamp(max=0) * (thin - images)
    )
    # Blur: mix with a quarter of the resolution, similar to the 8 × 8 digits.
    coarse = functional.adaptive_avg_pool2d(images, max(size // 4, 1))
    coarse = functional.interpolate(coarse, size=(size, size), mode="bilinear")
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
    """Rotate, crop, mirror and recolour a photo at random: PIL image -> PIL image of S × S pixels.

    The crop has 35 to 100% of the area (Szegedy et al., arXiv:1409.4842, §6, with 8 to 100%).
    """
    changes = [
        v2.RandomRotation(10),  # degrees
        v2.RandomResizedCrop(size, scale=(0.35, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    ]
    return v2.Compose(changes)(photo)


# ---------------------------------------------------------------------------------------- batches
def process_rank():
    """Return the number of this process and of all processes: 0 and 1 without torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@dataclass
class Batches:
    """Batches of tensors in memory: an iterable of (inputs, labels), like a DataLoader.

    A DataLoader fetches items one by one. For small images it is much faster to slice and augment
    a whole batch.
    """

    inputs: torch.Tensor  # (N, ...)
    labels: torch.Tensor  # (N,)
    batch_size: int
    transform: object = None  # function of a batch of inputs
    shuffle: bool = (
        False  # also leave out an incomplete last batch: BatchNorm needs two images
    )
    repeats: int = 1  # passes over all items per epoch

    def __len__(self):
        count = self.repeats * len(self.labels)
        if self.shuffle and count > self.batch_size:
            return count // self.batch_size
        return -(-count // self.batch_size)  # rounded up

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
    """Photos on disk: `paths` (N,) and labels int64 (N,). augment: None, or like augment_photo."""

    def __init__(self, paths, labels, preprocessing, augment=None):
        self.paths = paths
        self.labels = labels
        self.preprocessing = preprocessing
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Return (image float (3, S, S), label). Raises DataError for an unreadable file."""
        photo = open_image(self.paths[index], self.preprocessing)
        if self.augment is None:
            photo = fit_photo(photo, self.preprocessing)
        else:
            photo = self.augment(photo, self.preprocessing["image_size"])
        return normalise(v2.functional.pil_to_tensor(photo), self.preprocessing), self.labels[
            index
        ]


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

    def batches(self, split, augmented=False, indices=None):
        """Return an iterable of (images float (N, 3, S, S), labels (N,)), and with a length.

        augmented: for training: shuffled, repeated, without an incomplete last batch.
        indices: use only these images, in this order. None: the share of this process.
        """
        images, labels = self.splits[split]
        rank, processes = process_rank()
        if min(len(labels), self.batch_size) < 2 * processes and processes > 1:
            raise DataError(
                "too few images for all processes: use fewer, or raise --batch-size"
            )
        if indices is None:
            end = len(labels)
            if split == "train":
                end -= (
                    end % processes
                )  # equal shares, so that all take the same number of steps
            indices = torch.arange(rank, end, processes)
        images = images[indices.numpy()]
        labels = labels[indices]
        batch_size = self.batch_size // processes
        repeats = self.repeats if augmented else 1
        if self.kind == "photos":
            dataset = PhotoDataset(images, labels, self.preprocessing)
            if not augmented:
                return DataLoader(dataset, batch_size, num_workers=self.workers)
            dataset.augment = self.augment
            return DataLoader(
                dataset,
                batch_size,
                sampler=RandomSampler(dataset, num_samples=repeats * len(labels)),
                drop_last=repeats * len(labels) > batch_size,
                num_workers=self.workers,
            )

        def transform(batch):
            change = self.augment if augmented else resize
            batch = change(batch.to(self.device), self.preprocessing["image_size"])
            return normalise(batch, self.preprocessing)

        return Batches(
            images, labels, batch_size, transform, shuffle=augmented, repeats=repeats
        )


# ------------------------------------------------------------------------------- glyphs and digits
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
    """Draw a letter, white on black, centred: uint8 (1, 64, 64)."""
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

    They are the test part of UCI's Optical Recognition of Handwritten Digits (E. Alpaydin and C.
    Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0), as scikit-learn distributes
    it. Each of the 8 × 8 values counts the ink in a 4 × 4 area, 0 to 16. The order seems to follow
    the writers. The second half is the test split (899), as in scikit-learn's example. In the first
    half, every fifth image of a digit is for validation (184), the others for training (714).
    These share writers: validation accuracy is a little too high.
    """
    path = Path(__file__).with_name("digits.npz")
    with reading(f"'{path}' is damaged", "clone the project again"), numpy.load(path) as file:
        counts = torch.from_numpy(file["images"])
        labels = torch.from_numpy(file["labels"]).long()
    grey = (counts[:, None] * (255 / 16)).round()
    images = resize(grey, size).round().byte()  # (1797, 1, S, S)
    test = torch.arange(len(labels)) >= 898
    val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        first_half = ((labels == digit) & ~test).nonzero().flatten()
        val[first_half[::5]] = True
    train = ~val & ~test
    splits = {
        "train": (images[train], labels[train]),
        "val": (images[val], labels[val]),
        "test": (images[test], labels[test]),
    }
    return list("0123456789"), splits


# --------------------------------------------------------------------- MNIST and CIFAR-10, flowers
IDX_FILES = ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1")


def load_idx(kind, size, data_dir):
    """Load MNIST or Fashion-MNIST. kind: torchvision's class, which can download the files."""
    found = [sorted(data_dir.glob(f"{name}-ubyte*")) for name in IDX_FILES]
    if all(found):  # in data_dir itself, compressed or not
        train_images, train_labels, test_images, test_labels = [
            read_idx(files[0]) for files in found
        ]
    else:
        train, test = download(kind, data_dir, f"the four .gz files of {kind.mirrors[0]}")
        train_images, train_labels = train.data, train.targets
        test_images, test_labels = test.data, test.targets
    train = train_images[:, None], train_labels  # (N, 1, H, W)
    test = test_images[:, None], test_labels
    classes = [name.partition(" - ")[0] for name in kind.classes]  # not "0 - zero"
    return classes, make_splits(train, test, size, data_dir)


def read_idx(path):
    """Read LeCun's IDX format: 2 zeros, type 8 (uint8), dimensions, sizes (big-endian), bytes."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with reading(f"'{path}' is damaged", "download it again"), unpack(path, "rb") as file:
        _, _, _, dimensions = file.read(4)
        shape = numpy.frombuffer(file.read(4 * dimensions), ">u4")
        contents = numpy.frombuffer(file.read(), numpy.uint8)
        return torch.from_numpy(contents.reshape(shape).copy())


def load_cifar10(size, data_dir):
    """Load CIFAR-10: 32 × 32 pixels in colour."""
    train, test = download(datasets.CIFAR10, data_dir, datasets.CIFAR10.url)
    pairs = []
    for part in (train, test):
        images = torch.from_numpy(part.data).movedim(3, 1)  # (N, H, W, 3) -> (N, 3, H, W)
        pairs.append((images, torch.tensor(part.targets)))
    return train.classes, make_splits(*pairs, size, data_dir)


def download(kind, data_dir, source):
    """Return torchvision's training and test dataset, from data_dir or downloaded into it."""
    name = {datasets.FashionMNIST: "fashion-mnist"}.get(kind, kind.__name__.lower())
    fix = f"download {source} into '{data_dir}/{name}', and use it as --data-dir"
    with reading(f"--data {name}: no files, and no download", fix):
        return [kind(data_dir, train=train, download=True) for train in (True, False)]


def make_splits(train, test, size, data_dir):
    """Split the last tenth of train = (images, labels) off for validation. Returns the splits."""
    images, labels = train
    cut = len(labels) - max(len(labels) // 10, 1)
    splits = {
        "train": (images[:cut], labels[:cut]),
        "val": (images[cut:], labels[cut:]),
        "test": test,
    }
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            problem = f"{split} has {len(images)} images, {len(labels)} labels"
            raise DataError(f"'{data_dir}': {problem}: replace it")
        if size <= 64:  # resize once, not in every epoch; larger images would fill the memory
            parts = [resize(part, size).round().byte() for part in images.split(1024)]
            images = torch.cat(parts)
        splits[split] = images, labels.long()
    return splits


FLOWERS = (
    "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
)
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def load_flowers(size, data_dir):
    """Load TensorFlow's flower photos (229 MB), downloaded and unpacked once."""
    folder = data_dir / "flower_photos"
    archive = data_dir / "flower_photos.tgz"
    if not folder.is_dir():
        with reading("--data flowers: no photos", f"download {FLOWERS} to '{archive}'"):
            data_dir.mkdir(parents=True, exist_ok=True)
            if not archive.is_file():
                torch.hub.download_url_to_file(FLOWERS, archive, FLOWERS_SHA256)
            with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
                shutil.unpack_archive(
                    archive, temporary, filter="data"
                )  # stays in `temporary`
                Path(temporary, folder.name).rename(folder)
    return load_folder(size, folder)


# ------------------------------------------------------------------------------- folders of photos
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
# Without `formats`, PIL would also open an EPS file, and start Ghostscript for it.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
MAX_PIXELS = 120 * 10**6  # per image; four bytes each
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def open_image(path, preprocessing):
    """Decode a file to an upright PIL image in RGB. Raises DataError."""
    with reading(f"'{path}': cannot read this image", "remove it"):
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise ValueError("it is no regular file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its size exceeds the limit of {MAX_PIXELS} pixels")
            # Decode a JPEG at 1/2, 1/4 or 1/8 if that leaves twice the image size, enough for the
            # smallest random crop: photos of 12 megapixels load three times as fast.
            image.draft("RGB", [2 * preprocessing["image_size"]] * 2)
            image.load()
    with suppress(Exception):  # PIL on damaged EXIF data, which do not harm the pixels
        image = ImageOps.exif_transpose(image)  # EXIF has the orientation of a phone
    if image.mode.startswith("I"):  # 16 bits: 65535 is white, but PIL would cut at 255
        image = Image.fromarray((numpy.asarray(image) // 257).astype(numpy.uint8))
    if "A" in image.mode or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if preprocessing["channels"] == 1:
        image = image.convert("L")
    return image.convert("RGB")


def is_readable(path):
    """Check whether a file is an image. Only decoding shows whether a JPEG is complete."""
    try:
        str(path).encode()  # predictions.csv can only hold UTF-8 names
        open_image(path, SMALL_IMAGE)
    except (DataError, UnicodeError) as error:
        sys.stderr.write(f"skipping {str(path)!a}: {str(error.__cause__ or error)!a}\n")
        return False
    return True


def find_images(folder):
    """List the readable images below `folder`, sorted. Hidden files and folders are left out."""
    files = []
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        hidden = any(name.startswith(".") for name in names)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            files.append(path)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        readable = list(threads.map(is_readable, files))
    return [path for path, good in zip(files, readable) if good]


def list_folder(root):
    """List root/<class>/...: (sorted class names, paths (N,), labels (N,)). Raises DataError."""
    print(f"'{root}': decoding all images once, to find damaged ones", flush=True)
    images = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "_")):
            # Systems store é or 한 in different ways. NFC makes a name the same on all of them.
            name = normalize("NFC", path.name)
            images[name] = images.get(name, []) + find_images(path)
    if len(images) < 2 or not all(images.values()):
        found = ", ".join(f"{name} ({len(paths)} images)" for name, paths in images.items())
        fix = "at least two class folders with readable images are needed"
        raise DataError(f"'{root}': found {found or 'no folder'}; {fix}")
    classes = sorted(images)
    paths = []
    labels = []
    for label, name in enumerate(classes):
        paths += images[name]
        labels += [label] * len(images[name])
    return classes, numpy.array(paths), torch.tensor(labels)


def split_folder(root, paths, labels, share=0.2, salt=""):
    """Choose a share of each class. Returns (indices of the others, indices of the share).

    The order of hashes of the paths decides, so that a moved folder keeps its split. Another
    `salt` gives another split (experiments/split_photos.py). Raises DataError for a small class.
    """
    others = []
    chosen = []
    for label in labels.unique():
        hashes = []
        for index in (labels == label).nonzero().flatten().tolist():
            name = normalize("NFC", paths[index].relative_to(root).as_posix())
            hashes.append((hashlib.sha256(f"{salt}{name}".encode()).digest(), index))
        order = [index for _, index in sorted(hashes)]
        count = max(round(share * len(order)), 1)
        if count >= len(order):
            name = paths[order[0]].parent
            raise DataError(f"'{name}': too few images ({len(order)}); add some")
        chosen += order[:count]
        others += order[count:]
    return numpy.sort(others), numpy.sort(chosen)


def load_folder(size, root):
    """Load a folder; without val, a fifth of each class of train is for validation."""
    if not root.is_dir():
        raise DataError(f"'{root}': no such folder or dataset ({', '.join(DATASETS)})")
    subfolders = [path for path in root.iterdir() if path.is_dir()]
    folders = {}
    for name, split in SPLIT_NAMES.items():
        for path in subfolders:
            if path.name.lower() == name:
                folders[split] = path
    if "train" not in folders:
        if folders and len(folders) == len(subfolders):
            raise DataError(
                f"'{root}' has {', '.join(folders)}, but no train: add this folder"
            )
        folders = {"train": root}
    splits = {}
    classes = None
    for split, folder in folders.items():
        names, paths, labels = list_folder(folder)
        splits[split] = paths, labels
        if classes is None:
            classes = names
        if names != classes:
            different = ", ".join(sorted(set(names) ^ set(classes)))
            fix = f"only one of train and {split} has {different}; add the other"
            raise DataError(f"'{root}': {fix}")
    if "val" not in splits:
        paths, labels = splits["train"]
        train, val = split_folder(root, paths, labels)
        test = splits.get("test")
        splits = {"train": (paths[train], labels[train]), "val": (paths[val], labels[val])}
        if test is not None:
            splits["test"] = test
    return classes, splits


# --------------------------------------------------------------------------- the table of datasets
# load: function (image size, folder) -> (class names, {split: (images, labels)}).
# augment: function of training images: (N, C, H, W) in memory, or one photo; and the image size.
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
        # Mean and std of these four: measured on the training images, or ImageNet's for photos.
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
    name, preprocessing=None, per_class=None, seed=0, data_dir="datasets", **options
):
    """Load a dataset by name (a key of DATASETS) or folder. Returns Data; raises DataError.

    preprocessing: values that replace the dataset's own, for example a checkpoint's.
    per_class: training images per class, chosen by `seed`. options: fields of `Data`.
    """
    if name in DATASETS:
        entry = DATASETS[name]
        folder = Path(data_dir)
    else:
        entry = FOLDER
        folder = Path(name)
    preprocessing = {**entry["preprocessing"], **(preprocessing or {})}
    classes, splits = entry["load"](preprocessing["image_size"], folder)
    repeats = entry["repeats"]
    images, labels = splits["train"]
    if entry["kind"] == "photos":
        repeats = max(-(-FOLDER_EPOCH // len(labels)), repeats)  # rounded up
    if per_class is not None:
        kept = choose_per_class(labels, per_class, seed)
        splits["train"] = images[kept.numpy()], labels[kept]
        repeats = max(repeats * len(labels) // len(kept), 1)  # an epoch keeps its size
    return Data(
        classes,
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


def load_for(args, preprocessing=None):
    """Call `load_data` with the options of the command line, which override `preprocessing`."""
    preprocessing = dict(preprocessing or {})
    if args.image_size is not None:
        preprocessing["image_size"] = args.image_size
    return load_data(
        args.data,
        preprocessing,
        per_class=getattr(args, "per_class", None),  # an option of train.py and finetune.py
        seed=args.seed,
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        workers=args.workers,
        device=getattr(args, "device", "cpu"),  # export.py has no such option
    )


# ---------------------------------------------------------------------------------------- pictures
# Class names may be Chinese, Japanese or Korean: add the fonts of this computer that have them.
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
    """Draw with matplotlib's default settings and our fonts, whatever the user's settings are."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed]]
    own = {"font.family": fonts, "text.parse_math": False}  # $5 is no formula
    with style.context(["default", own]):
        yield


def shorten(text):
    """Cut a long name in the middle."""
    if len(text) < 19:
        return text
    return f"{text[:11]}…{text[-6:]}"


@picture_style()
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
        name = "\n".join(shorten(line) for line in names[index].splitlines())
        axes.set_title(name, color=colours[index] if colours else "black", fontsize=8)
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------- the script
def describe(dataset):
    """Format the image counts per class and split."""
    lines = []
    for split, (_, labels) in dataset.splits.items():
        lines.append(f"{split}: {len(labels)} images")
        counts = labels.bincount(minlength=len(dataset.classes)).tolist()
        lines += [f"    {count:6}  {name}" for name, count in zip(dataset.classes, counts)]
    return "\n".join(lines)


def main():
    parser = cli.make_parser(__doc__, data="glyphs", out="runs/data", batch_size=256)
    cli.add_device(parser)
    args = cli.parse(parser)
    dataset = load_for(args)
    print(f"{args.data}: {len(dataset.classes)} classes\n{describe(dataset)}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    some = torch.randperm(len(dataset.splits["train"][1]))[:32]
    images, labels = next(iter(dataset.batches("train", indices=some)))
    images = to_pixels(images, dataset.preprocessing)
    names = [dataset.classes[label] for label in labels]
    plot_grid(args.out / "samples.png", f"training images of {args.data}", images, names)
    # One batch: nine augmentations of one image.
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
