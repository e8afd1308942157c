"""The command line: shared options, the device, errors in one line. You can skip this file."""

import argparse
import ctypes
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed

if "MPLBACKEND" in os.environ and "ipykernel" not in sys.modules:
    # A notebook's backend may be missing here, and pictures are only written to files.
    os.environ["MPLBACKEND"] = "agg"

# Options of mallopt, by their numbers in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
ADVICE = {  # part of an error of PyTorch: problem and fix
    "out of memory": "not enough memory: lower --batch-size or --image-size",
    "allocate memory": "not enough memory: lower --batch-size or --image-size",
    "open files": "too many open files: use --workers 0, or raise `ulimit -n`",
    "ancdata": "too many open files: use --workers 0, or raise `ulimit -n`",
    "DataLoader worker": "a worker ended: use --workers 0, or more shared memory (/dev/shm)",
    "shared memory": "no shared memory: use --workers 0, or more of it (/dev/shm)",
    "Connection closed by peer": "another process of torchrun ended: see its message",
    "Timed out waiting": "another process of torchrun does not answer: see its messages",
}


class UserError(Exception):
    """A problem that the user can solve. The message names the problem and the fix."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the default of an option, unless its help text describes it."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see --help\n")


def in_range(kind, low, high):
    """Make a `type` for add_argument: an int or float from `low` to `high`, never NaN."""

    def parse_number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: use a value from {low} to {high}")
        return value

    parse_number.__name__ = kind.__name__  # "invalid int value: 'x'"
    return parse_number


def make_parser(description, data, out, batch_size=None):
    """Make a parser with the options that every script has, and these defaults."""
    parser = Parser(description=description, formatter_class=Formatter, allow_abbrev=False)
    add = parser.add_argument
    text = "dataset (python data.py --help lists all), or folder of images"
    add("--data", default=data, help=text)
    add("--data-dir", type=Path, default=Path("datasets"), help="folder for downloads")
    add("--out", type=Path, default=Path(out), help="folder for the results")
    text = "image side in pixels (default: the checkpoint's, or the dataset's)"
    add("--image-size", type=in_range(int, 8, 1024), help=text)
    text = "images per step, all processes" + ("" if batch_size else " (default: by recipe)")
    add("--batch-size", type=in_range(int, 2, 65536), default=batch_size, help=text)
    workers = 4 if torch.cuda.is_available() else 0  # on a CPU they would slow the network
    add("--workers", type=in_range(int, 0, 64), default=workers, help="processes for photos")
    add("--seed", type=in_range(int, 0, 10**6), default=0, help="seed of all random choices")
    return parser


def parse(parser):
    """Parse the command line. Raises UserError for a missing device."""
    args = parser.parse_args()
    data = os.path.realpath(args.data)
    if os.path.isdir(data) and Path(os.path.realpath(args.out)).is_relative_to(data):
        parser.error(f"--out {args.out}: is inside --data {args.data}; use another folder")
    if distributed.is_torchelastic_launched() and "resume" not in args:
        parser.error("this script runs in one process: start it without torchrun")
    if "device" in args:
        args.device = choose_device(args.device)
    return args


def choose_device(name):
    """Return the device to use: "auto" is the fastest kind of this machine."""
    if name == "auto":
        found = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:  # each backend has its own kind of exception
        raise UserError(f"--device {name}: not available; use auto or cpu") from error
    return name


def keep_freed_memory():
    """Make glibc keep freed memory: asking the system for it in each step is slow."""
    with suppress(AttributeError, TypeError):  # no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no separate memory for large tensors
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes to keep


def run(main, *errors):
    """Run a script. A UserError, or one of `errors`, ends in one line and exit code 2."""
    with suppress(AttributeError, ValueError):  # in a notebook, or in a thread
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack some letters
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` works like Ctrl-C
    for text in ("Detected pickle protocol", "'torch.load' received a zip"):
        warnings.filterwarnings("ignore", text)  # the error line is enough
    warnings.filterwarnings("ignore", module="PIL")  # unusual files that are readable
    keep_freed_memory()
    try:
        main()
        print(end="", flush=True)
        return
    except KeyboardInterrupt:
        message = "interrupted; train.py and finetune.py continue with --resume"
    except (UserError, *errors) as error:
        # A worker of a DataLoader adds its traceback in front of the message.
        message = str(error).rpartition(f"{type(error).__name__}: ")[2]
    except BrokenPipeError:  # `| head` has read enough
        message = "nobody reads the output; train.py and finetune.py continue with --resume"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it at the end
    except OSError as error:
        message = f"{error}: check permissions and free space, or use another folder"
    except RuntimeError as error:
        known = [advice for part, advice in ADVICE.items() if part in str(error)]
        if not known:
            raise
        message = known[0]
    with suppress(OSError):  # a closed or full stderr
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
