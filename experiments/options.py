"""Write docs/options.md: all options of the scripts, from the scripts' own definitions.

python experiments/options.py
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402
from mobilenetv2 import write_file  # noqa: E402

# The scripts in the order of the README, each with its description on the page.
SCRIPTS = {
    "mobilenetv2": "prints Table 2 with measured shapes and costs",
    "data": "counts and draws images",
    "train": "trains from scratch",
    "finetune": "fine-tunes a trained network",
    "evaluate": "measures and draws",
    "export": "writes and verifies files for other programs",
}
SHARED = ("data_dir", "image_size", "workers", "seed")  # the same in all scripts with --data
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


def format_values(action):
    """Format the possible values of an option."""
    if action.nargs == 0:  # a flag
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.type is None:
        return "text"
    if action.type is Path:
        return "path"
    if inspect.isfunction(action.type):  # made by cli.in_range
        limits = inspect.getclosurevars(action.type).nonlocals
        return f"{limits['low']} to {limits['high']}"
    return "number"


def format_default(action, described):
    """Format the default of an option. described: the default in its help text, or ""."""
    if action.dest == "workers":  # does not depend on the computer that writes the page
        return "4 with CUDA, else 0"
    if described:
        return described
    if action.default is False:
        return "off"
    if isinstance(action.default, list):
        return "all of them"
    if isinstance(action.default, Path):
        return f"`{action.default.as_posix()}`"
    return str(action.default)


def describe(action):
    """Format an option's row: name, values, default, meaning."""
    meaning, _, described = action.help.partition(" (default: ")
    described = described.removesuffix(")")
    if described == "%(default)s":  # added by BooleanOptionalAction of some Python versions
        described = ""
    cells = [
        ", ".join(f"`{option}`" for option in action.option_strings),
        format_values(action),
        format_default(action, described),
        meaning,
    ]
    return f"| {' | '.join(cells)} |"


def option_table(actions):
    head = ["| option | values | default | meaning |", "|---|---|---|---|"]
    return head + [describe(action) for action in actions]


def settings_table(corner, settings):
    """Format a dict of dicts: one row per name, one column per setting."""
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    header = [corner, *[name.replace("_", " ") for name in names]]
    rows = [header, ["---"] * len(header)]
    for name, values in settings.items():
        cells = [str(values.get(column, "")) for column in names]
        words = {"True": "yes", "False": "no"}
        rows.append([f"`{name}`", *[words.get(cell, cell) for cell in cells]])
    return [f"| {' | '.join(row)} |" for row in rows]


def page():
    """Return the text of docs/options.md."""
    parsers = {}
    for name in SCRIPTS:
        actions = find_parser(importlib.import_module(name))._actions
        parsers[name] = [action for action in actions if action.dest != "help"]
    shared = [action for action in parsers["data"] if action.dest in SHARED]
    lines = [HEADER, "## All scripts except mobilenetv2.py", "", *option_table(shared)]
    for name, about in SCRIPTS.items():
        own = parsers[name]
        if name != "mobilenetv2":
            own = [action for action in own if action.dest not in SHARED]
        lines += ["", f"## {name}.py", "", f"It {about}.", "", *option_table(own)]
    lines += ["", "## Recipes", ""]
    lines += ["`--recipe` of train.py sets:", "", *settings_table("recipe", train.RECIPES)]
    lines += ["", "The kind of dataset sets in finetune.py:", ""]
    lines += settings_table("kind", finetune.DEFAULTS)
    return "\n".join([*lines, ""])


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.parse_args()
    path = ROOT / "docs" / "options.md"
    write_file(path, page().encode())
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
