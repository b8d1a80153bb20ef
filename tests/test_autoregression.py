"""The experiment on long texts: the transformer, what is equal between the models, the scores, the stored result."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import experiments, report
from benchmarks.autoregression import CausalTransformer, causal_flops, causal_parameters, counted, equal_blocks, scores
from benchmarks.workloads import parameters
from engine.metrics.n_gram import KneserNey
from engine.model.cost import forward_flops
from engine.presets import PRESETS
from engine.training import denoiser

MODEL = PRESETS["text-tiny"].model
VECTORS = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return CausalTransformer(VECTORS, MODEL, 2)


def test_a_word_depends_on_earlier_ones_only(network):
    words = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(1))
    changed = words.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    a, b = network(words), network(changed)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_the_loss_is_of_a_text_with_its_end_and_of_nothing_behind(network):
    words = torch.tensor([[5, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [7] * 12])
    assert counted(words).sum(1).tolist() == [3, 12]
    nats = network.loss(words)
    assert (nats[0, 3:] == 0).all() and (nats[0, :3] > 0).all()
    first = network(torch.zeros(1, 1, dtype=torch.int64)).log_softmax(-1)[0, 0]  # before any word
    torch.testing.assert_close(nats[:, 0], -first[words[:, 0]])


def test_texts_are_drawn_from_the_probabilities_of_the_model(network):
    with torch.no_grad():
        network.vectors.zero_()
        network.vectors[3] = 100.0
        network.head.weight.zero_()
        network.head.bias.fill_(1.0)
    drawn = network.generate(70, torch.Generator().manual_seed(0))  # more than a batch
    assert drawn.shape == (70, 12) and (drawn == 3).all()


def test_both_models_have_as_many_parameters_and_operations():
    model = PRESETS["text"].model
    vectors = torch.empty(7000, 64, device="meta")
    blocks = equal_blocks(vectors, model)
    assert causal_parameters(vectors, model, blocks) == pytest.approx(parameters(model) + vectors.numel(), rel=0.1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only one that is counted
        CausalTransformer(VECTORS, MODEL, 2)(torch.zeros(3, 12, dtype=torch.int64))
    assert counter.get_total_flops() == 3 * causal_flops(50, MODEL, 2)


def test_scores_of_texts_count_their_n_grams():
    model, known = KneserNey([["a", "b", "c", "d"]]), {("a", "b", "c", "d")}
    found = scores(["a b c d", "a b c e"], model, known)
    nats = sum(model.surprise(words.split())[0] for words in ("a b c d", "a b c e"))
    assert found["perplexity of 3-grams"] == pytest.approx(math.exp(nats / 10))
    assert found["% known 4-grams"] == 50 and found["words a text"] == 4
    assert (found["distinct-1"], found["distinct-2"]) == (5 / 8, 4 / 6)
    assert scores([""], model, known)["% known 4-grams"] == 0


def test_the_experiment_stores_texts_that_the_report_shows_and_more_steps_continue_it(tmp_path, monkeypatch):
    monkeypatch.setattr(denoiser, "JOINT_SAMPLES", 1)
    for name, count in (("captions.json", 30), ("captions_test.json", 12)):
        captions = [
            {"image_id": i, "caption": f"a {('red', 'blue')[i % 2]} car number {i} of many"} for i in range(count)
        ]
        (tmp_path / name).write_text(json.dumps({"images": [], "annotations": captions}))
    results = tmp_path / "results"
    arguments = ["autoregression", "--preset", "text-tiny", "--data", str(tmp_path), "--out", str(tmp_path / "runs"),
                 "--results", str(results), "--count", "11", "--sampling-steps", "2", "--device", "cpu", "--dtype",
                 "float32", "--batch", "4"]  # fmt: skip
    for steps in ("6", "12"):
        assert experiments.main([*arguments, "--steps", steps]) == 0
    stored = json.loads((results / "experiment-autoregression-text-tiny.json").read_text())
    rows = {row["texts"]: row for row in stored["rows"]}
    assert list(rows) == ["held out", "words drawn by frequency", "diffusion", "autoregressive"]
    ours, theirs = rows["diffusion"], rows["autoregressive"]
    assert ours["steps"] == 12 and ours["training PFLOP"] == pytest.approx(theirs["training PFLOP"], rel=0.1)
    assert ours["MFLOP/forward"] == forward_flops(MODEL, 1) / 1e6 and ours["CPU-minutes of training"] > 0
    assert all(len(texts) == 10 for texts in stored["samples"].values())
    assert report.main(["--results", str(results), "--out", str(tmp_path / "RESULTS.md")]) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"\n* {stored['samples']['autoregressive'][0] or '(no word)'}\n" in page and "| autoregressive |" in page
    assert "a causal transformer" in (tmp_path / "TABLES.md").read_text()


@pytest.mark.parametrize(("name", "preset"), [("autoregression", "emoji"), ("masking", "text")])
def test_a_preset_of_another_experiment_is_refused(tmp_path, capsys, name, preset):
    options = [
        name,
        "--preset",
        preset,
        "--data",
        str(tmp_path),
        "--steps",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert experiments.main(options) == 2
    assert f"--preset: '{preset}' does not fit the experiment {name}; use" in capsys.readouterr().err
