"""What holds for the repository as a whole: layers, the wheel, the README, and what must not be written anywhere."""

import argparse
import ast
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from easgd_local.rules import RULES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "easgd_local"

# Who may import whom: a module imports from its own line and the lines below, never from above. `x.*` is the package x.
LAYERS = (
    ("easgd_local", "__main__"),  # the package itself only says, when asked, where its names live
    ("cli",),
    ("usage",),
    ("flags",),
    ("compare.*",),
    ("training", "joining", "doctor", "export"),
    ("leading",),
    ("launching",),
    ("prepare", "looprun"),
    ("checks",),
    ("run",),
    ("evaluations",),
    ("chronicle",),
    ("summary",),
    ("runfolder",),
    ("config",),
    ("gathering", "outset", "gpus"),
    ("preload", "preload_loop"),
    ("launcher", "referee", "hosted"),
    ("fork_server",),
    ("evaluate", "loop"),
    ("worker", "attached"),
    ("visitor", "loop_evaluator", "loop_state"),
    ("attachment",),
    ("plan",),
    ("stepping",),
    ("devices", "respondent"),
    ("gradient", "stream_turns", "curvature"),
    ("minibatches",),
    ("computing",),
    ("graphics",),
    ("link",),
    ("stream_words",),
    ("batches", "calibrate", "centers", "simulate.*"),
    ("view", "tensorboard"),
    ("board",),
    ("metrics", "report", "curves", "wording", "checkpoint", "data.*", "models", "theory.*"),
    ("overhead",),
    ("rules.*",),
    ("optimizers", "workloads"),
    ("free_turns",),
    ("turns", "center"),
    ("memory", "loss_scale"),
    ("flat",),
    ("halves",),
    ("backend.*",),
    ("figure_folder",),
    ("argument_types", "signals", "unfailing", "whole_file"),
    ("kernels", "child", "faults", "hardware", "linux", "schedules", "words", "learning_rate", "partition",
     "randomness", "reloads"),
)


# Layers


def module_name(path: Path) -> str:
    """`rules.easgd` for easgd_local/rules/easgd.py, `rules` for its __init__.py, `easgd_local` for the topmost one."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "easgd_local"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def rank(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        for entry in layer:
            if module == entry or (entry.endswith(".*") and f"{module}.".startswith(entry[:-1])):
                return number
    pytest.fail(f"easgd_local.{module} is in no line of LAYERS in tests/test_repository.py: add it where it belongs.")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def statements(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """Every node below this one, but what only a type checker reads and, if so asked, the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            yield from statements(ast.Module(child.orelse, []), into_functions=into_functions)
            continue
        if not into_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from statements(child, into_functions=into_functions)


def imports(module: str, *, into_functions: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that the module imports, `from a import b` as a.b."""
    path = MODULES[module]
    package = ["easgd_local", *path.relative_to(PACKAGE).parent.parts]
    for node in statements(ast.parse(path.read_text("utf-8")), into_functions=into_functions):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def own_imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and module, named as in LAYERS, of what the module imports from this package."""
    for line, name in imports(module):
        parts = name.split(".")
        if parts[0] != "easgd_local" or name == "easgd_local.__version__":
            continue
        known = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
        yield line, next((one for one in known if one in MODULES or one == "kernels"), "easgd_local")


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    upwards = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}, which is above it"
        for line, target in own_imports(module)
        if rank(target) < rank(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_module_imports_itself_by_way_of_others():
    # A package that lists its own modules, as rules/__init__.py does, is not a cycle: they name each other, not it.
    graph = {module: {target for _, target in own_imports(module)} for module in MODULES if module != "easgd_local"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_cupy_is_imported_only_where_it_is_used(module):
    eager = [line for line, name in imports(module, into_functions=False) if name.split(".")[0].startswith("cupy")]
    assert not eager, f"easgd_local.{module}, lines {eager}: import cupy inside the function that uses it"


def test_importing_the_package_costs_nothing():
    heavy = ("torch", "torchvision", "numpy", "cupy", "matplotlib", "safetensors", "rich")
    program = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import easgd_local\n"
        f"print(time.process_time() - start, *[name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *loaded = done.stdout.split()
    assert loaded == []
    assert float(seconds) < 0.25  # of the processor, so a busy machine does not matter; torch alone takes over 1


# The wheel


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """The files in a wheel built, without network, from a copy of what is needed: nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    no_bytecode = shutil.ignore_patterns("__pycache__")
    for name in ("easgd_local", "kernels", "tests", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=no_bytecode)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_every_kernel_and_the_digits(wheel_names):
    expected = {str(path.relative_to(ROOT)) for path in MODULES.values()}
    expected |= {f"easgd_local/kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.is_file()}
    expected |= {"easgd_local/kernels/elastic.cu", "easgd_local/data/digits.npz"}
    assert expected - wheel_names == set()


def test_the_wheel_installs_no_other_top_level_package(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"easgd_local"}


# What must not be written anywhere


def repository_files() -> list[Path]:
    """What git tracks, or would; without git, what a release of the sources holds."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"this test needs git, and a checkout: {done.stderr}"
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def test_no_file_names_a_path_of_someones_machine():
    folders = "|".join(["home", "root", "work", "Users"])
    pattern = re.compile(rf"(?<![\w.~-])/({folders})/|\b[A-Z]:\\\\?Users\b")
    found = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue  # not text
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


# The README


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


@cache
def parser() -> argparse.ArgumentParser:
    from easgd_local import cli

    return cli.parser()


def readme_commands() -> list[str]:
    """Every command line of this package in the README's shell blocks, without prompt and continuation."""
    blocks = re.findall(r"^```(?:bash|console|sh|shell)\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^(\$ )?\s*(\.venv/bin/)?", "", line) for line in lines]
    return [line for line in lines if re.match(r"(easgd-local|python3? -m easgd_local)(\s|$)", line)]


def arguments(command: str) -> list[str]:
    """The words that the program gets: after its name, and before a pipe, a redirection or the next command."""
    words = shlex.split(command, comments=True)
    words = words[1:] if words[0] == "easgd-local" else words[3:]
    ends = [number for number, word in enumerate(words) if word in {"|", "||", "&", "&&", ";", ">", ">>", "2>&1"}]
    return words[: min(ends, default=len(words))]


def test_every_command_in_the_readme_is_understood(capsys):
    commands = readme_commands()
    assert commands, "the README shows no command"
    refused = []
    for command in commands:
        try:
            parser().parse_args(arguments(command))
        except SystemExit as end:
            if end.code != 0:  # --help and --version end with 0
                refused.append(f"{command}\n{capsys.readouterr().err}")
    assert not refused, "\n".join(refused)


def flags(one: argparse.ArgumentParser) -> set[str]:
    """The long flags of a parser and of the parsers below it; --no-x stands under --x."""
    found = set()
    for action in one._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(flags, action.choices.values()))
        elif not isinstance(action, argparse._HelpAction):
            found |= {flag for flag in action.option_strings if flag.startswith("--")}
    return {flag for flag in found if not (flag.startswith("--no-") and f"--{flag[5:]}" in found)}


def subcommand(name: str) -> argparse.ArgumentParser:
    (subcommands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return subcommands.choices[name]


def test_the_readme_lists_exactly_the_flags_of_train():
    first_cells = re.findall(r"^\|((?:[^|\\\n]|\\.)*)\|", readme(), re.MULTILINE)
    listed = {flag for cell in first_cells for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", cell)}
    known = flags(subcommand("train"))
    assert listed - known == set(), "in the README, not in `easgd-local train`"
    assert known - listed == set(), "in `easgd-local train`, not in the README"


def test_the_readmes_table_of_rules_counts_what_the_rules_declare():
    rows = re.findall(r"^\| (`.+?`) \|.*?\| (\d[^|]*) \| (\d[^|]*) \| [^|]+ \|$", readme(), re.M)
    seen = []
    for cell, worker, center in rows:
        names = re.findall(r"`([^`]+)`", cell)
        counts = [int(part.split(":")[0]) for part in worker.split(";")]
        for name, count in zip(names, counts * (len(names) if len(counts) == 1 else 1), strict=True):
            rule = RULES[name]()
            assert count == 2 + len(rule.local) + len(rule.scratch), f"{name}: x, g and its own vectors"
            assert center.startswith(f"{1 + len(rule.shared)}{' + p' if rule.allotted else ''}:"), name
            seen.append(name)
    assert sorted(seen) == sorted(RULES)
