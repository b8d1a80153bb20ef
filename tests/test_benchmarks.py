"""The benchmarks themselves: timing in turns, right counts and metrics, reports that say what was not measured."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import experiments, report
from benchmarks.descriptions import DESCRIPTIONS
from benchmarks.metrics import bleu4, diversity, features_of, frechet_distance
from benchmarks.race import Contender, Replay, Timing, record, time_in_turns
from benchmarks.sweeps import reconditioned
from benchmarks.test_handover import StepsInThisThread
from benchmarks.test_loop import PASSES, STEPS, products_of
from benchmarks.trials import read_data
from benchmarks.workloads import (
    equal_compute,
    equal_depth,
    equal_parameters,
    forward_inputs,
    parameters,
    plain_loop,
    random_denoiser,
    sampling_flops,
    specs_of,
    table_of,
)
from engine import checkpoint
from engine.checkpoint import BUILT_IN
from engine.config import DiffusionConfig, SamplingConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.errors import InputError
from engine.model.cost import forward_flops
from engine.presets import PRESETS
from engine.sampling.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "float32": 1e11, "bfloat16": 2e11}
COCO = PRESETS["coco256"].model
TINY = PRESETS["tiny"]


def test_contenders_take_turns_in_an_order_that_rotates(monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.race.ROUND_SECONDS", 0)
    contenders = {name: Contender(lambda n=name: calls.append(n)) for name in "abc"}
    timings = time_in_turns(contenders, CPU, seconds=0, least=4)
    rounds = ["".join(calls[-12:][i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert all(len(t.seconds) == 4 and t.peak_bytes is None for t in timings.values())


def test_short_calls_are_repeated_until_the_clock_can_tell_them_apart():
    count = [0]
    time_in_turns({"a": Contender(lambda: count.__setitem__(0, count[0] + 1))}, CPU, seconds=0, least=2)
    assert count[0] > 1000


def test_a_contender_that_computes_something_else_is_reported():
    right = torch.ones(3)
    assert Contender(lambda: right + 1e-7, lambda: right).mismatch() is None
    assert "computes something else" in Contender(lambda: right + 1e-3, lambda: right).mismatch()


def test_a_replayed_clock_shows_the_times_that_were_measured():
    clock = Replay()
    call, seen = clock.play([0.25, 4.0]), []
    for _ in range(2):
        started = clock()
        call()
        seen.append(clock() - started)
    assert seen == [0.25, 4.0]


def test_what_a_contender_runs_within_is_entered_before_the_clock_starts():
    seen = []

    @contextmanager
    def within():
        seen.append("in")
        yield
        seen.append("out")

    contender = Contender(lambda: seen.append("run") or time.sleep(0.01), within=within)
    time_in_turns({"a": contender}, CPU, seconds=0, least=1)
    assert seen == ["in", "run", "out"] * (len(seen) // 3)


def test_a_record_has_the_rates_at_the_median_and_a_run_their_share_of_the_ceilings():
    contender = Contender(lambda: None, flops=1e10, moved=1e9, images=4, facts={"rows": 2})
    found = record(contender, Timing([0.5, 0.2, 0.2], None), "float32")
    run = stored_run({"a": 0.2})
    run["benchmarks"][0]["extra_info"] |= found
    (row,) = report.rows_by_group(run)["attention, 2 rows"]
    assert row["percent_of_matmul"] == pytest.approx(50) and row["percent_of_copy"] == pytest.approx(50)
    assert found["images_per_second"] == pytest.approx(20) and found["p95"] == 0.5 and found["rows"] == 2


def test_sampling_flops_count_the_in_blocks_of_known_modalities_once():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    inputs, times = forward_inputs(TINY.model, 2, CPU)
    with FlopCounterMode(display=False) as once:
        features = {"text": denoiser.branch_features("text", inputs, times)}
    with FlopCounterMode(display=False) as step:
        denoiser(inputs, times, ("image",), features)
    expected = once.get_total_flops() + 5 * step.get_total_flops()
    assert TINY.model.modality("text").depth > 0 and sampling_flops(TINY, 2, 5, ("image",)) == expected
    diffusion = DiffusionConfig(conditioning="renoise", time_sampling="independent")
    renoise = replace(TINY, diffusion=diffusion, sampling=SamplingConfig())
    assert sampling_flops(renoise, 2, 5, ("image",)) == 5 * forward_flops(TINY.model, 2, ("image",))


def test_the_products_of_a_loop_are_all_of_its_flops():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    run = products_of(denoiser, TINY, batch=1)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == STEPS * forward_flops(TINY.model, PASSES, ("image",), ("text",))


def test_all_loops_that_are_compared_make_the_same_samples():
    denoiser = random_denoiser(TINY, CPU, torch.float32)
    specs = specs_of(TINY, table_of(TINY, 3, GuidanceOptions(scale=3.0)), ("image",), 1)
    expected = Sampler(denoiser, TINY.model, buckets=[1]).run(specs)
    for calls in (1, PASSES):
        torch.testing.assert_close(plain_loop(denoiser, specs, CPU, ("image",), calls), expected)
    here = StepsInThisThread(denoiser, ("text",), CPU)
    for _ in range(2):  # the second run finds the memory of the first
        torch.testing.assert_close(here(specs), expected)


def test_models_are_equal_in_what_their_names_say():
    assert equal_depth(COCO).shared_depth == 17
    assert parameters(equal_parameters(COCO)) == pytest.approx(parameters(COCO), rel=0.04)
    assert forward_flops(equal_compute(COCO), 1) == pytest.approx(forward_flops(COCO, 1), rel=0.06)


def test_the_frechet_distance_is_that_of_the_fitted_gaussians():
    x = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])  # mean 1, covariance 4/3
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(18)
    assert frechet_distance(x, 2 * x) == pytest.approx(2 + 2 * (2 - 1) ** 2 * 4 / 3)
    skew = torch.tensor([[1.0, 2], [3, 1], [0, 5], [2, 2], [7, 1]])
    assert frechet_distance(x, skew) == pytest.approx(frechet_distance(skew, x))
    with pytest.raises(InputError, match="count"):
        frechet_distance(x[:1], x)


def test_bleu_counts_clipped_n_grams_and_punishes_brevity():
    assert bleu4(["a red car on a road"], [["a red car on a road", "something else"]]) == pytest.approx(1)
    assert bleu4(["the the the the the"], [["the cat sat on the mat"]]) == 0
    # 1-grams 6/6, 2-grams 4/5, 3-grams 3/4, 4-grams 2/3; as long as the nearest reference
    expected = (4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu4(["a b c d e a"], [["a b c d e", "x a a y z w"]]) == pytest.approx(expected * 1.0, rel=1e-6)
    short = bleu4(["a b c d"], [["a b c d e f"]])
    assert short == pytest.approx(2.718281828459045 ** (1 - 6 / 4))


def test_diversity_is_in_levels():
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 1.0)])
    assert diversity(images) == pytest.approx(127.5)


def test_features_come_from_a_file_and_others_are_refused(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("import torch\ndef load():\n    return torch.nn.Flatten()\n")
    assert features_of(file, CPU)(torch.full((2, 3, 4, 4), -1.0)).eq(0).all()
    (tmp_path / "other.py").write_text("")
    for wrong in (tmp_path / "other.py", tmp_path / "nowhere.py", tmp_path / "weights.pt"):
        with pytest.raises(InputError, match=f"features: {wrong} (is not a Python file|has no function)"):
            features_of(wrong, CPU)


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
    text = (tmp_path / "RESULTS.md").read_text()
    for part in ("a processor", "with uncommitted changes", "copy 10.0 GB/s", "| b | 2 ms |", "| 2.00 |"):
        assert part in text
    assert "**Not measured:** Anything on a GPU" in text and "experiments on approximations, architecture" in text
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
    text = report.markdown("old", report.read(tmp_path / "old.json"), [])
    assert "images/s" in text and "| 12.5 |" in text and "picture" not in text


def test_a_loop_is_compared_with_a_plain_one_and_with_its_products():
    run = stored_run({"plain, float32": 4.0, "plain": 3.0, "eager": 2.0, "compiled": 1.0,
                      "matrix products and attention alone": 0.8})  # fmt: skip
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "loop, batch 1"
    text = report.markdown("cpu", run, [])
    assert "fastest loop is compiled: 4.00 times as fast" in text and "1.25 times as long" in text and "80 %" in text


def test_a_loop_that_lacks_a_contender_is_reported_without_the_comparison():
    run = stored_run({"eager": 2.0, "matrix products and attention alone": 0.8})
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "loop, batch 1"
    assert "| eager | 2 s |" in report.markdown("cpu", run, []) and "fastest loop" not in report.markdown(
        "cpu", run, []
    )


@pytest.mark.parametrize(
    "ours, verdict", [(2.0, "| 0.50 | yes |"), (3.7, "| 0.93 | undecided |"), (9, "| 2.25 | no |")]
)
def test_the_papers_claims_about_speed_are_tested_by_medians_and_quartiles(ours, verdict):
    run = stored_run({"PS-U-Net, eager": ours, "U-ViT-multi, eager": 4.0})
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "training, batch 64"
    text = report.markdown("cpu", run, [])
    claim = "PS-U-Net trains faster than a U-ViT-multi with as many parameters."
    assert f"| {claim} | training, batch 64 {verdict}" in text and "samples faster" not in text


def test_a_request_is_compared_with_the_same_work_without_a_worker():
    run = stored_run({"calling thread": 2.0, "Sampler.run and Sampler.call": 2.0, "Engine.generate": 2.0})
    rounds = [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.01, 2.01, 4.0]
    for benchmark, data in zip(run["benchmarks"], rounds, strict=True):
        benchmark["group"] = "hand-over, text-to-image, one request, 10 steps"
        benchmark["stats"]["data"] = data
    assert "takes 100.5 % of the time" in report.markdown("cpu", run, [])
    del run["benchmarks"][0]
    assert "of the time" not in report.markdown("cpu", run, [])


def test_the_calls_of_joint_samples_stand_beside_their_times():
    run = stored_run({"PS-U-Net, together": 1.0, "PS-U-Net, text first": 2.0})
    for benchmark, calls in zip(run["benchmarks"], (10, 20), strict=True):
        benchmark["group"] = "joint order, batch 1, 10 steps"
        benchmark["extra_info"]["calls"] = calls
    text = report.markdown("cpu", run, [])
    assert "| calls |" in text and "| 1.00 | 10 |" in text and "| 2.00 | 20 |" in text


def test_two_passes_are_compared_with_three_in_a_batch_and_one_by_one():
    run = stored_run({"UniDiffuser, 3 passes in a batch": 2.0, "UniDiffuser, 3 passes one by one": 5.0,
                      "alternate, 2 passes": 1.0})  # fmt: skip
    for benchmark in run["benchmarks"]:
        benchmark["group"] = "sampling, guided joint of the U-ViT-multi, batch 1"
    text = report.markdown("cpu", run, [])
    assert "| 0.50 | yes |" in text and "| 0.20 | yes |" in text
    del run["benchmarks"][:2]
    assert "claim" not in report.markdown("cpu", run, [])


@pytest.fixture
def emoji(tmp_path):
    """Five images to train on and three to test with, named in words that the built-in model knows."""
    names = ["red heart", "dog", "cat", "man running", "blue heart", "woman running", "tree", "sun"]
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((64, 64)).save(tmp_path / "images" / f"{i}.png")
    for file, ids in (("captions.json", range(5)), ("captions_test.json", range(5, 8))):
        content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
            "annotations": [{"image_id": i, "caption": names[i]} for i in ids],
        }
        (tmp_path / file).write_text(json.dumps(content))
    return tmp_path


def experiment(emoji, name, *options):
    arguments = ["--data", str(emoji), "--out", str(emoji / "runs"), "--results", str(emoji / "results")]
    machine = ["--device", "cpu", "--dtype", "float32", "--sampling-steps", "1"]
    return experiments.main([name, *arguments, *machine, *options])


TRAINED = ["--preset", "tiny", "--autoencoder", str(BUILT_IN / "image"), "--steps", "1", "--batch", "2"]


@pytest.mark.parametrize(
    "options, rows",
    [
        (["masking", "--ratios", "0.5", "1"], 6),
        (["guidance", "--scales", "1", "3"], 12),
        (["architecture", *TRAINED], 6),
        (["depths", *TRAINED, "--seeds", "0", "1"], 2),
        (["masking", *TRAINED, "--ratios", "0.5"], 3),
        (["approximations", *TRAINED], 15),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_an_experiment_stores_a_table_that_is_reported_with_plots(emoji, options, rows):
    assert experiment(emoji, *options) == 0
    preset = "tiny" if "tiny" in options else "emoji"
    stored = json.loads((emoji / "results" / f"experiment-{options[0]}-{preset}.json").read_text())
    assert len(stored["rows"]) == rows and stored["command"].startswith(
        f"python -m benchmarks.experiments {options[0]}"
    )
    plots = [f"experiment-{options[0]}-{preset}.png"]
    if "curve" in stored:  # its last point is the table's
        assert stored["curve"][-1]["image error"] == stored["rows"][-1]["image error"] > 0
        plots.append(f"experiment-{options[0]}-{preset}-training.png")
    assert report.main(["--results", str(emoji / "results"), "--out", str(emoji / "RESULTS.md")]) == 0
    for name in plots:
        with Image.open(emoji / "results" / name) as plot:
            plot.verify()
    text = (emoji / "RESULTS.md").read_text()
    assert all(part in text for part in (DESCRIPTIONS[options[0]].title, *plots))


def test_of_a_single_split_no_image_is_both_trained_on_and_measured_on(emoji):
    (emoji / "captions_test.json").unlink()
    parsed = experiments.parse(["masking", "--data", str(emoji), "--out", str(emoji), "--count", "2"])
    data = read_data(experiments.options_of(parsed))
    trained, tested = ({item.image_id for item in items} for items in (data.train.items, [i for i, _ in data.test]))
    assert len(tested) == 2 and len(trained) == 3 and not trained & tested


def test_the_other_conditioning_keeps_the_network():
    loaded = checkpoint.load(BUILT_IN)
    other = reconditioned(loaded)
    assert (loaded.config.diffusion.conditioning, other.config.diffusion.conditioning) == ("clean", "renoise")
    assert other.network is loaded.network and other.codec("text").vocabulary == loaded.codec("text").vocabulary
    assert reconditioned(other).config.diffusion.conditioning == "clean"


def test_photos_are_measured_with_given_features(emoji):
    net = emoji / "net.py"
    network = "torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten())"
    net.write_text(f"import torch\ndef load():\n    return {network}\n")
    assert experiment(emoji, "depths", *TRAINED, "--features", str(net)) == 0
    row = json.loads((emoji / "results" / "experiment-depths-tiny.json").read_text())["rows"][0]
    assert row["FD"] > 0 and 0 <= row["BLEU-4"] <= 1 and row["± FD"] == "one seed"


@pytest.mark.parametrize(
    "options, named",
    [
        (["architecture"], "--steps"),
        (["masking", "--ratios", "0"], "--ratios"),
        (["masking", "--count", "1"], "--count"),
        (["guidance", "--features", "x.py"], "--autoencoder"),
        (["guidance", "--checkpoint", "nowhere"], "--checkpoint: nowhere"),
        (["depths", "--steps", "0"], "--steps"),
        (["masking", "--data", "nowhere"], "--data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_experiments_refuse_options_that_cannot_be_used(emoji, capsys, options, named):
    assert experiment(emoji, *options) == 2
    assert named in capsys.readouterr().err
    assert not (emoji / "results").exists()


@pytest.mark.slow
def test_a_benchmark_runs_and_its_stored_run_is_reported(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "-k", "cfg_step", "--seconds", "0.1",
               "--device", "cpu", "--dtype", "float32", "--benchmark-json", str(results / "run.json")]  # fmt: skip
    # pytest-benchmark stores nothing where it takes itself to be in a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = report.read(results / "run.json")
    assert stored["machine_info"]["engine"]["ceilings"]["float32"] > 1e9
    rows = [row for several in report.rows_by_group(stored).values() for row in several]
    assert rows and all(row["percent_of_copy"] > 0 for row in rows)
    assert [str(p.name) for p in report.write(results, tmp_path / "RESULTS.md")][0] == "RESULTS.md"
