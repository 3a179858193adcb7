"""One self-contained file for transformers, made from the source of an architecture.

The definitions that its model needs are copied as they are written, comments included, from the model's own file and
from those that it imports from; where `plain` has one of a name, that one. `rewrite` leaves out what a finished model
has no use for, and then goes whatever nothing refers to any more.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from nnx_cli import __version__, models
from nnx_cli.config import Field
from nnx_cli.convert.modeling.rewrite import GONE, Rewriter, snake
from nnx_cli.convert.modeling.source import Definition, Module, import_block, load_module, tidy
from nnx_cli.models._base import LanguageModel, ModelConfig

PLAIN = "nnx_cli.convert.modeling.plain"
BASE = "nnx_cli.models._base"
ROOTS = {"forward", "get_seq_length", "reorder_cache", "trunk", "make_cache"}  # methods that transformers calls
THEIR_NAMES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
THEIR_NAMES |= {"max_position_embeddings": "seq_len"}  # ours under those that transformers asks for
FOREIGN = (
    "from typing import Any",
    "from transformers import GenerationMixin",
    "from transformers import PreTrainedConfig",
    "from transformers import PreTrainedModel",
    "from transformers.modeling_outputs import CausalLMOutputWithPast",
)
CACHE = """# what this transformers calls it
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values\""""


@dataclass
class Collector:
    """Definitions that a model refers to, directly or not, in an order in which each stands after what it needs."""

    config: ModelConfig
    used: set[str]  # names of methods and attributes that something may ask for
    texts: dict[str, str] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)

    def rewriter(self, module: Module) -> Rewriter:
        """What edits definitions of a module."""
        return Rewriter(module, self.config, self.used.__contains__, _inherited)

    def take(self, name: str, module: Module) -> None:
        """Copy what a name means in a module, and all that this refers to."""
        plain = load_module(PLAIN)
        if name in self.texts or name in ("Config", "ModelConfig", "LanguageModel"):
            return
        if name in plain.definitions and module is not plain:
            self.take(name, plain)
        elif name in module.definitions:
            self._copy(name, module, module.definitions[name])
        elif name in module.ours:
            where, there = module.ours[name]
            assert name == there, f"{module.name} imports {there} as {name}"
            self.take(name, load_module(where))
        elif name in module.foreign:
            self.imports.add(module.foreign[name])
        elif function := next((each for each in module.definitions if snake(each) == name), None):
            self._copy(name, module, module.definitions[function])  # one of autograd's, called by another name here
        else:
            assert hasattr(builtins, name), f"{name} in {module.name}"

    def _copy(self, name: str, module: Module, node: Definition) -> None:
        rewriter = self.rewriter(module)
        plain = module.definitions.get(f"plain_{name}")
        if isinstance(plain, ast.FunctionDef) and isinstance(node, ast.FunctionDef):
            text = rewriter.plain(plain, node)
        else:
            text = rewriter.definition(node)
        self.texts[name] = ""  # taken, should it refer to itself
        for other in _free_names(text):
            self.take(other, module)
        del self.texts[name]
        self.texts[name] = text


def _free_names(text: str) -> list[str]:
    """Names that a definition, or a method of it, reads and does not bind itself."""
    parts: list[ast.AST] = []
    for node in ast.parse(text).body:
        parts += [*node.body, *node.bases] if isinstance(node, ast.ClassDef) else [node]
    found: dict[str, None] = {}
    for part in parts:
        nodes = [*ast.walk(part)]
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node is not part}
        read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        found |= dict.fromkeys(name for name in read if name not in bound)
    return [*found]


def _attributes(texts: Mapping[str, str]) -> set[str]:
    """Attributes that definitions ask for."""
    nodes = (node for text in texts.values() for node in ast.walk(ast.parse(text)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def _inherited(method: str) -> str:
    """What the base says of a method."""
    base = load_module(BASE).definitions["LanguageModel"]
    assert isinstance(base, ast.ClassDef)
    return next(ast.get_docstring(x) or "" for x in base.body if isinstance(x, ast.FunctionDef) and x.name == method)


@dataclass(frozen=True)
class Modeling:
    """The file for a model, what config.json says with it, and names of tensors that it has no use for."""

    text: str
    config: dict[str, Any]
    unused: frozenset[str]


def make_modeling(name: str, model: LanguageModel) -> Modeling:
    """Write an architecture down as it computes with the configuration of a model."""
    module, config = load_module(f"nnx_cli.models.{name}"), model.config
    used = set(ROOTS)
    while True:  # what refers to something may go itself
        collector = Collector(config, used)
        collector.take("Model", module)
        methods = _config_methods(module, collector)
        found = ROOTS | _attributes(collector.texts) | _attributes(methods)
        if found == used:
            break
        used = found
    kind, texts = name.capitalize(), collector.texts
    ties = _ties(model)
    texts["Model"] = _model(texts["Model"], ties)
    fields = _fields(name, used, methods)
    body = "\n\n\n".join([_config(name, fields, methods), *texts.values()])
    body = re.sub(r"\bConfig\b", f"{kind}Config", body)
    body = re.sub(r"^class Model\b", f"class {kind}ForCausalLM", body, flags=re.MULTILINE)
    about = "\n\n".join((ast.get_docstring(module.tree) or "").split("\n\n")[:2])
    head = f'"""{about}\n\nWritten by nnx-cli {__version__}. MIT licence.\n"""\n\nfrom __future__ import annotations'
    imports = import_block([*collector.imports, *FOREIGN])
    described = {
        "architectures": [f"{kind}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"modeling_{name}.{kind}Config",
            "AutoModelForCausalLM": f"modeling_{name}.{kind}ForCausalLM",
        },
        "model_type": f"nnx_{name}",
        **{each.name: getattr(config, each.name) for each in fields},
        "tie_word_embeddings": bool(ties),
    }
    unused = frozenset(key for key in model.state_without_ties() if key.partition(".")[0] in GONE.get(module.name, ()))
    return Modeling(f"{head}\n\n{imports}\n\n{CACHE}\n\n\n{body}\n", described, unused)


def _ties(model: LanguageModel) -> dict[str, str]:
    """Names of tensors that are others, and those others'."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(x), name) for name, x in model.state_dict(keep_vars=True).items()}
    return {name: owner for name, owner in names.items() if name != owner}


def _config_methods(module: Module, collector: Collector) -> dict[str, str]:
    """What the model asks its configuration for beside its fields, with all that this refers to."""
    node = module.definitions["Config"]
    assert isinstance(node, ast.ClassDef)
    kept = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name in collector.used and x.name != "unread"]
    methods = {x.name: collector.rewriter(module).method(x) for x in kept}
    for text in methods.values():
        for name in _free_names(text):
            collector.take(name, module)
    return methods


def _fields(name: str, used: set[str], methods: Mapping[str, str]) -> list[Field]:
    """The fields of an architecture's configuration that something asks for, perhaps by a name that it makes up."""
    made_up = any("getattr(" in text for text in methods.values())
    needed = used | {*THEIR_NAMES.values(), "vocab_size"}
    return [x for x in models.config_fields(name) if (made_up or x.name in needed) and x.name != "dropout"]


def _config(name: str, fields: Iterable[Field], methods: Mapping[str, str]) -> str:
    """The class that config.json is read into."""
    lines = [
        "class Config(PreTrainedConfig):",
        f'    """Shape of {name.capitalize()}; config.json has the values."""',
        "",
    ]
    lines += [f'    model_type = "nnx_{name}"', "    attribute_map = {"]
    lines += [*(f'        "{theirs}": "{ours}",' for theirs, ours in THEIR_NAMES.items()), "    }"]
    for each in fields:
        kind = each.type if each.default is not None else f"{each.type} | None"
        default = f'"{each.default}"' if isinstance(each.default, str) else str(each.default)
        lines.append(f"    {each.name}: {kind} = {default}  # {each.help}")
    text = "\n".join(lines)
    for method in methods.values():
        text += "\n\n" + textwrap.indent(method, "    ")
    return tidy(text)


def _model(text: str, ties: Mapping[str, str]) -> str:
    """The model's class as transformers wants it."""
    lines = text.splitlines()
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.ClassDef)
    (start,) = (x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    assert start.end_lineno is not None and node.body[0].end_lineno is not None
    lines.insert(start.end_lineno, "        self.post_init()")
    tied = "{" + ", ".join(f'"{copy}": "{name}"' for copy, name in ties.items()) + "}"
    lines[node.body[0].end_lineno : start.lineno - 1] = [
        "",
        "    config_class = Config",
        '    _input_embed_layer = "embedding"',
        "    _is_stateful = True",
        f"    _tied_weights_keys = {tied}",
        "",
    ]
    lines[0] = "class Model(PreTrainedModel, GenerationMixin):"
    return "\n".join(lines) + "\n" + (resources.files(__package__) / "forward.txt").read_text(encoding="utf-8").rstrip()
