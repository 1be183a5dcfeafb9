# SPDX-License-Identifier: Apache-2.0
"""Reads YAML with the line of every key, and says what is wrong in terms of file, line, key and the legal keys."""

from __future__ import annotations

import difflib
import typing

import pydantic
import yaml

from .errors import PresetError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str, name: str):
    """(data, {path: line}) of a document. A path is the tuple of keys and indices that lead to a value."""
    loader = _LOADER(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as why:
        mark = getattr(why, "problem_mark", None)
        problem = getattr(why, "problem", None) or str(why)
        raise PresetError(f"not YAML: {problem}", file=name, line=mark.line + 1 if mark else None) from None
    lines: dict[tuple, int] = {}
    if node is None:
        raise PresetError("is empty", file=name)
    _walk(node, (), lines, name, set())
    try:
        return loader.construct_document(node), lines
    except yaml.YAMLError as why:
        raise PresetError(f"not YAML: {why}", file=name) from None


def _walk(node, path, lines, name, seen):
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: walking it again could take for ever
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise PresetError("a key is a word, not a list or a mapping", file=name, line=line)
            here = (*path, key_node.value)
            if here in lines:
                message = f"given twice (first on line {lines[here]})"
                raise PresetError(message, file=name, line=line, key=dotted(here))
            lines[here] = line
            _walk(value_node, here, lines, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, name, seen)


def first_error(failed: pydantic.ValidationError, name: str, lines: dict, model: type) -> PresetError:
    """One PresetError for everything pydantic found: located at the first, listing the others.

    Args:
        lines: as of ``read_yaml``.
        model: that did not validate. Its OTHER_KEYS are legal where another model would have been taken.
    """
    messages = []
    for error in failed.errors(include_url=False):
        path = tuple(error["loc"])
        # A mistyped key is also a missing one: the typo explains both, so it comes first.
        order = (error["type"] != "extra_forbidden", _nearest_line(path, lines) or 0)
        messages.append((order, dotted(path), _explain(error, path, model)))
    messages.sort()
    (_, line), key, message = messages[0]
    others = "".join(f"\n  also line {at[1]}: {where}: {what}" for at, where, what in messages[1:])
    return PresetError(message + others, file=name, line=line, key=key)


def _explain(error: dict, path: tuple, model: type) -> str:
    if error["type"] == "extra_forbidden":
        return unknown("key", str(path[-1]), _keys_at(path[:-1], model))
    if error["type"] == "missing":
        return "is missing"
    given = "" if isinstance(error["input"], (dict, list)) else f" (given {error['input']!r})"
    return error["msg"][0].lower() + error["msg"][1:] + given


def unknown(what: str, given: str, legal) -> str:
    """A word that is none of the legal ones, and the one that may have been meant."""
    close = difflib.get_close_matches(given, legal, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown {what} {given!r}{hint} (legal: {', '.join(legal)})"


def _keys_at(path: tuple, model: type) -> list[str]:
    """The legal keys of the mapping at ``path`` of a document of a model."""
    for part in path:
        if isinstance(part, int):
            continue
        field = next(f for key, f in model.model_fields.items() if (f.alias or key) == part)
        model = _model_in(field.annotation)
    own = [field.alias or key for key, field in model.model_fields.items()]
    return [*own, *getattr(model, "OTHER_KEYS", ())]


def _model_in(annotation):
    """The model class inside Optional[...] or list[...]."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next(found for found in map(_model_in, typing.get_args(annotation)) if found is not None)


def _nearest_line(path: tuple, lines: dict) -> int | None:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def dotted(path: tuple) -> str:
    """forward[0].tile.m for ("forward", 0, "tile", "m")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "file"
