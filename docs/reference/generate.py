"""Write the pages that say what the code says: `api.md` and `command_line.md`, beside this file.

    python docs/reference/generate.py

api.md            every public name of partitioner, partitioner.plugin and runtime.engine: signature and docstring
command_line.md   every command of `partitioner` with its arguments, options and defaults, as typer has them

A test compares the pages with the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, get_args, get_type_hints

import typer.main

import partitioner
import partitioner.plugin
import runtime.engine
import runtime.generation.generation_options
import runtime.sampling.sampling_options
from partitioner.cli.app import app
from runtime.generation.generation_options import Options, Settings

HERE = Path(__file__).resolve().parent
MODULES = (partitioner, partitioner.plugin, runtime.engine)
OURS = ("partitioner", "passes", "runtime")
MADE = "<!-- Made by `python docs/reference/generate.py`: change the code's docstrings, not this page. -->\n"


def pages() -> dict[str, str]:
    """The text of each page, by file name."""
    return {"api.md": api(), "command_line.md": command_line()}


def api() -> str:
    lines = ["# API", "", MADE]
    for module in MODULES:
        lines += [f"## {module.__name__}", "", *docstring(module)]
        for name in public(module):
            lines += [*entry(module, name)]
    lines += ["## Options of `generate` and `stream`", "", *docstring(runtime.generation.generation_options)]
    lines += [*docstring(runtime.sampling.sampling_options), "| option | type | default |", "|---|---|---|"]
    defaults = option_defaults()
    kinds = {name: cell(kind.__forward_arg__) for name, kind in Options.__annotations__.items()}
    lines += [f"| `{name}` | `{kind}` | `{defaults[name]}` |" for name, kind in kinds.items()]
    return "\n".join(lines) + "\n"


def option_defaults() -> dict[str, str]:
    settings = Settings.of({}, eos_token_id=())
    known = {**vars(settings.sampling), **vars(settings)}
    own = {"do_sample": False, "eos_token_id": None, "pad_token_id": None, "tokenizer": None, "stop_strings": None}
    return {name: repr({**known, **own}.get(name)) for name in Options.__annotations__}


def public(module: ModuleType) -> list[str]:
    """In the order of the module's `__all__`; a name that another module here documents is not repeated."""
    return [name for name in module.__all__ if not name.startswith("_")]


def entry(module: ModuleType, name: str) -> Iterator[str]:
    thing = getattr(module, name)
    yield f"### `{module.__name__}.{name}`"
    yield ""
    if inspect.isclass(thing):
        yield from class_entry(name, thing)
    elif inspect.isfunction(thing):
        yield from call_entry(name, thing)
    else:
        yield from value_entry(name, thing)


def class_entry(name: str, kind: type[Any]) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    if issubclass(kind, Exception):
        yield from [f"An exception: a kind of {bases}.", ""]
    elif "__init__" in vars(kind) and not inspect.isabstract(kind):
        yield from block(signature(name, kind))
    yield from docstring(kind)
    if issubclass(kind, Exception):
        return
    for method_name, method in members(kind):
        if isinstance(method, property):
            yield from [f"#### `{name}.{method_name}`", "", f"A property: `{returned(method.fget)}`.", ""]
            yield from docstring(method)
        else:
            of_class = " (class method)" if isinstance(inspect.getattr_static(kind, method_name), classmethod) else ""
            yield from [f"#### `{name}.{method_name}`{of_class}", ""]
            yield from block(signature(method_name, getattr(kind, method_name)))
            yield from docstring(method)


def members(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that our packages define, base classes' after the class's own."""
    seen: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.split(".")[0] not in OURS:
            continue
        for name, raw in vars(each).items():
            thing = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
            if name.startswith("_") or name in seen or not (inspect.isfunction(thing) or isinstance(raw, property)):
                continue
            seen.add(name)
            yield name, thing


def call_entry(name: str, function: Any) -> Iterator[str]:
    yield from block(signature(name, function))
    yield from docstring(function)


def value_entry(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        keys = sorted(key.__name__ for key in value)
        yield from ["A table, by op. It has:", "", ", ".join(f"`{key}`" for key in keys) + ".", ""]
    elif inspect.getdoc(value) and inspect.getmodule(value) is not None:
        yield from docstring(value)
    else:
        yield from [f"`{value!r}`" if isinstance(value, str) else f"An alias: `{value}`", ""]


def returned(function: Any) -> str:
    return str(inspect.signature(function).return_annotation)


def signature(name: str, thing: Any) -> str:
    """One parameter to a line where one line does not hold them."""
    found = inspect.signature(thing)
    short = f"{name}{found}"
    if re.search(r" at 0x[0-9a-f]+", short):
        raise ValueError(f"{name} has a default without a name: {short}")
    if len(short) <= 100:
        return unquoted(short)
    parts = []
    is_keyword_only = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            is_keyword_only = True
            parts.append("*")
        parts.append(str(parameter))
    result = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return unquoted(f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}")


def unquoted(text: str) -> str:
    """Annotations are text: quotes around them say nothing."""
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", text)


def block(text: str) -> Iterator[str]:
    yield from ["```python", text, "```", ""]


def docstring(thing: Any) -> Iterator[str]:
    """Paragraphs and lists as they are; what is indented, or set out in columns, as blocks."""
    table: list[str] = []
    for paragraph in re.split(r"\n\s*\n", own_docstring(thing)):
        lines, is_list = paragraph.splitlines(), paragraph.startswith("- ")
        if not is_list and any(re.search(r"\S {2,}\S", line) or line.startswith(" ") for line in lines):
            table += [*([""] if table else []), paragraph.rstrip()]
            continue
        yield from text_block(table)
        table = []
        if paragraph:
            yield from [cell(paragraph), ""]
    yield from text_block(table)


def text_block(lines: list[str]) -> list[str]:
    return ["```text", *lines, "```", ""] if lines else []


def own_docstring(thing: Any) -> str:
    """Not the one that a dataclass makes of its fields. One that refers to its module's gets that in its place."""
    text = inspect.cleandoc(thing.__doc__) if thing.__doc__ else ""
    if inspect.isclass(thing) and text.startswith(f"{thing.__name__}("):
        return ""
    referring = re.match(r"See the module's docstring\.\s*", text)
    if referring:
        text = f"{inspect.cleandoc(str(inspect.getmodule(thing).__doc__))}\n\n{text[referring.end() :]}".rstrip()
    return text


def cell(text: str) -> str:
    return text.replace("|", "\\|") if "\n" not in text else text


def command_line() -> str:
    root = typer.main.get_command(app)
    lines = ["# Command line", "", MADE, "```text", inspect.cleandoc(str(partitioner.cli.app.__doc__)), "```", ""]
    for name, command, function in commands(root, app):
        kinds = get_type_hints(function)
        lines += [f"## partitioner {name}", "", inspect.cleandoc(str(command.help)), ""]
        lines += ["| argument or option | type | default | |", "|---|---|---|---|"]
        lines += [parameter_row(parameter, kinds[parameter.name]) for parameter in command.params]
        lines += [""]
    lines += [
        "Every command has `--help`. `partitioner --install-completion` completes names and options in this shell."
    ]
    return "\n".join(lines) + "\n"


def commands(group: Any, source: typer.Typer) -> Iterator[tuple[str, Any, Any]]:
    """Each with the function that it calls; those of a group under both names."""
    functions = {info.name: info.callback for info in source.registered_commands}
    groups = {info.name: info.typer_instance for info in source.registered_groups}
    for name, command in group.commands.items():
        if name in groups:
            yield from ((f"{name} {inner}", each, call) for inner, each, call in commands(command, groups[name]))
        else:
            yield name, command, functions[name]


def parameter_row(parameter: Any, kind: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    name = parameter.name.upper() if is_argument else ", ".join(f"`{each}`" for each in sorted(parameter.opts))
    kinds = [each.__name__ for each in get_args(kind) or (kind,) if each is not NoneType]
    text = "flag" if kinds == ["bool"] else kinds[0]
    if parameter.multiple:
        text = "str, several times"
    default = "required" if parameter.required else f"`{shown(parameter.default)}`"
    return f"| {name} | {text} | {default} | {cell(parameter.help or '')} |"


def shown(default: Any) -> str:
    """Paths in the package are those of this machine: only what follows the package is said."""
    text = "off" if default is False else str(default)
    root = str(HERE.parent.parent) + "/"
    return "none" if default is None else '""' if text == "" else text.replace(root, "")


if __name__ == "__main__":
    for file, text in pages().items():
        (HERE / file).write_text(text, encoding="utf-8")
