"""What every test shares: the project on the path, a fixed number of threads, no network, and the network that is graded."""

import functools
import importlib.util
import inspect
import os
import sys
import traceback
import urllib.request
from pathlib import Path

import pytest
import torch

# One thread, here and in what the tests start: the arrays are too small for more, and a busy machine changes nothing.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import CheckpointError, MobileNetV2  # noqa: E402


def load_class(path):
    """The class MobileNetV2 of somebody's file. Raises UsageError, which pytest tells in one line."""
    modules = {name: sys.modules.pop(name) for name in [file.stem for file in ROOT.glob("*.py")] if name in sys.modules}
    sys.path.insert(0, str(path.resolve().parent))  # what it imports lies beside it, even if it is called data.py
    try:
        spec = importlib.util.spec_from_file_location("implementation", path)
        module = sys.modules["implementation"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = module.MobileNetV2
    except (Exception, SystemExit) as error:  # a student's file may raise anything
        lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        fault = f"{type(error).__name__}{''.join(lines[-1:])}: {' '.join(str(error).split())}"
        mend = "a Python file is wanted, with a class MobileNetV2, and what it runs under if __name__ == '__main__':"
        raise pytest.UsageError(f"--implementation {path}: {fault} ({mend})") from error
    finally:
        sys.path.pop(0)
        sys.modules.update(modules)
    if not inspect.isclass(found) or found.__module__.startswith("torchvision"):
        raise pytest.UsageError(f"--implementation {path}: MobileNetV2 is {found!r}, and not a class of its own")
    return found


def pytest_addoption(parser):
    text = "a Python file whose class MobileNetV2 is graded, instead of this project's; only the tests that grade are run"
    parser.addoption("--implementation", type=Path, metavar="FILE", help=text)


def pytest_configure(config):
    path = config.getoption("--implementation")
    config.graded = load_class(path) if path else MobileNetV2


def pytest_collection_modifyitems(config, items):
    if config.getoption("--implementation"):
        others = [item for item in items if "network_class" not in item.fixturenames]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def network_class(request):
    """The class that test_mobilenetv2.py grades."""
    return request.config.graded


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the network fails the same way on every machine; it may 'fetch' from this computer."""
    real_open = urllib.request.urlopen

    def refuse(request, *args, **kwargs):
        url = request if isinstance(request, str) else request.full_url
        if not url.startswith(("file:", "http://127.0.0.1:")):
            raise urllib.error.URLError("no network in tests")
        return real_open(request, *args, **kwargs)

    for module in (urllib.request, torch.hub):  # the latter has a name of its own for it
        monkeypatch.setattr(module, "urlopen", refuse)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Most tests of a run do not look at its curves, which take a second; `trained` and those of evaluate.py draw them."""
    monkeypatch.setattr(train, "plot_history", lambda history, path: path.write_bytes(b"curves"))


@functools.cache
def draw_glyphs(size, load_glyphs=data.load_glyphs):
    return load_glyphs(size)


@pytest.fixture(autouse=True)
def glyphs_drawn_once(monkeypatch):
    """Draw the letters once for all tests, which takes a second."""

    def load_glyphs(size):
        classes, splits = draw_glyphs(size)
        return classes, dict(splits)

    monkeypatch.setattr(data, "load_glyphs", load_glyphs)


@pytest.fixture
def few_digits(monkeypatch):
    """Keep every third digit, of 16 pixels: 238 for training, 62 for validation and 300 for tests."""
    load_digits = data.load_digits
    monkeypatch.setitem(data.PREPROCESSING, "digits", data.SMALL | {"image_size": 16})

    def load_few(size):
        classes, splits = load_digits(size)
        return classes, {split: (images[::3], labels[::3]) for split, (images, labels) in splits.items()}

    monkeypatch.setattr(data, "load_digits", load_few)


def call_script(script, *arguments):
    """Call a script as the command line does: returns the exit code."""
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, arguments)]
    try:
        data.run(script.main, CheckpointError)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv


@pytest.fixture
def call(capsys):
    """call(train, '--epochs', 1) -> (exit code, stdout, stderr)."""

    def call_and_read(script, *arguments):
        capsys.readouterr()
        code = call_script(script, *arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return call_and_read


# The smallest run that is still a run: digits of 16 pixels, each image once per epoch, and a narrow network.
data.REPEATS["digits"] = data.FOLDER_EPOCH = 1
SMALL = ("--data", "digits", "--image-size", "16", "--epochs", "2", "--batch-size", "128")  # 5 steps per epoch
SMALL_NETWORK = ("--width", "0.35", "--output-stride", "32")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small training run, made once."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    assert call_script(train, *SMALL, *SMALL_NETWORK, "--out", folder) == 0
    return folder
