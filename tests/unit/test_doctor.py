import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from searche1.doctor import GIB, PACKAGES, Check, Machine, inspect_machine, judge, print_doctor, run_doctor

VERSIONS = dict.fromkeys(PACKAGES, "1.0") | {
    "torch": "2.13.0+cpu",
    "torchvision": None,
    "sglang": "0.5.21",
    "megatron-core": "0.16.1",
    "transformers": "5.12.1",
    "peft": "0.21.2",
    "faiss-cpu": "1.15.1",
    "faiss-gpu": None,
    "transformer-engine": None,
}
LAPTOP = Machine(
    python=(3, 11),
    versions=VERSIONS,
    torch_error="",
    driver_gpus=(),
    compute_modes=(),
    num_torch_gpus=0,
    no_native_losses="",
    openblas="Haswell",
    no_openblas="",
    has_plugin=True,
    omp_num_threads="1",
    cores=8,
    memory_bytes=16 * GIB,
    free_disk_bytes=100 * GIB,
    shared_memory_bytes=8 * GIB,
    loopback_error="",
    is_loopback_proxied=False,
    open_files=1024,
    alloc_conf="",
)
GPU_NODE = replace(
    LAPTOP,
    driver_gpus=("NVIDIA H800, 81559 MiB",) * 8,
    compute_modes=("Default",) * 8,
    open_files=1048576,
    num_torch_gpus=8,
    omp_num_threads=None,
    versions=VERSIONS | {"torch": "2.13.0", "transformer-engine": "2.9.0"},
)


def complaints(machine):
    return {check.name: check for check in judge(machine) if check.level != "ok"}


def with_versions(machine, **versions):
    return replace(machine, versions=dict(machine.versions) | {k.replace("_", "-"): v for k, v in versions.items()})


def test_a_ready_laptop_and_a_ready_gpu_node_have_no_complaints():
    assert complaints(LAPTOP) == {} and complaints(GPU_NODE) == {}


def test_every_complaint_has_a_remedy_and_nothing_else_has():
    nothing = replace(LAPTOP, versions=dict.fromkeys(PACKAGES), has_plugin=False, omp_num_threads=None, cores=1)
    for machine in (LAPTOP, GPU_NODE, nothing):
        for check in judge(machine):
            assert (check.remedy != "") == (check.level != "ok"), check


@pytest.mark.parametrize("package", ["torch", "sglang", "megatron-core", "transformers", "peft", "tensorboard"])
def test_a_missing_package_fails(package):
    (check,) = complaints(replace(LAPTOP, versions=VERSIONS | {package: None})).values()
    assert (check.name, check.level, check.found) == (package, "fail", "not installed")


def test_missing_small_libraries_are_named_together():
    check = complaints(with_versions(LAPTOP, rich=None, httpx=None))["libraries"]
    assert check.level == "fail" and check.found == "not installed: rich, httpx"


@pytest.mark.parametrize(("sglang", "torch"), [("0.5.17", "2.11.0+cu130"), ("0.5.21", "2.13.0"), ("0.5.23", "2.14.1")])
def test_each_known_sglang_goes_with_its_torch(sglang, torch):
    assert complaints(with_versions(GPU_NODE, sglang=sglang, torch=torch)) == {}
    assert complaints(with_versions(GPU_NODE, sglang=sglang, torch="2.9.0"))["torch"].level == "warn"


def test_an_unknown_sglang_is_a_warning_that_lists_the_known():
    check = complaints(with_versions(LAPTOP, sglang="0.6.0"))["sglang"]
    assert check.level == "warn" and "0.5.17, 0.5.21, 0.5.23" in check.remedy


def test_a_torch_that_does_not_load_fails_with_its_own_words():
    check = complaints(replace(LAPTOP, torch_error="OSError: libcudart.so.13: cannot open"))["torch"]
    assert check.level == "fail" and "libcudart" in check.found


def test_two_faiss_packages_fail_and_either_alone_is_fine():
    assert complaints(with_versions(LAPTOP, faiss_gpu="1.15.1"))["faiss"].level == "fail"
    assert complaints(with_versions(LAPTOP, faiss_cpu=None, faiss_gpu="1.15.1")) == {}
    assert complaints(with_versions(LAPTOP, faiss_cpu=None))["faiss"].found == "not installed"


def test_the_sglang_platform_is_needed_on_a_cpu_only():
    assert complaints(replace(LAPTOP, has_plugin=False))["SGLang CPU platform"].level == "fail"
    assert complaints(replace(GPU_NODE, has_plugin=False))["SGLang CPU platform"].level == "warn"


def test_gpus_that_torch_cannot_use_are_a_warning():
    check = complaints(replace(GPU_NODE, num_torch_gpus=0))["GPUs"]
    assert check.level == "warn" and "torch can use none" in check.found


def test_transformer_engine_is_optional_on_gpus():
    assert complaints(with_versions(GPU_NODE, transformer_engine=None))["transformer-engine"].level == "warn"


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"compute_modes": ("Default", "Exclusive_Process")}, "compute mode", "fail"),
        ({"alloc_conf": "max_split_size_mb:128,expandable_segments:True"}, "GPU memory settings", "fail"),
        ({"open_files": 4096}, "open files", "warn"),
    ],
)
def test_a_gpu_node_on_which_engines_could_not_live_beside_the_trainer_gets_a_complaint(change, name, level):
    (check,) = complaints(replace(GPU_NODE, **change)).values()
    assert (check.name, check.level) == (name, level)
    assert complaints(replace(GPU_NODE, open_files=-1, alloc_conf="max_split_size_mb:128")) == {}


def test_products_without_openblas_are_a_warning_on_a_cpu_only():
    check = complaints(replace(LAPTOP, openblas="", no_openblas="it is not installed"))["products"]
    assert check.level == "warn" and "not installed" in check.found and "scipy-openblas32" in check.remedy
    assert complaints(replace(GPU_NODE, openblas="", no_openblas="it is not installed")) == {}


def test_losses_in_plain_torch_are_a_warning_on_a_cpu_only():
    check = complaints(replace(LAPTOP, no_native_losses="they are not built"))["loss kernels"]
    assert check.level == "warn" and "not built" in check.found and "g++" in check.remedy
    assert complaints(replace(GPU_NODE, no_native_losses="they are not built")) == {}


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"python": (3, 10)}, "python", "fail"),
        ({"python": (3, 13)}, "python", "warn"),
        ({"omp_num_threads": None}, "OMP_NUM_THREADS", "warn"),
        ({"omp_num_threads": "8"}, "OMP_NUM_THREADS", "warn"),
        ({"cores": 1}, "CPU cores", "warn"),
        ({"memory_bytes": 4 * GIB}, "memory", "warn"),
        ({"free_disk_bytes": 5 * GIB}, "disk", "warn"),
        ({"free_disk_bytes": GIB // 2}, "disk", "fail"),
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm", "warn"),
        ({"shared_memory_bytes": None}, "/dev/shm", "fail"),
        ({"loopback_error": "Permission denied"}, "loopback", "fail"),
        ({"is_loopback_proxied": True}, "loopback", "warn"),
    ],
)
def test_a_poor_machine_gets_one_complaint_for_each_shortage(change, name, level):
    (check,) = complaints(replace(LAPTOP, **change)).values()
    assert (check.name, check.level) == (name, level)


def test_this_machine_is_inspected_and_local_servers_work_on_it():
    machine = inspect_machine()
    assert machine.python == sys.version_info[:2] and machine.cores >= 1 and machine.memory_bytes > GIB
    assert machine.versions["numpy"] is not None and machine.loopback_error == ""
    assert {check.name for check in run_doctor()} >= {"python", "torch", "sglang", "faiss", "disk", "loopback"}


def test_a_proxy_that_would_swallow_local_requests_is_noticed(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert inspect_machine().is_loopback_proxied
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert not inspect_machine().is_loopback_proxied


def test_the_exit_code_is_one_if_a_check_failed_and_brackets_are_printed_as_they_are(capsys):
    good, warned = Check("a", "ok", "1.0"), Check("b", "warn", "none", "pip install 'x[pytorch]'")
    assert print_doctor([good, warned]) == 0
    assert "x[pytorch]" in capsys.readouterr().out
    assert print_doctor([good, Check("c", "fail", "gone", "mend it")]) == 1
    assert "1 of 2 checks failed: c" in capsys.readouterr().out


def test_the_doctor_runs_where_no_package_at_all_is_installed():
    repository = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        "from searche1.doctor import print_doctor, run_doctor\n"
        "raise SystemExit(print_doctor(run_doctor()))"
    )
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert bare.returncode == 1, bare.stderr
    assert "fail  sglang: not installed; pip install" in bare.stdout and bare.stderr == ""
