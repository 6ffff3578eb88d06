"""Writes the reference pages of the documentation site from the code, so that they cannot drift from it."""

import argparse
import ast
import importlib
import inspect
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from typing import Any

from cnx2_jax import models
from cnx2_jax.cli import VERBS
from cnx2_jax.commandline import Parser
from cnx2_jax.configuration import INFINITY, RANGES, RECIPES, TASK_KEYS, defaults, flatten, load_module
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import TASKS

KEY_COLUMNS = ("key", "meaning", "default", "range")
GROUPS = {"": "the run", "model": "model", "data": "data", "optimizer": "optimizer", "mesh": "mesh"}


def pages() -> dict[str, str]:
    """Returns the Markdown of each page by its path in the site's sources.

    Raises:
      ValueError: a key has no comment, or a recipe no docstring.
    """
    return {
        "reference/verbs.md": verbs_page(),
        "reference/keys.md": keys_page(),
        "reference/recipes.md": recipes_page(),
        "reference/python.md": python_page(),
    }


def verbs_page() -> str:
    """Returns a section per verb, with a table of all its arguments and options."""
    parts = [
        "# Verbs",
        "`cnx2 VERB --help` prints the same. `--config.KEY=VALUE` changes a [config key](keys.md).",
    ]
    for verb, line in VERBS.items():
        parser = Parser(
            prog=f"cnx2 {verb}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        )
        importlib.import_module(f"cnx2_jax.commands.{verb}").add_arguments(parser)
        parts += [f"## cnx2 {verb}", f"{line[0].upper()}{line[1:]}.", fenced(parser.format_usage())]
        parts += _arguments(parser, level=3)
        if parser.epilog:
            parts.append(fenced(parser.epilog))
    return "\n\n".join(parts) + "\n"


def _arguments(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Yields the table of a parser and sections of its sub-commands; those with the same table share one."""
    formatter = argparse.HelpFormatter(parser.prog)
    rows, branches = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            branches.append(action)
        elif action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            value = "" if action.nargs == 0 else formatter._format_args(action, _metavar(action))
            name = ", ".join(f"{option} {value}".rstrip() for option in action.option_strings) or value
            required = " Required." if action.required and action.option_strings else ""
            meaning = formatter._expand_help(action) if action.help else ""
            rows.append((code(name), prose(sentence(meaning)) + required))
    if rows:
        yield table(("argument", "meaning"), rows)
    for action in branches:
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, inner in action.choices.items():
            alike.setdefault((inner.description or "", *_arguments(inner, level + 1)), []).append(name)
        for (description, *inside), names in alike.items():
            yield f"{'#' * level} {parser.prog.split(None, 1)[1]} {', '.join(names)}"
            if description:
                yield prose(sentence(description))
            yield from inside


def _metavar(action: argparse.Action) -> Any:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def keys_page() -> str:
    """Returns a table per group of the keys that all tasks have, and one per task with its own."""
    shared = {**_bare(), "task": ""}
    parts = [
        "# Config keys",
        "Set a key by `--config.KEY=VALUE`. The default is that of the task; [recipes](recipes.md) change "
        "it. A key without a range is checked where it is read, or takes any value of its type.",
    ]
    rows = _rows(shared, comments(defaults, "config", ""))
    for group, title in GROUPS.items():
        of_group = [row for key, row in rows.items() if key.rpartition(".")[0] == group]
        parts += [f"## Every task: {title}", table(KEY_COLUMNS, of_group)]
    for task in TASKS:
        values, described = flatten(defaults(task)), comments(TASKS[task].add_keys, "config", "")
        own = {key: value for key, value in values.items() if key in described or key not in shared}
        parts += [f"## The task {task}", table(KEY_COLUMNS, _rows(own, described).values())]
    return "\n\n".join(parts) + "\n"


def _bare() -> dict[str, Any]:
    """Returns the defaults of a task that adds no keys."""
    TASK_KEYS["none"] = lambda config: None
    try:
        return flatten(defaults("none"))
    finally:
        del TASK_KEYS["none"]


def _rows(values: dict[str, Any], described: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns the row of each key, in the order of the source, where a comment may refer to the key above."""
    rows: dict[str, tuple[str, ...]] = {}
    for key in [*(key for key in described if key in values), *(values.keys() - described.keys())]:
        if not described.get(key):
            raise ValueError(
                f"config key '{key}' has no comment beside it, which is its meaning in the reference"
            )
        least, greatest = RANGES.get(key, (-INFINITY, INFINITY))
        span = ("" if least == -INFINITY else f"from {least:,.10g}") + (
            "" if greatest == INFINITY else f" to {greatest:,.10g}"
        )
        rows[key] = code(key), prose(described[key]), code(_default(values[key])), span
    return rows


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(_default(item) for item in value) + ("," if len(value) == 1 else "") + ")"
    return f"{value:.4g}" if isinstance(value, float) and value else str(value)


def comments(function: Callable, root: str, prefix: str) -> dict[str, str]:
    """Returns the comment beside each config key that a function sets, by the key's dotted name.

    Functions of its module that it calls with a group of keys, such as `add_detection_keys(config.data)`, are
    read as well.

    Args:
      function: its source assigns to attributes of a config.
      root: the name of that config in it.
      prefix: the group that the config is, such as `data.`, or empty.
    """
    source = textwrap.dedent(inspect.getsource(function))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    beside = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT and token.line.strip() != token.string
    }
    names = {root: prefix}  # of variables that hold a config, with their groups
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            keys = [key for key in (_key(target, names) for target in node.targets) if key]
            if isinstance(node.value, ast.Call):  # model = config.model = ConfigDict()
                names.update({t.id: f"{keys[0]}." for t in node.targets if isinstance(t, ast.Name) and keys})
            else:
                found.update({key: beside.get(node.lineno, "") for key in keys})
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            called = inspect.unwrap(function).__globals__.get(node.func.id)
            key = _key(node.args[0], names)
            if key and inspect.isfunction(called):
                found.update(comments(called, next(iter(inspect.signature(called).parameters)), f"{key}."))
    return found


def _key(node: ast.expr, names: dict[str, str]) -> str:
    """Returns the key that `config.data.root` is, or an empty string."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return (
        names[node.id] + ".".join(parts) if isinstance(node, ast.Name) and node.id in names and parts else ""
    )


def recipes_page() -> str:
    """Returns a section per config file: its docstring, recipes, options and sweeps."""
    parts = [
        "# Recipes",
        "Give one as `--config NAME:RECIPE`, with options as `--config NAME:RECIPE,OPTION=VALUE`.",
    ]
    for path in sorted(RECIPES.glob("*.py")):
        module, _ = load_module(path.stem)
        if not module.__doc__:
            raise ValueError(f"configs/{path.name} has no docstring, which is its part of the reference")
        recipes = known(module.get_config, "?")
        options = known(module.get_config, f"{recipes[0]},?")
        lines = [f"- Recipes: {_listed(f'{path.stem}:{name}' for name in recipes)}"]
        if options != ["none"]:
            lines.append(f"- Options: {_listed(f'{name}=' for name in options)}")
        for name, sweep in vars(module).items():
            if name.startswith("sweep_"):
                meaning = " ".join((inspect.getdoc(sweep) or "").split())
                lines.append(f"- Sweep {code(name.removeprefix('sweep_'))}: {prose(meaning)}")
        parts += [f"## {path.stem}", "\n".join(lines), markdown(module.__doc__)]
    return "\n\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


def known(get_config: Callable, argument: str) -> list[str]:
    """Returns the names that a config file offers in its message on an unknown one.

    Raises:
      ValueError: it has no such message.
    """
    try:
        get_config(argument)
    except UserError as error:
        return str(error).partition("(known: ")[2].rstrip(")").split(", ")
    raise ValueError(f"{get_config.__module__} takes '{argument}'")


def python_page() -> str:
    """Returns directives of mkdocstrings for the public names of `cnx2_jax.models`."""
    names = sorted(models.__all__, key=lambda name: (name != "create_model", name.lower()))
    return "\n\n".join(["# Python API", *(f"::: cnx2_jax.models.{name}" for name in names)]) + "\n"


def markdown(docstring: str) -> str:
    """Returns a docstring as Markdown: indented lines become code, and lists follow an empty line."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if block.startswith("  "):
            blocks.append(fenced(textwrap.dedent(block)))
        else:
            text = re.sub(r"(?<!\n)\n- ", "\n\n- ", block, count=1)
            blocks.append(re.sub(r"docs/(\w+)\.md", r"[\g<0>](../\1.md)", text.replace("\n  ", "\n    ")))
    return "\n\n".join(blocks)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a Markdown table of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def fenced(text: str) -> str:
    """Returns a block of code."""
    return f"```text\n{text.strip()}\n```"


def sentence(text: str) -> str:
    """Returns text with a full stop."""
    return text if not text or text.endswith((".", ":")) else f"{text}."


def code(text: str) -> str:
    """Returns text as code in the cell of a table; nothing for nothing."""
    return f"<code>{_literal(text)}</code>" if text else ""


def prose(text: str) -> str:
    """Returns plain text for the cell of a table; what stands in backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _literal(text))


def _literal(text: str) -> str:
    """Returns text in which Markdown and HTML see no marks of theirs, except backticks."""
    return re.sub(r"[&<>|*_\[\]\\~^{}]", lambda match: f"&#{ord(match[0])};", text)
