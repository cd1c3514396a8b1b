"""The doctor: each line is true of the machine it looks at, and says what to do."""

import os
import stat
import time

import pytest

from launch import doctor


def put_on_path(folder, monkeypatch, name, script):
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_it_looks_at_everything_in_a_few_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.process_time()
    findings = list(doctor.examine())
    assert time.process_time() - started < 10
    assert [item.name for item in findings] == list(doctor.CHECKS)
    for item in findings:
        assert item.found
        assert item.remedy or item.status == "ok", f"{item.name}: says not what to do"


def test_a_check_that_dies_is_a_finding_and_the_others_still_run(monkeypatch):
    def die():
        raise ImportError("no module named nothing")

    monkeypatch.setitem(doctor.CHECKS, "torch", die)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = {item.name: item for item in doctor.examine()}
    assert findings["torch"].status == "broken"
    assert "no module named nothing" in findings["torch"].found
    assert findings["TurboJPEG"].status == "ok"


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "required_packages", lambda: ["numpy>=2.0", "no-such-thing==1"])
    found = doctor.check_packages()
    assert (found.status, found.found) == ("broken", "not installed: no-such-thing")


def test_slurm_is_found_by_its_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_slurm().status == "note"
    put_on_path(tmp_path, monkeypatch, "sbatch", "echo slurm 23.02.1")
    assert doctor.check_slurm().found == f"slurm 23.02.1 ({tmp_path / 'sbatch'})"
    put_on_path(tmp_path, monkeypatch, "sbatch", "echo no controller >&2; exit 1")
    found = doctor.check_slurm()
    assert found.status == "warn"
    assert "no controller" in found.found


def test_a_gpu_that_torch_cannot_see_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_gpus().status == "note"
    put_on_path(tmp_path, monkeypatch, "nvidia-smi", "true")
    assert doctor.check_gpus().status == "warn"


@pytest.mark.parametrize(("free", "status"), [(5e9, "warn"), (500e9, "ok")])
def test_little_disk_is_a_warning(monkeypatch, free, status):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert doctor.check_disk().status == status


def test_more_threads_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    found = doctor.check_cores()
    assert found.status == "warn"
    assert "OMP_NUM_THREADS=2" in found.remedy


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("150000 100000", 1), ("", 8)])
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    path = tmp_path / "cpu.max"
    path.write_text(quota)
    assert doctor.usable_cores(path) == cores


@pytest.mark.parametrize(("place", "status"), [("hub cache", "ok"), (None, "warn")])
def test_weights_out_of_reach_are_a_warning(monkeypatch, place, status):
    monkeypatch.setattr("dinogen.features.checkpoint.weights_reachable", lambda path: place)
    found = doctor.check_weights()
    assert found.status == status
    assert "facebook/dinov2-small" in found.found


def test_attention_without_fused_kernels_is_a_warning(monkeypatch):
    assert doctor.check_attention().found == "kernels: flash, math"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.cuda.cudnn_sdp_enabled", lambda: False)
    assert doctor.check_attention().found == "kernels: flash, math, memory-efficient"
    monkeypatch.setattr("torch.backends.cuda.flash_sdp_enabled", lambda: False)
    assert doctor.check_attention().status == "ok"
    monkeypatch.setattr("torch.backends.cuda.mem_efficient_sdp_enabled", lambda: False)
    found = doctor.check_attention()
    assert (found.status, found.found) == ("warn", "kernels: math")


@pytest.mark.parametrize(
    ("capability", "bf16", "version", "found", "status"),
    [
        ((9, 0), True, 91002, "TF32 yes, bf16 yes, cuDNN 9.10.2", "ok"),
        ((8, 6), True, 8902, "TF32 yes, bf16 yes, cuDNN 8.9.2", "ok"),
        ((7, 5), False, None, "TF32 no, bf16 no, cuDNN none", "note"),
    ],
)
def test_what_a_gpu_multiplies_fast(monkeypatch, capability, bf16, version, found, status):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: version)
    made = doctor.check_arithmetic()
    assert (made.found, made.status) == (found, status)


@pytest.mark.parametrize(
    ("level", "mkldnn", "status"), [("AVX512", True, "ok"), ("AVX2", False, "warn")]
)
def test_what_a_cpu_multiplies_fast(monkeypatch, level, mkldnn, status):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: level)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: mkldnn)
    made = doctor.check_arithmetic()
    assert made.found.startswith(f"{level}, oneDNN {'on' if mkldnn else 'off'}, memory kept")
    assert made.status == status


def test_fused_adam_is_tried(monkeypatch):
    assert doctor.check_optimizer().found == "yes, on cpu"

    def refuse(*given, **options):
        raise RuntimeError("`fused=True` requires all the params to be floating point Tensors")

    monkeypatch.setattr("torch.optim.Adam", refuse)
    assert doctor.check_optimizer().status == "warn"


def test_the_compiler_that_compile_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_compiler().status == "note"
    put_on_path(tmp_path, monkeypatch, "clang++", "true")
    assert doctor.check_compiler().found.startswith(str(tmp_path / "clang++"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.check_compiler().found == "no Triton"


def test_memory_that_cannot_be_pinned_is_a_warning(monkeypatch):
    assert doctor.check_pinned_memory().status == "note"

    def refuse(*given, **options):
        raise RuntimeError("cannot allocate locked memory")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", refuse)
    found = doctor.check_pinned_memory()
    assert (found.status, found.found) == ("warn", "cannot allocate locked memory")
