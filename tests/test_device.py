"""Where and in which dtype to compute: what "auto" becomes, what is refused, and how fast the machine is."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import Engine, device
from engine.device import ceilings, check_quantization, fastest, resolve, resolve_device, resolve_dtype
from engine.errors import InputError
from engine.presets import PRESETS

CPU = torch.device("cpu")
MODEL = PRESETS["tiny"].model


class Measurement:
    """Stands in for the measurement; counts how often it is made."""

    def __init__(self):
        self.milliseconds, self.calls = {"float32": 2.0, "bfloat16": 1.0}, []

    def __call__(self, *sizes: int) -> dict[str, float]:
        self.calls.append(sizes)
        return dict(self.milliseconds)


@pytest.fixture
def measured(monkeypatch, tmp_path) -> Measurement:
    """The measurement's stand-in, with nothing cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measurement = Measurement()
    monkeypatch.setattr(device, "_measure_dtypes", measurement)
    return measurement


def cached(folder: Path) -> Path:
    """The one file below a folder."""
    (file,) = [path for path in folder.rglob("*") if path.is_file()]
    return file


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(2.0, 1.0, torch.bfloat16), (1.25, 1.0, torch.bfloat16), (1.15, 1.0, torch.float32), (1.0, 1.5, torch.float32)],
)
def test_auto_is_bfloat16_where_it_is_measured_to_be_clearly_faster(measured, float32, bfloat16, chosen):
    measured.milliseconds = {"float32": float32, "bfloat16": bfloat16}
    assert resolve("cpu", "auto", MODEL) == (CPU, chosen)


def test_it_is_measured_on_the_model_s_shapes_once_per_shape_and_number_of_threads(measured):
    wide = replace(MODEL, dim=128)
    for _ in range(2):
        resolve_dtype("auto", CPU, MODEL)
        resolve_dtype("auto", CPU, wide)
    assert [sizes[1:] for sizes in measured.calls] == [(64, 256), (128, 512)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resolve_dtype("auto", CPU, MODEL)
    finally:
        torch.set_num_threads(threads)
    assert len(measured.calls) == 3


def test_what_was_measured_is_found_again_in_the_cache_folder(measured, tmp_path):
    resolve_dtype("auto", CPU, MODEL)
    file = cached(tmp_path / "cache")
    assert list(json.loads(file.read_text("utf-8")).values()) == [{"float32": 2.0, "bfloat16": 1.0}]
    measured.milliseconds = {"float32": 1.0, "bfloat16": 2.0}
    assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16, "as it was measured first"
    file.unlink()
    assert resolve_dtype("auto", CPU, MODEL) == torch.float32


def test_without_xdg_cache_home_it_is_the_home_s_cache(measured, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    resolve_dtype("auto", CPU, MODEL)
    assert cached(tmp_path / "home").is_relative_to(tmp_path / "home" / ".cache")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 100_000],
    ids=["empty", "cut", "list", "bytes", "null", "deep"],
)
def test_a_corrupt_cache_file_is_measured_anew_and_replaced(measured, tmp_path, content):
    resolve_dtype("auto", CPU, MODEL)
    file = cached(tmp_path / "cache")
    whole = file.read_bytes()
    file.write_bytes(content)
    assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16
    assert len(measured.calls) == 2 and file.read_bytes() == whole


@pytest.mark.parametrize("entry", [None, 1.0, [2.0, 1.0], {}, {"float32": 2.0}, {"float32": "2", "bfloat16": "1"}])
def test_a_corrupt_entry_is_measured_anew_and_others_stay(measured, tmp_path, entry):
    resolve_dtype("auto", CPU, MODEL)
    file = cached(tmp_path / "cache")
    (key,) = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({key: entry, "another machine": {"float32": 1.0}}))
    assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16 and len(measured.calls) == 2
    assert json.loads(file.read_text("utf-8")) == {key: measured.milliseconds, "another machine": {"float32": 1.0}}


def test_an_unwritable_cache_folder_costs_a_measurement_each_time(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16
    assert len(measured.calls) == 2


def test_a_folder_in_the_place_of_the_cache_file_costs_a_measurement_each_time(measured, tmp_path):
    resolve_dtype("auto", CPU, MODEL)
    file = cached(tmp_path / "cache")
    file.unlink()
    file.mkdir()
    assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16 and len(measured.calls) == 2


def test_a_user_without_a_home_costs_a_measurement_each_time(measured, monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert resolve_dtype("auto", CPU, MODEL) == torch.bfloat16 and len(measured.calls) == 1


def test_what_was_measured_is_logged(measured, caplog):
    caplog.set_level(logging.INFO, "engine")
    for _ in range(2):
        resolve_dtype("auto", CPU, MODEL)
    assert [record.getMessage() for record in caplog.records] == [
        "dtype: bfloat16 (measured: 2.00 ms in float32, 1.00 ms in bfloat16)"
    ] * 2


def test_without_a_model_auto_is_float32_on_a_cpu(measured):
    assert resolve("cpu", "auto") == (CPU, torch.float32) and measured.calls == []


@pytest.mark.parametrize("native", [True, False])
def test_on_cuda_auto_is_bfloat16_where_it_is_native(measured, monkeypatch, native):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(1) or native)
    chosen = resolve_dtype("auto", torch.device("cuda"), MODEL)
    assert chosen == (torch.bfloat16 if native else torch.float32) and asked and measured.calls == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_named_dtype_is_not_measured(measured, dtype):
    assert resolve_dtype(dtype, CPU, MODEL) == getattr(torch, dtype) and measured.calls == []


@pytest.mark.parametrize("dtype", ["float64", "", "half", "Float32", "bf16"])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(InputError, match=f"^dtype: '{dtype}' is not known; use auto, float32"):
        resolve_dtype(dtype, CPU)


def test_float16_is_for_cuda():
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(InputError, match="^dtype: 'float16' is not computed on a CPU; use auto, float32 or bfloat16"):
        resolve_dtype("float16", CPU)


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="^device: 'cuda:2' is not there .2 CUDA devices.; use auto or cpu"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:99", "meta", "mps", 7.5])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(InputError, match="^device: .* (is not known|is not there .*|is not supported); use auto"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("where", "capability", "hip", "problem"),
    [
        ("cpu", None, None, "needs an NVIDIA GPU of compute capability 8.9"),
        ("cuda", (8, 0), None, "needs an NVIDIA GPU of compute capability 8.9"),
        ("cuda", (9, 4), "6.4", "needs an NVIDIA GPU of compute capability 8.9"),
        ("cuda", (8, 9), None, None),
        ("cuda", (10, 0), None, None),
    ],
)
def test_8_bit_products_need_a_device_that_has_them(monkeypatch, where, capability, hip, problem):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    check_quantization("none", torch.device(where))
    if problem is None:
        check_quantization("fp8", torch.device(where))
        return
    with pytest.raises(InputError, match=f"^quantize: 'fp8' {problem}"):
        check_quantization("fp8", torch.device(where))


def test_an_unknown_quantization_is_refused():
    with pytest.raises(InputError, match="^quantize: 'int4' is not known; use one of none, fp8"):
        Engine.from_pretrained(device="cpu", quantize="int4")


def test_the_real_measurement_takes_milliseconds_and_finds_a_time_for_both_dtypes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve_dtype("auto", CPU, MODEL) in (torch.float32, torch.bfloat16)
    (milliseconds,) = json.loads(cached(tmp_path).read_text("utf-8")).values()
    assert milliseconds.keys() == {"float32", "bfloat16"} and all(0 < x < 1000 for x in milliseconds.values())


def test_ceilings_are_positive_for_a_copy_and_each_dtype():
    found = ceilings(CPU, (torch.float32,), tries=1)
    assert found.keys() == {"copy", "float32"}
    assert found["copy"] > 1e8 and found["float32"] > 1e8, "bytes and FLOPs a second, which any machine exceeds"


def test_the_fastest_of_several_tries_counts(monkeypatch):
    clock = iter([0, 9, 10, 13, 20, 24])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    calls = []
    assert fastest(lambda: calls.append(1), CPU, tries=3, repeats=3) == 1 and len(calls) == 9
