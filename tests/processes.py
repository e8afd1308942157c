"""Start processes quickly.

A new Python process needs three seconds to import torch and torchvision. So a server imports them
once, and each process here begins as a copy of it, without the modules of this project.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent
# Windows cannot fork, and on macOS the libraries of PyTorch do not expect it.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
CONTEXT = get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["torch", "torchvision.datasets", "matplotlib.figure"])


def redirect(folder, encoding):
    """Write the output of this process, also that of libraries in C, to two files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), number)
        # buffering=1: write each line at once
        stream = open(number, "w", 1, encoding, errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def run(program, arguments, cwd, path, output, encoding):
    """Run `program` in this process, which `Python` or `torchrun` has started."""
    redirect(output / os.environ.get("RANK", ""), encoding)
    hidden = {ROOT, ROOT / "tests", ROOT / "experiments"}
    others = [place for place in sys.path if place and Path(place).resolve() not in hidden]
    sys.path[:] = [*map(str, path), *others]
    os.chdir(cwd)
    if isinstance(program, Path):
        sys.argv = [str(program), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})


class Python:
    """A process that runs a program, as `python file arguments` or `python -c text arguments`.

    program: a Path, or the text of a program. It finds other modules in the folders of `path`, and
    the installed packages. output: folder for its stdout and stderr.
    """

    def __init__(self, program, *arguments, output, cwd=ROOT, path=(ROOT,), encoding="utf-8"):
        self.output = output
        how = (program, list(map(str, arguments)), cwd, path, output, encoding)
        # daemon: it ends with pytest
        self.process = CONTEXT.Process(target=run, args=how, daemon=True)
        self.process.start()

    def wait(self, timeout=100):
        """Wait for the end. Returns the exit code, stdout and stderr."""
        self.process.join(timeout)
        texts = [(self.output / name).read_text("utf-8") for name in ("stdout", "stderr")]
        assert self.process.exitcode is not None, f"it has not ended: {texts}"
        return self.process.exitcode, *texts


def torchrun(count, program, *arguments, output, path=(ROOT,)):
    """Run `program` in `count` processes, as torchrun does. Raises an error if one of them fails.

    output: folder; its folders 0, 1, ... get the stdout and stderr of each process.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
        start_method=METHOD,
    )
    how = (program, list(map(str, arguments)), ROOT, path, output, "utf-8")
    # In the main thread, elastic_launch would keep its signal handlers.
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(elastic_launch(config, run), *how).result(timeout=100)
        finally:
            for process in active_children():  # they wait for each other
                process.kill()
