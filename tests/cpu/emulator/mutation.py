# SPDX-License-Identifier: Apache-2.0
"""Plants single faults in the PTX of real compiled kernels and records what the emulator says.

    python -m tests.cpu.emulator.mutation            # the table of docs/emulator.md
    python -m tests.cpu.emulator.mutation --details  # and one line per fault

A fault counts as caught when one of the schedules reports a violation that the unbroken kernel does not have, stops
with an error, or leaves a wrong result.
"""

import argparse
import collections
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fgattn_cute import emulator

MAX_INSTRUCTIONS = 3_000_000


@dataclass(frozen=True)
class Mutation:
    """One fault: `kind`, the 0-based lines it changes and the whole changed text."""

    kind: str
    lines: tuple[int, ...]
    text: str


@dataclass
class Subject:
    """A compiled kernel with inputs. `run()` launches it inside the active session and returns the largest error."""

    name: str
    kernel: str  # a part of the PTX entry's name
    run: Callable[[], float]
    tolerance: float
    options: dict = field(default_factory=dict)  # of the session
    ptx: str = ""
    clean: set = field(default_factory=set)  # what the unbroken kernel is reported for


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: `how` is a kind of violation, "wrong result", "refused" or "undetected"."""

    mutation: Mutation
    how: str
    seed: int | None
    message: str = ""


# Rules: (kind of fault, pattern of the line, replacement). `\\g<0>` and groups refer to the pattern.
RULES: list[tuple[str, str, str]] = [
    ("drop fence.proxy.async", r"^\s*fence\.proxy\.async.*", ""),
    ("drop wgmma.fence", r"^\s*wgmma\.fence.*", ""),
    ("drop wgmma.commit_group", r"^\s*wgmma\.commit_group.*", ""),
    ("drop wgmma.wait_group", r"^\s*wgmma\.wait_group.*", ""),
    ("wgmma.wait_group one too many", r"(wgmma\.wait_group\S*\s+)0;", r"\g<1>1;"),
    ("drop bar.sync", r"^\s*(bar|barrier)\.sync.*", ""),
    ("drop bar.arrive", r"^\s*(bar|barrier)\.arrive.*", ""),
    ("drop mbarrier arrive", r"^\s*(@%?\w+\s+)?mbarrier\.arrive\.(?!expect).*", ""),
    (
        "expect_tx bytes halved",
        r"(mbarrier\.arrive\.expect_tx\S+\s+\S+\s*\[.*?\],\s*)(%\w+);",
        r"shr.u32 \2, \2, 1; \g<0>",
    ),
    ("expect_tx bytes halved", r"(mbarrier\.arrive\.expect_tx\S+\s+\S+\s*\[.*?\],\s*)(\d+);", "halve"),
    ("mbarrier count + 1", r"(mbarrier\.init\S*\s*\[.*?\],\s*)(\d+);", "increment"),
    ("mbarrier count + 1", r"(mbarrier\.init\S*\s*\[.*?\],\s*)(%\w+);", r"add.s32 \2, \2, 1; \g<0> sub.s32 \2, \2, 1;"),
    ("mbarrier count - 1", r"(mbarrier\.init\S*\s*\[.*?\],\s*)(\d+);", "decrement"),
    ("mbarrier count - 1", r"(mbarrier\.init\S*\s*\[.*?\],\s*)(%\w+);", r"sub.s32 \2, \2, 1; \g<0> add.s32 \2, \2, 1;"),
    ("elect.sync always true", r"elect\.sync\s+\S+\|(%\w+), -1;", r"setp.eq.u32 \1, 0, 0;"),
    ("drop bulk wait_group", r"^\s*cp\.async\.bulk\.wait_group.*", ""),
    ("drop bulk commit_group", r"^\s*cp\.async\.bulk\.commit_group.*", ""),
    ("drop TMA load", r"^\s*(@%?\w+\s+)?cp\.async\.bulk\.tensor\S*complete_tx.*", ""),
    ("drop TMA store", r"^\s*(@%?\w+\s+)?cp\.async\.bulk\.tensor\S*bulk_group.*", ""),
    ("drop cp.async", r"^\s*(@%?\w+\s+)?cp\.async\.c[ag]\.shared.*", ""),
    ("cp.async 16 bytes early", r"(cp\.async\.c[ag]\.shared\S*\s*\[\S+?\],\s*\[%\w+)(\+\d+)?\]", r"\1-16]"),
    ("cp.async without zero fill", r"(cp\.async\.c[ag]\.shared\S*\s*\[.*?\],\s*\[.*?\],\s*16),\s*%\w+;", r"\1;"),
    ("drop cp.async.wait_group", r"^\s*cp\.async\.wait_(group|all).*", ""),
    ("drop cp.async.commit_group", r"^\s*cp\.async\.commit_group.*", ""),
    (
        "cp.async arrival at once",
        r"cp\.async\.mbarrier\.arrive\.noinc\S*\s*\[(.*?)\];",
        r"mbarrier.arrive.shared::cta.b64 _, [\1];",
    ),
    ("cp.async arrival without noinc", r"cp\.async\.mbarrier\.arrive\.noinc", "cp.async.mbarrier.arrive"),
    ("drop global store", r"^\s*(@%?\w+\s+)?st\.global.*", ""),
    ("global store 64 KiB further", r"(st\.global\S*\s*\[%\w+)(\+\d+)?\]", r"\1+65536]"),
    ("global load 64 KiB further", r"(ld\.global\S*\s+\S+\s*\[%\w+)(\+\d+)?\]", r"\1+65536]"),
    ("stmatrix 64 KiB further", r"(stmatrix\S*\s*\[%\w+)(\+\d+)?\]", r"\1+262144]"),
    ("stmatrix 4 bytes further", r"(stmatrix\S*\s*\[%\w+)(\+\d+)?\]", r"\1+4]"),
    ("drop stmatrix", r"^\s*stmatrix.*", ""),
    ("drop cluster barrier wait", r"^\s*barrier\.cluster\.wait.*", ""),
    ("setmaxnreg.inc of 256 registers more", r"(setmaxnreg\.inc\S*\s+)\d+;", r"\g<1>256;"),
    ("operand in 64-byte swizzle", "descriptor", ""),
]
_WAIT = re.compile(r"mbarrier\.(?:try|test)_wait\S*\s+(%?\w+),\s*(\[.*?\]),\s*([^;]*);")
_SWIZZLE_128 = 1 << 62


def mutations(ptx: str) -> Iterator[Mutation]:
    """Every single fault of every rule, and of waits and their parities."""
    lines = ptx.split("\n")
    for kind, pattern, replacement in RULES:
        if pattern == "descriptor":
            continue
        for i, line in enumerate(lines):
            changed = _change(pattern, replacement, line)
            if changed is not None:
                yield _mutation(kind, lines, {i: changed})
    for site in _wait_sites(lines):
        passes = {i: _WAIT.sub(r"setp.eq.u32 \1, 0, 0;", lines[i]) for i in site}
        yield _mutation("drop mbarrier wait", lines, passes)
        yield _mutation("mbarrier wait for the other parity", lines, {i: _flip_parity(lines[i]) for i in site})
    for i, line in enumerate(lines):
        if re.search(r"\bmov\.b32\s+%\w+, 1073741888;", line):  # upper half: 128-byte swizzle, 1024-byte stride
            yield _mutation("operand in 64-byte swizzle", lines, {i: line.replace("1073741888", "2147483712")})
        if re.search(r"\b(or|mov)\.b64\b.*", line) and (m := re.search(r"-?\b\d{16,20}\b", line)):
            value = int(m[0]) & (2**64 - 1)
            if value >> 62 == 1:
                other = (value ^ (3 << 62)) - (0 if value < 2**63 else 2**64)
                yield _mutation("operand in 64-byte swizzle", lines, {i: line.replace(m[0], str(other))})


def _change(pattern: str, replacement: str, line: str) -> str | None:
    m = re.search(pattern, line)
    if m is None or line.strip().startswith(("//", ".")):
        return None
    if replacement in ("halve", "increment", "decrement"):
        n = int(m[2])
        n = {"halve": n // 2, "increment": n + 1, "decrement": n - 1}[replacement]
        return line[: m.start()] + f"{m[1]}{n};" + line[m.end() :]
    return line[: m.start()] + m.expand(replacement) + line[m.end() :]


def _flip_parity(line: str) -> str:
    m = _WAIT.search(line)
    parity, *rest = [x.strip() for x in m[3].split(",")]
    head = m[0][: m[0].index("[")]  # instruction and destination
    call = f"{head}{m[2]}, {', '.join(['flipped', *rest])};"
    return line[: m.start()] + f"{{.reg .b32 flipped; xor.b32 flipped, {parity}, 1; {call}}}" + line[m.end() :]


def _wait_sites(lines: list[str]) -> list[list[int]]:
    """Runs of waits on the same barrier within a few lines (a first try and the loop behind it) are one site."""
    sites: list[list[int]] = []
    last = None
    for i, line in enumerate(lines):
        if m := _WAIT.search(line):
            key = (m[2], m[3].split(",")[0])
            if last == key and i - sites[-1][-1] < 8:
                sites[-1].append(i)
            else:
                sites.append([i])
            last = key
    return sites


def _mutation(kind: str, lines: list[str], changed: dict[int, str]) -> Mutation:
    return Mutation(kind, tuple(changed), "\n".join(changed.get(i, x) for i, x in enumerate(lines)))


def prepare(subject: Subject, seeds: list[int]) -> Subject:
    """Finds the subject's PTX, and what the unbroken kernel is reported for in any of the schedules."""

    def note(name: str, ptx: str) -> str:
        if subject.kernel in name:
            subject.ptx = ptx
        return ptx

    for seed in seeds:
        error, findings = _once(subject, seed, note)
        assert error <= subject.tolerance, f"{subject.name} is wrong before any mutation: {error}"
        subject.clean |= {_signature(f) for f in findings}
    assert subject.ptx, f"{subject.name}: no launch of {subject.kernel}"
    return subject


def try_mutation(subject: Subject, mutation: Mutation, seeds: list[int]) -> Outcome:
    """Runs the broken kernel under one schedule after the other until something shows."""
    edit = lambda name, ptx: mutation.text if ptx == subject.ptx else ptx
    for seed in seeds:
        try:
            error, findings = _once(subject, seed, edit)
        except emulator.EmulatorError as e:
            return Outcome(mutation, e.kind, seed, str(e).split("\n")[1][:160] if "\n" in str(e) else str(e)[:160])
        new = [f for f in findings if _signature(f) not in subject.clean]
        if new:
            from fgattn_cute.emulator.report import kind_of

            return Outcome(mutation, kind_of(new[0]), seed, new[0].message.split("\n")[0][:160])
        if not error <= subject.tolerance:
            return Outcome(mutation, "wrong result", seed, f"{error:.3g}")
    return Outcome(mutation, "undetected", None)


def _once(subject: Subject, seed: int, edit) -> tuple[float, list]:
    """One run; violations are collected, and only what stops a launch for good makes the error infinite."""
    options = {"on_violation": "collect", "edit_ptx": edit, "max_instructions": MAX_INSTRUCTIONS, **subject.options}
    with emulator.session(seed=seed, **options) as emu:
        error = subject.run(emu)
    findings = emu.report().findings
    return error, findings


def _signature(finding) -> tuple:
    return str(finding.kind), re.sub(r"0x[0-9a-f]+|\d+", "#", finding.message), finding.text.strip()


def table(outcomes: list[Outcome]) -> str:
    """Markdown: per kind of fault how many were planted, how many were not noticed, and how the others showed."""
    groups: dict[str, list[Outcome]] = collections.defaultdict(list)
    for o in outcomes:
        groups[o.mutation.kind].append(o)
    rows = ["| fault | planted | undetected | caught as |", "|---|---|---|---|"]
    total = missed = 0
    for kind, found in sorted(groups.items()):
        how = collections.Counter(o.how for o in found)
        undetected = how.pop("undetected", 0)
        total, missed = total + len(found), missed + undetected
        caught = ", ".join(f"{n} {name}" for name, n in how.most_common())
        rows.append(f"| {kind} | {len(found)} | {undetected} | {caught} |")
    rows.append(f"| **all** | **{total}** | **{missed}** | |")
    return "\n".join(rows)


def main() -> None:
    """Command line: the whole table."""
    from tests.cpu.emulator.subjects import SUBJECTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--details", action="store_true", help="one line per mutation")
    parser.add_argument("--only", default="", help="only subjects whose name contains this")
    parser.add_argument("--schedules", type=int, default=10)
    options = parser.parse_args()
    emulator.prepare()
    seeds = emulator.schedules(options.schedules)
    everything = []
    for name, make in SUBJECTS.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        subject = prepare(make(), seeds)
        outcomes = []
        for m in mutations(subject.ptx):
            outcomes.append(try_mutation(subject, m, seeds))
            if options.details:
                o, lines = outcomes[-1], subject.ptx.split("\n")
                text = lines[m.lines[0]].strip()[:90]
                print(f"{m.kind} @ line {m.lines[0] + 1}: {o.how} (seed {o.seed}) {o.message} | {text}", flush=True)
        print(f"\n## {name}: {len(outcomes)} faults, {time.perf_counter() - start:.0f} s")
        print(f"reported for the unbroken kernel: {sorted(subject.clean)}\n\n{table(outcomes)}\n", flush=True)
        everything += outcomes
    print(f"## all\n\n{table(everything)}")


if __name__ == "__main__":
    main()
