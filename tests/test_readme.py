"""Files and commands that the README promises."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import Python

from mobilenetv2 import MobileNetV2, save_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks():
    return [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)]


def test_ci_runs_the_test_commands_of_the_readme():
    block = next(block for block in code_blocks() if any("pytest" in line for line in block))
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    start = lines.index(block[0])
    assert lines[start:] == block


def test_every_file_and_section_that_the_readme_points_to_exists():
    paths = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', README)
    paths = [path or source for path, source in paths]
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    sections = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    local = [path for path in paths if not path.startswith("http")]
    assert len(local) > 8
    assert [path for path in local if path not in sections and not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "script, default",
    [("finetune", "runs/train/best.pt"), ("evaluate", "runs/finetune/best.pt"), ("export", "runs/finetune/best.pt")],
)
def test_each_script_takes_by_default_what_the_one_before_wrote(script, default, call):
    writer = default.split("/")[1]
    for name, promised in ((script, default), (writer, f"runs/{writer}")):
        _, text, _ = call(importlib.import_module(name), "--help")
        assert f"(default: {promised})" in " ".join(text.split())


def test_names_of_functions_and_tests_in_the_readme_exist():
    scripts = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("mobilenetv2", "train"))
    paper = README[README.index("| paper | code |") : README.index("### Common mistakes")]
    names = re.findall(r"`\.?(\w+)`", paper)
    assert len(names) > 12 and [name for name in names if name not in scripts] == []
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    names = re.findall(r"`(test_\w+)`", README)
    assert len(names) > 10 and [name for name in names if f"def {name}(" not in tests] == []


def test_weights_go_back_to_torchvision_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MobileNetV2(num_classes=2, width_mult=0.35).eval()
    preprocessing = {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint("runs/photos/best.pt", model, ["cat", "dog"], preprocessing)
    program = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "to_torchvision" in block)
    names = {}
    exec(program, names)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(names["network"].eval()(images), model(images))


def test_the_network_works_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    script = Path(shutil.copy(ROOT / "mobilenetv2.py", tmp_path / "empty"))
    code, out, _ = Python(script, cwd=tmp_path / "empty", path=(), output=tmp_path / "output").wait()
    assert code == 0 and "300,774,272" in out


def test_six_scripts_have_at_most_2000_lines_of_at_most_100_columns():
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    assert scripts == ["data.py", "evaluate.py", "export.py", "finetune.py", "mobilenetv2.py", "train.py"]
    lines = [line for name in scripts for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 2000
    assert [line for line in lines if len(line) > 100] == []
