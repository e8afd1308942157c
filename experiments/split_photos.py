"""Copy a folder of photos into train, val and test folders, the same share of every class.

    python experiments/split_photos.py photos photos-split --val 0.2 --test 0.1

The original folder stays as it is. The same seed gives the same split.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("source", type=Path, help="folder with one folder per class")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument(
        "--val", type=float, default=0.2, help="share for validation (default: 0.2)"
    )
    parser.add_argument("--test", type=float, default=0.1, help="share for testing (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    args = parser.parse_args()
    if not (0 <= args.val <= 0.45 and 0 <= args.test <= 0.45):
        parser.error("--val and --test: use shares from 0 to 0.45")
    source, target = args.source.resolve(), args.target.resolve()
    if target.exists() or target.is_relative_to(source):
        raise data.DataError(f"'{target}' exists, or is inside '{source}': use a new folder")
    classes, paths, labels = data.list_folder(source)
    shares = (args.val, args.test)
    val, test, train = data.split_folder(source, paths, labels, shares, salt=f"{args.seed} ")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        for split, indices in (("train", train), ("val", val), ("test", test)):
            for path in paths[indices]:
                copy = Path(temporary, target.name, split, path.relative_to(source))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        Path(temporary, target.name).rename(target)  # complete, or not at all
    counts = f"{len(train)} to train, {len(val)} to val, {len(test)} to test"
    print(f"copied {len(paths)} images of {len(classes)} classes: {counts}")


if __name__ == "__main__":
    data.run(main)
