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
README = PAGES[ROOT / "README.md"]
CHINESE = PAGES[ROOT / "README.zh-CN.md"]


def code_blocks(text):
    """List the code blocks, each with the name of its language."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def links(text):
    """List the targets of links and pictures."""
    return [
        link or source for link, source in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)
    ]


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
        if link.startswith("https://"):
            continue
        if not target.exists() or (section and section not in sections(PAGES[target])):
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
        code = re.findall(r"`[^`]+`", prose)
        prose = re.sub(r"`[^`]+`|\]\([^)]+\)", "", prose)
        figures = re.findall(r"\d+(?:[.,]\d+)*", prose)
        contents.append([Counter(links(text)), Counter(code), Counter(figures)])
    assert contents[0] == contents[1]
    for text in (README, CHINESE):
        assert "[English](README.md) · [简体中文](README.zh-CN.md)" in text.splitlines()[:4]


def test_accuracies_of_the_readme_are_those_of_the_results():
    figures = re.findall(r"[\d.]+ ± [\d.]+%", README)
    results = PAGES[ROOT / "docs" / "results.md"]
    assert len(figures) == 3
    assert [figure for figure in figures if figure not in results] == []


def test_page_of_options_is_up_to_date():
    """If it is not: python experiments/options.py"""
    assert PAGES[ROOT / "docs" / "options.md"].splitlines() == options.page().splitlines()


def test_scripts_have_the_options_of_all_commands():
    known = {}
    texts = list(PAGES.values())
    for name in options.SCRIPTS:
        script = importlib.import_module(name)
        texts.append(script.__doc__)
        known[f"{name}.py"] = options.find_parser(script)._option_string_actions
    unknown = []
    count = 0
    pattern = r"(?:python|torchrun [^`\n]*?) (\w+\.py[^`\n&;#]*)"
    for text in texts:
        for command in re.findall(pattern, text.replace("\\\n", " ")):
            script, *words = shlex.split(command.rstrip(" ."))
            names = [word for word in words if word.startswith("--")]
            count += len(names)
            unknown += [command for name in names if name not in known[script]]
    assert unknown == [] and count > 60


@pytest.mark.parametrize("name", options.SCRIPTS)
def test_help_shows_the_docstring_and_all_defaults(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no wrapped lines
    script = importlib.import_module(name)
    parser = options.find_parser(script)
    code, text, _ = call(script, "--help")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert code == 0
    # mobilenetv2.py describes its command, because its docstring is about the network.
    description = parser.description if name == "mobilenetv2" else script.__doc__
    assert description.strip() in text
    for action in parser._actions:
        shown = action.help
        if action.default is False or action.dest == "help":
            pass  # a flag
        elif action.default is None:
            assert "(default: " in shown, action.dest
        else:
            shown = f"{shown} (default: {action.default})"
        assert any(line.endswith(shown) for line in lines), action.dest


def test_minutes_to_read_are_those_of_20_lines_per_minute():
    row = r"^\| \[`(\w+\.py)`\].* \| (\d+) \|$"
    rows = re.findall(row, README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [f"{name}.py" for name in options.SCRIPTS]
    for name, minutes in rows:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(minutes) - lines / 20) <= 4, name


def test_pictures_are_readable_in_dark_mode():
    for path in ROOT.glob("docs/*.png"):
        with Image.open(path) as file:
            image = file.convert("RGBA")
        for corner in ((0, 0), (0, image.height - 1)):
            assert image.getpixel(corner) == (255, 255, 255, 255), path.name


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
    folder = tmp_path / "empty"
    folder.mkdir()
    script = Path(shutil.copy(ROOT / "mobilenetv2.py", folder))
    code, out, _ = Python(script, cwd=folder, path=(), output=tmp_path / "output").wait()
    assert code == 0 and "300,774,272" in out


def test_seven_scripts_have_lines_of_at_most_100_columns_and_cli_is_short():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    assert scripts.keys() == {*options.SCRIPTS, "cli"}
    lines = [line for text in scripts.values() for line in text.splitlines()]
    assert [line for line in lines if len(line) > 100] == []
    assert len(scripts["cli"].splitlines()) <= 150
