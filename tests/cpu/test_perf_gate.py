# SPDX-License-Identifier: Apache-2.0
"""The gate on host overhead, import, compile, plans and the emulator's speed: it holds here, and it can fail."""

import json
import subprocess
import sys

import pytest

from perf import gate, host


@pytest.mark.parametrize("name", gate.MEASURES)
def test_nothing_is_slower_than_its_limit(name):
    """The limits are what was measured, times 4 to 10: see perf/limits.json."""
    own = {key: entry for key, entry in gate.limits().items() if key.split()[0] == name}
    found, said = gate.run({name: gate.MEASURES[name]}, own)
    assert said == [] and found.keys() == own.keys() and own
    assert all(value > 0 for value in found.values())


def test_it_fails_over_a_limit_after_three_tries_and_reports_what_is_missing():
    tries = []

    def slow():
        tries.append(1)
        return {"ms": 10.0 - len(tries), "other": 1.0}

    limits = {"a ms": {"measured": 2.0, "factor": 3}, "a gone": {"measured": 1.0, "factor": 2}}
    found, said = gate.run({"a": slow}, limits)
    assert found == {"a ms": 7.0} and len(tries) == 3
    assert said == ["a ms 7 is more than 6 (3 x 2)", "a gone was not measured"]
    tries.clear()
    assert gate.run({"a": slow}, {"a ms": {"measured": 2.0, "factor": 5}}) == ({"a ms": 9.0}, [])
    assert len(tries) == 1, "a figure that passes is not measured again"


def test_a_slower_call_is_caught(monkeypatch):
    """A hundred microseconds more in every call are over the limit."""
    import time

    from fgattn_cute import api

    original = api.run

    def slowed(*args):
        time.sleep(1e-4)
        return original(*args)

    monkeypatch.setattr(api, "run", slowed)
    _, said = gate.run({"call": lambda: host.call_overhead(100)}, {"call us": gate.limits()["call us"]})
    assert len(said) == 1 and said[0].startswith("call us")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "LIMITS", tmp_path / "limits.json")
    gate.LIMITS.write_text(json.dumps({"machine": "m", "limits": {"a s": {"measured": 1.0, "factor": 2}}}))
    monkeypatch.setattr(gate, "MEASURES", {"a": lambda: {"s": 3.0}})
    monkeypatch.setattr(sys, "argv", ["gate"])
    with pytest.raises(SystemExit) as ended:
        gate.main()
    assert ended.value.code == 1 and "a s 3 is more than 2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gate", "--write"])
    gate.main()
    assert gate.limits() == {"a s": {"measured": 3.0, "factor": 2}}
    done = subprocess.run(
        [sys.executable, "-m", "perf.gate", "--help"], cwd=host.ROOT, capture_output=True, text=True, check=True
    )
    assert "--write" in done.stdout
