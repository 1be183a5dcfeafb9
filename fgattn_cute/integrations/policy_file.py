# SPDX-License-Identifier: Apache-2.0
"""Policies as YAML files: one mapping with the fields of SparsePolicy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fgattn_cute.errors import InputError


def read(path: str | Path, cls):
    """A policy of class ``cls`` from a file.

    Raises:
        InputError: not YAML, not a mapping, an unknown key or a value that the policy refuses; the file is named.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a policy file is a mapping of the fields of SparsePolicy")
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(map(str, content)) - set(fields))
    if unknown:
        raise InputError(f"{path}: unknown {', '.join(unknown)}; a policy has {', '.join(fields)}")
    try:
        return cls(**content)
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error


def write(path: str | Path, policy, comment: str = "") -> None:
    """Writes the fields that differ from their defaults.

    Raises:
        InputError: the rule is a function.
    """
    import yaml

    if not isinstance(policy.rule, str):
        raise InputError(f"the rule {policy.rule_name!r} is a function, which a file cannot hold")
    content = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if field.name == "rule" or value != default:
            content[field.name] = _plain(value)
    header = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    Path(path).write_text(header + yaml.safe_dump(content, sort_keys=False, width=110))


def _plain(value):
    """Lists and dictionaries in place of tuples and other mappings."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
