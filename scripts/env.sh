#!/usr/bin/env bash
# Makes the Python environment where it is missing or out of date, and activates it:  source scripts/env.sh
# Run instead of sourced, it makes the environment and prints its folder. These variables change what it does:
#
#   SEARCHE1_DEVICE   auto (default), cpu or cuda; auto means cuda where nvidia-smi lists a GPU
#   SEARCHE1_VENV     folder of the environment; default .venv (CPU) or .venv-gpu in the checkout
#   SEARCHE1_PYTHON   the Python that makes it; default: the first python3.11 (CPU) or python3.12 (GPU) found
#   SEARCHE1_LOCK     the GPU lock file; default requirements/gpu-sglang0.5.21-py312.txt
#   SEARCHE1_WAIT     1: make nothing, wait until another node has made the environment on the shared disk
#   SEARCHE1_BUNDLE   unpacked archive of make_gpu_bundle.sh: nothing is installed, the machine's own python3 runs

if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then # sourced: the work is done in a process of its own, so a failure ends no shell
    _searche1_script=${BASH_SOURCE[0]:-$0} # zsh has no BASH_SOURCE
    _searche1_env=$(bash "$_searche1_script") || return 1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # beside other processes, OpenMP's spinning threads cost 10x and more
    if [ -n "${SEARCHE1_BUNDLE:-}" ]; then
        _searche1_root=$(cd "$(dirname "$_searche1_script")/.." && pwd -P)
        export PYTHONPATH="$_searche1_env/site:$_searche1_root${PYTHONPATH:+:$PYTHONPATH}"
        unset _searche1_root
    else
        export VIRTUAL_ENV="$_searche1_env"
        unset PYTHONHOME
    fi
    export PATH="$_searche1_env/bin:$PATH"
    unset _searche1_script _searche1_env
    return 0
fi

set -euo pipefail
trap 'exit 130' INT # pip ends on Ctrl-C with an ordinary error, after which bash would go on
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf 'searche1: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# No pipe into `grep -q`: it leaves at the first GPU, and nvidia-smi, still talking of the others, would count as failed.
has_gpu() { command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]; }

find_python() { # $1: wanted version, e.g. 3.11
    local candidate candidates=("python$1" python3 python)
    if [ -n "${SEARCHE1_PYTHON:-}" ]; then candidates=("$SEARCHE1_PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# pip's own lines go to the log; a line a quarter of the way goes to the terminal.
pip_install() { # $1: packages expected, then pip's arguments
    local expected=$1 count=0 line
    shift
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --no-input --no-deps --progress-bar off "$@" 2>&1 |
        while IFS= read -r line; do
            printf '%s\n' "$line" >>"$log"
            case $line in
            Collecting\ * | Processing\ *) # one a package: from an index, or from a folder
                count=$((count + 1))
                if [ $((count % 35)) = 0 ]; then say "  fetched $count of $expected packages"; fi
                ;;
            Installing\ collected\ packages*) if [ "$expected" -gt 1 ]; then say "  unpacking"; fi ;;
            esac
        done
}

die_with_log() {
    # "Location ... is ignored" only says that a configured package folder is absent: it hides the error that matters.
    grep -v -e 'Location .* is ignored' "$log" | tail -n 15 >&2 || true
    die "$1; all of pip's output is in $log. Mend the cause and run the same command again: it starts over"
}

install_torch_cpu() { # $1: the pinned requirement
    sed -n '/^torch==/,/[^\\]$/p' "$lock" >"$venv/torch.txt" # with its hash
    pip_install 1 -r "$venv/torch.txt" && return
    say "  pip's own sources have no $1 of the right hash; taking it from PyTorch's CPU index"
    pip_install 1 --index-url https://download.pytorch.org/whl/cpu -r "$venv/torch.txt" ||
        die_with_log "could not install $1: neither pip's configured sources nor PyTorch's CPU index gave it"
}

install_packages() {
    local python num_packages free_gb torch
    python=$(find_python "$version") || die "$lock_name needs Python $version, which is not among" \
        "the ones tried (${SEARCHE1_PYTHON:-python$version, python3, python}); install Python $version, or set" \
        "SEARCHE1_PYTHON=/path/to/python$version$cpu_hint"
    free_gb=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free_gb" -ge "$needed_gb" ] || die "needs $needed_gb GB of disk for the environment, but the disk of $venv" \
        "has $free_gb GB free; make room, or set SEARCHE1_VENV to a folder on another disk"
    num_packages=$(grep -c '^[A-Za-z]' "$lock")
    say "installing $num_packages packages from $lock_name into $venv: $effort, once"

    find "$venv" -mindepth 1 -maxdepth 1 ! -name "$(basename "$stamp")" -exec rm -rf {} +
    echo '*' >"$venv/.gitignore"
    "$python" -m venv "$venv" >"$log" 2>&1 ||
        die_with_log "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python$version-venv)"
    torch=$(grep -o '^torch==[^ ]*+cpu' "$lock" || true)
    if [ -n "$torch" ]; then install_torch_cpu "$torch"; fi
    pip_install "$num_packages" -r "$lock" || die_with_log "could not install $lock_name"
}

install_project() {
    pip_install 1 --no-build-isolation -e "$root" || die_with_log "could not install the project itself"
}

if [ -n "${SEARCHE1_BUNDLE:-}" ]; then
    bundle=$(cd "$SEARCHE1_BUNDLE" 2>/dev/null && pwd -P) && [ -d "$bundle/site" ] ||
        die "SEARCHE1_BUNDLE=$SEARCHE1_BUNDLE holds no site/ folder; unpack there what scripts/make_gpu_bundle.sh made"
    printf '%s\n' "$bundle"
    exit 0
fi

platform=$(uname -sm)
[ "$platform" = "Linux x86_64" ] || die "the locked packages are for Linux x86_64, this is $platform;" \
    "use such a machine or container"
device=${SEARCHE1_DEVICE:-auto}
case $device in
auto) if has_gpu; then device=cuda; else device=cpu; fi ;;
cuda) has_gpu || die "device cuda was asked for, but nvidia-smi lists no GPU; check the driver, or ask for device cpu" ;;
cpu) ;;
*) die "SEARCHE1_DEVICE is '$device'; it must be auto, cpu or cuda" ;;
esac
if [ "$device" = cpu ]; then
    lock=$root/requirements/cpu.txt venv=$root/.venv version=3.11 needed_gb=4
    effort="about 2 minutes" cpu_hint=""
else
    lock=${SEARCHE1_LOCK:-$root/requirements/gpu-sglang0.5.21-py312.txt} venv=$root/.venv-gpu version=3.12 needed_gb=25
    effort="5.4 GB to fetch" cpu_hint="; --device cpu (or SEARCHE1_DEVICE=cpu) does without the GPU"
fi
[ -f "$lock" ] || die "SEARCHE1_LOCK=$lock is no file; requirements/ holds the locks"
lock_name=requirements/$(basename "$lock")
venv=${SEARCHE1_VENV:-$venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
log=$venv/install.log
# The stamp holds what was installed, one line for the packages and one for the project, written when each is complete:
# after an interruption or a change the part without its line is done again.
stamp=$venv/.searche1
packages_line="packages $({ printf '%s\n' "$root" "$venv" && grep -v '^#' "$lock"; } | sha256sum | cut -c1-16)"
sources=("$root/setup.py" "$root"/megatron_ext/*.h "$root"/megatron_ext/*.cpp "$root"/megatron_ext/*/*.cpp "$root"/searche1/*/*.cpp)
project_line="project $(cat "${sources[@]}" | sha256sum | cut -c1-16)"

is_stamped() { grep -qxF "$1" "$stamp" 2>/dev/null; }

if [ "${SEARCHE1_WAIT:-}" = 1 ]; then
    waited=0
    until is_stamped "$packages_line" && is_stamped "$project_line"; do
        if [ $waited = 0 ]; then say "waiting for node 0 to make the environment in $venv"; fi
        if [ $waited -ge 3600 ]; then
            die "node 0 has made no environment in $venv for an hour; is that folder on a disk that all nodes see?"
        fi
        sleep 5
        waited=$((waited + 5))
    done
    [ -x "$venv/bin/python" ] || die "node 0 has made the environment, but its Python, $(readlink "$venv/bin/python")," \
        "is not on this node; install it here too, or set SEARCHE1_PYTHON to one on the shared disk before node 0 starts"
fi

if ! is_stamped "$packages_line" || ! is_stamped "$project_line" || ! [ -x "$venv/bin/python" ]; then
    # The stamp comes first into a new folder, and is looked for last: another shell may be making it right now.
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && ! [ -f "$stamp" ]; then
        die "$venv exists, but this script did not make it; remove it, or set SEARCHE1_VENV to another folder"
    fi
    mkdir -p "$venv"
    exec 9>>"$stamp"
    locked=0
    flock -n -E 10 9 2>/dev/null || locked=$?
    if [ $locked = 10 ]; then
        say "another shell is installing into $venv; waiting for it"
        flock 9
    elif [ $locked != 0 ]; then # some networked disks know no locks
        say "the disk of $venv knows no locks: see that no other shell or node installs into it now"
    fi
    if ! is_stamped "$packages_line" || ! [ -x "$venv/bin/python" ]; then
        : >"$stamp"
        install_packages
        echo "$packages_line" >"$stamp"
    fi
    if ! is_stamped "$project_line"; then
        echo "$packages_line" >"$stamp"
        install_project
        echo "$project_line" >>"$stamp"
        say "the environment is ready"
    fi
fi
printf '%s\n' "$venv"
