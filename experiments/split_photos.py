"""Copy a folder of photos into train, val and test folders, the same share of every class.

    python experiments/split_photos.py photos photos-split --val 0.2 --test 0.1

The original folder stays as it is. The same seed gives the same split.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
import data  # noqa: E402


def split(source, val_share, test_share, seed):
    """Return (number of classes, {split: paths (N,)}): first test, then val from the others."""
    classes, paths, labels = data.list_folder(source)
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
    return len(classes), splits


def main():
    parser = cli.Parser(description=__doc__, formatter_class=cli.HelpFormatter)
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
        raise data.DataError(f"'{source}': no such folder; name one with a folder per class")
    if target.exists() or target.is_relative_to(source):
        raise data.DataError(f"'{target}' exists, or is inside '{source}': use a new folder")
    classes, splits = split(source, args.val, args.test, args.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        for name, paths in splits.items():
            for path in paths:
                copy = Path(temporary, target.name, name, path.relative_to(source))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        Path(temporary, target.name).rename(target)  # complete, or not at all
    counts = ", ".join(f"{len(paths)} to {name}" for name, paths in splits.items())
    images = sum(len(paths) for paths in splits.values())
    print(f"copied {images} images of {classes} classes: {counts}")


if __name__ == "__main__":
    cli.run(main)
