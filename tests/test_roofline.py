"""The static model of a step's time: its operations are those that run, and each takes its longest limit."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import Ceilings, Operation, forward_operations, predicted, step_operations
from engine.kernels import adaln
from engine.model.cost import forward_bytes, forward_flops
from engine.presets import PRESETS

COCO = PRESETS["coco256"].model
UVIT = PRESETS["uvit-tiny"].model
NETWORKS = {
    "adaln": COCO,
    "time token": replace(PRESETS["tiny"].model, time_conditioning="token"),
    "uvit": UVIT,
    "post-norm uvit": replace(UVIT, uvit=replace(UVIT.uvit, norm="post", extra_tokens=2)),
}


def traced(model, device_type="cuda", rows=2, **options):
    return forward_operations(model, rows, torch.bfloat16, device_type, **options)


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_operations_have_the_flops_and_at_least_the_bytes_of_the_forward(model, device_type):
    operations = traced(model, device_type)
    assert sum(o.flops for o in operations) == forward_flops(model, 2)
    assert sum(o.moved for o in operations) >= forward_bytes(model, 2, 2)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_flops_are_the_same_with_any_attention(monkeypatch, backend):
    monkeypatch.setitem(roofline.backend.UNMEASURED, "attention", backend)
    operations = traced(COCO)
    assert any(o.name.startswith("attention") for o in operations) == (backend == "triton")
    assert sum(o.flops for o in operations) == forward_flops(COCO, 2)


def test_launches_are_those_of_the_kernels_without_views_and_allocations():
    deeper = replace(COCO, shared_depth=COCO.shared_depth + 2)  # a block without a skip and one with
    added = Counter(o.name for o in traced(deeper)) - Counter(o.name for o in traced(COCO))
    assert added.keys() <= {"linear", "cat", "gelu", "_addmm_activation", "adaln", "scaled_dot_product_attention"}
    assert added["scaled_dot_product_attention"] == 2 and added["linear"] >= 6
    names = {o.name.partition(".")[0] for o in traced(COCO)}
    assert not names & {"view", "flatten", "unflatten", "transpose", "permute", "unbind", "narrow", "empty", "device"}


def test_a_kernel_reads_few_rows_of_the_table_of_times():
    norms = [o for o in traced(COCO, rows=2) if o.name == "adaln"]
    _, moved = adaln.cost(2, COCO.tokens, COCO.dim, 2, residual=True)
    assert norms and all(0 < o.moved < 1.1 * moved for o in norms)


def test_a_step_leaves_out_what_runs_once_and_adds_the_solver():
    emoji = PRESETS["emoji"]  # clean conditioning: the text's in-blocks run once
    step = step_operations(emoji, 1, torch.bfloat16, "cuda", ("image",))
    assert sum(o.flops for o in step) == forward_flops(emoji.model, 2, ("image",), ("text",))
    assert [o.name for o in step if "cfg_step" in o.name] == ["psunet.cfg_step"]


def test_an_operation_takes_the_longest_of_its_limits():
    at = Ceilings(copy=1e9, matmul=1e12, launch=1e-6)
    products, copy, tiny = Operation("mm", 1e9, 1e3), Operation("copy", 0, 1e7), Operation("add", 0, 8)
    assert [o.seconds(at) for o in (products, copy, tiny)] == pytest.approx([1e-3, 1e-2, 1e-6])
    assert predicted([products, copy, tiny], at) == pytest.approx(1.1001e-2, rel=1e-3)


def test_the_command_prints_a_line_for_each_device_and_batch(capsys):
    assert roofline.main(["--preset", "tiny", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| H100", "| H200")) for line in lines) == 6
