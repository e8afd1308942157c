"""Write docs/options.md: all options of the scripts, from the scripts' own definitions.

python experiments/options.py
"""

import argparse
import importlib
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import write_file  # noqa: E402

SCRIPTS = {  # in the order of the README: how the page describes them
    "mobilenetv2": "prints Table 2 with measured shapes and costs",
    "data": "counts and draws images",
    "train": "trains from scratch",
    "finetune": "fine-tunes a trained network",
    "evaluate": "measures and draws",
    "export": "writes and verifies files for other programs",
}
SHARED = ("data_dir", "image_size", "workers", "seed", "device")
HEADER = """# Options

[README](../README.md)

All options of the scripts, as `--help` lists them. `python experiments/options.py` writes this
page. The same option has the same name in every script. A value outside its limits is an error.
Values "by recipe or dataset" are in [the last two tables](#recipes).
"""


class Stopped(Exception):
    """Raised instead of parsing the command line."""


def find_parser(script):
    """Return the parser that a script builds for its command line."""
    found = []

    def stop(parser, *_):
        found.append(parser)
        raise Stopped

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            script.main()
        except Stopped:
            return found[0]
    raise AssertionError(f"{script.__name__} parses no command line")


def describe(action, known):
    """Format an option's row: name, values, default, meaning. `known`: data.OPTIONS, or nothing."""
    _, limits, _, *unset = known.get(action.dest, (None, None, None))
    flag = action.nargs == 0
    values = "" if flag else {Path: "path", str: "text"}.get(action.type, "number")
    if action.choices:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    elif isinstance(limits, tuple):
        values = f"{limits[0]} to {limits[1]}"
    meaning, _, default = action.help.partition(" (default: ")
    if default.startswith("%") or not default:  # the help text itself has no default
        default = unset[0] if unset and action.default is None else action.default
    default = str(default).rstrip(")")
    if action.default is False:
        default = "off"
    elif isinstance(action.default, list):
        default = "all of them"
    if action.dest == "workers":  # does not depend on the computer that writes the page
        default = "4 with CUDA, else 0"
    elif isinstance(action.default, Path):
        default = f"`{action.default.as_posix()}`"
    name = ", ".join(f"`{option}`" for option in action.option_strings)
    return f"| {name} | {values} | {default} | {meaning} |"


def table(actions, known=data.OPTIONS):
    head = ["| option | values | default | meaning |", "|---|---|---|---|"]
    return head + [describe(action, known) for action in actions]


def recipe_tables():
    """Return tables of the recipes of train.py, and of the two cases of finetune.py."""
    recipes = [(f"`{name}`", *values) for name, values in train.RECIPES.items()]
    cases = {"photos": finetune.PHOTOS, "small images": finetune.SMALL_IMAGES}
    names = list(dict.fromkeys(name for values in cases.values() for name in values))
    rows = [(case, *(values.get(name, False) for name in names)) for case, values in cases.items()]
    tables = {
        "`--recipe` of train.py sets:": [("recipe", *train.RECIPE_OPTIONS), *recipes],
        "The dataset sets in finetune.py:": [("dataset", *names), *rows],
    }
    lines = []
    for title, (header, *rows) in tables.items():
        header = [name.replace("_", " ") for name in header]
        cells = [header, ["---"] * len(header)]
        for row in rows:
            cells.append([{"True": "yes", "False": "no"}.get(str(cell), str(cell)) for cell in row])
        lines += ["", title, "", *(f"| {' | '.join(row)} |" for row in cells)]
    return lines


def page():
    """Return the text of docs/options.md."""
    lines, parsers = [HEADER], {}
    for name in SCRIPTS:
        actions = find_parser(importlib.import_module(name))._actions
        parsers[name] = [action for action in actions if action.dest != "help"]
    shared = [action for action in parsers["data"] if action.dest in SHARED]
    lines += ["## All scripts except mobilenetv2.py", "", *table(shared)]
    for name, about in SCRIPTS.items():
        own, known = parsers[name], {}  # mobilenetv2.py stands alone
        if name != "mobilenetv2":
            own, known = [action for action in own if action.dest not in SHARED], data.OPTIONS
        lines += ["", f"## {name}.py", "", f"It {about}.", "", *table(own, known)]
    return "\n".join([*lines, "", "## Recipes", *recipe_tables(), ""])


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.parse_args()
    path = ROOT / "docs" / "options.md"
    write_file(path, page().encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    data.run(main)
