"""Rules about the source itself."""

import ast
import json
import re
import subprocess
import sys

import pytest
from source import FILES, PACKAGE, TREES

from nnx_cli.cli import COMMANDS

FLOORS = (  # a part imports only from those on lower floors, and from itself
    ("__main__", "api"),
    ("cli",),
    ("commands",),
    ("console",),
    ("trackers",),
    ("serving", "reporting", "experiments"),
    ("convert", "training"),
    ("planning",),
    ("evaluation", "inference", "webpage"),
    ("runs", "optim"),
    ("data", "models"),
    ("layers",),
    ("kernels",),
    ("system",),
    ("config",),
    ("errors", ""),
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
COMMAND_LINE = {"__main__", "api", "cli", "commands", "console", "config", "errors", ""}
ROOMS = set(FLOOR) - COMMAND_LINE
HEAVY = {"torch", "numpy", "tiktoken", "safetensors", "lion_pytorch", "torchinfo"}
EXTRAS = {
    "PIL",
    "backports",
    "compression",
    "fastapi",
    "gguf",
    "gigatoken",
    "lm_eval",
    "prompt_toolkit",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pyarrow",
    "regex",
    "rustbpe",
    "tensorboard",
    "tiktoken_ext",
    "tokenizers",
    "trackio",
    "transformers",
    "uvicorn",
    "wandb",
    "xllamacpp",
    "yaml",
}
SOMETIMES_MISSING = {"fcntl", "msvcrt", "resource", "triton", "pydoc_data", "readline"}  # by operating system or build
SELDOM_NEEDED = {"charset_normalizer", "rich", "typer", "tomllib", "functorch"}
MAY_BE_POSTPONED = HEAVY | EXTRAS | SOMETIMES_MISSING | SELDOM_NEEDED
ONE_SENTENCE = "A package's __init__ is one sentence that says what the room is for"

# What is not cured yet. Each of these sets is to be empty.
UPWARD = set()
IN_A_CIRCLE = set()
POSTPONED = set()
LONG_FUNCTIONS = set()
BIG_CLASSES = set()
MANY_ATTRIBUTES = set()
NOT_WRITTEN_YET: set[str] = set()  # that the README names


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


def module_name(path):
    """`models/llama.py` as models.llama, `models/__init__.py` as models."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(path): path for path in TREES if path != "__init__.py"}


def module_of(name):
    """The module of ours that `nnx_cli.X.Y.name` is or belongs to, or None."""
    rest = name.split(".")[1:] if name.split(".")[0] == "nnx_cli" else []
    while rest and ".".join(rest) not in MODULES:
        rest.pop()
    return ".".join(rest) or None


def nodes(kind):
    """(file, node) of every node of that kind in the package."""
    for name, tree in TREES.items():
        yield from ((name, node) for node in ast.walk(tree) if isinstance(node, kind))


def definitions(kind):
    """(file:name, node) of every function or class of the package."""
    yield from ((f"{name}:{node.name}", node) for name, node in nodes(kind))


def test_every_part_has_a_floor():
    assert {path.split("/")[0].removesuffix(".py").replace("__init__", "") for path in TREES} <= set(FLOOR)


def test_imports_point_down():
    upward = set()
    for name, tree in TREES.items():
        own = name.split("/")[0].removesuffix(".py").replace("__init__", "")
        used = {part(module) for module in imports(tree) if module.split(".")[0] == "nnx_cli"} - {own}
        upward |= {(name, lower) for lower in used if FLOOR[lower] <= FLOOR[own]}
    upward -= {("__init__.py", "api")}  # whose functions it hands out when they are asked for
    assert upward - UPWARD == set()


def test_the_console_is_for_the_command_line():
    for name, tree in TREES.items():
        if name.split("/")[0] not in ("api.py", "cli.py", "commands", "console"):
            assert "console" not in {part(module) for module in imports(tree)}, name


def test_no_modules_import_each_other():
    uses = {own: {module_of(m) for m in imports(TREES[path])} - {None, own} for own, path in MODULES.items()}

    def reached(start):
        found, todo = set(), [start]
        while todo:
            new = uses[todo.pop()] - found
            found |= new
            todo += new
        return found

    assert {module for module in uses if module in reached(module)} - IN_A_CIRCLE == set()


def test_only_what_is_heavy_is_imported_inside_a_function():
    """The command line may postpone everything, so that help stays light; so do the names that packages hand out."""
    for where, function in definitions((ast.FunctionDef, ast.AsyncFunctionDef)):
        name = where.partition(":")[0]
        light = name.split("/")[0] in ("commands", "api.py", "cli.py", "__main__.py")
        light |= name in ("__init__.py", "models/__init__.py")
        for module in imports(function):
            own_triton = name.startswith("kernels/") and module_of(module) == f"{module_name(name)}_triton"
            own_triton |= module == "nnx_cli.system.triton_probe"
            if own_triton or (light and module.startswith("nnx_cli.")) or name in POSTPONED:
                continue
            assert module.split(".")[0] in MAY_BE_POSTPONED, f"{where}: {module}"


def test_a_package_says_what_it_is_for():
    for name in (name for name in TREES if name.endswith("/__init__.py")):
        tree = TREES[name]
        assert ast.get_docstring(tree), (name, ONE_SENTENCE)
        if name != "models/__init__.py":
            assert len(tree.body) == 1 and ast.get_docstring(tree).count(".") == 1, (name, ONE_SENTENCE)


def lines(node):
    return node.end_lineno - node.lineno + 1


def test_functions_and_classes_fit_on_a_screen():
    functions = {name for name, node in definitions((ast.FunctionDef, ast.AsyncFunctionDef)) if lines(node) > 60}
    classes = {name for name, node in definitions(ast.ClassDef) if lines(node) > 250}
    assert functions - LONG_FUNCTIONS == set() and classes - BIG_CLASSES == set()


def attributes(node):
    """Names that a class assigns to `self`, and its fields."""
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    own = {n.attr for n in stored if ast.unparse(n.value) == "self"}
    return own | {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}


def test_no_class_holds_everything():
    """Configurations and records, which are frozen dataclasses, may have as many fields as they have settings."""
    frozen = "dataclass(frozen=True"
    full = {
        name
        for name, node in definitions(ast.ClassDef)
        if len(attributes(node)) > 15 and not any(ast.unparse(d).startswith(frozen) for d in node.decorator_list)
    }
    assert full - MANY_ATTRIBUTES == set()


def test_the_training_loop_is_read_at_a_glance():
    (train,) = [node for name, node in definitions(ast.FunctionDef) if name == "training/trainer.py:train"]
    (loop,) = [node for node in ast.walk(train) if isinstance(node, ast.While)]
    assert loop.end_lineno - loop.body[0].lineno + 1 <= 40


def test_libraries_have_their_place():
    for name, tree in TREES.items():
        used = {module.split(".")[0] for module in imports(tree)}
        assert "rich" not in used or name.split("/")[0] == "console", name
        assert not {"click", "marshal", "shelve", "joblib", "dill", "cloudpickle"} & used, name
        assert "pickle" not in used or name == "convert/checkpoint_file.py", name
        if name.split("/")[0] in ROOMS:
            assert "typer" not in used, name
        if name.split("/")[0] in ("models", "layers"):
            may = name in ("models/__init__.py", "models/_file.py")  # which find files
            assert may or not {"os", "sys", "pathlib", "json"} & used, name


def test_pickle_is_named_for_its_error_alone():
    for name, node in nodes(ast.Attribute):
        if ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{name}: the importer may name what torch.load raises, no more"


RUNS_CODE = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system"}


def test_nothing_that_runs_code_from_files():
    for name, node in nodes(ast.Call):
        called, where = ast.unparse(node.func), f"{name}:{node.lineno}"
        assert called not in ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system"), (
            where
        )
        if called == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name == "convert/checkpoint_file.py" and options["weights_only"] == "True", where
        if called.endswith(".load") and called.startswith(("np.", "numpy.")):
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, where
        assert not any(keyword.arg == "shell" for keyword in node.keywords), where


def test_heavy_libraries_stay_out_of_the_command_line():
    for name, tree in TREES.items():
        if name.split("/")[0] in ROOMS and name != "models/__init__.py":
            continue
        guarded = {id(node) for block in tree.body if isinstance(block, ast.If) for node in block.body}
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
                assert not {module.split(".")[0] for module in imports(ast.Module([node], []))} & HEAVY, name


def test_no_exception_is_swallowed_whole():
    for name, node in nodes(ast.ExceptHandler):
        where = f"{name}:{node.lineno}"
        assert node.type is not None, f"{where}: a bare except"
        wide = ast.unparse(node.type) in ("Exception", "BaseException")
        assert not (wide and all(isinstance(line, ast.Pass) for line in node.body)), where


def test_only_the_command_line_prints():
    for name, tree in TREES.items():
        if name.split("/")[0] in ROOMS:
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert not {"print", "sys.stdout.write", "sys.stderr.write"} & calls, name


NOT_EVERYWHERE = {"fork", "forkpty", "symlink", "link", "mkfifo", "symlink_to", "hardlink_to"}


def test_processes_are_started_by_their_command_and_files_are_never_linked():
    """So that a system without fork, or one that lets few people make links, runs the same code."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in NOT_EVERYWHERE, (name, node.lineno)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(each.split(".")[0] == "multiprocessing" for each in named), (name, node.lineno)
            elif isinstance(node, ast.keyword):
                assert node.arg != "preexec_fn", name


def test_the_environment_is_read_by_the_command_line_only():
    for name, tree in TREES.items():
        if name.split("/")[0] in ("models", "layers"):
            assert not any(isinstance(n, ast.Attribute) and n.attr in ("environ", "argv") for n in ast.walk(tree)), name


def test_the_package_is_cheap_to_import():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    at_once = [node for node in body if not isinstance(node, (ast.FunctionDef, ast.If))]
    assert len(body) < 10 and not list(imports(ast.Module(at_once, [])))


def test_no_file_is_called_helpers():
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


def test_the_readme_names_every_room():
    """Between a folder's name and the next one, whatever ends in .py is a file of it."""
    tree = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").partition("## The source")[2].split("```")[1]
    folder, named = PACKAGE, set()
    for line in tree.splitlines():
        if line.startswith("tests/"):
            break
        if match := re.match(r"  ([a-z]+)/ ", line):
            folder = PACKAGE / match[1]
            named.add(match[1])
        for file in re.findall(r"\b\w+\.py\b", line):
            if file not in ("X.py", "X_triton.py", *NOT_WRITTEN_YET):
                assert (folder / file).is_file() or (PACKAGE / file).is_file(), file
    assert named == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


PRIVATE_TORCH = {  # each name once, and tested for its presence
    "_compiled_call_impl": "layers/blocks.py",
    "_convert_weight_to_int4pack_for_cpu": "kernels/quantized_matmul.py",
    "_cuda_endAllocateToPool": "system/cuda_graph.py",
    "_cuda_releasePool": "system/cuda_graph.py",
    "_forward_hooks": "layers/blocks.py",
    "_forward_pre_hooks": "layers/blocks.py",
    "_is_vnni_supported": "system/hardware.py",
    "_per_optimizer_states": "training/step.py",
    "torch._dynamo": "system/torch_private.py",
    "torch.utils._python_dispatch": "system/torch_private.py",
    "_cdata": "system/torch_private.py",
    "_linear_pointwise": "system/torch_private.py",
    "_scaled_dot_product_efficient_attention": "system/torch_private.py",
    "_scaled_dot_product_efficient_attention_backward": "system/torch_private.py",
    "_scaled_dot_product_flash_attention": "system/torch_private.py",
    "_scaled_dot_product_flash_attention_backward": "system/torch_private.py",
    "_scaled_dot_product_flash_attention_for_cpu": "system/torch_private.py",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "system/torch_private.py",
    "torch._higher_order_ops.scan": "kernels/soft_xor.py",
    "_weight_int4pack_mm_for_cpu": "kernels/quantized_matmul.py",
}
PRIVATE = re.compile(r"_[a-z]\w+$|torch(\.\w+)*\._\w+")


def private_names(tree):
    """Names that may be private: attributes, those that `getattr` and `hasattr` ask for, and modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield ast.unparse(node.args[1]).strip("'")
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch."):
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(alias.name for alias in node.names))


def test_each_private_name_of_torch_has_one_place():
    own = {node.name for _, node in definitions((ast.FunctionDef, ast.ClassDef))}
    attributes = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    found = {}
    for path, tree in TREES.items():
        for name in private_names(tree):
            documented = name.startswith("_foreach_") or name == "_exit"
            foreign = PRIVATE.match(name) and not documented and name not in own
            if foreign or name in PRIVATE_TORCH:
                found.setdefault(name, set()).add(path)
    assert found == {name: {path} for name, path in PRIVATE_TORCH.items()}


LISTING = """
import runpy, sys
sys.argv = ["nnx", *sys.argv[1:]]
try:
    runpy.run_module("nnx_cli", run_name="__main__", alter_sys=False)
except SystemExit as end:
    code = end.code
"""
ONE_BY_ONE = """
import contextlib, io, json, runpy, sys
for words in json.load(sys.stdin):
    sys.argv = ["nnx", *words]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_module("nnx_cli", run_name="__main__", alter_sys=False)
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "numpy", "tiktoken", "safetensors", "torchinfo", "pyarrow"} & set(sys.modules)
    print(json.dumps([words, code, len(shown.getvalue().splitlines()) > 1, sorted(heavy)]))
"""


def test_every_command_is_mounted():
    modules = {path.stem for path in (PACKAGE / "commands").glob("[!_]*.py")}
    assert {module for module, _ in COMMANDS.values()} == modules


@pytest.mark.parametrize(("words", "loaded"), [(["--help"], []), (["list", "--help"], ["list_runs"])], ids=str)
def test_help_imports_no_other_command(words, loaded):
    code = LISTING + "print([m.split('.')[2] for m in sys.modules if m.startswith('nnx_cli.commands.')])\n"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout.splitlines()[-1])
    assert [name for name in found if not name.startswith("_")] == loaded


def test_help_imports_nothing_heavy():
    """All of them one after the other, in a process that has none of it to begin with."""
    asked = [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)]
    process = [sys.executable, "-c", ONE_BY_ONE]
    done = subprocess.run(process, input=json.dumps(asked), capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[words, 0, words != ["--version"], []] for words in asked] and done.stderr == ""
