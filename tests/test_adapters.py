"""LoRA adapters in an engine: each sample has its own or none, whatever it shares a step with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from adapter_cases import write_adapter
from engine_cases import assert_same, difference, mixed_requests
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from service_cases import assert_error, asynchronous, service

from engine import Engine, Request
from engine.adapters import BASE, CONFIG, PREFIX, WEIGHTS, merge_adapter, read_adapter, unmerge_adapter
from engine.checkpoint import load
from engine.errors import InputError
from engine.model.blocks import quantize_blocks
from engine.model.denoiser import Denoiser
from engine.model.lora import LAYERS, PLACES, AdapterRows, merged
from engine.sample import main

FORMS = {  # rank, seed, layers, of adapters by name
    "a": {"rank": 2, "seed": 1},
    "b": {"rank": 5, "seed": 2, "layers": ("proj", "fc2", "qkv")},
}


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, tiny_checkpoint, **form) for name, form in FORMS.items()}


@pytest.fixture(scope="module")
def merged_results(tiny_checkpoint, folders, tmp_path_factory):
    """Of `mixed_requests`, made by checkpoints that have the adapters in their weights."""
    root, results = tmp_path_factory.mktemp("merged"), {}
    for name, folder in folders.items():
        merge_adapter(tiny_checkpoint, folder, root / name)
        with Engine.from_pretrained(root / name, dtype="float32") as engine:
            results[name] = engine.generate(mixed_requests())
    return results


@pytest.fixture(scope="module")
def adapted(tiny_checkpoint, folders):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", adapters=folders) as engine:
        yield engine


def same_outputs(found, expected) -> bool:
    pairs = [(a.outputs, b.outputs) for a, b in zip(found.samples, expected.samples, strict=True)]
    return all(a["text"] == b["text"] and difference(a["image"], b["image"]) == 0 for a, b in pairs)


def test_samples_of_several_adapters_and_of_none_share_steps_and_stay_what_they_are(
    adapted, mixed, alone, merged_results
):
    names = [None, "a", "b"]
    steps = adapted.stats().forwards
    results = adapted.generate([replace(request, adapter=name) for request in mixed for name in names])
    assert adapted.stats().forwards - steps < sum(request.steps for request in mixed)
    for i, plain in enumerate(alone):
        for name, found in zip(names, results[3 * i : 3 * i + 3], strict=True):
            assert_same(found, plain if name is None else merged_results[name][i])
            assert name is None or not same_outputs(found, plain)


def test_a_scale_of_zero_is_the_checkpoint_and_of_minus_one_undoes_the_adapter(adapted, folders, alone, tmp_path):
    request = mixed_requests()[1]
    assert_same(adapted.generate(replace(request, adapter="a", adapter_scale=0.0)), alone[1])
    merge_adapter(adapted.folder, folders["a"], tmp_path / "merged")
    unmerge_adapter(tmp_path / "merged", folders["a"], tmp_path / "again")
    for name, weight in load(adapted.folder).network.state_dict().items():
        torch.testing.assert_close(load(tmp_path / "again").network.state_dict()[name], weight, rtol=0, atol=1e-6)
    other = write_adapter(tmp_path / "other", tmp_path / "merged", rank=2, seed=1)  # the same tensors
    with Engine.from_pretrained(tmp_path / "merged", dtype="float32", adapters={"a": other}) as engine:
        assert_same(engine.generate(replace(request, adapter="a", adapter_scale=-1.0)), alone[1])


def test_requests_without_an_adapter_are_bit_equal_once_some_are_loaded(adapted, mixed, alone):
    adapted.generate(replace(mixed[1], adapter="a"))
    for request, before in zip(mixed, alone, strict=True):
        assert same_outputs(adapted.generate(request), before)


def test_an_adapter_that_is_replaced_or_unloaded_stays_with_the_requests_that_had_it(tiny_checkpoint, folders):
    request = Request(prompt="red cat", steps=3, adapter="style")
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        with pytest.raises(
            InputError, match=r"^adapter: 'style' is not loaded; use one that is loaded \(none\), or load it"
        ):
            engine.generate(request)
        expected, held = {}, []
        for name, folder in folders.items():
            engine.load_adapter("style", folder)
            expected[name] = engine.generate(request)

        def swap(done: int, total: int) -> None:  # between the steps of a request that runs
            if not held:
                engine.load_adapter("style", folders["a"])
                held.append(engine.submit(request))
                engine.unload_adapter("style")

        running = engine.submit(request, swap)
        assert_same(running.result(), expected["b"])
        assert_same(held[0].result(), expected["a"])
        assert engine.adapters == [] and not same_outputs(expected["a"], expected["b"])
        with pytest.raises(InputError, match="^name: 'style' is not loaded"):
            engine.unload_adapter("style")


def test_a_checkpoint_that_is_replaced_later_keeps_its_adapters(tiny_checkpoint, folders, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "own")
    with Engine.from_pretrained(tmp_path / "own", dtype="float32", adapters={"a": folders["a"]}) as engine:
        shutil.rmtree(tmp_path / "own")
        engine.load_adapter("b", folders["b"])
        assert engine.adapters == ["a", "b"]


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_come_and_go_in_their_places(tiny_checkpoint, tmp_path, quantized):
    loaded = load(tiny_checkpoint)
    network, N = loaded.network, loaded.config.diffusion.timesteps
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    forms = [{"rank": 1 + i % 3, "seed": i, "layers": LAYERS[i % 4 :]} for i in range(2 * PLACES + 1)]
    folders = [write_adapter(tmp_path / str(i), tiny_checkpoint, **form) for i, form in enumerate(forms)]
    adapters = [None, *(read_adapter(folder, loaded.config.model) for folder in folders)]
    if quantized:
        quantize_blocks(network.blocks())
    denoiser = Denoiser(network, N)
    R = 3
    inputs = torch.randn(R, loaded.config.model.size, generator=torch.Generator().manual_seed(0))
    times = torch.full((R, loaded.config.model.tokens), 300, dtype=torch.int32)
    scale, tolerance = torch.tensor([0.5, 1.0, -1.0]), 0.05 if quantized else 2e-4  # 8 bits: a last bit may differ
    for block in network.blocks():
        block.forward = None  # stands for a package: steps with adapters do not run in one

    def expected(adapter, s):
        plain = load(tiny_checkpoint).network
        if quantized:  # the product in 8 bits of the layer's own weight, and the adapter beside it
            quantize_blocks(plain.blocks())
            for name, (a, b) in ({} if adapter is None else adapter.layers).items():
                layer = plain.get_submodule(name)
                layer.register_forward_hook(lambda _, x, y, a=a, b=b: y + s * (x[0] @ a.T) @ b.T)
        elif adapter is not None:
            plain.load_state_dict(merged(weights, adapter, s))
        return Denoiser(plain, N)(inputs, times)

    with torch.inference_mode():
        for first in (0, 1, 5, 7, 2):  # more than there are places for, some again
            wanted = [adapters[first], adapters[first + 1], adapters[0 if first % 2 else first]]
            places, _ = denoiser.adapters.place(wanted)
            found = denoiser(inputs, times, adapted=AdapterRows(torch.tensor(places), scale))
            for row, adapter in enumerate(wanted):
                right = expected(adapter, scale[row].item())
                torch.testing.assert_close(found[row], right[row], rtol=tolerance, atol=tolerance)
        everyone, moved = denoiser.adapters.place(adapters)  # more at once than there were places
        assert moved and len(set(everyone)) == len(adapters)
        assert denoiser.adapters.place(adapters) == (everyone, False)


@pytest.mark.gpu
def test_graphs_replay_steps_with_adapters(tiny_checkpoint, folders):
    requests = [Request(prompt="red cat", steps=4, adapter=name) for name in (None, "a", "b")]
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", graphs=False, adapters=folders) as engine:
        eager = engine.generate(requests)
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", adapters=folders) as engine:
        for _ in range(2):
            first = engine.generate(requests[:2])  # captured before the other adapter needs more memory
            both = engine.generate(requests)
        assert engine.stats().replays
        for found, expected in zip([*first, *both], [*eager[:2], *eager], strict=True):
            assert_same(found, expected)


# ------------------------------------------------------------------------------------------------- refusals


def config_with(**changes):
    def change(folder):
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors_with(change, **metadata):
    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata or None)

    return write


def of_other_names(tensors):
    for name in list(tensors):
        tensors[name.replace("qkv", "query")] = tensors.pop(name)


def narrower(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor[..., : tensor.shape[-1] // 2].contiguous()


def cut_short(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


REFUSED = {
    "no folder": (lambda folder: [file.unlink() for file in folder.iterdir()], f"{CONFIG} does not exist"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} does not exist"),
    "cut": (cut_short, f"{WEIGHTS} is damaged or truncated"),
    "another method": (config_with(peft_type="IA3"), "is not the config of a LoRA adapter"),
    "no rank": (config_with(r=None), "does not say rank and alpha"),
    "rank 0": (config_with(r=0), "does not say rank and alpha"),
    "infinite alpha": (config_with(lora_alpha=float("inf")), "does not say rank and alpha"),
    "wrong rank": (config_with(r=3), r"where rank 3 and this model need \(3, "),
    "dora": (config_with(use_dora=True), "sets use_dora to True, which is not used"),
    "another base": (
        config_with(init_lora_weights="pissa"),
        "sets init_lora_weights to pissa, which changes the weights",
    ),
    "layers twice": (config_with(layer_replication=[[0, 1]]), "sets layer_replication to"),
    "huge rank": (config_with(r=10**400), "does not say rank and alpha"),
    "huge alpha": (config_with(lora_alpha=10**400), "does not say rank and alpha"),
    "alpha of another kind": (config_with(lora_alpha=True), "does not say rank and alpha"),
    "ranks by layer": (config_with(rank_pattern={"qkv": 4}), "sets rank_pattern to"),
    "wrong width": (tensors_with(narrower), "where rank 2 and this model need"),
    "other names": (tensors_with(of_other_names), "which is not a linear layer of this model's blocks"),
    "half of a pair": (tensors_with(lambda t: t.pop(min(t))), "does not hold lora_A and lora_B of"),
    "nothing": (tensors_with(lambda t: t.clear()), "holds no layers"),
    "not finite": (tensors_with(lambda t: t[min(t)].fill_(float("nan"))), "holds values that are not finite"),
    "too large": (tensors_with(lambda t: t[max(t)].fill_(3e38)), "holds values that are too large"),
    "one name twice": (
        tensors_with(lambda t: t.update({min(t).removeprefix(PREFIX): t[min(t)] + 1})),
        "holds lora_A.weight of .* under two names",
    ),
    "other base": (
        tensors_with(lambda t: None, **{BASE: "0" * 64}),
        "was trained on other weights than the checkpoint's",
    ),
}


@pytest.mark.parametrize("change, problem", REFUSED.values(), ids=REFUSED)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(adapted, tiny_checkpoint, tmp_path, change, problem):
    folder = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    change(folder)
    with pytest.raises(InputError, match=f"^adapter: {folder}.*{problem}.*; (give|copy|train|save)"):
        adapted.load_adapter("other", folder)
    assert adapted.adapters == ["a", "b"]


def test_what_is_no_folder_and_no_name_is_refused(adapted, tmp_path):
    for folder in (tmp_path / "none", None, 3):
        with pytest.raises(InputError, match="^adapter: .* is not a folder"):
            adapted.load_adapter("other", folder)
    for name in ("", None, 3, "\0", "\ud800", "x" * 1000, []):
        with pytest.raises(InputError, match="^name: .* is not loaded"):
            adapted.unload_adapter(name)
        with pytest.raises(InputError, match="^name: .* is not a name"):
            adapted.load_adapter(name, tmp_path)
    with pytest.raises(InputError, match="^adapters: .* is not a mapping; give a dict"):
        Engine.from_pretrained(adapted.folder, adapters=[tmp_path])


def test_a_config_with_a_byte_order_mark_is_read(adapted, folders, tmp_path):
    shutil.copytree(folders["a"], tmp_path / "marked")
    file = tmp_path / "marked" / CONFIG
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    layers = read_adapter(tmp_path / "marked", adapted.config.model).layers
    assert {len(a) for a, _ in layers.values()} == {2}


def test_a_merged_checkpoint_takes_no_adapter_of_its_base_and_overwrites_nothing(tiny_checkpoint, folders, tmp_path):
    merge_adapter(tiny_checkpoint, folders["a"], tmp_path / "merged")
    with pytest.raises(InputError, match="^adapter: .* was trained on other weights than the checkpoint's"):
        merge_adapter(tmp_path / "merged", folders["b"], tmp_path / "both")
    with pytest.raises(InputError, match=f"^out: {tmp_path / 'merged'} exists already"):
        merge_adapter(tiny_checkpoint, folders["b"], tmp_path / "merged")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for out, problem in (
        (tmp_path / "nowhere", "exists already"),
        (tmp_path / "merged" / "config.json" / "x", "cannot be written"),
        (3, "is not a name"),
        ("", "is not a name"),
    ):
        with pytest.raises(InputError, match=f"^out: .*{problem}.*; give "):
            merge_adapter(tiny_checkpoint, folders["b"], out)
    for scale in (float("nan"), "x", 1e39):
        with pytest.raises(InputError, match="^scale: .*; use a number"):
            merge_adapter(tiny_checkpoint, folders["b"], tmp_path / "scaled", scale)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "nowhere"]


def test_a_merge_on_a_full_disk_leaves_nothing(tiny_checkpoint, folders, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(InputError, match="^out: .* cannot be written .No space left on device.; give another folder"):
        merge_adapter(tiny_checkpoint, folders["a"], tmp_path / "merged")
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------ commands and the service


def test_a_command_samples_with_an_adapter(adapted, tiny_checkpoint, folders, tmp_path, capsys):
    def sample(*options) -> int:
        model = ["--checkpoint", str(tiny_checkpoint), "--dtype", "float32", "--steps", "3", "--quiet"]
        return main([*model, "--out", str(tmp_path / "out"), *options])

    adapter = ["--adapter", str(folders["a"]), "--adapter-scale", "0.5"]
    request = Request(prompt="red cat", steps=3, adapter="a", adapter_scale=0.5)
    assert sample("--prompt", "red cat", *adapter) == 0
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert difference(image, adapted.generate(request).image) <= 1

    bulk = ["--joint", "1", "--out", str(tmp_path / "bulk")]
    assert sample(*bulk, *adapter) == 0
    with Image.open(tmp_path / "bulk" / "000000.png") as image:
        joint = replace(request, prompt=None)
        assert difference(image, adapted.generate(joint).image) <= 1
    assert sample(*bulk, "--adapter", str(folders["b"]), "--adapter-scale", "0.5") == 2  # does not resume that run

    for options, line in (
        (["--adapter", str(tmp_path)], f"--adapter: {tmp_path / CONFIG} does not exist; give a folder that"),
        (["--adapter-scale", "2"], "--adapter-scale: 2.0 needs an adapter; give adapter too"),
        (["--adapter-scale", "nan", *adapter[:2]], "--adapter-scale: nan is not valid; use a number from -100 to 100"),
    ):
        capsys.readouterr()
        assert sample("--prompt", "red cat", *options) == 2
        assert line in capsys.readouterr().err


@asynchronous
async def test_clients_ask_for_an_adapter_by_its_name(adapted):
    async with service(adapted) as http:
        assert (await http.get("/v1/models")).json()["data"][0]["adapters"] == ["a", "b"]
        body = {"prompt": "red cat", "steps": 3, "seed": 1}
        answers = [(await http.post("/v1/infill", json=body | {"adapter": name})).json() for name in (None, "a", "b")]
        assert len({answer["samples"][0]["image"] for answer in answers}) == 3
        assert_error(await http.post("/v1/infill", json=body | {"adapter": "c"}), 400, "invalid_value", "adapter")
        refused = await http.post("/v1/infill", json=body | {"adapter_scale": 2})
        assert_error(refused, 400, "invalid_value", "adapter_scale")
