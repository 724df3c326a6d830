"""What the code says of itself: comments beside fields, types, verdict rules, options, messages. scripts/reference.py
makes pages of it.
"""

import argparse
import ast
import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import yaml

from twoclocks import errors, metrics, verdict
from twoclocks.load import load_run
from twoclocks.summary import summarise
from twoclocks.verdict_reason import Level

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "output" / "example"


@dataclasses.dataclass(frozen=True)
class VerdictReason:
    """A reason, as the rule that gives it is written."""

    name: str
    levels: list[str]
    why: str
    remedy: str


def verdict_reasons() -> list[VerdictReason]:
    """Read from the source of the rules: the name, levels and remedy that each puts into its Reason."""
    found = []
    for rule in verdict.RULES:
        function = ast.parse(inspect.getsource(rule)).body[0]
        assert isinstance(function, ast.FunctionDef)
        bound: dict[str, ast.expr] = {
            name: ast.Constant(value)
            for name, value in rule.__globals__.items()
            if name.isupper() and isinstance(value, int | float)
        }
        bound |= {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        words = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
        levels = [level for level in get_args(Level) if level in words]
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Reason":
                name, remedy = call.args[1], call.args[4]
                assert isinstance(name, ast.Constant)
                found.append(VerdictReason(name.value, levels, metrics.definition(rule), _text(remedy, bound)))
    return found


def figures() -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> the figure as summary.json has it, and when it is there; by runs of every kind."""
    run = load_run(EXAMPLE)
    limits = run.experiment | {"slo": {"ttft_ms": 500}}
    rate = run.experiment | {"load": {"shape": "rate", "rate": 1}}
    batch = run.experiment | {"load": {"shape": "batch", "batch": 1}}
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for changed, when in (
        (run.experiment, ""),
        (limits, "with an SLO"),
        (rate, "in an open loop"),
        (batch, "of shape batch"),
    ):
        for name, figure in summarise(dataclasses.replace(run, experiment=changed))["figures"].items():
            found.setdefault(name, (figure, when))
    return found


def comments_of(module: ModuleType | Path, struct: type | str) -> dict[str, str]:
    """Field -> the comment beside it in the source."""
    path = module if isinstance(module, Path) else Path(inspect.getfile(module))
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    name = struct if isinstance(struct, str) else struct.__name__
    (node,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == name)
    found = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            behind = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()
            found[field.target.id] = behind.strip().removeprefix("# ").strip()
    return found


def type_words(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{type_words(parts[0])}{_bounds(parts[1])}"
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in parts)
    if origin in (Union, UnionType):
        return " or ".join(type_words(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {type_words(parts[0])}"
    if origin is tuple:
        return (
            f"[{', '.join(type_words(part) for part in parts)}]"
            if parts[-1] is not ...
            else f"list of {type_words(parts[0])}"
        )
    if origin is dict:
        return "mapping"
    names = {float: "number", int: "whole number", str: "text", bool: "true or false", Any: "anything"}
    return names.get(kind, "mapping")


def default_words(field: Any) -> str:
    """A field's default, as YAML has it."""
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    elif field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        return "*needed*"
    if isinstance(value, msgspec.Struct):
        return ""
    if value is None:
        return "none given"
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip().removesuffix('...').strip()}`"


def _bounds(meta: Any) -> str:
    low = f" above {meta.gt:g}" if meta.gt is not None else f", {meta.ge:g} or more" if meta.ge is not None else ""
    return low + (f", at most {meta.le:g}" if meta.le is not None else "")


def _text(node: ast.AST, bound: dict[str, ast.expr] | None = None) -> str:
    """What an expression that makes text says; `...` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part.value if isinstance(part, ast.FormattedValue) else part, bound) for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, bound) + _text(node.right, bound)
    if isinstance(node, ast.IfExp):
        return _text(node.body, bound)
    if isinstance(node, ast.Name) and bound and node.id in bound:
        return _text(bound[node.id])
    return "..."  # what a run fills in


def error_classes() -> list[list[str]]:
    """From the tree in the docstring of errors, which says what each is for."""
    said = dict(re.findall(r"(\w+Error) +\d +(.+)", errors.__doc__ or ""))
    found = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.TwoclocksError)]
    return [[f"`{one.__name__}`", f"`{one.exit_code}`", said[one.__name__]] for one in found]


def messages() -> dict[str, list[str]]:
    """Class of error -> the messages with which it is raised, in order of the alphabet."""
    names = [row[0].strip("`") for row in error_classes()]
    found: dict[str, set[str]] = {name: set() for name in names}
    for path in sorted((ROOT / "twoclocks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found and node.args:
                text = " ".join(_text(node.args[0]).split())
                if text.strip(" .:"):
                    found[node.func.id].add(text)
    return {
        name: [f"`{text.replace('`', chr(39))}`" for text in sorted(texts)] for name, texts in found.items() if texts
    }


def options(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """(how it is written, what it means) of each option of a parser."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        takes = action.nargs != 0
        name = (
            f"{', '.join(action.option_strings)}{f' {value}' if takes else ''}" if action.option_strings else str(value)
        )
        said = (action.help or "") % {"default": action.default, "prog": parser.prog}
        found.append((f"{name} ..." if action.nargs == "+" else name, said))
    return found


class _Recorder:
    """Takes options as Locust's parser would, and keeps them."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def add_argument(self, name: str, **told: Any) -> None:
        """One option."""
        value = f" {told['metavar']}" if "metavar" in told else ""
        variable = f"; also the environment variable {told['env_var']}" if "env_var" in told else ""
        self.found.append((name + value, told["help"] + variable))

    def set_defaults(self, **_: Any) -> None:
        """Of options that are Locust's own."""


def locust_options() -> list[tuple[str, str]]:
    """The same of those that we add to Locust's. To be asked last: Locust changes the standard library."""
    from twoclocks.hooks import add_options

    recorder = _Recorder()
    add_options(recorder)
    return recorder.found
