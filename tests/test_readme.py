"""What the README promises about files and commands."""

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


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\(((?:docs|tests)/[^)#]+|[\w./-]+\.(?:py|txt|npz))\)", README)))
)
def test_every_file_that_the_readme_points_to_exists(path):
    assert (ROOT / path).exists()


def test_the_scripts_stay_readable_in_an_evening():
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    assert scripts == ["data.py", "evaluate.py", "export.py", "finetune.py", "mobilenetv2.py", "train.py"]
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in scripts) <= 2000
