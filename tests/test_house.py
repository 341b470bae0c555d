"""The habits of the house: budgets, import contracts, one door per foreign library, no traces of one machine."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.config.check import TRACKERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hybridtrain"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [str(path.relative_to(ROOT)) for path in SOURCES]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Library -> the files (or folders) that may import it.
DOORS = {
    "hydra": ("config/compose.py",),
    "omegaconf": ("config/compose.py", "config/interpolations.py"),
    "yaml": ("config/compose.py", "config/limits.py"),
    "deepspeed": ("engine/deepspeed/",),
    "jinja2": ("data/template.py",),
    **dict.fromkeys(TRACKERS, ("trackers/",)),
    "accelerate": ("trackers/", "mesh.py", "evaluate/"),
    "transformers": ("models/", "data/tokenizer.py", "data/template.py", "evaluate/"),
    "tokenizers": ("data/tokenizer.py",),
    "datasets": ("data/readers.py",),
    "pyarrow": ("data/readers.py",),
    "matplotlib": ("report/",),
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the libraries that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_budgets(module):
    text = (ROOT / module).read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{module} is two parts"
    long = {node.name: length for node in functions(ast.parse(text)) if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long, f"{module}: longer than {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    text = (ROOT / module).read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_one_door_per_foreign_library(module):
    inside = module.removeprefix("hybridtrain/")
    for library in set(imported(ast.parse((ROOT / module).read_text()))):
        doors = DOORS.get(library, (inside,))
        assert any(inside == door or (door.endswith("/") and inside.startswith(door)) for door in doors), f"{module} imports {library}; its door: {doors}"


@pytest.mark.parametrize("module", [module for module in MODULES if "/config/" not in module])
def test_defaults_live_in_the_schema_alone(module):
    """No parameter outside config/ has a default value, except main's and those of methods that override a foreign class's."""
    tree = ast.parse((ROOT / module).read_text())
    overriding = {method for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases for method in node.body}
    having = [
        f"{node.name}() line {node.lineno}"
        for node in functions(tree)
        if node.name != "main" and node not in overriding and (node.args.defaults or any(default is not None for default in node.args.kw_defaults))
    ]
    assert not having, f"{module}: {', '.join(having)}"


def test_import_contracts():
    result = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


def test_an_upward_import_breaks_the_contract(tmp_path):
    """The contract can fail: a copy of the package in which the lowest layer imports the highest."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for path in SOURCES:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text() + ("\nimport hybridtrain.cli\n" if path.name == "types.py" and path.parent == PACKAGE else ""))
    result = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "hybridtrain.types is not allowed to import hybridtrain.cli" in result.stdout


def test_no_traces_of_one_machine():
    patterns = [*SOURCES, *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("launch/*"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    patterns += [ROOT / name for name in ("pyproject.toml", "constraints.txt", ".pre-commit-config.yaml", ".ci/run")]
    trace = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|opt/wheels)(?:/|\b)(?!/\.\.)")
    found = [f"{path.relative_to(ROOT)}:{number}" for path in patterns for number, line in enumerate(path.read_text().splitlines(), 1) if trace.search(line)]
    assert [place for place in found if not place.startswith("tests/test_house.py")] == []


@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/test.sh", "launch/quickstart.sh", "launch/bench_gpu.sh", ".ci/run"])
def test_scripts_parse_and_may_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


def test_constraints_pin_every_requirement():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = re.findall(r'^    "([\w-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    extras = re.findall(r"^(?:data|test) = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(extras) == 2
    wanted += re.findall(r'"([\w-]+)[><=]', " ".join(extras))
    assert len(wanted) > 15
    assert [name for name in wanted if name.lower() not in pinned] == []
