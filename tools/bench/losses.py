"""Time, memory and error of the vocabulary losses, beside what a user would pick instead.

    python tools/bench/losses.py                                    # this machine, sizes of Qwen2.5
    python tools/bench/losses.py --jobs kl --rows 256 --dtype bfloat16 --threads 1,2
    python tools/bench/losses.py --device cuda --rows 8192 --jobs "kl,tokens,head kl,head tokens"

First every variant computes a few rows and is compared with float64: whoever is wrong is not timed, and if it is one
of ours the program fails. Then all are timed in turns, so that a busy machine is busy for all of them; medians are
printed. Memory is what a call needs at its peak beyond its inputs. The last line is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loss_variants import Inputs, Result, Variant, absent, our_kernels, variants

from megatron_ext.vocab_parallel import reference, tile_cuts, whole_vocabulary

JOBS = ("kl", "tokens", "head kl", "head tokens")
CHECKED_ROWS = 16
# Relative errors allowed of the gradient; values may lose as much of log V. bfloat16 is what rounding to it costs.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def main() -> int:
    arguments = parsed()
    device = arguments.device
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "kernels": our_kernels(device),
        "rows": arguments.rows,
        "vocab": arguments.vocab,
        "hidden": arguments.hidden,
        "dtype": arguments.dtype,
        "kl_clip": arguments.kl_clip,
        "repeats": arguments.repeats,
        "absent": absent(),
        "jobs": {},
    }
    print(f"{report['device']}, torch {report['torch']}; ours on a {device}: {', '.join(report['kernels'])} kernels")
    for name in report["absent"]:
        print(f"  not measured: {name}, which is not installed")
    is_right = True
    for job in arguments.jobs:
        rows, good = measure_job(job, arguments)
        report["jobs"][job] = rows
        is_right &= good
    print(json.dumps(report))
    if not is_right:
        print("one of our own variants is wrong; see the errors above", file=sys.stderr)
    return 0 if is_right else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", default="kl,tokens", help=f"comma-separated, of: {', '.join(JOBS)}")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of the head jobs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: float32 on a CPU")
    parser.add_argument("--kl-clip", type=float, default=10.0)
    parser.add_argument("--threads", default="1", help="CPU threads; with 1,2 ours is timed with both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="variants whose name contains one of these, comma-separated")
    arguments = parser.parse_args()
    arguments.jobs = [job.strip() for job in arguments.jobs.split(",")]
    if unknown := [job for job in arguments.jobs if job not in JOBS]:
        parser.error(f"unknown job {unknown[0]!r}; jobs are {', '.join(JOBS)}")
    if min(arguments.rows, arguments.vocab, arguments.hidden, arguments.repeats) < 1:
        parser.error("--rows, --vocab, --hidden and --repeats must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU; leave it out")
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    try:
        arguments.threads = [int(n) for n in arguments.threads.split(",")]
    except ValueError:
        parser.error(f"--threads must be numbers such as 1,2, got {arguments.threads!r}")
    arguments.only = [part.strip() for part in arguments.only.split(",") if part.strip()]
    for job in arguments.jobs:
        if not entrants(job, arguments):
            parser.error(f"no variant of {job} has a name with {' or '.join(map(repr, arguments.only))} in it")
    return arguments


def entrants(job: str, arguments: argparse.Namespace) -> list[Variant]:
    everybody = variants(job, arguments.device)
    return [v for v in everybody if not arguments.only or any(part in v.name for part in arguments.only)]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


# -- inputs ---------------------------------------------------------------------------------------


class Source:
    """The inputs of a job: drawn once, copied for whoever may use them up."""

    def __init__(self, job: str, arguments: argparse.Namespace, rows: int) -> None:
        options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
        v, self.is_head = arguments.vocab, job.startswith("head")
        width = arguments.hidden if self.is_head else v
        # Logits of standard deviation 3; the teacher is the student and some noise.
        spread = 3.0 / math.sqrt(arguments.hidden) if self.is_head else 3.0
        self.student = torch.empty(rows, width, **options).normal_(0, 1 if self.is_head else spread)
        self.teacher = None
        if job.endswith("kl"):
            self.teacher = torch.empty_like(self.student).normal_(0, 0.2 if self.is_head else 0.5).add_(self.student)
        self.head = torch.empty(v, width, **options).normal_(0, spread) if self.is_head else None
        self.targets = torch.randint(v, (rows,), device=arguments.device)
        self.upstream = torch.full((rows,), 1 / rows, device=arguments.device)
        self.upstream_entropy = torch.full((rows,), -1e-3 / rows, device=arguments.device)
        self.kl_clip = arguments.kl_clip
        sizes = tuple(-(-v // (128 * tp)) * 128 for tp in (1, 2, 4, 8))
        self.shard = whole_vocabulary(v, cuts=tile_cuts(v, sizes))

    def fresh(self, *, kl_clip: float | None = None, entropy: bool = True) -> Inputs:
        return Inputs(
            student=self.student.clone(),
            teacher=None if self.teacher is None else self.teacher.clone(),
            head=self.head,
            targets=self.targets,
            upstream=self.upstream,
            upstream_entropy=self.upstream_entropy if entropy else torch.zeros_like(self.upstream_entropy),
            kl_clip=self.kl_clip if kl_clip is None else kl_clip,
            shard=self.shard,
        )


# -- the gate -------------------------------------------------------------------------------------


def exact(job: str, x: Inputs) -> Result:
    """The job in float64, from logits as the variant's type rounds them."""
    trained = x.student.double().requires_grad_()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return hidden if x.head is None else F.linear(hidden, x.head.double())

    options = {"vocab_size": x.shard.vocab_size}
    if job.endswith("kl"):
        assert x.teacher is not None
        loss = reference.clipped_kl(logits(trained), logits(x.teacher.double()), kl_clip=x.kl_clip, **options).loss
        loss.backward(x.upstream.double())
    else:
        loss, entropy = reference.token_logprobs(logits(trained), x.targets, **options)
        torch.autograd.backward([loss, entropy], [x.upstream.double(), x.upstream_entropy.double()])
    assert trained.grad is not None
    return loss.detach(), trained.grad


def errors(variant: Variant, source: Source, want: Result, dtype: torch.dtype) -> dict[str, float | bool]:
    """Largest error of a row's value, relative error of the gradient, and whether both will do."""
    kl_clip = None if variant.has_clip else math.inf
    values, gradient = variant.run(source.fresh(kl_clip=kl_clip, entropy=variant.has_entropy))
    want_values, want_gradient = want
    assert want_values is not None
    of_gradient = float((gradient.double() - want_gradient).norm() / want_gradient.norm())
    of_values = float((values.double() - want_values).abs().max()) if values is not None else 0.0
    scale = math.log(source.shard.vocab_size)
    allowed = ALLOWED[dtype] * (3 if source.is_head else 1)
    return {
        "error_values": of_values,
        "error_gradient": of_gradient,
        "is_right": of_gradient <= allowed and of_values <= allowed * scale,
    }


# -- time and memory ------------------------------------------------------------------------------


def measure_job(job: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    dtype = getattr(torch, arguments.dtype)
    print(f"\n{job}: {arguments.rows} rows, vocabulary {arguments.vocab}, {arguments.dtype}", flush=True)
    torch.set_num_threads(arguments.threads[0])
    few = Source(job, arguments, min(CHECKED_ROWS, arguments.rows))
    results: dict[str, Any] = {}
    timed: list[tuple[str, Variant, int]] = []
    is_right = True
    want: dict[tuple[bool, bool], Result] = {}  # by what is asked of a variant
    for variant in entrants(job, arguments):
        asked = (variant.has_clip, variant.has_entropy)
        if asked not in want:
            kl_clip = None if variant.has_clip else math.inf
            want[asked] = exact(job, few.fresh(kl_clip=kl_clip, entropy=variant.has_entropy))
        try:
            found = errors(variant, few, want[asked], dtype)
        except Exception as error:  # another library's failure is a line of the report; our own is an error
            if variant.is_ours:
                raise
            results[variant.name] = {"covers": variant.covers, "failure": f"{type(error).__name__}: {error}"}
            print(f"  {variant.name} failed and is not timed: {results[variant.name]['failure']}")
            continue
        results[variant.name] = {"covers": variant.covers or "all of it", **found}
        if not found["is_right"]:
            print(f"  {variant.name} is wrong and not timed: {found}")
            is_right &= not variant.is_ours
            continue
        timed.append((variant.name, variant, arguments.threads[0]))
        if variant.is_ours and arguments.device == "cpu":
            for threads in arguments.threads[1:]:
                results[f"{variant.name}, {threads} threads"] = dict(results[variant.name])
                timed.append((f"{variant.name}, {threads} threads", variant, threads))
    del few, want
    source = Source(job, arguments, arguments.rows)
    times: dict[str, list[float]] = {name: [] for name, _, _ in timed}
    peaks: dict[str, int] = {}
    for turn in range(arguments.repeats + 1):
        for name, variant, threads in timed:
            if arguments.device == "cpu":
                torch.set_num_threads(threads)
            if "failure" in results[name]:
                continue
            try:
                seconds, extra = one_call(variant, source.fresh(), arguments.device)
            except torch.OutOfMemoryError as error:
                results[name]["failure"] = str(error).splitlines()[0]
                print(f"  {name}: {results[name]['failure']}")
                del times[name]
                continue
            if turn:  # the first one compiles, and touches memory for the first time
                times[name].append(seconds)
            peaks[name] = extra
            print(f"\r  turn {turn}/{arguments.repeats}: {name:<40}", end="", file=sys.stderr, flush=True)
    print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)
    for name, taken in times.items():
        results[name] |= {
            "ms_per_row": statistics.median(taken) / arguments.rows * 1e3,
            "ms_all": [seconds * 1e3 for seconds in taken],
            "extra_bytes_per_row": peaks[name] / arguments.rows,
            "extra_mib": peaks[name] / 2**20,
        }
    add_ratios(results)
    print_table(results)
    return results, is_right


def one_call(variant: Variant, inputs: Inputs, device: str) -> tuple[float, int]:
    """Seconds, and bytes at the peak beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = variant.run(inputs)
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back, or it would serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    started = time.perf_counter()
    result = variant.run(inputs)
    seconds = time.perf_counter() - started
    del result
    return seconds, max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def add_ratios(results: dict[str, Any]) -> None:
    """How many times longer everybody takes than the best of ours on one thread, and the same against naive torch."""
    measured = {name: row["ms_per_row"] for name, row in results.items() if "ms_per_row" in row}
    ours = {name: ms for name, ms in measured.items() if name.startswith("ours") and "threads" not in name}
    for name, ms in measured.items():
        if ours:
            results[name]["times_ours"] = ms / min(ours.values())
        if "naive torch" in measured:
            results[name]["speedup_over_naive"] = measured["naive torch"] / ms


def print_table(results: dict[str, Any]) -> None:
    print(f"  {'variant':<34}{'ms/row':>9}{'x naive':>9}{'extra MiB':>11}{'value err':>11}{'grad err':>10}  covers")
    for name, row in results.items():
        if "ms_per_row" not in row:
            continue
        speedup = f"{row['speedup_over_naive']:.1f}" if "speedup_over_naive" in row else ""
        print(
            f"  {name:<34}{row['ms_per_row']:>9.3f}{speedup:>9}{row['extra_mib']:>11.1f}"
            f"{row['error_values']:>11.1e}{row['error_gradient']:>10.1e}  {row['covers']}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
