"""Rules about the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnx_cli
from nnx_cli.cli import COMMANDS

PACKAGE = Path(nnx_cli.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FLOORS = (  # a part imports only from those on lower floors, and from itself
    ("__main__",),
    ("cli",),
    ("commands",),
    ("console",),
    ("experiments",),
    ("convert", "training"),
    ("planning",),
    ("evaluation",),
    ("inference",),
    ("runs", "optim"),
    ("data", "models"),
    ("layers",),
    ("kernels",),
    ("system",),
    ("config",),
    ("errors", ""),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
ROOMS = set(FLOOR) - {"__main__", "cli", "commands", "console", "config", "errors", ""}
UPWARD = {  # what still imports from a floor above
    "evaluation/evaluator.py",
    "inference/decoding.py",
    "kernels/qkv_swiglu.py",
    "planning/plan.py",
    "system/hardware.py",
}
HEAVY = {"torch", "numpy", "tiktoken", "safetensors", "lion_pytorch", "torchinfo"}


def imports(tree):
    """Names of imported modules, those of `from package import module` with the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name):
    """The part of the package that `nnx_cli.X...` belongs to: "" for the package's own names."""
    rest = name.split(".")[1:]
    known = rest and ((PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").is_file())
    return rest[0] if known else ""


@pytest.mark.parametrize("name", TREES)
def test_imports_point_down(name):
    own = name.split("/")[0].removesuffix(".py").replace("__init__", "")
    used = {part(module) for module in imports(TREES[name]) if module.split(".")[0] == "nnx_cli"} - {own}
    if name in UPWARD:
        return
    assert {lower for lower in used if FLOOR[lower] <= FLOOR[own]} == set()


@pytest.mark.parametrize("name", TREES)
def test_libraries_have_their_place(name):
    used = {module.split(".")[0] for module in imports(TREES[name])}
    assert "rich" not in used or name == "console.py"
    assert not {"click", "marshal", "shelve", "joblib", "dill", "cloudpickle"} & used
    assert "pickle" not in used or name == "convert/import_original.py"
    if name.split("/")[0] in ROOMS:
        assert "typer" not in used
    if name.split("/")[0] in ("models", "layers"):
        may = name in ("models/__init__.py", "kernels/gemm.py")  # one finds files, one asks which processor this is
        assert may or not {"os", "sys", "pathlib", "json"} & used


@pytest.mark.parametrize("name", TREES)
def test_nothing_that_runs_code_from_files(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", "the importer may name what torch.load raises, and nothing else"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system")
            if called == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name == "convert/import_original.py" and options["weights_only"] == "True"
            if called.endswith(".load") and called.startswith(("np.", "numpy.")):
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}
            assert not any(keyword.arg == "shell" for keyword in node.keywords)


@pytest.mark.parametrize("name", TREES)
def test_heavy_libraries_stay_out_of_the_command_line(name):
    if name.split("/")[0] in ROOMS and name != "models/__init__.py":
        return
    tree = TREES[name]
    guarded = {id(node) for block in tree.body if isinstance(block, ast.If) for node in block.body}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
            assert not {module.split(".")[0] for module in imports(ast.Module([node], []))} & HEAVY


@pytest.mark.parametrize("name", TREES)
def test_no_exception_is_swallowed_whole(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            wide = ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (wide and all(isinstance(line, ast.Pass) for line in node.body))


def test_only_the_command_line_prints():
    for name, tree in TREES.items():
        if name.split("/")[0] in ROOMS:
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert not {"print", "sys.stdout.write", "sys.stderr.write"} & calls, name


def test_the_environment_is_read_by_the_command_line_only():
    for name, tree in TREES.items():
        if name.split("/")[0] in ("models", "layers"):
            assert not any(isinstance(n, ast.Attribute) and n.attr in ("environ", "argv") for n in ast.walk(tree)), name


def test_the_package_is_cheap_to_import():
    source = (PACKAGE / "__init__.py").read_text()
    assert len(source.splitlines()) < 10 and not list(imports(ast.parse(source)))


def test_no_file_is_called_helpers():
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


LISTING = """
import runpy, sys
sys.argv = ["nnx", *sys.argv[1:]]
try:
    runpy.run_module("nnx_cli", run_name="__main__", alter_sys=False)
except SystemExit as end:
    code = end.code
heavy = {"torch", "numpy", "tiktoken", "safetensors", "torchinfo", "pyarrow", "rich"} & set(sys.modules)
print("\\nEND", code, sorted(heavy))
"""


def test_every_command_is_mounted():
    modules = {path.stem for path in (PACKAGE / "commands").glob("[!_]*.py")}
    assert {module for module, _ in COMMANDS.values()} == modules


@pytest.mark.parametrize(("words", "loaded"), [(["--help"], []), (["list", "--help"], ["list_runs"])], ids=str)
def test_help_imports_no_other_command(words, loaded):
    code = LISTING + "print('COMMANDS', [m.split('.')[2] for m in sys.modules if m.startswith('nnx_cli.commands.')])\n"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout.splitlines()[-1].removeprefix("COMMANDS "))
    assert [name for name in found if not name.startswith("_")] == loaded


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", LISTING, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "END 0 []", done.stderr
    assert len(done.stdout.splitlines()) > 1 and done.stderr == ""
