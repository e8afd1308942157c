"""Files and commands that the README and the pages promise."""

import importlib
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import Python

from mobilenetv2 import MobileNetV2, save_checkpoint

sys.path.insert(0, str(ROOT / "experiments"))
options = importlib.import_module("options")

PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"))
}
README, CHINESE = PAGES[ROOT / "README.md"], PAGES[ROOT / "README.zh-CN.md"]


def code_blocks(text):
    """List the code blocks, each with the name of its language."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def links(text):
    """List the targets of links and pictures."""
    return [link or source for link, source in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)]


def sections(text):
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [
        code for _, code in code_blocks(README) if code.endswith("python -m pytest tests\n")
    ]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines(keepends=True)
    assert "".join(lines[-1:]) == command and lines.index("rm -rf .venv\n") == len(lines) - 2


def test_readmes_are_short():
    assert len(README.splitlines()) <= 200
    assert [path for path, text in PAGES.items() if len(text.splitlines()) > 250] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_and_section_that_a_page_points_to_exists(path):
    missing = []
    for link in links(PAGES[path]):
        name, _, section = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not link.startswith("https://") and not target.exists() or section and not name.startswith("https://") and section not in sections(PAGES[target]):
            missing.append(link)
    assert missing == []


def test_readme_links_every_page_and_pictures_are_all_shown():
    assert {path.name for path in PAGES} <= {Path(link).name for link in links(README)}
    shown = {Path(link).name for text in PAGES.values() for link in links(text)}
    assert [path.name for path in ROOT.glob("docs/*.png") if path.name not in shown] == []


def test_both_readmes_have_the_same_code_figures_and_links():
    assert code_blocks(CHINESE) == code_blocks(README)
    contents = []
    for text in (README, CHINESE):
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        code, prose = re.findall(r"`[^`]+`", prose), re.sub(r"`[^`]+`|\]\([^)]+\)", "", prose)
        figures = re.findall(r"\d+(?:[.,]\d+)*", prose)
        contents.append([Counter(links(text)), Counter(code), Counter(figures)])
    assert contents[0] == contents[1]
    for text in (README, CHINESE):
        assert "[English](README.md) · [简体中文](README.zh-CN.md)" in text.splitlines()[:4]


def test_accuracies_of_the_readme_are_those_of_the_results():
    figures = re.findall(r"[\d.]+ ± [\d.]+%", README)
    assert len(figures) == 3
    assert [figure for figure in figures if figure not in PAGES[ROOT / "docs" / "results.md"]] == []


def test_page_of_options_is_up_to_date():
    """If it is not: python experiments/options.py"""
    assert PAGES[ROOT / "docs" / "options.md"].splitlines() == options.page().splitlines()


def test_scripts_have_the_options_of_all_commands():
    parsers, unknown, count = {}, [], 0
    for path in sorted(ROOT.glob("*.py")):
        parsers[path.name] = options.find_parser(importlib.import_module(path.stem))
    for text in PAGES.values():
        for command in re.findall(
            r"(?:python|torchrun [^`\n]*?) (\w+\.py[^`\n&;#]*)", text.replace("\\\n", " ")
        ):
            script, *words = shlex.split(command.rstrip(" ."))
            names = [word for word in words if word.startswith("--")]
            count += len(names)
            unknown += [
                command for name in names if name not in parsers[script]._option_string_actions
            ]
    assert unknown == [] and count > 60


def test_minutes_to_read_are_those_of_15_lines_per_minute():
    for name, minutes in re.findall(
        r"^\| \[`(\w+\.py)`\].* \| (\d+) \|$", README, flags=re.MULTILINE
    ):
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(minutes) - lines / 15) <= 4, name


def test_pictures_are_readable_in_dark_mode():
    for path in ROOT.glob("docs/*.png"):
        with Image.open(path) as image:
            corners = (
                image.convert("RGBA").getpixel((0, 0)),
                image.convert("RGBA").getpixel((0, image.height - 1)),
            )
        assert corners == ((255, 255, 255, 255),) * 2, path.name


@pytest.mark.parametrize(
    "script, default",
    [
        ("finetune", "runs/train/best.pt"),
        ("evaluate", "runs/finetune/best.pt"),
        ("export", "runs/finetune/best.pt"),
    ],
)
def test_each_script_takes_by_default_what_the_one_before_wrote(script, default, call):
    writer = default.split("/")[1]
    for name, promised in ((script, default), (writer, f"runs/{writer}")):
        _, text, _ = call(importlib.import_module(name), "--help")
        assert f"(default: {promised})" in " ".join(text.split())


def test_names_of_functions_and_tests_in_the_readme_exist():
    scripts = "".join(
        (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("mobilenetv2", "train")
    )
    paper = README[README.index("| paper | code |") : README.index("### Common mistakes")]
    names = re.findall(r"`\.?(\w+)`", paper)
    assert len(names) > 12 and [name for name in names if name not in scripts] == []
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    names = re.findall(r"`(test_\w+)`", README)
    assert len(names) > 10 and [name for name in names if f"def {name}(" not in tests] == []


def test_weights_go_back_to_torchvision_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MobileNetV2(num_classes=2, width_mult=0.35).eval()
    preprocessing = {"image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    save_checkpoint("runs/photos/best.pt", model, ["cat", "dog"], preprocessing)
    blocks = code_blocks(PAGES[ROOT / "docs" / "shipping.md"])
    (program,) = [
        code for language, code in blocks if language == "python" and "to_torchvision" in code
    ]
    names = {}
    exec(program, names)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(names["network"].eval()(images), model(images))


def test_the_network_works_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    script = Path(shutil.copy(ROOT / "mobilenetv2.py", tmp_path / "empty"))
    code, out, _ = Python(
        script, cwd=tmp_path / "empty", path=(), output=tmp_path / "output"
    ).wait()
    assert code == 0 and "300,774,272" in out


def test_six_scripts_have_at_most_2000_lines_of_at_most_100_columns():
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    assert scripts == [
        "data.py",
        "evaluate.py",
        "export.py",
        "finetune.py",
        "mobilenetv2.py",
        "train.py",
    ]
    lines = [
        line for name in scripts for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    assert len(lines) <= 2000
    assert [line for line in lines if len(line) > 100] == []
