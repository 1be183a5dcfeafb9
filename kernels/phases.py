# SPDX-License-Identifier: Apache-2.0
"""Which CTA of a persistent launch takes which items: guided self-scheduling without a counter, in plain Python.

The grid is larger than one wave of CTAs, and the GPU starts a CTA wherever another one has ended. Every wave is a
phase. It takes half of the rounds that are left (a round is an item for each of its CTAs), so that later phases make up
for what earlier ones shared out unevenly. A counter in global memory would have to be reset, and kept apart by launch,
stream and graph.

With R rounds in all, R >> k are left before phase k: half of n rounds, rounded up, is n - (n >> 1).
"""

from collections.abc import Iterator


def span(rounds, phase) -> tuple:
    """(first round, end) of a phase. rounds: of all phases. Of numbers on the host and of Int32 in the kernel."""
    return rounds - (rounds >> phase), rounds - (rounds >> (phase + 1))


def num_rounds(items: int, ctas_per_wave: int) -> int:
    """Rounds of all phases; the last one may leave CTAs without an item."""
    return -(-items // ctas_per_wave)


def num_ctas(items: int, ctas_per_wave: int) -> int:
    """CTAs of all phases: whole waves, and in the last phase, which is one round, a CTA for each item that is left."""
    rounds = num_rounds(items, ctas_per_wave)
    return (rounds.bit_length() - 1) * ctas_per_wave + items - (rounds - 1) * ctas_per_wave if rounds else 0


def shares(items: int, ctas_per_wave: int) -> Iterator[range]:
    """The items of every CTA, as ``scheduler.Scheduler`` finds them."""
    rounds = num_rounds(items, ctas_per_wave)
    for cta in range(num_ctas(items, ctas_per_wave)):
        phase, place = divmod(cta, ctas_per_wave)
        first, end = span(rounds, phase)
        yield range(first * ctas_per_wave + place, min(items, end * ctas_per_wave), ctas_per_wave)


def zigzag(items: int, ctas_per_wave: int) -> Iterator[list]:
    """The items of every CTA of a launch in zigzag, which has no phases."""
    ctas = min(items, ctas_per_wave)
    for cta in range(ctas):
        places = (cta, ctas - 1 - cta)  # of even and odd rounds
        indices = (step * ctas + places[step % 2] for step in range(num_rounds(items, ctas_per_wave)))
        yield [index for index in indices if index < items]
