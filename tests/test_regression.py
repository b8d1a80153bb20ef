"""The check of stored ratios: it measures what is stored, and a ratio that has become larger fails it."""

import json
import shutil

import pytest
import torch

from benchmarks import regression
from benchmarks.race import Contender
from benchmarks.regression import PLACES, RATIOS, RESULTS


def test_every_ratio_has_stored_times_and_a_contender_that_can_be_timed(monkeypatch):
    monkeypatch.setattr("engine.compiled.entry", lambda source, build=False: None)  # compiling takes long
    stored = regression.baseline(RESULTS)
    assert stored.seconds.keys() == set(PLACES) and all(seconds > 0 for seconds in stored.seconds.values())
    found = regression.contenders(torch.float32)
    assert found.keys() == set(PLACES) and all(isinstance(c, Contender) for c in found.values())


def test_a_ratio_above_the_tolerance_fails(monkeypatch, capsys):
    stored = regression.baseline(RESULTS)
    now = dict(stored.seconds)
    monkeypatch.setattr(regression, "measured", lambda dtype, seconds: now)
    monkeypatch.setattr(regression, "facts", lambda device: {"device": device_here})
    device_here = stored.device
    assert regression.main([]) == 0 and "no ratio is above 1.5" in capsys.readouterr().out
    now[RATIOS[0].ours] *= 2
    assert regression.main([]) == 1
    out = capsys.readouterr().out
    assert out.count("REGRESSION") == 1 and "2.00  REGRESSION" in out
    device_here = "another processor"
    assert regression.main([]) == 0


def test_the_latest_run_on_a_cpu_is_the_baseline(tmp_path):
    newer = json.loads((RESULTS / "cpu.json").read_text())
    shutil.copy(RESULTS / "cpu.json", tmp_path / "a.json")
    newer["datetime"] = "2099-01-01"
    (tmp_path / "b.json").write_text(json.dumps(newer))
    newer["machine_info"]["engine"]["cuda"] = "13.0"
    newer["datetime"] = "2099-01-02"
    (tmp_path / "c.json").write_text(json.dumps(newer))
    assert regression.baseline(tmp_path).name == "b.json"


def test_without_a_stored_run_it_says_how_to_store_one(tmp_path, capsys):
    assert regression.main(["--results", str(tmp_path)]) == 2
    assert "--benchmark-json" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_restored(monkeypatch, fails):
    def time_in_turns(*_, **__):
        if fails:
            raise RuntimeError("stopped")
        return {}

    monkeypatch.setattr(regression, "contenders", lambda dtype: {})
    monkeypatch.setattr(regression, "time_in_turns", time_in_turns)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(RuntimeError):
                regression.measured(torch.float32, 1.0)
        else:
            assert regression.measured(torch.float32, 1.0) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
