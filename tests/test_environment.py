"""Environments as people have them: variables, signals, pipes, threads, folders that change.

`RUN` is a run on ten photos with a network of one block, so that a row costs little.
"""

import gc
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import matplotlib
import pytest
import torch
from conftest import ROOT, call_script
from processes import Python
from test_bad_input import one_block  # noqa: F401  an autouse fixture
from test_folders import build, two
from test_train import assert_same_runs
from torch import nn
from torch.utils.data import get_worker_info

import cli
import data
import evaluate
import export
import finetune
import train
from mobilenetv2 import MobileNetV2, load_checkpoint, save_checkpoint

TRAINING = ("--width", 0.35, "--image-size", 16, "--batch-size", 4, "--learning-rate", 0.01)
RUN = (*TRAINING, "--epochs", 2)
TUNING = ("--image-size", 16, "--batch-size", 4, "--classifier-epochs", 1, "--epochs", 1)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Do not draw pictures of results, which takes seconds."""
    for module, name in ((data, "plot_grid"), (evaluate, "plot_confusion")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "plot_history", lambda *_: None)


@pytest.fixture(autouse=True)
def old_signal_handler():
    """Restore the handler that cli.run replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten photos of two classes for training, and ten for tests."""
    return build(tmp_path_factory.mktemp("photos"), two("train", "test"))


def interrupt_after_epoch(*arguments, save_epoch=train.save_epoch):
    save_epoch(*arguments)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def half(one_block, photos, tmp_path_factory):  # noqa: F811
    """The folder of a run that was interrupted after the first of its two epochs."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(train, "save_epoch", interrupt_after_epoch)
        assert call_script(train, "--data", photos, *RUN, "--out", folder) == 2
    return folder


@pytest.fixture(scope="module")
def finished(half, tmp_path_factory):
    """The folder of the same run, after its second epoch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(half, folder)
    assert call_script(train, "--resume", "--out", folder) == 0
    return folder


@pytest.fixture
def run(half, tmp_path):
    """A copy of `half`, which a test may change."""
    return shutil.copytree(half, tmp_path / "run")


@pytest.fixture
def no_step(monkeypatch):
    """Fail if a script trains, or computes features."""
    for module, name in ((train, "train_epoch"), (finetune, "extract_features")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a step was taken"))


@pytest.fixture
def verify_here(monkeypatch):
    """Verify exported files in this process. A new one takes seconds to start."""
    monkeypatch.setattr(
        export, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def history(folder):
    return load_checkpoint(folder / "last.pt")[1]["history"]


def name_of(script):
    return script.__name__


# ------------------------------------------------------------------------ variables left by others

LEFT_BEHIND = {  # variables of containers, schedulers and other programs
    "torchrun": {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    },
    "rank 0": {"RANK": "0", "WORLD_SIZE": "8"},
    "no numbers": {"RANK": "", "WORLD_SIZE": "all"},
    "slurm": {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "1"},
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_variables_of_other_programs_change_nothing(
    name, photos, finished, tmp_path, call, monkeypatch
):
    for variable, value in LEFT_BEHIND[name].items():
        monkeypatch.setenv(variable, value)
    code, out, err = call(train, "--data", photos, *RUN, "--out", tmp_path / "run")
    assert (code, err) == (0, "") and out.count("\nscratch ") == 2
    assert_same_runs(tmp_path / "run", finished)
    best = ("--checkpoint", finished / "best.pt", "--data", photos)
    code, out, err = call(evaluate, *best, "--out", tmp_path / "results")
    assert (code, err) == (0, "") and f"on 10 images of {photos} (test)" in out
    tables = [(tmp_path / "results" / "predictions.csv").read_bytes()]
    for variable in LEFT_BEHIND[name]:
        monkeypatch.delenv(variable)
    assert call(evaluate, *best, "--out", tmp_path / "results")[0] == 0
    tables.append((tmp_path / "results" / "predictions.csv").read_bytes())
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 11


@pytest.mark.parametrize("script", (data, evaluate, export), ids=name_of)
def test_scripts_of_one_process_refuse_torchrun(script, tmp_path, call, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code, _, err = call(script, "--out", tmp_path / "out")
    reason = "this script runs in one process: start it without torchrun; see --help"
    assert (code, err) == (2, f"{script.__name__}.py: {reason}\n")


SETTINGS = "text.usetex: True\nbackend: tkagg\nfont.size: 30\n"
NOTEBOOK = "module://matplotlib_inline.backend_inline"


def test_pictures_need_no_backend_and_no_tex(photos, tmp_path):
    """This environment has neither matplotlib_inline nor LaTeX. matplotlib reads both early."""
    (tmp_path / "matplotlibrc").write_text(SETTINGS)
    other = {"MPLBACKEND": NOTEBOOK, "MATPLOTLIBRC": str(tmp_path)}
    command = (
        ROOT / "data.py",
        "--data",
        photos,
        "--image-size",
        16,
        "--out",
        tmp_path / "out",
    )
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **other},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path / "out")) == ["augmented.png", "samples.png"]


@pytest.mark.parametrize(
    "value, notebook", ((NOTEBOOK, False), ("inline", False), ("x", True))
)
def test_only_a_notebook_keeps_its_backend(value, notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", value)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    spec = importlib.util.spec_from_file_location("cli_again", cli.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.environ["MPLBACKEND"] == (value if notebook else "agg")


def test_settings_of_the_user_do_not_reach_the_curves(finished, tmp_path):
    rows = history(finished)
    spec = importlib.util.spec_from_file_location("evaluate_again", evaluate.__file__)
    again = importlib.util.module_from_spec(spec)  # here `few_pictures` replaced the function
    spec.loader.exec_module(again)
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):
        again.plot_history(rows, tmp_path / "other.png")
        assert matplotlib.rcParams["text.usetex"]
    again.plot_history(rows, tmp_path / "usual.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "usual.png").read_bytes()


# ---------------------------------------------------------------------------- errors of PyTorch


def fail_with(error):
    def main():
        raise error

    return types.SimpleNamespace(__name__="train", main=main)


@pytest.mark.parametrize("part", cli.ADVICE)
def test_known_errors_of_pytorch_end_in_one_line(part, call):
    code, _, err = call(fail_with(RuntimeError(f"first line\n[file.cpp:1] {part}: last line")))
    assert (code, err) == (2, f"train.py: {cli.ADVICE[part]}\n")


MESSAGES = {  # messages of PyTorch: part of ours
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory:"
    " you tried to allocate 9000000000000 bytes. Error code 12": "lower --batch-size",
    "DataLoader worker (pid 71) is killed by signal: Killed. ": "use --workers 0",
    "DataLoader worker (pid(s) 71, 72) exited unexpectedly": "use --workers 0",
    "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's"
    " workers are out of shared memory. Please try to raise your shared memory limit.": "/dev/shm",
    "unable to allocate shared memory(shm) for file </torch_71_2_3>: No space left on device"
    " (28)": "/dev/shm",
    "unable to open shared memory object </torch_71_2_3> in read-write mode: Too many open files"
    " (24)": "use --workers 0",
    "[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    " [127.0.0.1]:4711": "another process of torchrun",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_pytorch_get_the_right_advice(message, call):
    code, _, err = call(fail_with(RuntimeError(message)))
    assert code == 2 and MESSAGES[message] in err and err.count("\n") == 1


TOO_MANY_FILES = [  # with `ulimit -n 20` and --workers 2
    "Too many open files. Communication with the workers is no longer possible. Please increase"
    " the limit using `ulimit -n` in the shell or change the sharing strategy",
    "received 0 items of ancdata",
]


@pytest.mark.parametrize("message", TOO_MANY_FILES)
def test_too_many_open_files_end_in_one_line(message, call):
    code, _, err = call(fail_with(RuntimeError(message)))
    assert code == 2 and "--workers 0" in err and err.count("\n") == 1


def test_a_full_gpu_ends_in_one_line(call):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    code, _, err = call(fail_with(error))
    assert (
        code == 2
        and err == "train.py: not enough memory: lower --batch-size or --image-size\n"
    )


@pytest.mark.parametrize(
    "error", (RuntimeError("size mismatch"), ValueError("x"), KeyError(1))
)
def test_a_mistake_of_ours_ends_in_a_traceback(error, call):
    with pytest.raises(type(error)) as caught:
        call(fail_with(error))
    assert caught.value is error


# --------------------------------------------------------------------------------------- workers


def test_photos_that_no_worker_can_read_end_in_one_line(tmp_path, call, monkeypatch):
    # A DataLoader that ends with an error waits for its workers as long.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds
    folder = build(tmp_path / "photos", two(""))
    for path in folder.rglob("*.jpg"):
        path.write_text("no image")
    for workers in (0, 1):
        command = ("--data", folder, *RUN, "--workers", workers, "--out", tmp_path / "out")
        code, _, err = call(train, *command)  # a worker's own lines do not reach `err`
        assert code == 2
        line = err.splitlines()[-1]
        assert line == "train.py: 100 unreadable photos in a row: check the folder"
        assert err.count("\n") == (9 if workers == 0 else 1)  # 8 photos for training
        assert not (tmp_path / "out").exists()
    gc.collect()  # ends the worker


def test_a_worker_that_is_killed_ends_in_one_line(photos, tmp_path, call, monkeypatch):
    def end(*_):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.PhotoDataset, "load", end)
    command = ("--data", photos, *RUN, "--workers", 1, "--out", tmp_path / "out")
    code, _, err = call(train, *command)
    assert (code, err) == (2, f"train.py: {cli.ADVICE['DataLoader worker']}\n")


def test_a_photo_that_disappears_does_not_end_a_run(tmp_path, call, monkeypatch):
    folder = build(tmp_path / "photos", two(""))
    train_epoch = train.train_epoch

    def remove_a_photo(*arguments):
        (folder / "a" / "2.jpg").unlink(missing_ok=True)
        return train_epoch(*arguments)

    monkeypatch.setattr(train, "train_epoch", remove_a_photo)
    code, _, err = call(train, "--data", folder, *RUN, "--out", tmp_path / "run")
    assert code == 0 and err.startswith("unreadable photo 1, left out: ")
    assert err.count("\n") == 1 and len(history(tmp_path / "run")) == 2


class Full(io.StringIO):
    """A stream to a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_an_error_that_cannot_be_printed_has_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    assert call_script(train, "--data", tmp_path / "none", "--out", tmp_path / "out") == 2


def test_damaged_photos_and_a_closed_stderr_do_not_end_a_run(tmp_path, call, monkeypatch):
    folder = build(tmp_path / "photos", two(""))
    (folder / "a" / "3.jpg").write_text("no image")
    (folder / "b" / "3.jpg").write_text("no image")

    closed = io.StringIO()
    closed.close()
    for number, stream in enumerate((Full(), closed, None)):
        with monkeypatch.context() as context:
            context.setattr(sys, "stderr", stream)
            options = ("--data", folder, *TRAINING, "--epochs", 1)
            assert call_script(train, *options, "--out", tmp_path / str(number)) == 0


# ------------------------------------------------------------------- output, signals and threads

PROGRAM = """
import os
import sys
import time
import conftest
import mobilenetv2
import train

mobilenetv2.BOTTLENECKS = mobilenetv2.BOTTLENECKS[:1]
train.plot_history = lambda history, path: None
CHANGE
sys.exit(conftest.call_script(train, *sys.argv[1:]))
"""
CLOSED_PIPE = """
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
"""
WAIT = """
def wait(*arguments):
    print("training", flush=True)
    time.sleep(100)

train.train_epoch = wait
"""


def start(change, *arguments, output):
    program = PROGRAM.replace("CHANGE", change)
    return Python(program, *arguments, output=output, path=(ROOT, ROOT / "tests"))


NOBODY_READS = "nobody reads the output; train.py and finetune.py continue with --resume"


def test_a_closed_pipe_ends_in_one_line(photos, tmp_path):
    """This is the end of `python train.py | head -1`."""
    process = start(
        CLOSED_PIPE,
        "--data",
        photos,
        *RUN,
        "--out",
        tmp_path / "run",
        output=tmp_path / "output",
    )
    code, _, err = process.wait()
    assert (code, err) == (2, f"train.py: {NOBODY_READS}\n")


@pytest.mark.parametrize(
    "script",
    [
        data,
        evaluate,
        export,
    ],
    ids=name_of,
)
def test_every_script_notices_that_nobody_reads(
    script, photos, finished, tmp_path, monkeypatch, capsys, verify_here
):
    read, write = os.pipe()
    os.close(read)
    options = ["--data", photos, "--out", tmp_path / "out"]
    if script is not data:
        options += ["--checkpoint", finished / "best.pt"]
    if script is export:
        options += ["--formats", "torchscript"]
    with open(write, "w") as pipe, monkeypatch.context() as context:
        context.setattr(sys, "stdout", pipe)
        code = call_script(script, *options)
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), write
        )  # it has to be closed without an error
    assert code == 2
    assert capsys.readouterr().err == f"{script.__name__}.py: {NOBODY_READS}\n"


@pytest.mark.parametrize("ending", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_in_one_line_and_leaves_nothing(
    ending, photos, tmp_path, call, monkeypatch
):
    def be_ended(*_):
        os.kill(os.getpid(), ending)
        time.sleep(10)
        pytest.fail("the signal was ignored")

    monkeypatch.setattr(train, "train_epoch", be_ended)
    code, _, err = call(train, "--data", photos, *RUN, "--out", tmp_path / "run")
    line = "train.py: interrupted; train.py and finetune.py continue with --resume\n"
    assert (code, err) == (2, line) and not (tmp_path / "run").exists()


def test_scripts_run_in_a_thread(photos, finished, tmp_path, capsys):
    """Only the main thread may set the handler of a signal."""
    handler = signal.getsignal(signal.SIGTERM)
    codes = []

    def train_and_evaluate():
        codes.append(call_script(train, "--data", photos, *RUN, "--out", tmp_path / "run"))
        options = ("--data", photos, "--out", tmp_path / "out")
        codes.append(call_script(evaluate, "--checkpoint", finished / "best.pt", *options))
        codes.append(call_script(evaluate, "--checkpoint", "nothing.pt", *options))

    thread = threading.Thread(target=train_and_evaluate)
    thread.start()
    thread.join()
    assert codes == [0, 0, 2] and signal.getsignal(signal.SIGTERM) is handler
    assert_same_runs(tmp_path / "run", finished)
    err = capsys.readouterr().err
    assert err.startswith("evaluate.py: cannot load 'nothing.pt'") and err.count("\n") == 1


@pytest.mark.parametrize("stream", (io.StringIO, lambda: None), ids=("notebook", "no console"))
def test_scripts_run_without_a_console(stream, photos, finished, tmp_path):
    """The output of a notebook has no `reconfigure`. Without a console, sys.stdout is None."""
    out = stream()
    with redirect_stdout(out):
        assert call_script(train, "--data", photos, *RUN, "--out", tmp_path / "run") == 0
    assert_same_runs(tmp_path / "run", finished)
    assert out is None or out.getvalue().count("\nscratch ") == 2


def test_a_missing_temporary_folder_ends_in_one_line(
    photos, finished, tmp_path, call, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    options = (
        "--checkpoint",
        finished / "best.pt",
        "--data",
        photos,
        "--out",
        tmp_path / "out",
    )
    code, _, err = call(export, *options)
    assert code == 2 and err.startswith("export.py: ") and err.count("\n") == 1
    assert "No such file or directory" in err and "none" in err


# ---------------------------------------------------------------------------- the folder of a run


def test_two_runs_do_not_write_to_one_folder(run, photos, finished, tmp_path, call):
    """The second one ends. If the first one is killed, its folder is free again."""
    process = start(WAIT, "--resume", "--out", run, output=tmp_path / "output")
    stdout = tmp_path / "output" / "stdout"
    while not (stdout.exists() and "training" in stdout.read_text()):
        assert process.process.is_alive(), process.wait()
        time.sleep(0.02)
    before = contents(run)
    assert before.keys() == {".lock", "best.pt", "last.pt", "log.csv"}
    for options in (("--resume",), ("--overwrite", "--data", photos, *RUN)):
        code, _, err = call(train, *options, "--out", run)
        reason = (
            f"--out {run}: another run writes there; wait for its end, or use another --out"
        )
        assert (code, err) == (2, f"train.py: {reason}\n")
        assert contents(run) == before
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.join()
    assert (run / ".lock").exists()
    assert call(train, "--resume", "--out", run)[0] == 0
    assert history(run) == history(finished)
    assert sorted(os.listdir(run)) == ["best.pt", "curves.png", "last.pt", "log.csv"]


def test_a_run_that_ends_while_another_one_loads_its_data_is_kept(
    photos, finished, tmp_path, call, monkeypatch
):
    """Without --overwrite. The lock is free again, but there is a run now."""
    run = tmp_path / "run"
    load_for = data.load_for

    def load_slowly(*arguments, **how):
        shutil.copytree(finished, run)
        return load_for(*arguments, **how)

    monkeypatch.setattr(data, "load_for", load_slowly)
    code, _, err = call(train, "--data", photos, *RUN, "--seed", 1, "--out", run)
    assert contents(run) == contents(finished)
    assert code == 2 and "contains a run; use --resume, --overwrite or another" in err


def test_fine_tuning_does_not_write_to_the_folder_of_another_run(
    photos, finished, tmp_path, call, no_step
):
    (tmp_path / "run").mkdir()
    options = ("--data", photos, "--checkpoint", finished / "best.pt", *TUNING)
    with open(tmp_path / "run" / ".lock", "w") as lock:
        train.fcntl.flock(lock, train.fcntl.LOCK_EX)
        code, _, err = call(finetune, *options, "--out", tmp_path / "run")
    assert code == 2 and "another run writes there" in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_system_without_locks_is_no_obstacle(photos, finished, tmp_path, call, monkeypatch):
    monkeypatch.setattr(train, "fcntl", None)  # Windows
    assert call(train, "--data", photos, *RUN, "--out", tmp_path / "run")[0] == 0
    assert_same_runs(tmp_path / "run", finished)


@pytest.mark.parametrize("number", (38, 95, 37))  # ENOSYS, EOPNOTSUPP, ENOLCK
def test_a_network_disk_without_locks_is_no_obstacle(
    number, photos, tmp_path, call, monkeypatch
):
    """Lustre, NFS and FUSE may refuse flock."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(train.fcntl, "flock", refuse)
    assert call(train, "--data", photos, *RUN, "--out", tmp_path / "run")[0] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_no_open_file_is_removed(photos, tmp_path, call, monkeypatch):
    """Windows refuses to remove the lock while it is open."""
    unlink = os.unlink

    def refuse_open_files(path, **options):
        for number in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{number}"
            if os.path.exists(link) and os.path.realpath(link) == os.path.realpath(path):
                raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, **options)

    monkeypatch.setattr(train, "fcntl", None)
    monkeypatch.setattr(os, "unlink", refuse_open_files)
    assert call(train, "--data", photos, *RUN, "--out", tmp_path / "run")[0] == 0


def make_loop(path):
    path.symlink_to(path)
    return path


def make_pipe(path):
    os.mkfifo(path)
    return path


def make_file(path):
    path.write_text("mine")
    return path


def make_folder_in_file(path):
    return make_file(path) / "run"


PLACES = {  # that are no folders
    "a link to itself": make_loop,
    "a named pipe": make_pipe,
    "a file": make_file,
    "a folder in a file": make_folder_in_file,
    "/dev/null": lambda path: os.devnull,
}


@pytest.mark.parametrize("script", (train, finetune, evaluate, export, data), ids=name_of)
def test_a_place_that_is_no_folder_is_refused_at_once(
    script, photos, finished, tmp_path, call, no_step, verify_here
):
    options = ["--data", photos]
    if script in (finetune, evaluate, export):
        options += ["--checkpoint", finished / "best.pt"]
    options += {train: RUN, finetune: TUNING, export: ("--formats", "torchscript")}.get(
        script, ()
    )
    for number, (name, make) in enumerate(PLACES.items()):
        out = make(tmp_path / str(number))
        code, _, err = call(script, *options, "--out", out)
        assert code == 2 and err.count("\n") == 1, name
        assert err.startswith(f"{script.__name__}.py: ") and str(out) in err, name
        assert (tmp_path / str(number)).exists() == (number in (1, 2, 3)), name
    assert (tmp_path / "2").read_text() == "mine"


def test_a_run_that_is_killed_while_it_overwrites_leaves_no_old_run(
    run, photos, finished, tmp_path, call, monkeypatch
):
    """Otherwise --resume would continue the old run."""
    stages = []

    def be_killed(*_):
        stages.append((run / "last.pt").exists())  # as SIGKILL would leave it
        raise KeyboardInterrupt

    command = ("--data", photos, *RUN, "--seed", 1, "--out", run)
    with monkeypatch.context() as context:
        context.setattr(train, "train_epoch", be_killed)
        assert call(train, *command, "--overwrite")[0] == 2
    assert stages == [False] and not (run / "last.pt").exists()
    assert call(train, *command, "--resume")[0] == 0
    assert load_checkpoint(run / "last.pt")[1]["settings"]["seed"] == 1
    assert len(history(run)) == 2 and history(run) != history(finished)


def test_a_run_that_cannot_start_keeps_the_run_that_it_would_overwrite(run, tmp_path, call):
    before = contents(run)
    for options in (("--data", tmp_path / "none"), ("--data", "digits", "--per-class", 999)):
        assert call(train, *options, "--out", run, "--overwrite")[0] == 2
        assert contents(run) == before


# ------------------------------------------------------------------- runs that continue elsewhere

IGNORED = {  # option: value that the run does not have
    "--epochs": 3,
    "--learning-rate": 0.3,
    "--seed": 1,
    "--recipe": "paper",
    "--batch-size": 8,
    "--image-size": 32,
    "--width": 1.0,
    "--loss": "dice",
    "--amp": "bfloat16",
    "--per-class": 2,
    "--output-stride": 8,
    "--label-smoothing": 0.3,
    "--weight-decay": 0.5,
}


@pytest.mark.parametrize("option", IGNORED)
def test_a_resumed_run_names_an_option_that_it_ignores(option, run, call, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_, **__: None)
    value = IGNORED[option]
    code, out, err = call(train, "--resume", "--out", run, option, value)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "ignored" in line]
    assert lines == [f"{option} {value} is ignored: a resumed run keeps its settings"]


def test_a_resumed_run_names_all_ignored_options_and_no_others(run, finished, call):
    same = ("--epochs", 2, "--batch-size", 4, "--device", "cpu", "--workers", 0)
    other = [word for pair in IGNORED.items() for word in pair]
    code, out, _ = call(train, "--resume", "--out", run, *other)
    assert code == 0 and out.count(" is ignored: ") == len(IGNORED)
    assert history(run) == history(finished)  # they are really ignored
    _, out, _ = call(train, "--resume", "--out", run, *same)
    assert "ignored" not in out


def test_fine_tuning_names_ignored_options_too(photos, finished, tmp_path, call):
    command = ("--data", photos, "--checkpoint", finished / "best.pt", *TUNING)
    assert call(finetune, *command, "--out", tmp_path / "run")[0] == 0
    other = ("--unfreeze", 1, "--checkpoint", "imagenet", "--train-batch-norm")
    code, out, _ = call(finetune, "--resume", "--out", tmp_path / "run", *other)
    assert code == 0
    for text in ("--unfreeze 1", "--checkpoint imagenet", "--train-batch-norm True"):
        assert f"{text} is ignored: a resumed run keeps its settings\n" in out
    assert out.count(" is ignored: ") == 3


@pytest.mark.parametrize("count, train_now", ((2, 2), (3, 4), (40, 64)))
def test_photos_that_were_removed_or_added_are_named(
    count, train_now, photos, run, call, no_step
):
    """The schedule counts steps, so another number of photos would make it jump."""
    folder = shutil.copytree(photos, run.parent / "photos")
    shutil.rmtree(folder / "train")
    build(folder, two("train", count=count))
    before = contents(run)
    code, _, err = call(train, "--resume", "--out", run, "--data", folder)
    problem = f"--resume: train had 8 images, and has {train_now} now; restore them, or use"
    assert code == 2 and problem in err and err.count("\n") == 1
    assert contents(run) == before


def test_another_test_split_is_named(photos, run, call, no_step):
    folder = shutil.copytree(photos, run.parent / "photos")
    (folder / "test" / "a" / "3.jpg").unlink()
    code, _, err = call(train, "--resume", "--out", run, "--data", folder)
    assert code == 2 and "test had 10 images, and has 9 now; restore them" in err


def test_a_run_continues_with_photos_that_have_moved(photos, run, finished, call):
    moved = shutil.copytree(photos, run.parent / "moved")
    code, out, err = call(train, "--resume", "--out", run, "--data", moved)
    assert (code, err) == (0, "") and "ignored" not in out
    assert f"{run / 'last.pt'}: resumes after epoch 1, with the run's settings\n" in out
    assert history(run) == history(finished)
    weights = [
        load_checkpoint(folder / "last.pt")[0].state_dict() for folder in (run, finished)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    settings = load_checkpoint(run / "last.pt")[1]["settings"]
    assert settings["data"] == str(moved)  # the next --resume finds them


def test_a_run_does_not_continue_with_other_photos(run, tmp_path, call, no_step):
    folder = build(tmp_path / "cats", {"cat": 5, "dog": 5})
    for source, reason in (
        (folder, "the classes of the data have changed; use --overwrite"),
        (tmp_path / "none", "no such folder or dataset"),
    ):
        code, _, err = call(train, "--resume", "--out", run, "--data", source)
        assert code == 2 and reason in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------- exports


@pytest.fixture
def exporting(verify_here, tmp_path, call):
    """exporting(checkpoint, options...) -> (exit code, stdout, stderr, folder)."""

    def export_to_folder(checkpoint, *options):
        out = tmp_path / "export"
        return (*call(export, "--checkpoint", checkpoint, "--out", out, *options), out)

    return export_to_folder


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_file_can_be_moved_to_another_device(finished, photos, exporting):
    """A frozen module has constants instead of parameters, which stay where they are."""
    code, _, err, out = exporting(
        finished / "best.pt", "--data", photos, "--formats", "torchscript"
    )
    assert (code, err) == (0, "")
    network = torch.jit.load(out / "model.torchscript.pt", map_location="cpu")
    model, _ = load_checkpoint(finished / "best.pt")
    folded = export.fold_batch_norm(model)
    count = sum(parameter.numel() for parameter in folded.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
        outputs = network.double()(images.double())  # moving to a type moves everything
    assert outputs.dtype == torch.double
    torch.testing.assert_close(outputs.float(), expected, rtol=1e-4, atol=1e-4)


def test_export_needs_no_data(finished, exporting, monkeypatch):
    monkeypatch.setattr(data, "load_for", lambda *_, **__: pytest.fail("data were loaded"))
    options = ("--data", "none", "--formats", "torchscript", "int8")
    code, out, err, folder = exporting(finished / "best.pt", *options)
    assert (code, err) == (0, "")
    assert "--data none: files are compared on 64 random images" in out
    assert "--data none: no int8, which has to see typical images" in out
    assert sorted(os.listdir(folder)) == ["labels.txt", "model.torchscript.pt", "report.json"]
    assert (folder / "labels.txt").read_text() == "a\nb\n"
    report = json.loads((folder / "report.json").read_text())
    assert report["verified_on"] == "64 images of none (random)"
    assert report["preprocessing"]["image_size"] == 16
    assert report["formats"]["model.torchscript.pt"]["largest_difference"] < 1e-4


def test_no_other_script_takes_data_none(finished, tmp_path, call):
    for script in (train, evaluate, data):
        options = ("--checkpoint", finished / "best.pt") if script is evaluate else ()
        code, _, err = call(script, *options, "--data", "none", "--out", tmp_path / "out")
        assert code == 2 and "'none': no such folder or dataset" in err


@pytest.mark.parametrize("factor", (1, 100, 10_000))
def test_the_tolerance_is_relative_to_the_range_of_the_logits(factor, tmp_path, exporting):
    """Logits up to 28 after one epoch differ by more than 1e-4, although a file is correct."""
    model = MobileNetV2(10, 0.35)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
    with torch.no_grad():
        model.classifier.weight *= factor
    save_checkpoint(tmp_path / "best.pt", model, list("0123456789"), data.SMALL_IMAGE)
    options = ("--data", "none", "--image-size", 16, "--formats", "torchscript")
    code, _, err, out = exporting(tmp_path / "best.pt", *options)
    assert (code, err) == (0, "")
    report = json.loads((out / "report.json").read_text())
    result = report["formats"]["model.torchscript.pt"]
    assert (result["largest_difference"] > export.TOLERANCE) == (factor == 10_000)


@pytest.mark.parametrize(
    "spread, difference, faulty",
    [
        (0.01, 0.9e-4, False),
        (0.01, 1.1e-4, True),
        (28, 27e-4, False),
        (28, 29e-4, True),
        (28, float("nan"), True),
        (float("nan"), 0, True),
    ],
)
def test_a_difference_beyond_the_tolerance_is_a_fault(
    spread, difference, faulty, verify_here, tmp_path, monkeypatch
):
    entry = {
        "file": "file",
        "export": lambda network, example, path, *_: path.write_bytes(b"contents"),
        "load": lambda path: None,
    }
    monkeypatch.setattr(export, "FORMATS", {"onnx": entry})
    expected = torch.full((20, 3), float(spread))
    for outputs, alone in ((expected + difference, 0.0), (expected, difference)):
        result = {"accuracy": 0.5, "latency_ms": 1.0, "batch_difference": alone}
        monkeypatch.setattr(export, "measure", lambda *_, pair=(outputs, result): pair)
        reference = (expected, {"accuracy": 0.5})
        arguments = (["onnx"], None, None, None, None, (), reference, tmp_path)
        formats, faults = export.export_formats(*arguments)
        assert bool(faults) == faulty and bool(formats) != faulty
