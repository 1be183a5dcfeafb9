# SPDX-License-Identifier: Apache-2.0
"""The sparse attention of one transformer: when to find a mask, what is held between steps, what is computed."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from fgattn_cute import api, distributed, predict, reference
from fgattn_cute.errors import InputError, UnsupportedError
from fgattn_cute.integrations import rules
from fgattn_cute.integrations.families import Family
from fgattn_cute.integrations.policy import Site, SparsePolicy
from fgattn_cute.integrations.report import Record, Stopwatch, head_density
from fgattn_cute.integrations.tile_order import TokenOrder
from fgattn_cute.integrations.tracking import Moment
from fgattn_cute.mask import SliceMask
from fgattn_cute.plan import Plan
from fgattn_cute.predict import MaskSchedule, Video

_ENDLESS = 1 << 30  # steps of a run whose length nobody knows


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one forward call of the transformer fixes for all its layers.

    moment: run, step and branch.
    grid: (frames, rows, columns) of the video tokens, or None.
    order: tile order of the video tokens, or None for raster order.
    """

    moment: Moment
    grid: tuple[int, int, int] | None
    order: TokenOrder | None


class Engine:
    """State of one transformer between ``enable`` and ``disable``.

    Args:
        component: its name in the pipeline.
        model: the transformer.
        family: its kind.
        policy: what to do.
        total: function that returns the steps of the current run, or None.
        heads: attention heads of the model.
    """

    def __init__(self, component: str, model: nn.Module, family: Family, policy: SparsePolicy, total, heads: int):
        self.component, self.model, self.family, self.policy = component, model, family, policy
        self.heads, self.layers = heads, len(family.layers(model))
        self.records: dict[tuple, Record] = {}
        self.fresh: list[Record] = []  # of the attention call in progress
        self.scene: Scene | None = None
        self._total = total
        self._schedules: dict[tuple, MaskSchedule] = {}
        self._plans: dict[tuple, tuple[SliceMask, Plan | None, int]] = {}
        self._orders: dict[tuple, TokenOrder] = {}
        self._rotary: tuple[object, object] = (None, None)
        self._lengths: tuple[int, ...] | None = None
        self._run = -1

    # ---- one forward call -----------------------------------------------------------------------------------------
    def begin(self, moment: Moment, arguments: dict) -> None:
        """The transformer is called: reads its token grid and forgets an earlier run's masks."""
        if moment.run != self._run:
            self.forget()
            self._run = moment.run
        grid = self.family.grid(self.model, arguments)
        if grid is None and self.policy.needs_grid:
            raise InputError(
                f"{type(self.model).__name__} was called without the size of its token grid, which "
                f"{'tile order' if self.policy.tile else f'rule {self.policy.rule_name!r}'} needs: pass num_frames, "
                "height and width, or take a rule that needs no grid and tile=None"
            )
        self.scene = Scene(moment, grid, self._order(grid, arguments["hidden_states"].device))
        self._lengths = None

    def forget(self) -> None:
        """Drops masks and key lists."""
        self._schedules.clear()
        self._plans.clear()

    def is_dense(self, layer: int) -> bool:
        """Whether the layer runs dense at this moment."""
        dense_steps = self.policy.dense_steps_of(self._total())
        return self._need_scene().moment.step < dense_steps or self.policy.is_dense(self.component, layer)

    def record(self, layer: int, entry: int, record: Record) -> None:
        """Keeps a record; a call that is repeated (gradient checkpointing) takes the place of the first."""
        moment = self._need_scene().moment
        self.records[(moment.run, self.component, layer, moment.step, moment.branch, entry)] = record
        self.fresh.append(record)

    def permuted_rotary(self, tables, order: TokenOrder):
        """Rotary tables in tile order; the layers of one forward call share them."""
        if self._rotary[0] is not tables:
            self._rotary = (tables, tuple(order.apply(table, self.family.rotary_dim) for table in tables))
        return self._rotary[1]

    def end(self) -> None:
        """The transformer returned: rotary tables of the call are not held any longer."""
        self._rotary = (None, None)

    def _order(self, grid, device) -> TokenOrder | None:
        if self.policy.tile is None:
            return None
        key = (grid, device)
        if key not in self._orders:
            self._orders[key] = TokenOrder(Video(*grid, tile=self.policy.tile), device)
        return self._orders[key]

    def _need_scene(self) -> Scene:
        if self.scene is None:
            raise InputError(
                f"an attention layer of {self.component} was called outside a call of the transformer itself: step and "
                "token grid are unknown"
            )
        return self.scene

    # ---- one attention call ---------------------------------------------------------------------------------------
    def attend(self, layer: int, q, k, v, attn_mask, scale: float | None, entry: int, heads: range) -> torch.Tensor:
        """Sparse attention in place of a dense one.

        Args:
            layer: self-attention layer.
            q, k, v: (batch, heads, seqlen, head_dim).
            attn_mask: None, or a bool mask that leaves out padded text at the end of the sequence.
            scale: factor on q.k; None means head_dim ** -0.5.
            entry: how many attention calls of this layer came before in the same forward call.
            heads: which of the model's heads these are.

        Returns:
            (batch, heads, seqlen, head_dim); rows of padded text are zero.
        """
        if attn_mask is None:
            return self._attend(layer, q, k, v, scale, entry, heads)
        seqlen = q.shape[2]
        parts = []
        for b, length in enumerate(self._valid_lengths(attn_mask, q.shape[0], seqlen)):
            one = (x[b : b + 1, :, :length] for x in (q, k, v))
            out = self._attend(layer, *one, scale, entry + b, heads)
            parts.append(nn.functional.pad(out, (0, 0, 0, seqlen - length)))
        return torch.cat(parts)

    def attend_ring(self, layer: int, q, k, v, scale: float | None, group) -> torch.Tensor:
        """Sparse attention of this process's queries over the keys of all processes, which share the sequence.

        Args:
            layer, scale: as for ``attend``.
            q, k, v: (batch, heads, its tokens, head_dim); every process has as many, a multiple of slice_m.
            group: the process group of the ring.
        """
        world, own = torch.distributed.get_world_size(group), q.shape[2]
        if self.policy.tile is not None or own % self.policy.slice_m:
            raise UnsupportedError(
                f"a ring of {world} processes with {own} tokens each, slice_m={self.policy.slice_m}, "
                f"tile={self.policy.tile}: each process needs whole query blocks in raster order. "
                f"ulysses_degree={world} has no such condition"
            )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        record, moment = Record("reuse", q.shape[2]), self._need_scene().moment
        schedule = self._schedule(moment.branch, 0, q.shape)

        def find(_) -> SliceMask:
            # Rules judge the whole map; every process keeps the rows of its own queries.
            whole = [distributed.gather_tokens(x, group) for x in (q, k)]
            mask = self._find(layer, *whole, scale, range(q.shape[2]), record)
            start = torch.distributed.get_rank(group) * own
            return distributed.slice_queries(mask, start, start + own)

        mask = schedule.mask(moment.step, layer, find)
        record.density, record.mask_bytes = head_density(mask), mask.nbytes
        self.record(layer, 0, record)
        core = functools.partial(attend_bshd, backend=self.policy.backend)
        return distributed.ring(q, k, v, mask, group, attend=core, scale=scale).transpose(1, 2)

    def _valid_lengths(self, attn_mask: torch.Tensor, batch: int, seqlen: int) -> tuple[int, ...]:
        """Tokens before the padding, per batch entry. Read back once per forward call: all layers share the text."""
        if self._lengths is None:
            row = attn_mask[:, 0, 0] if attn_mask.ndim == 4 else attn_mask
            if row.dtype != torch.bool or row.shape[-1] != seqlen or self.family.text != "last":
                raise UnsupportedError(
                    f"{type(self.model).__name__} passes an attention mask {tuple(attn_mask.shape)} {attn_mask.dtype}, "
                    "and only a bool mask of padded text at the end of the sequence is known here"
                )
            lengths = row.sum(-1)
            prefix = (torch.arange(seqlen, device=row.device) < lengths.unsqueeze(-1)).eq(row).all()
            *counted, sound = torch.cat([lengths.expand(batch), prefix.to(lengths).unsqueeze(0)]).tolist()
            if not sound:
                raise UnsupportedError(
                    f"{type(self.model).__name__} masks tokens in the middle of the sequence, not only padding at its "
                    "end: run this prompt dense"
                )
            self._lengths = tuple(counted)
        return self._lengths

    def _attend(self, layer: int, q, k, v, scale, entry: int, heads: range) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        moment, key = self._need_scene().moment, (layer, entry)
        record = Record("reuse", len(heads))
        schedule = self._schedule(moment.branch, entry, q.shape)

        def find(_) -> SliceMask:
            return self._find(layer, q.transpose(1, 2), k.transpose(1, 2), scale, heads, record)

        mask = schedule.mask(moment.step, layer, find)
        plan = self._plan((moment.branch, *key, q.shape), mask, record)
        record.density, record.mask_bytes = head_density(mask), mask.nbytes
        self.record(layer, entry, record)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend_bshd(q, k, v, plan, scale=scale, backend=self.policy.backend).transpose(1, 2)

    def _find(self, layer: int, q, k, scale: float, heads: range, record: Record) -> SliceMask:
        """A new mask for (batch, seqlen, heads, head_dim) queries and keys; notes time and recall."""
        moment, record.action = self._need_scene().moment, "find"
        with Stopwatch(q.device) as record.find, torch.no_grad():
            video, text = self._video(q.shape[1])
            where = (self.component, layer, moment.step, moment.branch)
            mask = rules.find(Site(q, k, *where, video, scale, self.policy, heads), text)
            if self.policy.measure_recall:
                record.recall = predict.recall(mask, q, k, scale=scale).mean(0)
        return mask

    def _schedule(self, branch: int, entry: int, shape) -> MaskSchedule:
        """The masks of one branch of the step; sequences of another length have masks of their own."""
        key = (branch, entry, tuple(shape))
        if key not in self._schedules:
            total = self._total()
            self._schedules[key] = MaskSchedule(
                _ENDLESS if total is None else total,
                self.layers,
                dense_steps=self.policy.dense_steps_of(total),
                refresh=self.policy.refresh_every,
            )
        return self._schedules[key]

    def _plan(self, key: tuple, mask: SliceMask, record: Record) -> Plan:
        """Key lists of a mask: kept while they fit the memory that the policy grants, or else made again.

        Their size and order are read back once per mask; lists that are made again take them from there.
        """
        held, plan, known = self._plans.get(key, (None, None, {}))
        if held is not mask:
            plan, known = None, {}
        if plan is None:
            plan = Plan.from_mask(mask, **known)
            self._plans.pop(key, None)
            fits = self.held_bytes[1] + plan.nbytes <= self.policy.plan_memory_gb * 2**30
            known = {"capacity": plan.capacity, "grouped": plan.grouped, "even": plan.even}
            self._plans[key] = (mask, plan if fits else None, known)
        record.plan_bytes = plan.nbytes if self._plans[key][1] is not None else 0
        return plan

    def _video(self, seqlen: int) -> tuple[Video | None, tuple[int, int]]:
        """The grid with the text tokens of a sequence, and first position and number of the text tokens."""
        grid, family = self._need_scene().grid, self.family
        if grid is None:
            return None, (0, 0)
        tokens = grid[0] * grid[1] * grid[2]
        text = seqlen - tokens
        if text < 0 or (text > 0 and family.text == "none"):
            raise UnsupportedError(
                f"{type(self.model).__name__} attends over {seqlen} tokens, but its grid {grid} has {tokens}: this "
                "version of the model adds tokens whose place is unknown here"
            )
        video = Video(*grid, text=text, text_first=family.text == "first", tile=self.policy.tile)
        return video, (0 if family.text == "first" else tokens, text)

    @property
    def held_bytes(self) -> tuple[int, int]:
        """Bytes of the masks and of the key lists that are held now."""
        masks = sum(schedule.nbytes for schedule in self._schedules.values())
        return masks, sum(plan.nbytes for _, plan, _ in self._plans.values() if plan is not None)


def attend_bshd(q, k, v, plan: Plan, *, scale: float, backend: str, return_lse: bool = False):
    """Attention over a plan, as ``fgattn_cute.attention``.

    On the CPU "auto" and "reference" take the reference directly: any float type and head size, also with gradients.
    """
    if q.device.type == "cpu" and backend in ("auto", "reference"):
        out, lse = reference.attention(q, k, v, plan, scale=scale, return_lse=True)
        return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
    return api.attention(q, k, v, plan, scale=scale, backend=backend, return_lse=return_lse)
