"""What the hardware decides. It is not available here, so the tests replace what torch reports about it."""

import types

import pytest
import torch

from medqa.config_file import load_experiment
from medqa.errors import UserError
from medqa.model import device, settings
from medqa.model.settings import KEPT, SavedSettings, four_bit_unavailable, resolve_settings, usable_gpu
from medqa.training import distributed


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, and with a CPU without bfloat16: no device files, and torch reports none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(settings, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu(monkeypatch, SLOW)
    return tmp_path


SLOW = "this CPU has no bfloat16 instructions (AVX512-BF16, AMX or Arm BF16)"


def cpu(monkeypatch, no_bfloat16: str | None) -> None:
    monkeypatch.setattr(settings, "no_native_bfloat16", lambda: no_bfloat16)


def gpu(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(settings, "usable_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


def resolved(*sets: str, cpu: bool = False):
    return resolve_settings(load_experiment("exp_001", sets=["model.quantization=none", *sets]), cpu=cpu)


def test_a_cpu_without_bfloat16_uses_float32_and_says_why():
    found = resolved()
    assert (found.device_type, found.mixed_precision, found.dtype) == ("cpu", "no", torch.float32)
    assert found.changes == {
        "training.mixed_precision": ("bf16", "no", SLOW),
        "model.dtype": ("bfloat16", "float32", SLOW),
    }
    assert found.precision_note is None
    assert resolved("training.mixed_precision=no", "model.dtype=float32").changes == {}


def test_a_cpu_with_bfloat16_uses_the_requested_precision(monkeypatch):
    cpu(monkeypatch, None)
    found = resolved()
    assert (found.device_type, found.mixed_precision, found.dtype) == ("cpu", "bf16", torch.bfloat16)
    assert (found.changes, found.precision_note) == ({}, None)
    found = resolved("model.dtype=float32")
    assert (found.mixed_precision, found.dtype, found.changes) == ("bf16", torch.float32, {})
    found = resolved("model.dtype=float32", "training.mixed_precision=no")
    assert (found.mixed_precision, found.dtype, found.changes) == ("no", torch.float32, {})


@pytest.mark.parametrize("no_bfloat16", [None, SLOW])
def test_float16_on_a_cpu_is_float32(no_bfloat16, monkeypatch):
    cpu(monkeypatch, no_bfloat16)
    found = resolved("model.dtype=float16", "training.mixed_precision=fp16")
    assert (found.mixed_precision, found.dtype) == ("no", torch.float32)
    assert {why for _, _, why in found.changes.values()} == {"float16 is supported on GPUs only"}


@pytest.mark.parametrize("no_bfloat16", [None, SLOW])
def test_tiny_is_float32_everywhere(no_bfloat16, monkeypatch):
    cpu(monkeypatch, no_bfloat16)
    experiment = load_experiment("exp_002", tiny=True, sets=["model.quantization=none"])
    for on_gpu in (False, True):
        if on_gpu:
            gpu(monkeypatch, "A100", (8, 0))
        found = resolve_settings(experiment, cpu=False)
        assert (found.mixed_precision, found.dtype, found.changes) == ("no", torch.float32, {})


@pytest.mark.parametrize("no_bfloat16", [None, SLOW])
@pytest.mark.parametrize("before", [("no", "float32"), ("bf16", "bfloat16")])
def test_a_run_that_was_saved_on_a_cpu_keeps_its_precision_on_a_cpu(before, no_bfloat16, monkeypatch):
    cpu(monkeypatch, no_bfloat16)
    experiment = load_experiment("exp_001", sets=["model.quantization=none"])
    found = resolve_settings(experiment, cpu=True, saved=kept(*before), keep_bf16=True)
    assert (found.mixed_precision, found.dtype_name) == before
    assert {why for _, _, why in found.changes.values()} == (set() if before[0] == "bf16" else {KEPT})
    slower = f"bfloat16, {KEPT}; it is slower than float32 here: {SLOW}"
    assert found.precision_note == (slower if no_bfloat16 and before[0] == "bf16" else None)


def test_bfloat16_of_a_gpu_is_kept_only_on_a_cpu_that_has_it(monkeypatch):
    """The same holds for `medqa evaluate` and `medqa ask` of any run that was trained in bfloat16."""
    experiment = load_experiment("exp_001", sets=["model.quantization=none"])
    found = resolve_settings(experiment, cpu=True, saved=kept("bf16", "bfloat16"))
    assert (found.mixed_precision, found.dtype, found.precision_note) == ("no", torch.float32, None)
    assert found.changes == {
        "training.mixed_precision": ("bf16", "no", SLOW),
        "model.dtype": ("bfloat16", "float32", SLOW),
    }
    cpu(monkeypatch, None)
    found = resolve_settings(experiment, cpu=True, saved=kept("bf16", "bfloat16"))
    assert (found.mixed_precision, found.dtype, found.changes) == ("bf16", torch.bfloat16, {})


# --- bfloat16 on a CPU

FLAGS = {
    "processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n": True,
    "processor : 0\nflags\t\t: fpu amx_bf16\n": True,
    "processor : 0\nFeatures\t: fp asimd svebf16 i8mm bf16 dgh\n": True,
    "processor : 0\nflags\t\t: fpu avx2 avx512f\n": False,
    "processor : 0\nmodel name : a bf16 avx512_bf16 marvel\nflags : avx2\n": False,
    "": False,
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """`asked(cpuinfo, speedup, queries)`: the result on such a CPU; cpuinfo None: the file does not exist."""

    def answer(cpuinfo: str | None, speedup: float, **queries: bool) -> str | None:
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(device, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch, "cpu", types.SimpleNamespace(**{n: lambda v=v: v for n, v in queries.items()}))
        monkeypatch.setattr(device, "_bfloat16_speedup", lambda: speedup)
        return device.no_native_bfloat16()

    return answer


@pytest.mark.parametrize("cpuinfo, has", FLAGS.items(), ids=range(len(FLAGS)))
def test_a_cpu_has_bfloat16_by_its_flags(cpuinfo, has, asked):
    assert asked(cpuinfo, 5.0) == (None if has else SLOW)


def test_a_cpu_has_bfloat16_if_torch_reports_it(asked):
    assert asked(None, 5.0, _is_avx512_bf16_supported=True) is None
    assert asked(None, 5.0, _is_avx512_bf16_supported=False, _is_amx_tile_supported=True) is None
    assert asked(None, 5.0, _is_avx512_bf16_supported=False, _is_amx_tile_supported=False) == SLOW
    assert asked(None, 5.0) == SLOW


@pytest.mark.parametrize("speedup, fast", [(0.02, False), (1.4, False), (1.5, True), (5.0, True)])
def test_a_cpu_whose_bfloat16_is_not_faster_does_not_count(speedup, fast, asked):
    said = asked("flags : amx_bf16", speedup)
    assert said == (None if fast else f"this CPU multiplies bfloat16 only {speedup:.1f} times as fast as float32")


def test_the_product_is_timed_once(monkeypatch):
    times = iter([1.0, 9.0, 10.0, 10.5] * 4)  # float32 takes 8 seconds, bfloat16 half of one
    asked = []
    monkeypatch.setattr(device.time, "perf_counter", lambda: asked.append(1) or next(times))
    device._bfloat16_speedup.cache_clear()
    assert device._bfloat16_speedup() == 16
    assert len(asked) == 16
    assert device._bfloat16_speedup() == 16
    assert len(asked) == 16
    device._bfloat16_speedup.cache_clear()


def test_processes_on_machines_of_different_precision_are_refused(monkeypatch):
    here = settings.Settings("cpu", "bf16", torch.bfloat16)
    other = ["no with weights in float32"]
    monkeypatch.setattr(distributed, "gather_object", lambda found: found * 2)
    distributed._require_one_precision(here)
    monkeypatch.setattr(distributed, "gather_object", lambda found: found + other)
    with pytest.raises(UserError, match="bf16 with weights in bfloat16 and no with weights in float32; use --set"):
        distributed._require_one_precision(here)


# --- GPUs


@pytest.mark.parametrize("name, capability", [("Tesla T4", (7, 5)), ("Tesla V100", (7, 0)), ("GTX 1080", (6, 1))])
def test_an_older_gpu_gets_float16_whatever_torch_claims(name, capability, monkeypatch):
    gpu(monkeypatch, name, capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)  # by emulation
    found = resolved()
    assert (found.device_type, found.mixed_precision, found.dtype) == ("cuda", "fp16", torch.float16)
    assert found.changes.keys() == {"training.mixed_precision", "model.dtype"}
    for asked, used, why in found.changes.values():
        assert (asked, used) in {("bf16", "fp16"), ("bfloat16", "float16")}
        assert why == f"{name} has compute capability {capability[0]}.{capability[1]}: bfloat16 needs 8.0"


@pytest.mark.parametrize("sets", [("training.mixed_precision=no",), ("model.dtype=float32",)])
def test_both_move_together_where_either_is_bfloat16(sets, monkeypatch):
    gpu(monkeypatch, "Tesla T4", (7, 5))
    found = resolved(*sets)
    assert (found.mixed_precision, found.dtype) == ("fp16", torch.float16)


@pytest.mark.parametrize(
    "name, capability", [("A100", (8, 0)), ("RTX 3090", (8, 6)), ("H100", (9, 0)), ("B200", (10, 0))]
)
def test_a_newer_gpu_gets_what_is_asked(name, capability, monkeypatch):
    gpu(monkeypatch, name, capability)
    found = resolved()
    assert (found.device_type, found.mixed_precision, found.dtype) == ("cuda", "bf16", torch.bfloat16)
    assert found.changes == {}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize(
    "mixed, dtype, expected", [("fp16", "float16", torch.float16), ("no", "float32", torch.float32)]
)
def test_what_asks_for_no_bfloat16_stays(mixed, dtype, expected, capability, monkeypatch):
    gpu(monkeypatch, "some GPU", capability)
    found = resolved(f"training.mixed_precision={mixed}", f"model.dtype={dtype}")
    assert (found.mixed_precision, found.dtype, found.changes) == (mixed, expected, {})


def kept(mixed_precision: str, dtype: str) -> SavedSettings:
    return SavedSettings(mixed_precision=mixed_precision, dtype=dtype, quantization="none", attn_implementation="sdpa")


@pytest.mark.parametrize("before", [("fp16", "float16"), ("no", "float32"), ("bf16", "bfloat16")])
def test_a_run_that_goes_on_keeps_its_precision(before, monkeypatch):
    gpu(monkeypatch, "A100", (8, 0))
    found = resolve_settings(
        load_experiment("exp_001", sets=["model.quantization=none"]), cpu=False, saved=kept(*before)
    )
    assert (found.mixed_precision, str(found.dtype)) == (before[0], f"torch.{before[1]}")
    assert all(why == KEPT for _, _, why in found.changes.values())
    assert bool(found.changes) == (before[0] != "bf16")


def test_where_it_cannot_be_kept_the_machine_decides(monkeypatch):
    gpu(monkeypatch, "Tesla T4", (7, 5))
    found = resolve_settings(
        load_experiment("exp_001", sets=["model.quantization=none"]), cpu=False, saved=kept("bf16", "bfloat16")
    )
    assert (found.mixed_precision, found.dtype) == ("fp16", torch.float16)
    found = resolve_settings(
        load_experiment("exp_001", sets=["model.quantization=none"]), cpu=True, saved=kept("fp16", "float16")
    )
    assert (found.mixed_precision, found.dtype) == ("no", torch.float32)


def test_cpu_insists_whatever_there_is(monkeypatch):
    gpu(monkeypatch, "A100", (8, 0))
    assert resolved(cpu=True).device_type == "cpu"


@pytest.mark.parametrize("device", ["nvidia0", "nvidia3"])
def test_a_gpu_that_torch_cannot_see_is_an_error_that_says_what_to_install(device, machine, monkeypatch):
    assert not usable_gpu()
    (machine / device).touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        UserError, match=r"an NVIDIA GPU is present, but torch .*, built without CUDA, cannot"
    ) as caught:
        resolved()
    assert "--cpu" in str(caught.value)
    assert "https://pytorch.org" in str(caught.value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"built for CUDA 13.0, cannot use it"):  # a driver that is too old
        resolved()
    assert resolved(cpu=True).device_type == "cpu"


def test_device_files_that_are_no_gpu_do_not_count(machine):
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (machine / name).touch()
    assert not usable_gpu()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_hidden_on_purpose_means_cpu(hidden, machine, monkeypatch):
    (machine / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolved().device_type == "cpu"


def test_a_wheel_without_code_for_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "GTX 680")

    def no_kernel(*arguments, **named):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match=r"torch .* cannot use GTX 680: CUDA error: no kernel image .*; install"):
        usable_gpu()


def test_4_bit_can_be_had_on_a_cpu():
    assert four_bit_unavailable(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("error", [ImportError("no bitsandbytes"), RuntimeError("None of the available devices\nx")])
def test_why_4_bit_cannot_be_had(error, monkeypatch):
    import bitsandbytes as bnb

    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(bnb.nn, "Linear4bit", fail)
    told = four_bit_unavailable(torch.device("cpu"), torch.float32)
    assert told == f"4-bit is not available: {type(error).__name__}: {str(error).splitlines()[0]}"


def test_out_of_memory_and_defects_are_no_reason_to_fall_back(monkeypatch):
    import bitsandbytes as bnb

    for error in (torch.OutOfMemoryError("full"), OSError("missing")):

        def fail(*arguments, error=error, **named):
            raise error

        monkeypatch.setattr(bnb.nn, "Linear4bit", fail)
        with pytest.raises(type(error)):
            four_bit_unavailable(torch.device("cpu"), torch.float32)
