# SPDX-License-Identifier: Apache-2.0
"""docs/masks.md: its examples run, it names every public function, its table is monotone as its text says."""

import contextlib
import io
import re
from pathlib import Path

from fgattn_cute import SliceMask, convert, predict

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "masks.md").read_text()


def test_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        scope: dict = {}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(example, "masks.md", "exec"), scope)
        assert isinstance(scope["mask"], SliceMask) and 0 < scope["mask"].density < 1
        assert printed.getvalue()


def test_every_public_name_is_explained():
    for name in predict.__all__:
        assert re.search(rf"\b{name}\b", TEXT), f"predict.{name}"
    for name in convert.__all__:
        assert f"`{name.split('_', 1)[1]}`" in TEXT, f"convert.{name}"


def test_the_table_shows_what_the_text_says():
    rows = {
        (int(m), int(n)): [float(x) for x in values.split("|")]
        for m, n, values in re.findall(r"^\| (\d+) x (\d+) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE)
    }
    assert set(rows) == {(m, n) for m in (16, 64, 128) for n in (1, 8, 64, 128)}
    for (m, n), kept in rows.items():
        assert kept == sorted(kept)
        coarser = [(a, b) for a, b in rows if a >= m and b >= n]
        assert all(fine >= coarse for other in coarser for fine, coarse in zip(kept, rows[other], strict=True))
    missed = {slices: round(100 * (1 - rows[slices][1])) for slices in ((128, 1), (128, 128), (16, 1))}
    said = re.search(r"miss (\d+) % of the mass where blocks of 128 keys miss (\d+) %;.* it is (\d+) %", TEXT)
    assert list(missed.values()) == [int(share) for share in said.groups()]
