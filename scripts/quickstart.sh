#!/usr/bin/env bash
# From a fresh checkout to a finished run: makes the environment, then hands its arguments to `searche1 quickstart`.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/quickstart.sh [--fast] [--seed N] [--out DIR] [--device cpu|cuda|auto] [--new] [key=value ...]

Trains a tiny search agent in a toy world on this machine, and writes a run folder with a report.
The first call also installs the environment. The same command again continues where it stopped.

  --fast        one tiny cycle: shows that every stage works, too short to show gains
  --seed N      seed of the world, the data order and the sampling (default 0)
  --out DIR     run folder (default runs/quickstart-seed<N> in the checkout, runs/quickstart-fast-seed<N> with --fast)
  --device D    cpu, cuda or auto (default): auto takes the GPU where nvidia-smi lists one
  --new         start anew, in the next free folder beside DIR, instead of continuing
  key=value     settings, as `searche1 config` lists them
  -h, --help    this text
END
}
refuse() {
    echo "quickstart.sh: $1; scripts/quickstart.sh --help lists the flags" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
device=auto arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --*=*) # --seed=1 is --seed 1
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
    --seed | --out | --device) if [ -z "${2:-}" ]; then refuse "$1 needs a value"; fi ;;
    esac
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --seed) if ! [[ $2 =~ ^[0-9]+$ ]]; then refuse "--seed is '$2', it must be a whole number such as 0"; fi ;;
    --device)
        case $2 in cpu | cuda | auto) ;; *) refuse "--device is '$2', it must be cpu, cuda or auto" ;; esac
        device=$2
        ;;
    --out) # the run starts in the checkout: a relative folder is the caller's
        if ! [[ $2 = /* || $PWD -ef $root ]]; then set -- --out "$PWD/$2" "${@:3}"; fi
        ;;
    --fast | --new | [a-z]*=*) ;;
    *) refuse "unknown flag '$1'" ;;
    esac
    arguments+=("$1")
    case $1 in
    --seed | --out | --device)
        arguments+=("$2")
        shift
        ;;
    esac
    shift
done

cd "$root"
export SEARCHE1_DEVICE=$device
# shellcheck source=scripts/env.sh
source scripts/env.sh
exec searche1 quickstart ${arguments[@]+"${arguments[@]}"}
