"""The network as a model of diffusers: what diffusers' own testers of models ask of one, case by case."""

import inspect
from dataclasses import asdict

import pytest
import torch
from diffusers.training_utils import EMAModel

from engine.errors import InputError
from engine.model.denoiser import Denoiser
from engine.pipeline_components import PSUNetModel, WordTokenizer
from engine.presets import PRESETS

CONFIGS = {name: PRESETS[name].model for name in ("tiny", "uvit-tiny")}
TINY = CONFIGS["tiny"]


def model_of(config, seed: int = 0) -> PSUNetModel:
    """With random weights throughout: as initialised, gates and heads are zero."""
    model, generator = PSUNetModel(**asdict(config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def model() -> PSUNetModel:
    return model_of(TINY)


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return torch.randn(2, TINY.size, generator=torch.Generator().manual_seed(1))


def same(a: PSUNetModel, b: PSUNetModel, sample) -> bool:
    with torch.no_grad():
        return torch.equal(a(sample, 500).sample, b(sample, 500).sample)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", ["one", "rows", "tokens"])
def test_it_predicts_what_the_denoiser_predicts(config, sample, shape):
    model = model_of(config)
    rows = torch.tensor([1000, 3])
    given = {"one": 500, "rows": rows, "tokens": rows[:, None] - torch.arange(config.tokens) % 3}[shape]
    times = torch.as_tensor(given) if shape != "rows" else rows[:, None]
    with torch.no_grad():
        expected = Denoiser(model.network, 1000)(sample, times.expand(2, config.tokens).int())
        found = model(sample, given)
    torch.testing.assert_close(found.sample, expected, rtol=1e-4, atol=1e-5)
    assert found.sample.shape == sample.shape


def test_calls_are_deterministic_and_may_return_a_tuple(model, sample):
    assert list(inspect.signature(model.forward).parameters)[:2] == ["sample", "timestep"]
    with torch.no_grad():
        first, (second,) = model(sample, 500).sample, model(sample, 500, return_dict=False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_comes_back(config, sample, tmp_path):
    model = model_of(config)
    model.save_pretrained(tmp_path)
    again, info = PSUNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.model_config == config and not again.training and again.dtype == torch.float32
    assert same(model, again, sample)


def test_variants_are_saved_and_loaded_by_their_name(model, sample, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert same(model, PSUNetModel.from_pretrained(tmp_path, variant="fp16"), sample)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        PSUNetModel.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_are_saved_and_loaded_in_parts(model, tmp_path, variant):
    model.save_pretrained(tmp_path, variant=variant, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    loaded = PSUNetModel.from_pretrained(tmp_path, variant=variant).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_loaded_in_a_dtype(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = PSUNetModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    model.to(dtype).save_pretrained(tmp_path)
    assert PSUNetModel.from_pretrained(tmp_path).dtype == torch.float32


def test_a_config_makes_a_network_and_a_wrong_one_is_refused(model):
    again = PSUNetModel.from_config(model.config)
    assert again.model_config == TINY and again.num_parameters() == model.num_parameters()
    with pytest.raises(InputError, match="^dim: 65 is not valid; use a multiple of head_dim"):
        PSUNetModel.from_config({**model.config, "dim": 65})
    with pytest.raises(InputError, match="^model.uvit: 'depth' is not a known setting"):
        PSUNetModel.from_config({**model.config, "uvit": {"depth": 1}})


def test_every_weight_is_trained_and_a_step_changes_the_prediction(model, sample):
    model.train()
    before = model(sample, 500).sample
    before.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.allclose(model(sample, 500).sample, before)


def test_averages_of_diffusers_follow_the_weights(model, tmp_path):
    average = EMAModel(model.parameters(), decay=0.5, model_cls=PSUNetModel, model_config=model.config)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    assert PSUNetModel.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_computes_blocks_again_and_the_same_gradients(config, sample):
    model = model_of(config).train()
    calls = []
    for block in model.network.blocks():
        block.fc1.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for enabled in (False, True):
        (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
        assert model.is_gradient_checkpointing == enabled
        model.zero_grad()
        calls.clear()
        model(sample, 500).sample.square().mean().backward()
        assert len(calls) == (1 + enabled) * sum(1 for _ in model.network.blocks())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    calls.clear()
    with torch.no_grad():
        model(sample, 500)
    assert len(calls) == sum(1 for _ in model.network.blocks())  # once where nothing is trained


def test_repeated_blocks_are_what_is_compiled(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: compiled.append((block, options)))
    model.compile_repeated_blocks(fullgraph=True)
    assert compiled == [(block, {"fullgraph": True}) for block in model.network.blocks()]


def test_layerwise_casting_stores_8_bits_and_computes_nearly_the_same(model, sample):
    with torch.no_grad():
        expected = model(sample, 500).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        stored = [block.fc1.weight.dtype for block in model.network.blocks()]
        found = model(sample, 500).sample
    assert set(stored) == {torch.float8_e4m3fn}
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_moving_keeps_the_weights(model, sample):
    with torch.no_grad():
        before = model(sample, 500).sample
        after = model.to("cpu").to(torch.float64).to(torch.float32)(sample, 500).sample
    assert torch.equal(before, after) and model.device.type == "cpu"


def test_lora_layers_are_added_saved_and_loaded(sample, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "fc1", "skip"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, other = model_of(TINY), model_of(TINY)
        plain = model_of(TINY)
        model.add_adapter(config)
    assert not same(model, plain, sample)
    model.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert same(other, model, sample)
    other.disable_lora()
    assert same(other, plain, sample)


def test_word_tokenizers_keep_words_and_vectors(tmp_path):
    words, vectors = ["</s>", "red", "größe"], torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    WordTokenizer(words, vectors).save_pretrained(tmp_path / "tokenizer")
    again = WordTokenizer.from_pretrained(tmp_path, subfolder="tokenizer")
    assert again.vocabulary == tuple(words) and torch.equal(again.vectors, vectors)
    (tmp_path / "tokenizer" / "vocabulary.json").unlink()
    with pytest.raises(InputError, match="^checkpoint: .*vocabulary.json does not exist"):
        WordTokenizer.from_pretrained(tmp_path / "tokenizer")
