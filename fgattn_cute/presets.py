# SPDX-License-Identifier: Apache-2.0
"""YAML files of ``configs/``, and users' own -> GPU facts and presets. With preset_reading.py alone in importing
pydantic.

A mistake in a file is a ``PresetError`` that names file, line, key and the legal keys; a preset whose kernel cannot run
is one that quotes ``FwdSpec.reasons()``. Files are read once per process.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field

from .errors import PresetError
from .kernels.spec import DTYPES, HEAD_DIMS, FwdSpec
from .plan_facts import in_zigzag, loads_for
from .preset_reading import first_error, read_yaml, unknown

CONFIG_DIR = Path(__file__).parent / "configs"
GENERIC = "sm90"  # the file for Hopper GPUs that no other file names
SCHEMA_VERSION = 1


# ---- the file format -----------------------------------------------------------------------------------------------
class _Model(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Fact(_Model):
    """A number about the GPU and where it comes from."""

    value: float = Field(description="in the unit that the key names")
    source: str = Field(min_length=1, description="document, or what was measured where and when")


class GpuModel(_Model):
    """Which GPU the file is for, and its constants."""

    names: list[str] = Field(min_length=1, description="device names as the driver says them; the generic file has one")
    cc: list[int] = Field(min_length=2, max_length=2, description="compute capability, [9, 0]")
    sms: Fact = Field(description="streaming multiprocessors")
    l2_bytes: Fact = Field(description="L2 cache")
    memory_bytes: Fact
    memory_gb_per_s: Fact
    bf16_dense_tflops: Fact = Field(description="tensor-core peak without structured sparsity, at the boost clock")
    boost_mhz: Fact
    power_w: Fact = Field(description="power limit")
    l2_gather_tb_per_s: Fact | None = Field(None, description="random 256-byte rows by cp.async, 32 MB footprint")
    l2_gather_two_ctas_tb_per_s: Fact | None = Field(None, description="the same with two CTAs on each SM")
    sustained_mhz: Fact | None = Field(None, description="clock under back-to-back attention kernels")
    dense_attention_tflops: Fact | None = Field(None, description="the best dense attention, bf16, head dim 128")
    # What the cost model (roofline.py) knows about an SM.
    tensor_flop_per_clk: Fact | None = Field(None, description="16-bit WGMMA, one SM")
    mufu_per_clk: Fact | None = Field(None, description="exponentials, one SM")
    smem_bytes_per_clk: Fact | None = Field(None, description="shared-memory port, one SM")
    cycles_per_instruction: Fact | None = Field(None, description="issue slots that an instruction of a loop takes")
    overlap_exponent: Fact | None = Field(None, description="p of the norm that joins the resources' cycles")
    list_cycles: Fact | None = Field(None, description="cycles of a CTA before its first and after its last tile")


class IntCondition(_Model):
    """All given conditions must hold."""

    multiple_of: int | None = Field(None, ge=1)
    max: int | None = Field(None, ge=1)
    one_of: list[int] | None = Field(None, min_length=1)

    def holds(self, value: int) -> bool:
        return (
            (self.multiple_of is None or value % self.multiple_of == 0)
            and (self.max is None or value <= self.max)
            and (self.one_of is None or value in self.one_of)
        )

    @property
    def smallest(self) -> int:
        """The smallest value for which the conditions hold."""
        return min(self.one_of) if self.one_of else self.multiple_of or 1


class When(_Model):
    """For which problems a preset is meant. What is not given is not asked for."""

    dtype: list[Literal["bf16", "fp16"]] | None = Field(None, min_length=1)
    head_dim: list[int] | None = Field(None, min_length=1)
    slice_m: IntCondition | None = None
    slice_n: IntCondition | None = None


class TileModel(_Model):
    m: int = Field(description="query rows of a CTA, 64 per consumer warpgroup")
    n: int = Field(description="keys of a packed tile")


class RegistersModel(_Model):
    """setmaxnreg targets of a thread."""

    consumer: int
    producer: int


class TuneModel(_Model):
    """Values the autotuner may try in place of the preset's own."""

    tile_m: list[int] | None = None
    tile_n: list[int] | None = None
    kv_stages: list[int] | None = None
    softmax: list[Literal["fixed_ref", "exact"]] | None = None
    q_source: list[Literal["smem", "registers"]] | None = None
    scheduler: list[Literal["grid", "persistent"]] | None = None
    ctas_per_sm: list[int] | None = None
    ping_pong: list[bool] | None = None
    scale_reference: list[Literal["once", "per_tile"]] | None = None
    proxy_fence: list[Literal["producer", "consumer"]] | None = None
    kv_loads: list[Literal["gather", "runs"]] | None = None


class MeasuredModel(_Model):
    """One measurement of the preset on this GPU; null until there is one."""

    workload: str | None = Field(None, description="lengths, heads, density and how it was timed")
    tflops: float | None = Field(None, gt=0, description="packed: FLOPs of the kept pairs only")
    relative_to_dense: float | None = Field(None, gt=0, description="packed rate / rate of dense FA4 in the same run")
    commit: str | None = None
    date: datetime.date | None = None
    machine: str | None = None


class PresetModel(_Model):
    """One kernel and when to use it."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    when: When
    tile: TileModel
    stages: int = 2
    softmax: Literal["fixed_ref", "exact"]
    q_source: Literal["smem", "registers"] = "smem"
    scheduler: Literal["grid", "persistent"] = Field(
        "grid", description="a CTA per work item, or several items to a CTA: in waves, or for even lists in zigzag"
    )
    ctas_per_sm: int = 1
    ping_pong: bool = False
    scale_reference: Literal["once", "per_tile"] = "once"
    proxy_fence: Literal["producer", "consumer"] = "producer"
    kv_loads: Literal["gather", "runs"] = Field(
        "gather", description="of slice_n that are not multiples of 8, whose segments come as boxes"
    )
    registers: RegistersModel | None = Field(None, description="null takes the default of the warp layout")
    provenance: Literal["measured", "assumed"]
    measured: MeasuredModel
    tune: TuneModel = TuneModel()


class FileModel(_Model):
    """A file of configs/. The first preset that matches wins; the last one asks for nothing and is the fallback."""

    OTHER_KEYS: ClassVar = ("extends",)  # which would make it an OverlayModel

    schema_: int = Field(alias="schema", description="version of this format")
    gpu: GpuModel
    forward: list[PresetModel] = Field(min_length=1)


def _optional(field: pydantic.fields.FieldInfo) -> tuple:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return kind | None, Field(None, description=field.description)


# The gpu section of a file that extends another: what it leaves out is the other's.
GpuChanges = pydantic.create_model(
    "GpuChanges", __base__=_Model, **{name: _optional(field) for name, field in GpuModel.model_fields.items()}
)


class OverlayModel(_Model):
    """A user's file over a file of configs/. Its entries come first; one with the id of a base entry replaces that."""

    schema_: int = Field(alias="schema", description="version of this format")
    extends: str = Field(description="file of configs/ without .yaml")
    gpu: GpuChanges = GpuChanges()
    forward: list[PresetModel] = []


# ---- what the rest of the package sees -----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """names: device names; constants: every number of the file's gpu section by its key."""

    names: tuple[str, ...]
    cc: tuple[int, int]
    sms: int
    l2_bytes: int
    constants: dict[str, float]
    sources: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Preset:
    """A preset: conditions, and the fields of FwdSpec that it fixes (all but the problem's own)."""

    id: str
    file: str
    when: When
    fields: dict
    provenance: str
    measured: MeasuredModel
    tune: dict[str, tuple]

    def takes(self, dtype: str, head_dim: int, slice_n: int) -> bool:
        """Whether the preset is meant for these, whatever slice_m is."""
        w = self.when
        return (
            (w.dtype is None or dtype in w.dtype)
            and (w.head_dim is None or head_dim in w.head_dim)
            and (w.slice_n is None or w.slice_n.holds(slice_n))
        )

    def takes_slice_m(self, slice_m: int) -> bool:
        return self.when.slice_m is None or self.when.slice_m.holds(slice_m)

    @property
    def is_fallback(self) -> bool:
        """The entry that asks for nothing."""
        return self.when == When()

    def spec(
        self,
        *,
        dtype: str,
        head_dim: int,
        slice_n: int = 1,
        nearly_full: bool = False,
        grouped: bool = False,
        even: bool = False,
    ) -> FwdSpec:
        """The preset's kernel for a problem and plan of these facts, see ``loads_for`` and ``in_zigzag``."""
        loads = loads_for(slice_n, self.fields["kv_loads"], nearly_full, grouped)
        spec = FwdSpec(dtype=dtype, head_dim=head_dim, slice_n=slice_n, **self.fields | {"kv_loads": loads})
        if loads == "octets" and spec.reasons():
            spec = dataclasses.replace(spec, kv_loads="gather")  # which reads lists of any order
        return in_zigzag(spec, nearly_full) if even else spec

    def specs(self):
        """The preset's kernels with the smallest slice_n: one for each dtype and head dim that it takes."""
        slice_n = self.when.slice_n.smallest if self.when.slice_n else 1
        for dtype in self.when.dtype or DTYPES:
            for head_dim in self.when.head_dim or HEAD_DIMS:
                yield self.spec(dtype=dtype, head_dim=head_dim, slice_n=slice_n)


@dataclasses.dataclass(frozen=True, eq=False)
class PresetFile:
    """A validated file.

    name: how messages call it, "configs/h200.yaml".
    presets: its own entries.
    base: the file that it extends, without the entries that it replaces; None for a whole file.
    """

    name: str
    gpu: GpuFacts
    presets: tuple[Preset, ...]
    base: PresetFile | None = None

    def get(self, preset_id: str) -> Preset:
        """The preset of that id.

        Raises:
            PresetError: there is none.
        """
        for preset in self.presets:
            if preset.id == preset_id:
                return preset
        raise PresetError(unknown("preset", preset_id, [p.id for p in self.presets]), file=self.name)


def builtin_names() -> tuple[str, ...]:
    """Stems of the shipped files, the generic one last."""
    return tuple(sorted((p.stem for p in CONFIG_DIR.glob("*.yaml")), key=lambda stem: (stem == GENERIC, stem)))


def builtin(stem: str) -> PresetFile:
    """The shipped file ``configs/<stem>.yaml``.

    Raises:
        PresetError: no such file; the message lists those there are.
    """
    if stem not in builtin_names():
        raise PresetError(unknown("GPU of configs/", stem, builtin_names()))
    return load(CONFIG_DIR / f"{stem}.yaml")


def for_gpu(name: str, folder: Path | None = None) -> PresetFile | None:
    """The file that lists the device ``name``, else the generic one.

    Args:
        name: as the driver says it.
        folder: where to look, by default the shipped configs. None is returned where it has neither.
    """
    folder = folder or CONFIG_DIR
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if name in text or "extends:" in text:  # reading is cheap, checking a whole file is not
            file = load(path)
            if name in file.gpu.names:
                return file
    generic = folder / f"{GENERIC}.yaml"
    return load(generic) if generic.exists() else None


def load(path: Path | str) -> PresetFile:
    """Read and check one file.

    Raises:
        PresetError: not readable, not YAML, a wrong key or value, or a preset whose kernel cannot run.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        raise PresetError(f"cannot be read: {why}", file=_shown(path)) from None
    return parse(text, _shown(path))


def json_schema() -> str:
    """The JSON schema of a file, as configs/schema.json holds it."""
    schema = pydantic.TypeAdapter(FileModel | OverlayModel).json_schema()
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


@functools.lru_cache(maxsize=64)
def parse(text: str, name: str) -> PresetFile:
    """Check the text of a file called ``name``. Raises PresetError as ``load`` does."""
    data, lines = read_yaml(text, name)
    kind = OverlayModel if isinstance(data, dict) and "extends" in data else FileModel
    try:
        model = kind.model_validate(data)
    except pydantic.ValidationError as failed:
        raise first_error(failed, name, lines, kind) from None
    if model.schema_ != SCHEMA_VERSION:
        where = {"file": name, "line": lines.get(("schema",)), "key": "schema"}
        raise PresetError(f"{model.schema_} is not a known version (this package reads {SCHEMA_VERSION})", **where)
    presets = tuple(_preset(entry, name) for entry in model.forward)
    _check_presets(presets, name, lines)
    if kind is OverlayModel:
        return _over_base(model, presets, name, lines)
    if not presets[-1].is_fallback:
        _fail(
            name, lines, len(presets) - 1, "when", "the last entry must be `when: {}`, the fallback for every problem"
        )
    return PresetFile(name, _gpu_facts(model.gpu), presets)


def _over_base(model: OverlayModel, presets: tuple[Preset, ...], name: str, lines: dict) -> PresetFile:
    """The file that extends another, and what it leaves of that."""
    if model.extends not in builtin_names():
        where = {"file": name, "line": lines.get(("extends",)), "key": "extends"}
        raise PresetError(unknown("GPU of configs/", model.extends, builtin_names()), **where)
    base = builtin(model.extends)
    own = {preset.id: index for index, preset in enumerate(presets)}
    fallback = base.presets[-1].id
    if fallback in own and not presets[own[fallback]].is_fallback:
        _fail(name, lines, own[fallback], "when", f"replaces the fallback of {base.name}, so it must ask for nothing")
    kept = tuple(preset for preset in base.presets if preset.id not in own)
    gpu = _gpu_facts(model.gpu, base.gpu)
    return PresetFile(name, gpu, presets, dataclasses.replace(base, gpu=gpu, presets=kept))


# ---- from models to plain values -----------------------------------------------------------------------------------
def _gpu_facts(gpu, base: GpuFacts | None = None) -> GpuFacts:
    facts = {key: fact for key, fact in gpu if isinstance(fact, Fact)}
    constants = {**(base.constants if base else {}), **{key: fact.value for key, fact in facts.items()}}
    sources = {**(base.sources if base else {}), **{key: fact.source for key, fact in facts.items()}}
    return GpuFacts(
        names=tuple(gpu.names or base.names),
        cc=tuple(gpu.cc or base.cc),
        sms=int(constants["sms"]),
        l2_bytes=int(constants["l2_bytes"]),
        constants=constants,
        sources=sources,
    )


def _preset(entry: PresetModel, file: str) -> Preset:
    fields = {
        "tile_m": entry.tile.m,
        "tile_n": entry.tile.n,
        "kv_stages": entry.stages,
        "consumer_registers": entry.registers.consumer if entry.registers else None,
        "producer_registers": entry.registers.producer if entry.registers else None,
    }
    kept = (
        "softmax",
        "q_source",
        "scheduler",
        "ctas_per_sm",
        "ping_pong",
        "scale_reference",
        "proxy_fence",
        "kv_loads",
    )
    for key in kept:
        fields[key] = getattr(entry, key)
    tune = {key: tuple(values) for key, values in entry.tune if values is not None}
    return Preset(entry.id, file, entry.when, fields, entry.provenance, entry.measured, tune)


def _check_presets(presets: tuple[Preset, ...], file: str, lines: dict) -> None:
    """Unique ids, a fallback at the end or nowhere, honest provenance, and every kernel (and its redo pass) can run."""
    seen = {}
    for index, preset in enumerate(presets):
        fail = functools.partial(_fail, file, lines, index)
        if preset.id in seen:
            fail("id", f"{preset.id!r} is already the id of forward[{seen[preset.id]}]")
        seen[preset.id] = index
        filled = [key for key, value in preset.measured if value is not None]
        if (preset.provenance == "measured") != ("tflops" in filled):
            fail("provenance", f"{preset.provenance!r}, but measured.tflops is {preset.measured.tflops}")
        if preset.is_fallback and index != len(presets) - 1:
            fail("when", "asks for nothing, so nothing after it can match: it must be the last entry")
        for spec in preset.specs():
            why = spec.reasons()
            if spec.softmax == "fixed_ref":
                why += [f"redo pass: {reason}" for reason in spec.redo_spec().reasons()]
            if why:
                bullets = "".join(f"\n  - {reason}" for reason in why)
                fail("id", f"{preset.id} cannot run with {spec.dtype}, head_dim {spec.head_dim}:{bullets}")


def _fail(file: str, lines: dict, index: int, key: str, message: str):
    """Raise a PresetError about a key of an entry."""
    path = ("forward", index)
    line = lines.get((*path, key)) or lines.get(path)
    raise PresetError(message, file=file, line=line, key=f"forward[{index}].{key}")


def _shown(path: Path) -> str:
    return f"configs/{path.name}" if path.parent == CONFIG_DIR else str(path)
