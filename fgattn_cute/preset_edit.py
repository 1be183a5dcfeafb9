# SPDX-License-Identifier: Apache-2.0
"""Writes a tuner's winner into a preset file: only the lines of one entry change, comments and order stay."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from . import presets
from .errors import PresetError
from .kernels.spec import FwdSpec

_FIELDS = {
    "tile": lambda s: f"{{m: {s.tile_m}, n: {s.tile_n}}}",
    "stages": lambda s: str(s.kv_stages),
    "softmax": lambda s: s.softmax,
    "q_source": lambda s: s.q_source,
    "scheduler": lambda s: "persistent" if s.scheduler == "zigzag" else s.scheduler,  # which follows from the plan
    "ctas_per_sm": lambda s: str(s.ctas_per_sm),
    "ping_pong": lambda s: str(s.ping_pong).lower(),
    "scale_reference": lambda s: s.scale_reference,
    "proxy_fence": lambda s: s.proxy_fence,
}


def write(path: Path, preset_id: str, record: dict) -> bool:
    """Make a preset the winner of a tuning record, with what was measured.

    Args:
        path: the YAML file, whole or extending another.
        preset_id: entry to change. A file that extends another gets the entry if it is the other's.
        record: ``Tuning.record`` of a measured tuning.

    Returns:
        Whether the file has changed.

    Raises:
        PresetError: nothing was measured, no such entry, or the result is not a valid file. The file is as before then.
    """
    path = Path(path)
    if not record["measured"]:
        raise PresetError("nothing was measured, so there is nothing to write", file=path.name)
    text = path.read_text(encoding="utf-8")
    edited = edit(text, preset_id, record, path.name)
    presets.parse(edited, path.name)
    if edited == text:
        return False
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}", suffix=path.suffix)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(edited)
    os.chmod(temporary, path.stat().st_mode)
    os.replace(temporary, path)
    return True


def edit(text: str, preset_id: str, record: dict, name: str) -> str:
    """The text of a file with one entry changed; see ``write``."""
    lines = text.splitlines()
    found = _entry(lines, preset_id)
    if found is None:
        lines = _taken_over(text, preset_id, name)
        found = _entry(lines, preset_id)
    first, last = found
    spec = FwdSpec(**record["winner"]["spec"])
    default = FwdSpec(head_dim=spec.head_dim)
    entry = lines[first:last]
    for key, say in _FIELDS.items():
        entry = _set(entry, key, say(spec), needed=say(spec) != say(default))
    if spec.kv_loads not in ("boxes", "octets"):  # which follow from the plan, whatever the preset says
        entry = _set(entry, "kv_loads", spec.kv_loads, needed=spec.kv_loads != default.kv_loads)
    entry = _set(entry, "registers", None, needed=False)  # the winner takes the default of its warp layout
    entry = _set(entry, "provenance", "measured", needed=True)
    entry = _set(entry, "measured", _measured(record), needed=True)
    return "\n".join([*lines[:first], *entry, *lines[last:]]) + "\n"


def _entry(lines: list[str], preset_id: str) -> tuple[int, int] | None:
    """First line of an entry and the one after its last; None where there is none."""
    starts = [i for i, line in enumerate(lines) if re.match(r"^  - id: ", line)]
    own = [i for i in starts if lines[i].split("#")[0].split(":", 1)[1].strip() == preset_id]
    if not own:
        return None
    after = (i for i in range(own[0] + 1, len(lines)) if re.match(r"^  (- |#)|^\S", lines[i]))
    return own[0], next(after, len(lines))


def _taken_over(text: str, preset_id: str, name: str) -> list[str]:
    """The lines of a file that extends another, with an entry of the other before its own."""
    base = presets.parse(text, name).base
    theirs = (presets.CONFIG_DIR / Path(base.name).name).read_text(encoding="utf-8").splitlines() if base else []
    found = _entry(theirs, preset_id)
    if found is None:
        raise PresetError(f"no preset {preset_id!r}", file=name)
    lines = text.splitlines()
    if not any(re.match(r"^forward:", line) for line in lines):
        lines.append("forward:")
    at = 1 + next(i for i, line in enumerate(lines) if re.match(r"^forward:", line))
    return [*lines[:at], *theirs[slice(*found)], *lines[at:]]


def _measured(record: dict) -> str:
    gpu, winner = record["gpu"], record["winner"]
    tflops = winner["packed_tflops"]
    workload = f"fgattn tune: {record['problem']}, density {record['density']:.3g}".replace('"', "'")
    return (
        f'{{workload: "{workload}", tflops: {tflops:.1f}, relative_to_dense: null, commit: null, '
        f'date: {record["created"][:10]}, machine: "{gpu["name"]}"}}'
    )


def _set(entry: list[str], key: str, value: str | None, needed: bool) -> list[str]:
    """Replace a key's value in the lines of an entry, its nested lines included; None removes the key."""
    for i, line in enumerate(entry):
        found = re.match(rf"^    {key}:(?P<value>[^#]*?)(?P<comment>\s+#.*)?$", line)
        if not found:
            continue
        end = i + 1
        while end < len(entry) and re.match(r"^      ", entry[end]):
            end += 1
        if found["value"].strip() == value:
            return entry
        new = [] if value is None else [f"    {key}: {value}{found['comment'] or ''}"]
        return entry[:i] + new + entry[end:]
    if not needed or value is None:
        return entry
    at = next(i for i, line in enumerate(entry) if line.startswith("    provenance:"))
    return [*entry[:at], f"    {key}: {value}", *entry[at:]]
