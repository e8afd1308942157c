"""What all tests share: path, one thread, no network, fixtures, the options of the grader."""

import functools
import os
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

# One thread, here and in what the tests start. The arrays are too small for more, and with one
# thread a busy machine changes nothing.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grader import Score, Submission, load_submission  # noqa: E402

import cli  # noqa: E402
import data  # noqa: E402
import mobilenetv2  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import CheckpointError, MobileNetV2  # noqa: E402


def pytest_addoption(parser):
    text = (
        "grade the class MobileNetV2 of this Python file instead of the project's;"
        " no other tests run"
    )
    parser.addoption("--implementation", type=Path, metavar="FILE", help=text)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "criterion(name): the criterion of grader.CRITERIA that a test belongs to"
    )
    path = config.getoption("--implementation")
    config.submission = load_submission(path) if path else Submission(MobileNetV2)
    config.score = Score(path) if path else None
    if path:  # nothing may hide the score
        if config.option.tbstyle == "auto":
            config.option.tbstyle = "no"
        config.option.reportchars = ""
        config.option.disable_warnings = True


def pytest_collection_modifyitems(config, items):
    if config.score:
        others = [item for item in items if not item.get_closest_marker("criterion")]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("criterion")
    if item.config.score and marker and (report.when == "call" or report.outcome != "passed"):
        message = str(call.excinfo.value) if call.excinfo else ""
        if report.failed and not call.excinfo.errisinstance(pytest.fail.Exception):
            kind = call.excinfo.typename
            message = f"the grader stopped with {kind}: {message} (--tb=long shows where)"
        item.config.score.add(marker.args[0], report.outcome, message)


def pytest_terminal_summary(terminalreporter, config):
    if config.score:
        terminalreporter.section(f"MobileNetV2 of {config.score.file}")
        for line in config.score.lines():
            terminalreporter.write_line(line)


def pytest_sessionfinish(session, exitstatus):
    if session.config.score and exitstatus == 0 and not session.config.score.complete:
        session.exitstatus = 1


@pytest.fixture(scope="session")
def submission(request):
    """The network that test_mobilenetv2.py grades."""
    return request.config.submission


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the network fails the same way on every machine.

    It may 'fetch' from this computer.
    """
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
    """Do not draw the curves of a run, which takes a second: most tests do not look at them.

    `trained` and the tests of evaluate.py draw them.
    """
    monkeypatch.setattr(
        train, "plot_history", lambda history, path: mobilenetv2.write_file(path, b"curves")
    )


@functools.cache
def draw_glyphs(size):
    return data.load_glyphs(size)


@pytest.fixture(autouse=True)
def glyphs_drawn_once(monkeypatch):
    """Draw the letters once for all tests, which takes a second."""

    def load(size, folder):
        classes, splits = draw_glyphs(size)
        return classes, dict(splits)

    monkeypatch.setitem(data.DATASETS["glyphs"], "load", load)


@pytest.fixture
def few_digits(monkeypatch):
    """Keep every third digit, of 16 pixels.

    These are 238 for training, 62 for validation and 300 for tests.
    """

    def load(size, folder):
        classes, splits = data.load_digits(size)
        few = {split: (images[::3], labels[::3]) for split, (images, labels) in splits.items()}
        return classes, few

    preprocessing = {**data.SMALL_IMAGE, "image_size": 16}
    monkeypatch.setitem(data.DATASETS["digits"], "preprocessing", preprocessing)
    monkeypatch.setitem(data.DATASETS["digits"], "load", load)


def call_script(script, *arguments):
    """Call a script as the command line does: returns the exit code."""
    argv = sys.argv
    sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
    try:
        cli.run(script.main, CheckpointError)
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


# The smallest run that is still a run: digits of 16 pixels, each image once per epoch, and a
# narrow network. An epoch has 5 steps.
data.DATASETS["digits"]["repeats"] = 1
data.FOLDER_EPOCH = 1
SMALL_DATA = ("--data", "digits", "--image-size", "16")
SMALL = (*SMALL_DATA, "--epochs", "2", "--batch-size", "128")
SMALL_NETWORK = ("--width", "0.35", "--output-stride", "32")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small training run, made once."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    assert call_script(train, *SMALL, *SMALL_NETWORK, "--out", folder) == 0
    return folder
