"""Every data set as batches that are ready for the network.

The walk of one image:  file or array -> uint8 (C, H, W) -> augmentation (training only) -> normalisation
-> float (N, 3, S, S), channels last.

Three sources:
    glyphs     37 classes of printed letters, drawn here from the fonts that matplotlib carries
    digits     1,797 handwritten digits of 8 × 8 pixels, in digits.npz beside this file
    a folder   path/<class>/*.jpg, or path/{train,val,test}/<class>/*.jpg

Small data sets live in memory as one uint8 tensor and are augmented a whole batch at a time (`ArraySplit`); photos
stay on the disk and are decoded by worker processes (`FolderSplit`). Both give the same thing: `split.batches()`.
At the end stands what the scripts share of the command line: common options, and `run`, which turns an error into one line.
"""

import argparse
import hashlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms import v2

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")

# What a network is trained with when it does not start from another one that says so itself (its checkpoint).
# Augmented glyphs have a mean of 0.25 and a deviation of 0.31, digits a little more; photos have ImageNet's statistics.
SMALL_PREPROCESSING = {"image_size": 32, "channels": 1, "mean": [0.25] * 3, "std": [0.3] * 3}
PHOTO_PREPROCESSING = {"image_size": 224, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class DataError(ValueError):
    """Data or an option that cannot be used. The message says what is wrong and how to mend it, in one line."""


@dataclass
class Data:
    """A data set: class names in the order of the labels, how images become tensors, and its splits.

    A folder without a test split has test = None.
    """

    classes: list
    preprocessing: dict
    train: "Split"
    val: "Split"
    test: "Split | None"


def load_data(name, preprocessing=None, per_class=None, batch_size=128, workers=0, seed=0, device="cpu"):
    """Load a data set by name or by folder.

    Args:
        name: 'glyphs', 'digits' or the path of a folder.
        preprocessing: dict whose image_size, mean, std and channels replace those of the data set, so that a
            trained network sees images as it learned to; keys that are not given keep the data set's own.
        per_class: keep so many training images of each class, chosen by `seed`.
        workers: processes that decode photos; data sets in memory need none.
        seed: decides order, augmentation and the images of `per_class`; equal seeds give equal batches.
        device: where the batches are made.
    Returns Data. Raises DataError.
    """
    in_memory = {"glyphs": load_glyphs, "digits": load_digits}
    if name in in_memory:
        own, load = SMALL_PREPROCESSING, in_memory[name]
    elif str(name) and Path(name).is_dir():
        own, load = PHOTO_PREPROCESSING, lambda common: load_folder(Path(name), common | {"workers": workers})
    else:
        raise DataError(f"'{name}' is neither a data set ({', '.join(in_memory)}) nor a folder: name one with --data")
    preprocessing = own | (preprocessing or {})
    classes, splits = load({"preprocessing": preprocessing, "batch_size": batch_size, "seed": seed, "device": device})
    if per_class is not None:
        few = splits["train"].subset(choose_per_class(splits["train"].labels, per_class, seed))
        # An epoch keeps its size: fewer images are shown more often, and runs with few and many labels take as many steps.
        splits["train"] = replace(few, repeats=max(splits["train"].epoch_size() // len(few), 1))
    return Data(classes, preprocessing, splits["train"], splits["val"], splits.get("test"))


def choose_per_class(labels, per_class, seed):
    """Indices of `per_class` random images of each class, in their old order: (N,) labels -> (classes × per_class,)."""
    chosen = []
    generator = torch.Generator().manual_seed(seed)
    for label in range(int(labels.max()) + 1):
        indices = (labels == label).nonzero().flatten()
        if len(indices) < per_class:
            raise DataError(f"--per-class {per_class}: a class has only {len(indices)} training images")
        chosen.append(indices[torch.randperm(len(indices), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


# ------------------------------------------------------------------------------------------ batches from memory


def normalise(images, preprocessing):
    """Images of 0..255 -> float (N, 3, S, S) with about mean 0 and deviation 1, channels last.

    Grayscale (N, 1, S, S) becomes three equal channels, since the first convolution has three.
    Channels last (all channels of a pixel side by side in memory) is what convolutions on the CPU and on tensor cores
    want; the shape stays (N, 3, S, S).
    """
    mean = torch.tensor(preprocessing["mean"], device=images.device).view(1, 3, 1, 1) * 255
    deviation = torch.tensor(preprocessing["std"], device=images.device).view(1, 3, 1, 1) * 255
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


def index_batches(count, batch_size, generator=None):
    """Split range(count), shuffled if a generator is given, into index tensors of `batch_size`.

    A last batch of a single image joins the one before it: BatchNorm cannot take a deviation of one number.
    """
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class Split:
    """What every split has: sizes and order, from its labels, batch_size, seed and repeats."""

    def __len__(self):
        return len(self.labels)

    def epoch_size(self):
        """Number of images in an epoch of training."""
        return len(self) * self.repeats

    def steps(self):
        """Number of batches in an epoch of training."""
        return len(index_batches(self.epoch_size(), self.batch_size))

    def indices(self, epoch):
        """Index tensors of the batches: all in order if `epoch` is None, else the epoch's, shuffled and with repeats."""
        if epoch is None:
            return index_batches(len(self), self.batch_size)
        shuffle = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        return index_batches(self.epoch_size(), self.batch_size, shuffle)


@dataclass
class ArraySplit(Split):
    """Images in memory: uint8 (N, C, H, W) with labels int64 (N,).

    repeats is how often an epoch of training shows each image, distorted anew every time.
    """

    images: torch.Tensor
    labels: torch.Tensor
    preprocessing: dict
    batch_size: int
    seed: int
    device: str
    repeats: int = 1

    def name(self, index):
        """What to call image `index` in a report: its number."""
        return str(index)

    def subset(self, indices):
        """The same split with these images only."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def batches(self, epoch=None):
        """Yield (images float (N, 3, S, S), labels (N,)): in order as they are, or for training, given the epoch's number.

        Order and augmentation depend on the seed and the epoch alone, not on what ran before.
        """
        size = self.preprocessing["image_size"]
        if epoch is None:
            for indices in self.indices(epoch):
                images = resize(self.images[indices].to(self.device).float(), size)
                yield normalise(images, self.preprocessing), self.labels[indices].to(self.device)
            return
        generator = torch.Generator(self.device).manual_seed(epoch_seed(self.seed, epoch))
        for indices in self.indices(epoch):
            indices = indices % len(self)
            images = self.images[indices].to(self.device).float() / 255
            images = distort(images, size, generator) * 255
            yield normalise(images, self.preprocessing), self.labels[indices].to(self.device)


def epoch_seed(seed, epoch):
    """One number for the randomness of an epoch (or, given an epoch's, of an image in it): no two pairs share it."""
    return seed * 1_000_003 + epoch


def resize(images, size):
    """(N, C, H, W) -> (N, C, size, size), bilinear."""
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def distort(images, size, generator):
    """Give each image of a batch a new shape, as another hand or another font would have drawn it.

    Shift, scale, rotation, shear and a smooth warp are one sampling grid; then stroke width, blur and noise.
    Everything is done on the whole batch at once: no loop, each image has its own random numbers.
    Never a flip: a mirrored letter is another letter, or none.

    Shape: (N, C, H, W) in 0..1, background 0 -> (N, C, size, size) in 0..1.
    """
    count = len(images)

    def uniform(limit, *shape):
        return (2 * torch.rand(count, *shape, generator=generator, device=images.device) - 1) * limit

    angle, shear = uniform(0.25), uniform(0.35)  # radians; tangent of the slant
    scale_x, scale_y = uniform(0.25).exp(), uniform(0.25).exp()
    cos, sin = angle.cos(), angle.sin()
    # Where in the input each output pixel comes from: rotation · shear · scale, then the shift. (N, 2, 3)
    matrix = torch.stack(
        [
            torch.stack([scale_x * cos, scale_y * (cos * shear - sin), uniform(0.15)], dim=1),
            torch.stack([scale_x * sin, scale_y * (sin * shear + cos), uniform(0.15)], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(matrix, (count, 1, size, size), align_corners=False)  # (N, S, S, 2), from -1 to 1
    warp = functional.interpolate(uniform(0.12, 2, 4, 4), size=(size, size), mode="bicubic")
    images = functional.grid_sample(images, grid + warp.permute(0, 2, 3, 1), align_corners=False)

    # Stroke: between the minimum and the maximum of the 3 × 3 neighbourhood, the picture itself at 0.
    stroke = uniform(0.6, 1, 1, 1)
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    images = images + stroke.clamp(min=0) * (thick - images) - stroke.clamp(max=0) * (thin - images)

    # Blur: a share of the picture goes through a quarter of its resolution, as the 8 × 8 digits did; in a third of the
    # pictures all of it (a number up to 1.5, cut at 1).
    coarse = functional.adaptive_avg_pool2d(images, max(size // 4, 1))
    coarse = functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images = torch.lerp(images, coarse, uniform(1.5, 1, 1, 1).abs().clamp(max=1))
    images = images / images.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)  # thin letters are as white as bold ones

    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return (images + noise * uniform(0.1, 1, 1, 1)).clamp(0, 1)


# ------------------------------------------------------------------------------- glyphs: letters that cost nothing

# The letters of EMNIST's "balanced" set (Cohen et al., arXiv:1702.05373), which takes fifteen small letters and their
# capitals for one class each: their shapes are too alike.
GLYPH_CLASSES = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt")

# matplotlib's text fonts. Computer Modern is another family than all that is trained on, so that validation and test
# ask for letters and not for fonts that were learned by heart.
DEJAVU = [f"DejaVu{family}" for family in ("Sans", "SansMono", "Serif")]
GLYPH_FONTS = {
    "train": [
        *[font + style for font in DEJAVU[:2] for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
        *[DEJAVU[2] + style for style in ("", "-Bold", "-Italic", "-BoldItalic")],
        *["STIXGeneral" + style for style in ("", "Bol", "Italic", "BolIta")],
    ],
    "val": ["cmr10", "cmmi10"],
    "test": ["cmb10", "cmss10", "cmtt10"],
}
GLYPH_CANVAS, GLYPH_INK = 64, 54  # the drawn picture, and the longer side of the letter in it
GLYPH_REPEATS = 32  # pictures of each letter in each font: an epoch of training, and the fixed sets


def draw_glyph(character, font):
    """Draw one letter, white on black, centred, its longer side GLYPH_INK pixels: uint8 (1, 64, 64)."""
    left, top, right, bottom = font.getbbox(character)
    letter = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letter).text((-left, -top), character, fill=255, font=font)
    scale = GLYPH_INK / max(letter.size)
    letter = letter.resize([max(round(side * scale), 1) for side in letter.size], Image.Resampling.LANCZOS)
    canvas = Image.new("L", (GLYPH_CANVAS, GLYPH_CANVAS))
    canvas.paste(letter, [(GLYPH_CANVAS - side) // 2 for side in letter.size])
    return torch.from_numpy(numpy.asarray(canvas).copy())[None]


def draw_fonts(names):
    """Every class in every font: uint8 (fonts × 37, 1, 64, 64) and labels (fonts × 37,)."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", size=4 * GLYPH_INK) for name in names]
    images = [draw_glyph(character, font) for font in fonts for character in GLYPH_CLASSES]
    return torch.stack(images), torch.arange(len(GLYPH_CLASSES)).repeat(len(fonts))


def load_glyphs(common):
    """Training letters are distorted anew in every batch; validation and test letters once, with a seed of their own."""
    splits = {"train": ArraySplit(*draw_fonts(GLYPH_FONTS["train"]), repeats=GLYPH_REPEATS, **common)}
    for fixed_seed, split in enumerate(("val", "test")):
        images, labels = draw_fonts(GLYPH_FONTS[split])
        images, labels = images.repeat(GLYPH_REPEATS, 1, 1, 1), labels.repeat(GLYPH_REPEATS)
        generator = torch.Generator().manual_seed(fixed_seed)
        images = distort(images / 255, common["preprocessing"]["image_size"], generator)
        splits[split] = ArraySplit((images * 255).round().byte(), labels, **common)
    return GLYPH_CLASSES, splits


# -------------------------------------------------------------------------------------- digits: few and by hand

DIGITS_FILE = Path(__file__).with_name("digits.npz")
DIGITS_HALF = 898
DIGITS_REPEATS = 4


def load_digits(common):
    """1,797 digits by 13 writers, the test part of UCI's "Optical Recognition of Handwritten Digits".

    E. Alpaydin and C. Kaynak, 1998, https://archive.ics.uci.edu/dataset/80, CC BY 4.0, taken from scikit-learn's copy.
    A 32 × 32 bitmap was cut into 4 × 4 squares and the inked pixels of each were counted: 8 × 8 numbers from 0 to 16.

    The file does not name the writers, but its order, kept here, presumably follows them: the second half (899) tests, as in
    scikit-learn's example, whose support vector machine gets 96.9% of it right. Of the first half every fifth image of each
    digit (184) validates, by the same writers and so a little too well, and the others (714) train.
    """
    with numpy.load(DIGITS_FILE, allow_pickle=False) as file:
        counts, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = (counts.float() * (255 / 16)).round()[:, None]  # (1797, 1, 8, 8)
    images = resize(images, common["preprocessing"]["image_size"]).round().byte()
    first_half = torch.arange(len(labels)) < DIGITS_HALF
    validates = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        validates[((labels == digit) & first_half).nonzero().flatten()[::5]] = True
    parts = {"train": first_half & ~validates, "val": validates, "test": ~first_half}
    splits = {
        split: ArraySplit(images[part], labels[part], repeats=DIGITS_REPEATS, **common) for split, part in parts.items()
    }
    return [str(digit) for digit in range(10)], splits


# -------------------------------------------------------------------------------------------- folders of photos


def open_image(path, channels):
    """Decode one file: a PIL image, upright as the camera meant it, 1 channel or 3. Raises DataError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image '{path}' ({error}): repair it or take it out of the folder") from error


def photo_transform(size, training):
    """PIL image -> uint8 (C, size, size). Training sees a random part, randomly mirrored; all else the centre.

    The centre is 224/256 of the shorter side, as is customary for ImageNet.
    """
    if training:
        steps = [v2.RandomResizedCrop(size, scale=(0.35, 1)), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*steps, v2.PILToTensor()])


class Photos(torch.utils.data.Dataset):
    """What a worker process needs in order to turn an index into (uint8 (C, S, S), label)."""

    def __init__(self, paths, labels, transform, channels, seed):
        self.paths, self.labels, self.transform, self.channels, self.seed = paths, labels, transform, channels, seed

    def __getitem__(self, index):
        which = index % len(self.paths)  # an epoch with repeats counts further than there are files
        try:
            image = open_image(self.paths[which], self.channels)
        except DataError as error:
            return error  # raised in the main process, where it is one line; a worker would wrap it in its traceback
        with torch.random.fork_rng(devices=[]):
            # A seed for each picture of each epoch: the same picture from any worker, and without workers.
            torch.manual_seed(epoch_seed(self.seed, index))
            return self.transform(image), self.labels[which]


def collate(samples):
    """List of (image, label) -> (images uint8 (N, C, S, S), labels (N,)), or the first error among them."""
    errors = [sample for sample in samples if isinstance(sample, DataError)]
    if errors:
        return errors[0]
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


@dataclass
class FolderSplit(Split):
    """Image files with labels int64 (N,), decoded by `workers` processes when they are needed. All else as in ArraySplit."""

    paths: list
    labels: torch.Tensor
    preprocessing: dict
    batch_size: int
    seed: int
    device: str
    workers: int
    repeats: int = 1

    def name(self, index):
        """What to call image `index` in a report: its path."""
        return str(self.paths[index])

    def subset(self, indices):
        """The same split with these images only."""
        return replace(self, paths=[self.paths[index] for index in indices.tolist()], labels=self.labels[indices])

    def batches(self, epoch=None):
        """As ArraySplit.batches. Raises DataError for an image that cannot be read."""
        training = epoch is not None
        seed = epoch_seed(self.seed, epoch) if training else 0
        transform = photo_transform(self.preprocessing["image_size"], training)
        photos = Photos(self.paths, self.labels.tolist(), transform, self.preprocessing["channels"], seed)
        indices = [batch.tolist() for batch in self.indices(epoch)]
        for batch in DataLoader(photos, batch_sampler=indices, num_workers=self.workers, collate_fn=collate):
            if isinstance(batch, DataError):
                raise batch
            images, labels = (tensor.to(self.device) for tensor in batch)
            yield normalise(images.float(), self.preprocessing), labels


def list_folder(root):
    """Classes and image files of root/<class>/...: (sorted class names, sorted paths, labels). Hidden files are passed over."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
        if not files:
            raise DataError(
                f"no images in '{root / name}': add some ({', '.join(IMAGE_SUFFIXES)}) or remove the folder"
            )
        paths += files
        labels += [label] * len(files)
    if len(classes) < 2:
        raise DataError(
            f"'{root}' has {len(classes)} class folders: put the images of each class in a folder, at least two"
        )
    return classes, paths, labels


def split_folder(root, paths, labels, share=0.2):
    """Stratified split without a list: in each class the `share` of the files with the smallest hash is for validation.

    The hash of the path below `root` stays when the folder is listed in another order, is moved, or gets more files. It
    does not depend on --seed, so that no script ever validates on what another one trained on.
    Returns (indices to train, indices to validate).
    """

    def rank(index):
        return hashlib.sha256(paths[index].relative_to(root).as_posix().encode()).digest()

    train, val = [], []
    for label in sorted(set(labels)):
        indices = sorted((index for index, other in enumerate(labels) if other == label), key=rank)
        if len(indices) < 2:
            raise DataError(
                f"'{paths[indices[0]].parent}' has one image: a class needs at least two, to train and to validate"
            )
        count = max(round(len(indices) * share), 1)
        val += indices[:count]
        train += indices[count:]
    return torch.tensor(sorted(train)), torch.tensor(sorted(val))


def load_folder(root, common):
    """Class folders, split into train/val/test folders or not; without, a fifth of each class validates and nothing tests."""
    if not (root / "train").is_dir():
        classes, paths, labels = list_folder(root)
        everything = FolderSplit(paths, torch.tensor(labels), **common)
        train, val = split_folder(root, paths, labels)
        return classes, {"train": everything.subset(train), "val": everything.subset(val)}
    if not (root / "val").is_dir():
        raise DataError(
            f"'{root}' has a folder 'train' and none called 'val': add it, or leave the class folders unsplit"
        )
    classes, splits = None, {}
    for split in ("train", "val", "test"):
        if (root / split).is_dir():
            found, paths, labels = list_folder(root / split)
            if classes not in (None, found):
                difference = ", ".join(sorted(set(classes) ^ set(found)))
                raise DataError(
                    f"'{root / split}' and '{root / 'train'}' have different classes: only one has {difference}"
                )
            classes, splits[split] = found, FolderSplit(paths, torch.tensor(labels), **common)
    return classes, splits


# -------------------------------------------------------------------------- the command line that the scripts share


def number(kind, low, high):
    """An argparse type: an int or a float (`kind`) from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # lies between no two numbers
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not {'a whole number' if kind is int else 'a number'} from {low} to {high}"
            )
        return value

    return parse


def command_line(description, data, out, batch_size):
    """A parser with the options that every script has, each named and explained once; the arguments are their defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", default=data, help="glyphs, digits, or a folder of images")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for what the run writes")
    parser.add_argument("--batch-size", type=number(int, 2, 65536), default=batch_size, help="images a step")
    parser.add_argument("--workers", type=number(int, 0, 64), default=2, help="processes that decode photos")
    return parser


def add_device_option(parser):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_training_options(parser, epochs, learning_rate, weight_decay):
    """The options that train.py and finetune.py share, beside those of every script."""
    add_device_option(parser)
    parser.add_argument(
        "--epochs",
        type=number(int, 1, 100_000),
        default=epochs,
        help="passes over the images (finetune.py: in stage blocks)",
    )
    parser.add_argument("--learning-rate", type=number(float, 0, 100), default=learning_rate, help="at its highest")
    parser.add_argument(
        "--weight-decay", type=number(float, 0, 1), default=weight_decay, help="of weights, not of biases"
    )
    parser.add_argument(
        "--label-smoothing", type=number(float, 0, 1), default=0.1, help="probability that all classes share"
    )
    parser.add_argument(
        "--image-size", type=number(int, 8, 1024), help="pixels a side; None: as the data or the checkpoint has it"
    )
    parser.add_argument(
        "--per-class", type=number(int, 1, 1_000_000), help="train on so many images a class; None: all"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 1_000_000), default=0, help="equal seeds give equal checkpoints on the CPU"
    )


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
    """Call a script's `main`; what a user can mend ends in one line on stderr and exit code 2, not in a traceback.

    These are DataError, OSError, an interrupt, too little memory, and `errors`.
    """
    try:
        main()
        return
    except KeyboardInterrupt:
        message = "interrupted; the checkpoints it had written are whole"
    except (DataError, *errors) as error:
        message = str(error)
    except OSError as error:
        message = f"{error}: see that this place can be written or read and has space, or name another"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "not enough memory: lower --batch-size or --image-size"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
