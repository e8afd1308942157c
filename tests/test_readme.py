"""What the README promises about files and commands."""

import importlib
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks():
    return [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)]


def test_ci_runs_the_test_commands_of_the_readme():
    block = next(block for block in code_blocks() if any("pytest" in line for line in block))
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    start = lines.index(block[0])
    assert lines[start:] == block


def test_every_file_that_the_readme_points_to_exists():
    paths = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', README)
    paths = [path or source for path, source in paths]
    local = [path for path in paths if not path.startswith("http")]
    assert len(local) > 8
    assert [path for path in local if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "script, default",
    [("finetune", "runs/train/best.pt"), ("evaluate", "runs/finetune/best.pt"), ("export", "runs/finetune/best.pt")],
)
def test_each_script_takes_by_default_what_the_one_before_wrote(script, default, call):
    writer = default.split("/")[1]
    for name, promised in ((script, default), (writer, f"runs/{writer}")):
        _, text, _ = call(importlib.import_module(name), "--help")
        assert f"(default: {promised})" in " ".join(text.split())


def test_the_scripts_stay_readable_in_an_evening():
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    assert scripts == ["data.py", "evaluate.py", "export.py", "finetune.py", "mobilenetv2.py", "train.py"]
    lines = [line for name in scripts for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    assert sum(1 for line in lines if line.strip()) <= 2320  # code and comments, without the empty lines between functions
