"""Every data set as batches that are ready for the network, and what the scripts share beside it.

An image walks: file or array -> uint8 (C, H, W) -> augmentation (training only) -> normalisation -> float (N, 3, S, S).

    glyphs                           37 classes of printed letters, drawn here from the fonts that matplotlib carries
    digits                           1,797 handwritten digits of 8 × 8 pixels, in digits.npz beside this file
    mnist, fashion-mnist, cifar10    60,000 small images each, from --data-dir, or downloaded into it
    flowers                          3,670 photos of five kinds, likewise
    a folder                         path/<class>/*.jpg, or path/{train,val,test}/<class>/*.jpg

Small images live in memory as one uint8 tensor and are augmented a whole batch at a time (`ArraySplit`); photos
stay on the disk and are decoded by worker processes (`FolderSplit`). Both give the same thing: `split.batches()`.

    python data.py --data photos                     # classes, counts and channel statistics; pictures of what training sees
    python data.py --split photos photos-split       # a copy, divided into train, val and test
"""

import argparse
import gzip
import hashlib
import os
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed
from torch.nn import functional
from torch.utils.data import DataLoader, default_convert
from torchvision import datasets
from torchvision.transforms import v2

# What a network is trained with, unless it starts from a checkpoint, which says so itself. Mean and deviation are of pixels
# in 0..1: of augmented glyphs, for digits, too; of the training images of MNIST, Fashion-MNIST and CIFAR-10 at their own size
# (`python data.py` measures resized ones); of ImageNet, for all photos.
# crop: the share of an image's shorter side that is shown, of photos 224 / 256, as is customary for ImageNet.
SMALL = {"image_size": 32, "crop": 1.0, "channels": 1, "mean": [0.25] * 3, "std": [0.3] * 3}
PREPROCESSING = {
    "glyphs": SMALL,
    "digits": SMALL,
    "mnist": SMALL | {"mean": [0.1307] * 3, "std": [0.3081] * 3},
    "fashion-mnist": SMALL | {"mean": [0.2860] * 3, "std": [0.3530] * 3},
    "cifar10": SMALL | {"channels": 3, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]},
    "flowers": {"image_size": 224, "crop": 0.875, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}


class DataError(ValueError):
    """Data or an option that cannot be used. The message says what is wrong and how to mend it, in one line."""


@dataclass
class Data:
    """A data set: class names in the order of the labels, how images become tensors, and its splits."""

    classes: list
    preprocessing: dict
    train: "Split"
    val: "Split"
    test: "Split | None" = None  # a folder may have none


def load_data(name, preprocessing=None, per_class=None, batch_size=128, workers=0, seed=0, device="cpu", data_dir="datasets"):
    """The data set `name`, a key of PREPROCESSING or the path of a folder, as Data. Raises DataError.

    preprocessing: what replaces the data set's own, key by key, so that a trained network sees images as it learned to.
    per_class: keep so many training images of each class.
    workers: processes that decode photos; data sets in memory need none.
    seed: decides order, augmentation and the images of `per_class`; equal seeds give equal batches.
    device: where the batches are made. data_dir: where downloads lie, or will.
    """
    name, data_dir = str(name), Path(data_dir)
    preprocessing = PREPROCESSING.get(name, PREPROCESSING["flowers"]) | (preprocessing or {})
    common = {"preprocessing": preprocessing, "batch_size": batch_size, "seed": seed, "device": device}
    if name == "glyphs":
        classes, splits = load_glyphs(common)
    elif name == "digits":
        classes, splits = load_digits(common)
    elif name in PUBLISHED:
        classes, splits = load_published(name, data_dir, common)
    else:
        folder = fetch_flowers(data_dir) if name == "flowers" else Path(name)
        if not name or not folder.is_dir():
            raise DataError(f"'{name}' is neither a data set nor a folder: name one ({', '.join(PREPROCESSING)})")
        classes, splits = load_folder(folder, common | {"workers": workers})
    if per_class is not None:
        few = splits["train"].subset(choose_per_class(splits["train"].labels, classes, per_class, seed))
        # An epoch keeps its size: fewer images are shown more often, and few or many labels take as many steps.
        splits["train"] = replace(few, repeats=max(splits["train"].epoch_size() // len(few), 1))
    return Data(classes, preprocessing, **splits)


def choose_per_class(labels, classes, per_class, seed):
    """Indices of `per_class` random images of each class, in their old order: (N,) labels -> (classes × per_class,)."""
    chosen = []
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(classes):
        indices = (labels == label).nonzero().flatten()
        if len(indices) < per_class:
            raise DataError(f"--per-class {per_class}: '{name}' has {len(indices)} images to train on: ask for no more")
        chosen.append(indices[torch.randperm(len(indices), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


# ------------------------------------------------------------------------------------------ batches from memory


def memory_format(device):
    """How a network and its images lie in memory: all channels of a pixel side by side, as convolutions like it.

    On Apple's GPUs gradients then take 30 times as long (https://github.com/pytorch/pytorch/issues/193349).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def normalise(images, preprocessing):
    """(N, 1 or 3, S, S) in 0..255 -> float (N, 3, S, S) of about mean 0 and deviation 1; grey fills all three channels."""
    mean, deviation = (torch.tensor(preprocessing[key], device=images.device).view(3, 1, 1) * 255 for key in ("mean", "std"))
    return (images - mean).div_(deviation).contiguous(memory_format=memory_format(images.device))


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) if it is the only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(tensor):
    """All processes' rows of a tensor on the CPU, in the order of the processes, for each of them."""
    parts = [tensor] * processes()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, tensor)
    return torch.cat(parts)


def mix(*parts):
    """A seed from numbers and words: for each use of randomness its own, equal whenever they are equal."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def index_batches(count, batch_size, generator=None):
    """range(count), shuffled if a generator is given, as index tensors of `batch_size`."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2 * processes()[1]:  # BatchNorm needs two images in each
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


@dataclass(kw_only=True)
class Split:
    """Images and their labels int64 (N,). What `images` is, and `batches`, stands in the classes below."""

    images: object
    labels: torch.Tensor
    batch_size: int
    seed: int
    preprocessing: dict = None
    device: str = "cpu"
    repeats: int = 1  # how often an epoch of training shows each image, augmented anew every time

    def __len__(self):
        return len(self.labels)

    def epoch_size(self):
        """Images in an epoch of training."""
        return len(self) * self.repeats

    def steps(self):
        return len(index_batches(self.epoch_size(), self.batch_size))

    def indices(self, epoch):
        """This process's share of each batch, as indices: in order if `epoch` is None, else shuffled, with repeats."""
        if epoch is None:
            batches = index_batches(len(self), self.batch_size)
        else:
            shuffle = torch.Generator().manual_seed(mix(self.seed, epoch, "order"))
            batches = index_batches(self.epoch_size(), self.batch_size, shuffle)
        rank, count = processes()
        return [share for batch in batches if len(share := batch[rank::count])]

    def subset(self, indices):
        """The same split with these images only."""
        indices = indices.numpy()  # paths are a numpy array, which takes a tensor of one index for a number
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(kw_only=True)
class ArraySplit(Split):
    """Images in memory: a tensor uint8 (N, C, H, W)."""

    augment: object = None  # in training: (images of a batch, size, generator) -> (n, C, size, size) in 0..255

    def name(self, index):
        """What to call image `index` in a report."""
        return str(index)

    def batches(self, epoch=None):
        """Yield (images float (N, 3, S, S), labels (N,)): in order as they are, or for training, given the epoch's number.

        Order and augmentation depend on the seed, the epoch, the batch size and the device, not on what ran before.
        """
        size, generator = self.preprocessing["image_size"], torch.Generator(self.device)
        generator.manual_seed(mix(self.seed, epoch, processes(), "augmentation"))
        for indices in self.indices(epoch):
            indices = indices % len(self)
            images = self.images[indices].to(self.device)
            images = resize(images, size) if epoch is None else self.augment(images, size, generator)
            yield normalise(images, self.preprocessing), self.labels[indices].to(self.device)


def resize(images, size):
    """(N, C, H, W) of any type -> float (N, C, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return functional.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)


def resize_all(images, size):
    """(N, C, H, W) -> uint8 (N, C, size, size), some at a time, for the memory's sake."""
    return torch.cat([resize(some, size).round().byte() for some in images.split(1024)])


def crop_and_flip(images, size, generator):
    """Shift each image by up to an eighth of its side over a black border, and mirror half of them, at random.

    4 of 32 pixels, as in He et al. (arXiv:1512.03385, §4.2) for CIFAR-10. torchvision's transforms would treat the whole
    batch alike, or take a Python call an image. Shape: uint8 (N, C, H, H) -> float (N, C, size, size) in 0..255.
    """
    count, side = len(images), images.shape[-1]
    border = side // 8
    # All possible windows, as a view of which nothing is copied: (N, C, 2b+1, 2b+1, H, H)
    windows = functional.pad(images, [border] * 4).unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(2 * border + 1, (2, count), generator=generator, device=images.device)
    images = windows[torch.arange(count, device=images.device), :, top, left]  # (N, C, H, H)
    mirrored = torch.rand(count, generator=generator, device=images.device) < 0.5
    return resize(torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images), size)


def distort(images, size, generator):
    """Give each image of a batch a new shape, as another hand or another font would have drawn it.

    Shift, scale, rotation, shear and a smooth warp are one sampling grid; then stroke width, blur and noise.
    Never a flip: a mirrored letter is another letter, or none.
    Shape: (N, C, H, W) in 0..255, background 0 -> float (N, C, size, size) in 0..255.
    """
    images, count = images.float() / 255, len(images)

    def uniform(limit, *shape):
        return (2 * torch.rand(count, *shape, generator=generator, device=images.device) - 1) * limit

    angle, shear = uniform(0.25), uniform(0.35)  # radians; tangent of the slant
    scale_x, scale_y = uniform(0.25).exp(), uniform(0.25).exp()
    cos, sin = angle.cos(), angle.sin()
    # Where in the input each output pixel comes from: rotation · shear · scale, then the shift. (N, 2, 3)
    to_x = torch.stack([scale_x * cos, scale_y * (cos * shear - sin), uniform(0.15)], dim=1)
    to_y = torch.stack([scale_x * sin, scale_y * (sin * shear + cos), uniform(0.15)], dim=1)
    matrix = torch.stack([to_x, to_y], dim=1)
    grid = functional.affine_grid(matrix, (count, 1, size, size), align_corners=False)  # (N, S, S, 2), from -1 to 1
    warp = functional.interpolate(uniform(0.12, 2, 4, 4), size=(size, size), mode="bicubic")
    images = functional.grid_sample(images, grid + warp.permute(0, 2, 3, 1), align_corners=False)

    # Stroke: between the minimum and the maximum of the 3 × 3 neighbourhood, the picture itself at 0.
    stroke = uniform(0.6, 1, 1, 1)
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    images = images + stroke.clamp(min=0) * (thick - images) - stroke.clamp(max=0) * (thin - images)

    # Blur: a mixture with the picture at a quarter of its resolution, as the 8 × 8 digits have; one in three is that alone.
    coarse = functional.adaptive_avg_pool2d(images, max(size // 4, 1))
    coarse = functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = torch.lerp(images, coarse, uniform(1.5, 1, 1, 1).abs().clamp(max=1))
    images = images / images.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)  # thin letters are as white as bold ones

    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * uniform(0.1, 1, 1, 1)).clamp(0, 1) * 255


# ------------------------------------------------------------------------------- glyphs: letters that cost nothing

# Those of EMNIST's "balanced" set (Cohen et al., arXiv:1702.05373): no small letter that looks like its capital.
GLYPH_CLASSES = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt")

# matplotlib's text fonts. Computer Modern, a family of its own, asks for letters and not for fonts learned by heart.
GLYPH_FONTS = {
    "train": [
        *["DejaVuSans" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
        *["DejaVuSansMono" + style for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
        *["DejaVuSerif" + style for style in ("", "-Bold", "-Italic", "-BoldItalic")],
        *["STIXGeneral" + style for style in ("", "Bol", "Italic", "BolIta")],
    ],
    "val": ["cmr10", "cmmi10"],
    "test": ["cmb10", "cmss10", "cmtt10"],
}
GLYPH_CANVAS, GLYPH_INK = 64, 54  # the drawn picture, and the longer side of the letter in it
GLYPH_REPEATS = 32  # pictures of each letter in each font: an epoch of training, and the fixed sets


def draw_glyph(character, font):
    """A letter, white on black and centred: uint8 (1, 64, 64)."""
    left, top, right, bottom = font.getbbox(character)
    letter = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letter).text((-left, -top), character, fill=255, font=font)
    scale = GLYPH_INK / max(letter.size)
    letter = letter.resize([max(round(side * scale), 1) for side in letter.size], Image.Resampling.LANCZOS)
    canvas = Image.new("L", (GLYPH_CANVAS, GLYPH_CANVAS))
    canvas.paste(letter, [(GLYPH_CANVAS - side) // 2 for side in letter.size])
    return v2.functional.pil_to_tensor(canvas)


def draw_fonts(names):
    """Every class in every font: uint8 (fonts × 37, 1, 64, 64) and labels (fonts × 37,)."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), size=4 * GLYPH_INK) for name in names]
    images = [draw_glyph(character, font) for font in fonts for character in GLYPH_CLASSES]
    return torch.stack(images), torch.arange(len(GLYPH_CLASSES)).repeat(len(fonts))


def load_glyphs(common):
    """Training letters are distorted anew in every batch; validation and test letters once, with a seed of their own."""
    images, labels = draw_fonts(GLYPH_FONTS["train"])
    splits = {"train": ArraySplit(images=images, labels=labels, augment=distort, repeats=GLYPH_REPEATS, **common)}
    for fixed_seed, split in enumerate(("val", "test")):
        images, labels = draw_fonts(GLYPH_FONTS[split])
        images, labels = images.repeat(GLYPH_REPEATS, 1, 1, 1), labels.repeat(GLYPH_REPEATS)
        images = distort(images, common["preprocessing"]["image_size"], torch.Generator().manual_seed(fixed_seed))
        splits[split] = ArraySplit(images=images.round().byte(), labels=labels, **common)
    return GLYPH_CLASSES, splits


# -------------------------------------------------------------------------------------- digits: few and by hand

DIGITS_FILE = Path(__file__).with_name("digits.npz")
DIGITS_REPEATS = 4


def load_digits(common):
    """1,797 digits by 13 writers, the test part of UCI's "Optical Recognition of Handwritten Digits".

    E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0, taken from scikit-learn's copy.
    Each of the 8 × 8 numbers counts the inked pixels, 0 to 16, in a 4 × 4 square of a bitmap.

    The order presumably follows the writers, who are not named: the second half (899) tests, as in scikit-learn's example,
    whose support vector machine gets 96.9% of it right. Of the first half every fifth image of each digit (184) validates,
    by the same writers and so a little too well, and the others (714) train.
    """
    with numpy.load(DIGITS_FILE, allow_pickle=False) as file:
        counts, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = (counts.float() * (255 / 16)).round()[:, None]  # (1797, 1, 8, 8)
    images = resize(images, common["preprocessing"]["image_size"]).round().byte()
    first_half = torch.arange(len(labels)) < 898
    validates = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        validates[((labels == digit) & first_half).nonzero().flatten()[::5]] = True
    parts = {"train": first_half & ~validates, "val": validates, "test": ~first_half}
    common = common | {"augment": distort, "repeats": DIGITS_REPEATS}
    splits = {name: ArraySplit(images=images[part], labels=labels[part], **common) for name, part in parts.items()}
    return [str(digit) for digit in range(10)], splits


# -------------------------------------------------------------- MNIST, Fashion-MNIST, CIFAR-10, flowers: downloaded

# torchvision's class, which knows where to download, and what suits its images in training.
PUBLISHED = {
    "mnist": (datasets.MNIST, distort),
    "fashion-mnist": (datasets.FashionMNIST, crop_and_flip),
    "cifar10": (datasets.CIFAR10, crop_and_flip),
}
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def load_published(name, data_dir, common):
    """MNIST (LeCun et al., 1998), Fashion-MNIST (Xiao et al., arXiv:1708.07747) or CIFAR-10 (Krizhevsky, 2009).

    torchvision downloads and verifies what is not there. The last tenth of the training part validates.
    """
    kind, augment = PUBLISHED[name]
    try:
        train, test, classes = read_cifar10(data_dir) if name == "cifar10" else read_mnist(kind, data_dir)
    except (OSError, RuntimeError) as error:
        files = kind.url if name == "cifar10" else f"{', '.join(IDX_FILES)} (or these with .gz) from {kind.mirrors[0]}"
        folder = data_dir if name == "cifar10" else data_dir / kind.__name__ / "raw"
        raise DataError(f"no {name} and no download ({error}): fetch {files} and put it into '{folder}'") from error
    count, size = max(len(train[1]) // 10, 1), common["preprocessing"]["image_size"]
    if size <= 64:  # resized once, here, and not in every epoch; larger ones would fill the memory
        train, test = ((resize_all(images, size), labels) for images, labels in (train, test))
    parts = {"train": [part[:-count] for part in train], "val": [part[-count:] for part in train], "test": test}
    common = common | {"augment": augment}
    return classes, {name: ArraySplit(images=part[0], labels=part[1], **common) for name, part in parts.items()}


def read_cifar10(data_dir):
    """Training and test part, each (uint8 (N, 3, 32, 32), int64 (N,)), and the classes."""
    parts = [datasets.CIFAR10(data_dir, train, download=True) for train in (True, False)]
    arrays = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts]
    return *arrays, parts[0].classes


def read_mnist(kind, data_dir):
    """Training and test part, each (uint8 (N, 1, 28, 28), int64 (N,)), from data_dir or torchvision's folder in it."""

    def find(file):
        names = [name + ending for name in (file, file.replace("-idx", ".idx")) for ending in ("", ".gz")]  # .idx: on Kaggle
        paths = [place / name for place in (data_dir / kind.__name__ / "raw", data_dir) for name in names]
        return next(filter(Path.is_file, paths), None)

    if not all(map(find, IDX_FILES)):
        kind(data_dir, download=True)
    images, labels, test_images, test_labels = [read_idx(find(file)) for file in IDX_FILES]
    for pixels, targets in ((images, labels), (test_images, test_labels)):
        if pixels.shape != (targets.numel(), 28, 28) or targets.dim() != 1 or len(targets) < 2 or targets.max() > 9:
            raise DataError(f"the files of {kind.__name__} in '{data_dir}' do not belong together: fetch them again")
    classes = [name.partition(" - ")[0] for name in kind.classes]  # torchvision calls a digit "0 - zero"
    return (images[:, None], labels.long()), (test_images[:, None], test_labels.long()), classes


def read_idx(path):
    """An array of LeCun's IDX format: two zeros, 8 for uint8, number of dimensions, their sizes (big-endian), bytes."""
    try:
        contents = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = numpy.frombuffer(contents, ">u4", count=contents[3], offset=4)
        array = numpy.frombuffer(contents, numpy.uint8, offset=4 + shape.nbytes).reshape(shape)
        return torch.from_numpy(array.copy())
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"'{path}' is damaged ({error}): delete it and fetch it again") from error


FLOWERS_URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"  # 229 MB
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"


def fetch_flowers(data_dir):
    """The folder of TensorFlow's 3,670 flowers below data_dir: unpacked, and before that downloaded, if need be."""
    folder, archive = data_dir / "flower_photos", data_dir / "flower_photos.tgz"
    if folder.is_dir():
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        try:
            torch.hub.download_url_to_file(FLOWERS_URL, archive, FLOWERS_SHA256)  # appears when it is whole
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
            raise DataError(f"no flowers ({error}): fetch {FLOWERS_URL} and put it at '{archive}'") from error
    if hashlib.sha256(archive.read_bytes()).hexdigest() != FLOWERS_SHA256:
        raise DataError(f"'{archive}' is damaged (its SHA-256 is not {FLOWERS_SHA256}): delete it to fetch it again")
    with new_folder(folder) as unpacked, tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # nothing lands elsewhere; None: before Python 3.11.4
        tar.extractall(unpacked.parent)
    return folder


@contextmanager
def new_folder(target):
    """Give a folder to fill, which becomes `target` when it is complete, and vanishes if filling it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        yield Path(temporary, target.name)
        if target.is_dir():
            target.rmdir()  # an empty one may be there
        Path(temporary, target.name).replace(target)


# -------------------------------------------------------------------------------------------- folders of photos

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
FOLDER_EPOCH = 320  # images at least: an epoch of a small folder is still some steps, or all would be warm-up and one leap
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folder -> split
warnings.filterwarnings("ignore", module="PIL")  # of large images and odd EXIF data, which are read all the same


def open_image(path, channels, size):
    """Decode one file: an upright PIL image of 1 channel or 3. Raises DataError if it cannot be read.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution where that leaves twice `size`, enough for the smallest crops of
    training: photos of 12 megapixels are read three times as fast.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))
            image.load()
            with suppress(Exception):  # damaged EXIF data leave the pixels as they are
                image = ImageOps.exif_transpose(image)  # phones store there how they were held
            if image.mode.startswith("I"):  # 16 bits: 65535 is white. PIL would cut at 255 instead of scaling.
                image = Image.fromarray((numpy.asarray(image) / 257).astype(numpy.uint8))
            if "A" in image.mode or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")  # what is transparent may have any colour
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # a damaged file makes PIL raise almost anything
        raise DataError(f"cannot read the image '{path}' ({error}): repair it or take it out of the folder") from error


def find_damage(path):
    """Why an image file cannot be used, or None. A JPEG has no checksums: it must be decoded, at 1/8, to be sure."""
    try:
        str(path).encode()  # a name that is not UTF-8 could not be written into predictions.csv
        open_image(path, channels=3, size=1)
    except (DataError, UnicodeError) as error:
        return str(error.__cause__ or error)


def find_damages(paths):
    """{path: why it cannot be used}, by all cores; each process of torchrun checks its share of the files."""
    rank, count = processes()
    share = paths[rank::count]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        shares = [dict(zip(share, threads.map(find_damage, share), strict=True))] * count
    if count > 1:
        distributed.all_gather_object(shares, shares[rank])
    return {path: damage for share in shares for path, damage in share.items() if damage}


def photo_transform(size, training, crop=0.875):
    """PIL image -> uint8 (C, size, size). Training sees it tilted, cropped, mirrored and lit at random; all else the centre."""

    def centre(image):
        side = round(min(image.size) * crop)
        return v2.functional.resize(v2.functional.center_crop(image, side), [size, size])

    if not training:
        return v2.Compose([centre, v2.PILToTensor()])
    view = [v2.RandomRotation(10), v2.RandomResizedCrop(size, scale=(0.35, 1)), v2.RandomHorizontalFlip()]  # 10 degrees
    return v2.Compose([*view, v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2), v2.PILToTensor()])


@dataclass(kw_only=True)
class FolderSplit(Split):
    """Images in files: a numpy array (N,) of their paths, decoded by `workers` processes when they are needed."""

    workers: int

    def __post_init__(self):
        self.work, self.loader = [], None

    def name(self, index):
        return str(self.images[index])

    def batches(self, epoch=None):
        """As ArraySplit.batches. Raises DataError for an image that cannot be read."""
        # DataLoader hands each element of batch_sampler to __getitems__ in a worker process; default_convert leaves what comes
        # back as it is. The list is filled anew and the workers stay: on Windows and macOS they would import torch each epoch.
        if self.loader is None:
            stay = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
            stay["generator"] = torch.Generator()  # not the one that dropout draws from: --resume would end in other bits
            self.loader = DataLoader(replace(self), batch_sampler=self.work, collate_fn=default_convert, **stay)
        self.work[:] = [(epoch, batch.tolist()) for batch in self.indices(epoch)]
        for batch in self.loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (tensor.to(self.device) for tensor in batch)
            yield normalise(images, self.preprocessing), labels

    def __getitems__(self, work):
        """What a worker process does for a batch: (epoch or None, indices) -> uint8 (N, C, S, S), (N,)."""
        epoch, indices = work
        size, channels, crop = (self.preprocessing[key] for key in ("image_size", "channels", "crop"))
        transform, images = photo_transform(size, epoch is not None, crop), []
        try:
            with torch.random.fork_rng(devices=[]):
                for index in indices:
                    # A seed for each picture of each epoch: the same picture from any worker, and without workers.
                    torch.default_generator.manual_seed(mix(self.seed, epoch, index))
                    images.append(transform(open_image(self.images[index % len(self)], channels, size)))
        except DataError as error:
            return error  # raised in the main process, where it is one line; a worker would wrap it in its traceback
        return torch.stack(images), self.labels[torch.tensor(indices) % len(self)]


def find_images(folder):
    """Sorted paths of the images below `folder`; unreadable ones are left out and named. Raises DataError if none is left."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]  # hidden
    damages = find_damages(files)
    named = [f"'{path}' ({damage})" for path, damage in damages.items()]
    if len(named) == len(files):
        mend = f"add some ({', '.join(IMAGE_SUFFIXES)}) or remove the folder"
        raise DataError(f"no image in '{folder}' that can be read ({', '.join([f'{len(files)} found', *named[:1]])}): {mend}")
    if named:
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        warn(f"{len(named)} unreadable image{'s' * (len(named) > 1)} left out: {', '.join(named[:10])}{more}")
    return [path for path in files if path not in damages]


def list_folder(root):
    """Of root/<class>/...: (class names, sorted; paths (N,); labels (N,)). Raises DataError for less than two classes."""
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    # Some systems write é, or 한, as several characters: normalised, a class has one name on all of them.
    folders = sorted((unicodedata.normalize("NFC", folder.name), folder) for folder in folders)
    classes = [name for name, _ in folders]
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        found = f"'{root}' has {len(classes)} class folders ({', '.join(classes[:5])})"
        raise DataError(f"{found}: it needs at least two, of different names, with the images of a class each")
    paths = [find_images(folder) for _, folder in folders]
    counts = torch.tensor([len(images) for images in paths])
    return classes, numpy.concatenate(paths), torch.arange(len(classes)).repeat_interleave(counts)


def load_pictures(places, preprocessing, **common):
    """The images in files and folders as a split, the labels being 0. Raises DataError where there is none."""
    preprocessing = PREPROCESSING["flowers"] | preprocessing  # as in load_data: keys that are not given are those of photos
    paths = []
    for place in places:
        if not place.exists():
            raise DataError(f"there is no '{place}': name an image, or a folder of some")
        paths += find_images(place) if place.is_dir() else [place]
    labels = torch.zeros(len(paths), dtype=torch.long)
    return FolderSplit(images=numpy.array(paths), labels=labels, seed=0, preprocessing=preprocessing, **common)


def split_folder(root, paths, labels, shares=(0.2,), salt=""):
    """Stratified split: in each class the files with the smallest hash validate, the next ones test, the others train.

    The hash of the path below `root` stays when the folder is moved or grows. Another `salt` gives another split; loading
    has none, so that no script validates on what another one trained on. Returns index tensors in that order.
    """

    def rank(index):
        name = unicodedata.normalize("NFC", paths[index].relative_to(root).as_posix())
        return hashlib.sha256(f"{salt}{name}".encode()).digest()

    parts = []  # of each class, as many index tensors
    for label in labels.unique():
        indices = sorted((labels == label).nonzero().flatten().tolist(), key=rank)
        counts = [max(round(len(indices) * share), 1) if share else 0 for share in shares]
        rest = len(indices) - sum(counts)
        if rest < 1:
            raise DataError(f"{len(indices)} images in the class of '{paths[indices[0]]}': too few to split, add some")
        parts.append(torch.tensor(indices).split([*counts, rest]))
    return [torch.cat(part).sort().values for part in zip(*parts, strict=True)]


def load_folder(root, common):
    """Class folders, in train, val and test folders or not. Without `val`, a fifth of each class of `train` validates."""
    there = [path for path in root.iterdir() if path.is_dir()]
    folders = {PARTS[path.name.lower()]: path for path in there if path.name.lower() in PARTS}
    if "train" not in folders:
        if folders and len(folders) == len(there):
            raise DataError(f"'{root}' has {' and '.join(sorted(folders))} but no train: rename or add that folder")
        folders = {"train": root}
    found = {split: list_folder(path) for split, path in folders.items()}
    classes = found["train"][0]
    for split, (others, _, _) in found.items():
        if others != classes:
            difference = ", ".join(sorted(set(classes) ^ set(others)))
            raise DataError(f"the classes of train and {split} in '{root}' differ: only one has {difference}")
    splits = {name: FolderSplit(images=paths, labels=labels, **common) for name, (_, paths, labels) in found.items()}
    if "val" not in splits:
        everything = splits["train"]
        val, train = split_folder(root, everything.images, everything.labels)
        splits |= {"train": everything.subset(train), "val": everything.subset(val)}
    splits["train"].repeats = -(-FOLDER_EPOCH // len(splits["train"]))
    return classes, splits


def copy_split(source, target, shares, seed):
    """Copy class folders into target/{train,val,test}/<class>; shares: of val and test. Raises DataError."""
    source, target = source.resolve(), target.resolve()
    if not source.is_dir() or (source / "train").is_dir():
        raise DataError(f"'{source}' is not a folder with one folder a class, still undivided: name such a one")
    if target.is_relative_to(source):
        raise DataError(f"'{target}' lies in '{source}', which is only read: name another folder")
    if sum(shares) >= 1:
        raise DataError(f"--val and --test take {sum(shares):g} of the images: leave some to train on")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"'{target}' is not empty: name a new folder, or empty it")
    classes, paths, labels = list_folder(source)
    val, test, train = split_folder(source, paths, labels, shares, salt=f"{seed} ")
    parts = {"train": train, "val": val, "test": test}
    with new_folder(target) as folder:
        for part, indices in parts.items():
            for index in indices.tolist():
                copy = folder / part / paths[index].relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(paths[index], copy)
    counts = ", ".join(f"{len(indices)} to {part}" for part, indices in parts.items())
    print(f"copied {len(paths)} images of {len(classes)} classes: {counts}")
    print(f"next: python data.py --data {shlex.quote(str(target))}")


# ------------------------------------------------------------------------------------------------------ pictures


def to_pictures(images, preprocessing):
    """Undo `normalise` for people: float (N, 3, S, S) -> numpy (N, S, S, 3) in 0..1."""
    mean, deviation = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images.cpu() * deviation + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def shorten(name, length=16):
    """A class name that fits beside a picture."""
    return name if len(name) <= length else name[: length - 1] + "…"


def plot_grid(path, title, pictures, names, colours=None, columns=8):
    """Draw numpy (N, S, S, 3) as a grid, each picture with its name above it."""
    columns = min(columns, max(len(pictures), 4))  # fewer would leave no room for the title
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    colours = colours or ["black"] * len(names)
    for axes, picture, name, colour in zip(figure.axes, pictures, names, colours, strict=False):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, color=colour, fontsize=9)
    figure.savefig(path, dpi=120)


def find_fonts(names):
    """Let matplotlib write class names of any script, with fonts of this computer; what none of them has is told."""
    own = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    lacking, families, coverage = set(map(ord, "".join(names))) - set(own.get_charmap()), ["DejaVu Sans"], {}
    fonts = font_manager.findSystemFonts() if lacking else []
    for path in sorted(fonts, key=lambda path: ("LastResort" in path, "Regular" not in path, path)):
        with suppress(OSError, RuntimeError):  # a format that matplotlib does not read
            coverage[path] = lacking & set(font_manager.get_font(path).get_charmap())
    for path in sorted(coverage, key=lambda path: -len(coverage[path])):
        if lacking & coverage[path]:
            font_manager.fontManager.addfont(path)
            families.append(font_manager.FontProperties(fname=path).get_name())
            lacking -= coverage[path]
    matplotlib.rcParams.update({"font.family": families, "text.parse_math": False})  # a class may be called $5
    if lacking:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # this one line is enough
        mend = "Noto Sans CJK for Chinese, Japanese and Korean (Debian, Ubuntu: apt install fonts-noto-cjk)"
        lacking = "".join(map(chr, sorted(lacking)))
        warn(f"no font here has {lacking}: pictures show boxes instead. Install one, such as {mend}")


# -------------------------------------------------------------------------- the command line that the scripts share


def add_number(parser, name, kind, low, high, default, text):
    """An option whose value is an int or a float (`kind`) from `low` to `high`."""

    def parse(argument):
        value = kind(argument)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{argument}' is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    parser.add_argument(name, type=parse, default=default, help=text)


def command_line(description, data, out, batch_size=None):
    """A parser with the options that every script has; the arguments are their defaults."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", default=data, help=f"{', '.join(PREPROCESSING)}, or a folder of images")
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="where downloads are, or go")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for what the run writes")
    add_number(parser, "--batch-size", int, 2, 65536, batch_size, "images a step, of all processes together")
    workers = 4 if torch.cuda.is_available() else 0  # beside a network on the CPU they would only take its cores
    add_number(parser, "--workers", int, 0, 64, workers, "processes that decode photos")
    return parser


def add_image_options(parser):
    add_number(parser, "--image-size", int, 8, 1024, None, "pixels a side; None: as the data or the checkpoint has it")
    add_number(parser, "--seed", int, 0, 1_000_000, 0, "equal seeds give equal checkpoints on the CPU")


def load_for(args, preprocessing=None, device="cpu"):
    """`load_data` as the command line asks for it."""
    preprocessing, few, seed = dict(preprocessing or {}), getattr(args, "per_class", None), getattr(args, "seed", 0)
    if getattr(args, "image_size", None):
        preprocessing["image_size"] = args.image_size
    return load_data(args.data, preprocessing, few, args.batch_size, args.workers, seed, device, args.data_dir)


def add_device_option(parser):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_training_options(parser, fewest_epochs=1):
    """The options that train.py and finetune.py share; each sets those that are None here."""
    add_device_option(parser)
    add_image_options(parser)
    add_number(parser, "--epochs", int, fewest_epochs, 100_000, None, "passes over the images; finetune.py: in stage blocks")
    add_number(parser, "--patience", int, 0, 100_000, 0, "end after so many epochs without a higher validation accuracy; 0: never")
    add_number(parser, "--learning-rate", float, 0, 100, None, "at its highest")
    add_number(parser, "--weight-decay", float, 0, 1, None, "of weights, not of biases")
    add_number(parser, "--label-smoothing", float, 0, 1, 0.1, "probability that all classes share; cross-entropy only")
    text = "focal: hard images count more; dice: rare classes do"
    parser.add_argument("--loss", choices=("cross-entropy", "focal", "dice"), default="cross-entropy", help=text)
    text = "compute in fewer bits, where the device is faster so"
    parser.add_argument("--amp", choices=("off", "bfloat16", "float16"), default="off", help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="write over the run in --out")
    add_number(parser, "--per-class", int, 1, 1_000_000, None, "train on so many images a class; None: all")


def data_options(args):
    """The options that name the data of this run, for the command that comes next."""
    place = "" if args.data_dir == Path("datasets") else f" --data-dir {shlex.quote(str(args.data_dir))}"
    return f"--data {shlex.quote(args.data)}{place}"


def choose_device(name):
    """'auto' is the fastest device there is. Raises DataError for a device that this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.empty(1, device=name).device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("another kind of device")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DataError(f"--device {name} is not to be had here: take auto or cpu") from error
    return name


def run(main, *errors):
    """Call a script's `main`; what a user can mend, and `errors`, ends in one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be ended is to be interrupted
    if hasattr(sys.stdout, "reconfigure"):  # a console or a log file may not know all characters of class names
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        return
    except KeyboardInterrupt:
        message = "interrupted; what it had written is whole (train.py and finetune.py go on with --resume)"
    except (DataError, *errors) as error:
        message = str(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        message = f"{error}: see that this place can be written or read and has space, or name another"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "not enough memory: lower --batch-size or --image-size"
    warn(f"{Path(sys.argv[0]).name}: {message}")
    sys.exit(2)


def warn(message):
    """Tell on stderr, in one line."""
    print(" ".join(message.split()).encode(errors="backslashreplace").decode(), file=sys.stderr)


# -------------------------------------------------------------------------------------------------- the script


def channel_statistics(split):
    """Mean and standard deviation of each channel, of pixels in 0..1: two lists of 3, over the images as they are."""
    plain = replace(split, preprocessing=split.preprocessing | {"mean": [0.0] * 3, "std": [1.0] * 3})
    moments = []
    for images, _ in plain.batches():
        moments.append(torch.stack([images.mean(dim=(2, 3)), images.square().mean(dim=(2, 3))]))  # (2, N, 3)
    mean, square = torch.cat(moments, dim=1).double().mean(dim=1)
    return mean.tolist(), (square - mean.square()).clamp(min=0).sqrt().tolist()


def describe(dataset):
    """Sizes, classes and their numbers of images in each split, and the channels, as text."""
    splits = {name: getattr(dataset, name) for name in ("train", "val", "test") if getattr(dataset, name)}
    counts = [torch.bincount(split.labels, minlength=len(dataset.classes)).tolist() for split in splits.values()]
    table = [("", *splits), *zip(dataset.classes, *counts, strict=True), ("total", *map(sum, counts))]
    width = max(len(name) for name, *_ in table)
    lines = [f"{name:{width}}" + "".join(f"{cell:>8}" for cell in row) for name, *row in table]
    for name, values in zip(("mean", "deviation"), channel_statistics(dataset.train), strict=True):
        lines.append(f"{name} of the channels, training images: " + " ".join(f"{value:.4f}" for value in values))
    channels = "grayscale" if dataset.preprocessing["channels"] == 1 else "colour"
    size = dataset.preprocessing["image_size"]
    return "\n".join([f"{len(dataset.classes)} classes, {channels}, {size} × {size} pixels", "", *lines])


def main():
    parser = command_line("Show a data set, or divide a folder of photos.", "glyphs", "runs/data", batch_size=256)
    add_image_options(parser)
    parser.add_argument("--split", nargs=2, type=Path, metavar=("SOURCE", "TARGET"), help="copy class folders, divided")
    add_number(parser, "--val", float, 0, 0.9, 0.2, "share of each class for validation, with --split")
    add_number(parser, "--test", float, 0, 0.9, 0.1, "share of each class for the test, with --split")
    args = parser.parse_args()
    if args.split:
        copy_split(*args.split, (args.val, args.test), args.seed)
        return
    dataset = load_for(args)
    print(f"{args.data}: {describe(dataset)}")
    args.out.mkdir(parents=True, exist_ok=True)
    find_fonts([args.data, *dataset.classes])
    some = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(args.seed))[:32]
    images, labels = next(replace(dataset.train.subset(some), batch_size=32).batches())
    names = [shorten(dataset.classes[label]) for label in labels]
    pictures = to_pictures(images, dataset.preprocessing)
    plot_grid(args.out / "samples.png", f"training images of {args.data}", pictures, names)
    one = replace(dataset.train.subset(some[:1]), batch_size=9, repeats=9)
    images = torch.cat([next(one.batches(epoch))[0] for epoch in (None, 0)])  # as it is, then augmented nine times
    pictures, names = to_pictures(images, dataset.preprocessing), [names[0], *["augmented"] * 9]
    plot_grid(args.out / "augmented.png", "one image, nine augmentations", pictures, names, columns=5)
    print(f"wrote samples.png and augmented.png to {args.out}")
    print(f"next: python train.py {data_options(args)}")


if __name__ == "__main__":
    run(main)
