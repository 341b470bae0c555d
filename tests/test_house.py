"""The habits of the house: budgets, import contracts, one door per foreign library, no
traces of one machine."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hybridtrain.config.checks import TRACKERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hybridtrain"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEXTS = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in SOURCES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SCRIPTS = [ROOT / ".ci/run", *sorted(ROOT.glob("launch/*.sh"))]
LIBRARY = ("api.py", "training/trainer.py")
"""Where the functions stand that programs call."""

# Library -> the files (or folders) that may import it.
DOORS = {
    "hydra": ("config/compose.py", "config/sweep.py"),
    "omegaconf": ("config/compose.py", "config/interpolations.py"),
    "yaml": ("config/compose.py", "config/limits.py", "quantize/plan.py"),
    "deepspeed": ("engine/deepspeed/",),
    "jinja2": ("data/prepare/template.py",),
    **dict.fromkeys(TRACKERS, ("run/trackers/",)),
    "accelerate": ("run/trackers/", "parallel/mesh.py", "evaluate/", "models/build.py"),
    "transformers": ("models/", "data/prepare/tokenizer.py", "data/prepare/template.py", "evaluate/"),
    "tokenizers": ("data/prepare/tokenizer.py",),
    "datasets": ("data/prepare/tables.py",),
    "pyarrow": ("data/prepare/tables.py",),
    "matplotlib": ("report/",),
    "lm_eval": ("evaluate/harness.py",),
    "compressed_tensors": ("quantize/stored.py",),
    "pynvml": ("runtime/energy.py",),
    "torchao": ("quantize/floats8.py",),
}

# Names that a library keeps to itself, and may change without a word -> where we use them.
PRIVATE = {
    "torch.distributed.checkpoint.planner_helpers._create_write_items": ("checkpoint/sharded.py",),
    "torch.distributed.tensor._utils": ("models/init.py",),
    "torch.utils._python_dispatch": ("models/init.py", "models/stage.py", "analysis/randomness.py"),
    "_cdata": ("models/init.py",),
    **dict.fromkeys(("_C", "_current_graph_task_id"), ("parallel/watch.py",)),
    "hydra._internal.core_plugins.basic_sweeper": ("config/sweep.py",),
    **dict.fromkeys(("_StorageInfo", "_get_layout"), ("checkpoint/metadata.py",)),
    "_set_pg_timeout": ("parallel/mesh.py",),
    **dict.fromkeys(
        ("_state_ctx", "_unsharded_param"),
        ("parallel/pipeline.py",),
    ),
    **dict.fromkeys(("_fsdp_param_group", "_fsdp_param_groups"), ("parallel/fsdp.py",)),
    "_step_supports_amp_scaling": ("optim/user_optimizer.py",),
    "_experts_implementation": ("quantize/experts.py",),
    "_dynamo": ("parallel/recompute.py",),
    "_scaled_mm": ("parallel/recompute.py", "precision/qlinear.py"),
    "_is_mkldnn_fp16_supported": ("engine/__init__.py",),
    "_attn_implementation": ("models/", "analysis/"),
    **dict.fromkeys(("_model_mapping", "_supports_sdpa"), ("models/build.py",)),
    "_no_split_modules": ("models/structure.py",),
    "_fingerprint": ("data/prepare/tables.py",),
    **dict.fromkeys(
        ("_get_param_partition_group", "_hp_mapping", "_partition_all_parameters"), ("engine/deepspeed/",)
    ),
    **dict.fromkeys(
        ("_reassign_or_swap_out_partitioned_parameters", "_global_grad_norm"), ("engine/deepspeed/",)
    ),
    **dict.fromkeys(("_get_full_key", "_get_node", "_is_interpolation", "_is_missing"), ("config/",)),
    **dict.fromkeys(("_is_none", "_maybe_dereference_node", "_set_value"), ("config/",)),
    "_is_text_encoding": ("config/section_checks.py",),
    "_run_exitfuncs": ("runtime/launch.py",),
    **dict.fromkeys(("_record_memory_history", "_dump_snapshot"), ("training/builtin.py",)),
}
# spelt so; the last two in annotations alone
PUBLIC = re.compile(r"_exit|_foreach_\w+|_scaled_dot_product_\w+|_c10d_functional|_Environ|_Hash")


def private(tree: ast.AST) -> Iterator[str]:
    """Names with a leading underscore that a file takes from elsewhere, and its own: attributes, words
    of getattr, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr")
        ):
            yield from (
                word.value
                for word in node.args[1:2]
                if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("hybridtrain"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_"))
            yield from (node.module for word in node.module.split(".")[1:] if word.startswith("_"))


def defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (
                node.id
                if isinstance(node, ast.Name)
                else node.attr
                if isinstance(node.value, ast.Name) and node.value.id == "self"
                else ""
            )


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def overriding(tree: ast.AST) -> set[ast.stmt]:
    """Methods of classes that have a base class."""
    return {
        method
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.bases
        for method in node.body
    }


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the libraries that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def test_files_are_at_most_400_lines():
    assert {
        name: lines for name, text in TEXTS.items() if (lines := len(text.splitlines())) > MAX_FILE_LINES
    } == {}, "these files are two parts"


def test_functions_are_at_most_60_lines():
    lengths = {
        f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in functions(tree)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}, (
        "these functions are two parts"
    )


def test_every_module_says_what_it_is_for():
    assert [
        name for name, tree in TREES.items() if TEXTS[name].strip() and not ast.get_docstring(tree)
    ] == [], "these modules have no docstring"


def test_one_door_per_foreign_library():
    uses = [
        (name, library)
        for name, tree in TREES.items()
        for library in sorted(set(imported(tree)) & DOORS.keys())
    ]
    assert [use for use in uses if not use[0].startswith(DOORS[use[1]])] == [], (
        f"another file is to import these: {DOORS}"
    )


def private_uses() -> set[tuple[str, str]]:
    """(name, file) of each use of a name that a library keeps to itself."""
    ours = {name for tree in TREES.values() for name in defined(tree)}
    used = {
        (name, file)
        for file, tree in TREES.items()
        for name in private(tree)
        if "_" in (name[0], *re.findall(r"\.(.)", name))
    }
    return {
        (name, file)
        for name, file in used
        if name not in ours and not name.startswith("__") and not PUBLIC.fullmatch(name)
    }


def test_private_names_of_libraries_are_in_one_list():
    assert {
        (name, file) for name, file in private_uses() if not file.startswith(PRIVATE.get(name, ()))
    } == set(), "PRIVATE does not list these"


def test_the_list_of_private_names_is_up_to_date():
    assert PRIVATE.keys() - {name for name, _ in private_uses()} == set(), "nothing uses these any more"


def test_defaults_live_in_the_schema_alone():
    """No parameter outside config/ and the library's own functions has a default value, except main's and
    those of methods that override a foreign class's."""
    having = [
        f"{name}:{node.lineno} {node.name}()"
        for name, tree in TREES.items()
        for node in set(functions(tree)) - overriding(tree)
        if node.name != "main"
        and any(default is not None for default in [*node.args.defaults, *node.args.kw_defaults])
    ]
    assert [place for place in having if not place.startswith(("config/", *LIBRARY))] == [], (
        "these parameters have defaults"
    )


def test_import_contracts():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


def test_an_upward_import_breaks_the_contract(tmp_path):
    """The contract can fail: a copy of the package in which the lowest layer imports the highest."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for path in SOURCES:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            path.read_text()
            + ("\nimport hybridtrain.cli\n" if path.name == "errors.py" and path.parent == PACKAGE else "")
        )
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "hybridtrain.errors is not allowed to import hybridtrain.cli" in result.stdout


def test_no_traces_of_one_machine():
    patterns = [
        *SOURCES,
        *ROOT.glob("conf/**/*.yaml"),
        *ROOT.glob("launch/*.*"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
    ]
    patterns += [
        ROOT / name for name in ("pyproject.toml", "constraints.txt", ".pre-commit-config.yaml", ".ci/run")
    ]
    trace = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|opt/wheels)(?:/|\b)(?!/\.\.)")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in patterns
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if trace.search(line)
    ]
    assert [place for place in found if not place.startswith("tests/test_house.py")] == []


def test_scripts_are_executable():
    assert [script for script in SCRIPTS if not script.stat().st_mode & 0o111] == []


def test_scripts_are_valid_bash():
    assert [
        script for script in SCRIPTS if subprocess.run(["bash", "-n", script], check=False).returncode
    ] == []


def test_constraints_pin_every_requirement():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = re.findall(r'^    "([\w-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    extras = re.findall(
        r"^(?:data|deepspeed|report|test|trackers|wandb) = \[(.*)\]",
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    assert len(extras) == 6
    wanted += re.findall(r'"([\w-]+)[><=]', " ".join(extras))
    assert len(wanted) > 15
    assert [name for name in wanted if name.lower() not in pinned] == []
