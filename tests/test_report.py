"""RESULTS.md and TABLES.md: what is written of stored runs, how runs are compared, and what was not measured."""

import json
import re

import pytest

from benchmarks import report, stored, summary, tables
from benchmarks.questions import PRODUCTS
from benchmarks.race import Contender, Timing, record
from engine.errors import InputError

CEILINGS = {"copy": 1e10, "float32": 1e11, "bfloat16": 2e11}


def stored_run(medians, device="a processor"):
    statistics = {"iqr": 0.01, "min": 0.1, "rounds": 5}
    benchmarks = [
        {
            "group": "attention, 2 rows", "name": name, "fullname": f"benchmarks/test_kernels.py::{name}",
            "extra_info": {"contender": name, "dtype": "float32", "p95": median, "peak_bytes": None, "flops": 1e6,
                           "bytes": 1e5, "flops_per_second": 1e6 / median,
                           "bytes_per_second": 1e5 / median},
            "stats": {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, **statistics},
        }
        for name, median in medians.items()
    ]  # fmt: skip
    engine = {"device": device, "threads": 1, "torch": "2", "ceilings": CEILINGS}
    return {
        "machine_info": {"engine": engine}, "commit_info": {"id": "abc", "dirty": True}, "benchmarks": benchmarks,
        "datetime": "2026-01-02T03:04:05",
    }  # fmt: skip


def test_a_record_has_the_rates_at_the_median_and_a_run_their_share_of_the_ceilings():
    contender = Contender(lambda: None, flops=1e10, moved=1e9, images=4, facts={"rows": 2})
    found = record(contender, Timing([0.5, 0.2, 0.2], None), "float32")
    run = stored_run({"a": 0.2})
    run["benchmarks"][0]["extra_info"] |= found
    (row,) = stored.rows_by_group(run)["attention, 2 rows"]
    assert row["percent_of_matmul"] == pytest.approx(50) and row["percent_of_copy"] == pytest.approx(50)
    assert found["images_per_second"] == pytest.approx(20) and found["p95"] == 0.5 and found["rows"] == 2


def test_a_run_is_compared_by_ratios_divided_by_the_machines_drift():
    old = stored_run({"a": 1.0, "b": 2.0, "c": 3.0})
    lines, none_slower = report.compare(stored_run({"a": 2.0, "b": 4.0, "c": 6.0}), old, 1.25)
    assert none_slower and "median ratio is 2.000" in lines[0]
    lines, none_slower = report.compare(stored_run({"a": 1.0, "b": 2.0, "c": 6.0}), old, 1.25)
    assert not none_slower and "SLOWER" in lines[1] and lines[1].endswith("c") and "SLOWER" not in lines[2]
    with pytest.raises(InputError, match="another.*different machines"):
        report.compare(stored_run({"a": 1.0}, device="another"), old, 1.25)
    with pytest.raises(InputError, match="runs have in common"):
        report.compare(stored_run({"z": 1.0}), old, 1.25)
    with pytest.raises(InputError, match="an experiment.* has no times"):
        report.compare({"experiment": "depths"}, old, 1.25)


def test_results_name_the_machine_the_ceilings_and_what_is_missing(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (results / "cpu.json").write_text(json.dumps(stored_run({"a": 1e-3, "b": 2e-3})))
    assert report.main(["--results", str(results), "--out", str(tmp_path / "RESULTS.md")]) == 0
    page, text = ((tmp_path / name).read_text() for name in ("RESULTS.md", "TABLES.md"))
    for part in ("a processor", "with uncommitted changes", "copy 10.0 GB/s", "| b | 2 ms |", "| 2.00 |"):
        assert part in text
    assert "* Anything on a GPU" in page and "experiments on approximations, architecture" in page
    assert "| [cpu](TABLES.md#cpu) | kernels | 2026-01-02 | `abc` | a processor |" in page
    plots = {path.name for path in results.glob("*.png")}
    assert plots == {"cpu-bars-kernels.png", "cpu-roofline.png"} and all(plot in text for plot in plots)
    for wrong in ("{}", "not json"):
        (results / "cpu.json").write_text(wrong)
        assert report.main(["--results", str(results)]) == 2
        assert "cpu.json" in capsys.readouterr().err


def test_keys_of_earlier_runs_are_read_by_their_present_names(tmp_path):
    run = stored_run({"a": 1e-3})
    run["benchmarks"][0]["extra_info"]["pictures_per_second"] = 12.5
    (tmp_path / "old.json").write_text(json.dumps(run))
    text = tables.markdown("old", stored.read(tmp_path / "old.json"), [])
    assert "images/s" in text and "| 12.5 |" in text and "picture" not in text


def test_a_loop_is_compared_with_a_plain_one_and_with_its_products():
    run = stored_run({"plain, float32": 4.0, "plain": 3.0, "eager": 2.0, "compiled": 1.0,
                      PRODUCTS: 0.8})  # fmt: skip
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "loop, batch 1"
    text = tables.markdown("cpu", run, [])
    assert "fastest loop is compiled: 4.00 times as fast" in text and "1.25 times as long" in text and "80 %" in text


def test_a_loop_that_lacks_a_contender_is_reported_without_the_comparison():
    run = stored_run({"eager": 2.0, PRODUCTS: 0.8})
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "loop, batch 1"
    assert "| eager | 2 s |" in tables.markdown("cpu", run, []) and "fastest loop" not in tables.markdown(
        "cpu", run, []
    )


@pytest.mark.parametrize(
    "ours, verdict", [(2.0, "| 0.50 | yes |"), (3.7, "| 0.93 | undecided |"), (9, "| 2.25 | no |")]
)
def test_the_papers_claims_about_speed_are_tested_by_medians_and_quartiles(ours, verdict):
    run = stored_run({"PS-U-Net, eager": ours, "U-ViT-multi, eager": 4.0})
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "training, batch 64"
    text = tables.markdown("cpu", run, [])
    claim = "PS-U-Net trains faster than a U-ViT-multi with as many parameters."
    assert f"| {claim} | training, batch 64 | 1 {verdict}" in text and "samples faster" not in text


def test_a_request_is_compared_with_the_same_work_without_a_worker():
    run = stored_run({"calling thread": 2.0, "Sampler.run and Sampler.call": 2.0, "Engine.generate": 2.0})
    rounds = [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.01, 2.01, 4.0]
    for benchmark, data in zip(run["benchmarks"], rounds, strict=True):
        benchmark["group"] = "hand-over, text-to-image, one request, 10 steps"
        benchmark["stats"]["data"] = data
    assert "`Engine.generate` takes 100.5 % of the time" in tables.markdown("cpu", run, [])
    del run["benchmarks"][0]
    assert "of the time" not in tables.markdown("cpu", run, [])


def test_latencies_under_load_are_compared_by_their_95th_percentiles():
    run = stored_run({"step-level batching": 1.0, "request-level batching": 2.0, "one at a time": 4.0})
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "service, 80% of capacity"
        facts = {"p50": 0.5, "p99": 9.0, "queue_p50": 0.001, "queue_p95": 0.25, "goodput": 12.5}
        facts |= {"step": [0.008, 0.02], "predicted_ratio": 0.837}
        benchmark["extra_info"] |= facts | {"requests": 70, "answered": 69}
    text = tables.markdown("cpu", run, [])
    for part in ("0.50 times that of request-level batching and 0.25 times that of one at a time", "good answers/s",
                 "steps of 8 ms + 20 ms a sample (`benchmarks/queueing.py`): 0.84 times that of request-level batching",
                 "| step-level batching | 500 ms | 1 s | 9 s | 1 ms | 250 ms | 70 | 69 | 12.5 |"):  # fmt: skip
        assert part in text
    del run["benchmarks"][0]
    assert "| one at a time |" in tables.markdown("cpu", run, []) and "times that" not in tables.markdown(
        "cpu", run, []
    )


def test_the_calls_of_joint_samples_stand_beside_their_times():
    run = stored_run({"PS-U-Net, together": 1.0, "PS-U-Net, text first": 2.0})
    for benchmark, calls in zip(run["benchmarks"], (10, 20), strict=True):
        benchmark["group"] = "joint order, batch 1, 10 steps"
        benchmark["extra_info"]["calls"] = calls
    text = tables.markdown("cpu", run, [])
    assert "| calls |" in text and "| 1.00 | 10 |" in text and "| 2.00 | 20 |" in text


def test_two_passes_are_compared_with_three_in_a_batch_and_one_by_one():
    run = stored_run({"UniDiffuser, 3 passes in a batch": 2.0, "UniDiffuser, 3 passes one by one": 5.0,
                      "alternate, 2 passes": 1.0})  # fmt: skip
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "sampling, guided joint of the U-ViT-multi, batch 1"
    text = tables.markdown("cpu", run, [])
    assert "| 0.50 | yes |" in text and "| 0.20 | yes |" in text
    del run["benchmarks"][:2]
    assert "claim" not in tables.markdown("cpu", run, [])


def run_of_groups(times, device="a processor", datetime="2026-01-02T03:04:05"):
    """A stored run of {group: {contender: median}}."""
    run = stored_run({}, device)
    for group, medians in times.items():
        benchmarks = stored_run(medians)["benchmarks"]
        run["benchmarks"] += [benchmark | {"group": group} for benchmark in benchmarks]
    return run | {"datetime": datetime}


LOOPS = {f"loop, text-to-image, batch {batch}, 10 steps": {"eager": eager, PRODUCTS: 1.0}
         for batch, eager in ((1, 1.2), (16, 3.0))}  # fmt: skip


def test_the_first_page_says_what_was_asked_and_where_it_falls_short():
    kernels = {"attention, 2 rows": {"engine": 1.0, "SDPA": 2.0}, "cfg_step, 1 rows": {"engine": 4.0, "other": 1.0},
               "cfg_step, 2 rows": {"engine": 2.0, "other": 1.0, "faster (less work)": 0.1}}  # fmt: skip
    page = summary.first_page({"cpu": run_of_groups(LOOPS | kernels)}, "TABLES.md")
    assert "| The loop takes little more than its products: eager, 2 rows. | 1.8 | 1.20 | 1 of 1 |  |" in page
    assert "| Each kernel takes no longer than its fastest peer. | 1 | 0.50 to 4.00 | 1 of 3 |  |" in page
    short = [line for line in page.splitlines() if line.startswith("* **")]
    assert short == [
        "* **4.00** instead of at most 1: engine against other, in cfg_step, 1 rows, and 1 more.",
        f"* **3.00** instead of at most 1.5: eager against {PRODUCTS}, in loop, text-to-image, batch 16, 10 steps.",
    ]


def test_the_first_page_keeps_devices_apart_and_takes_the_latest_run_of_each():
    (group, medians), *_ = LOOPS.items()
    later = run_of_groups({group: medians | {"eager": 1.4}}, datetime="2026-02-01")
    other = run_of_groups({group: medians | {"eager": 1.1}}, device="another")
    page = summary.first_page({"a": later, "b": run_of_groups({group: medians}), "c": other}, "TABLES.md")
    assert "| 1.8 | 1.40 | 1 of 1 |" in page and "| 1.8 | 1.10 | 1 of 1 |" in page and "| 1.8 | 1.20 |" not in page
    assert "## Speed on a processor" in page and "## Speed on another" in page


def test_the_first_page_is_that_of_the_stored_runs_and_its_links_are_headings_of_the_tables():
    runs = {file.stem: stored.read(file) for file in sorted((report.HERE / "results").glob("*.json"))}
    page = summary.first_page(runs, "TABLES.md")
    written, text = (report.HERE.joinpath(name).read_text(encoding="utf-8") for name in ("RESULTS.md", "TABLES.md"))
    assert written == page + "\n", "run python -m benchmarks.report"
    headings = {re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("## ")}  # fmt: skip
    assert set(re.findall(r"\(TABLES\.md#([^)]*)\)", page)) == headings


def test_predicted_times_stand_beside_the_measured_ones():
    run = stored_run({"eager": 4e-3, "plain": 5e-3})
    run["benchmarks"][0]["extra_info"] |= {"launches": 99, "predicted": 1e-3}
    text = tables.markdown("cpu", run, [])
    assert "| launches | predicted | predicted/measured |" in text and "| 99 | 1 ms | 0.25 |" in text
