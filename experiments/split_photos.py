"""Copy a folder of photos into train, val and test folders, the same share of every class.

    python experiments/split_photos.py photos photos-split --val 0.2 --test 0.1

The original folder stays as it is. The same seed gives the same split.
"""

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402


def list_photos(folder):
    """List folder/<class>/...: (number of classes, paths (N,), labels (N,)). Raises DataError."""
    left_out = Counter()
    splits = data.find_splits(folder, left_out)
    if splits:
        fix = "name a folder with one folder per class"
        raise data.DataError(f"'{folder}' is already split ({', '.join(splits)}); {fix}")
    images = data.list_classes(folder, left_out)
    classes = data.sort_names(images)
    if len(classes) < 2:
        raise data.DataError(f"'{folder}' needs at least two class folders with images")
    data.check_classes(folder, images, classes, required=True)
    for reason, count in left_out.items():
        if count > 0:
            print(f"left out: {count} {reason}")
    return len(classes), *data.index_images(images, classes)


def split(source, paths, labels, val_share, test_share, seed):
    """Return {split: paths (N,)}, shares of each class: first test, then val from the others."""
    splits = {"train": paths, "val": paths[:0], "test": paths[:0]}
    remaining = 1.0  # share of the images in train
    for name, share in (("test", test_share), ("val", val_share)):
        if share > 0:
            others, chosen = data.split_folder(
                source, splits["train"], labels, share / remaining, salt=f"{seed} "
            )
            splits[name] = splits["train"][chosen]
            splits["train"] = splits["train"][others]
            labels = labels[others]
            remaining -= share
    return splits


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.Formatter)
    add = parser.add_argument
    add("source", type=Path, help="folder with one folder per class")
    add("target", type=Path, help="new folder")
    add("--val", type=cli.in_range(float, 0, 0.45), default=0.2, help="share for validation")
    add("--test", type=cli.in_range(float, 0, 0.45), default=0.1, help="share for testing")
    add("--seed", type=cli.in_range(int, 0, 10**6), default=0, help="seed of the split")
    args = parser.parse_args()
    source = args.source.resolve()
    target = args.target.resolve()
    if not source.is_dir():
        fix = "name a folder with one folder per class"
        raise data.DataError(f"'{source}': no such folder; {fix}")
    if target.exists() or target.is_relative_to(source):
        raise data.DataError(f"'{target}' exists, or is inside '{source}': use a new folder")
    source = data.unwrap(source)
    classes, paths, labels = list_photos(source)
    splits = split(source, paths, labels, args.val, args.test, args.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        for name, chosen in splits.items():
            for path in map(Path, chosen):
                copy = Path(temporary, target.name, name, path.relative_to(source))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        Path(temporary, target.name).rename(target)  # complete, or not at all
    counts = ", ".join(f"{len(chosen)} to {name}" for name, chosen in splits.items())
    print(f"copied {len(paths)} images of {classes} classes: {counts}")


if __name__ == "__main__":
    cli.run(main)
