"""The README's paper map and commands, and the import directions of the house, checked against the source."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

README = ROOT / "README.md"
OURS = {path.stem for path in ROOT.glob("*.py")}


def readme() -> str:
    if not README.exists():
        pytest.skip("README.md is not written yet")
    return README.read_text()


def equations(text: str) -> set[int]:
    """{2, 3, 4, 10} from '(2)-(4), (10)'."""
    numbers = set()
    for first, last in re.findall(r"\((\d+)\)(?:\s*[-–]\s*\((\d+)\))?", text):  # noqa: RUF001 an en dash may stand in prose
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def cited(path: Path) -> set[int]:
    """Numbers behind 'Eq.' or 'Eqs.' in a file. The list in the module's docstring does not count: it computes nothing."""
    source = path.read_text()
    docstring = ast.parse(source).body[0]
    body = "\n".join(source.splitlines()[docstring.end_lineno :])
    lists = re.findall(r"Eqs?\.\s*((?:\(?\d+\)?(?:\s*(?:,|-|and)\s*)?)+)", body)
    return set().union(*(equations(re.sub(r"\(?(\d+)\)?", r"(\1)", numbers)) for numbers in lists))


def defined(path: Path) -> set[str]:
    """Names of functions and classes at the top level of a file, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def paper_map() -> list[tuple[str, str, str]]:
    """(first cell, file, function) of every row of the README's table."""
    return re.findall(r"^\|([^|]*)\|\s*`(\w+\.py)`\s*\|\s*`([\w.]+)`\s*\|", readme(), re.MULTILINE)


# --- the paper map ----------------------------------------------------------------------------------------------------


def test_every_named_function_exists():
    rows = paper_map()
    assert len(rows) >= 10
    missing = [(file, name) for _, file, name in rows if not (ROOT / file).exists() or name not in defined(ROOT / file)]
    assert missing == []


def test_every_file_cites_the_equations_that_the_map_gives_it():
    absent = []
    for cell, file, name in paper_map():
        absent += [f"({n}) in {file}, for {name}" for n in sorted(equations(cell) - cited(ROOT / file))]
    assert absent == []


def test_the_map_covers_the_paper():
    # The paper's Eqs. (1)-(57) but for (42), which is no step of the method.
    covered = set().union(*(equations(cell) for cell, _, _ in paper_map()))
    assert sorted({*range(1, 42), *range(43, 58)} - covered) == []


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, flags) of every command in a text that runs a script of ours, comments and backslashes taken out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(r"(?:python|torchrun)\b[^#&|;]*?(?<![\w/])(\w+)\.py\b([^#&|;\n]*)", line)
        if match and match[1] in OURS:
            found.append((match[1], shlex.split(match[2])))
    return found


def parse(script: str, flags: list[str]) -> None:
    """Read the flags as the script does, without running it. An unknown flag or a value of the wrong kind fails."""
    if "--help" in flags:
        return
    config = importlib.import_module(script).Config
    try:
        tyro.cli(config, args=flags)
    except SystemExit:
        pytest.fail(f"python {script}.py {shlex.join(flags)}: not accepted")


def test_every_command_of_the_readme_parses():
    fences = re.findall(r"^```(\w*)\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    blocks = [code for language, code in fences if language in ("", "bash", "sh", "console")]
    inline = re.findall(r"`([^`\n]*\.py [^`\n]*)`", readme())
    found = commands("\n".join(blocks + inline))
    assert {"dbp_train", "dbpo_finetune", "evaluate"} <= {script for script, _ in found}
    for script, flags in found:
        parse(script, flags)


@pytest.mark.parametrize("script", ["dbp_train", "dbpo_finetune", "evaluate", "robot_ur5"])
def test_every_command_of_a_scripts_docstring_parses(script):
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    lines = (re.sub(r"(\S)\s{2,}.*", r"\1", line) for line in docstring.splitlines())  # command, two spaces, what it does
    found = commands("\n".join(lines))
    assert len(found) >= 3
    for name, flags in found:
        parse(name, flags)


def test_the_parser_of_this_test_refuses_unknown_flags():
    with pytest.raises(pytest.fail.Exception):
        parse("evaluate", ["--no-such-flag"])


# --- import directions ------------------------------------------------------------------------------------------------

LEAVES = ["drift", "encoders", "pointcloud", "demos", "common", "vector", "rotations", "replay"]
MAY_IMPORT = {
    **{leaf: set() for leaf in LEAVES},
    "manipulation": {"pointcloud"},
    "pusht": {"manipulation"},
    "locomotion": {"manipulation", "vector"},
    "cubes": {"manipulation"},
    "blockpush": {"manipulation"},  # drawing, and the writer of recorded episodes
    "kitchen": {"manipulation"},
    "robomimic_tasks": {"manipulation", "rotations"},
    "scripted": {"manipulation", "robomimic_tasks", "rotations"},
    "ur5_motion": {"rotations"},
    "ur5_twin": {"manipulation", "ur5_motion"},
    "ur5_tasks": {"manipulation", "robomimic_tasks", "rotations", "ur5_motion", "ur5_twin"},
    "ur5_devices": {"rotations", "ur5_motion"},
    "ur5_times": {"ur5_motion"},
    "ur5_policy": {"common", "encoders", "policy", "ur5_devices", "ur5_motion", "ur5_tasks", "ur5_twin"},
    "robot_ur5": {"common", "ur5_devices", "ur5_motion", "ur5_policy", "ur5_tasks", "ur5_times"},
    "envs": {
        "vector",
        "manipulation",
        "pusht",
        "locomotion",
        "blockpush",
        "cubes",
        "kitchen",
        "robomimic_tasks",
        "scripted",
        "ur5_tasks",
    },  # the simulators behind the rows of its table
    "policy": {"encoders", "common"},  # common: our one departure from leaves that stand alone, for save and load
    "evaluate": {"encoders", "policy", "demos", "envs", "vector", "common"},
    "dbp_train": {"drift", "encoders", "demos", "envs", "common", "policy", "evaluate"},
    "dbpo_finetune": {"encoders", "envs", "vector", "common", "policy", "evaluate"},
    "dfp_finetune": {"drift", "encoders", "demos", "envs", "vector", "common", "policy", "evaluate", "replay"},
}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_import_directions(module):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= MAY_IMPORT[module]
