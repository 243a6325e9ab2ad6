#!/usr/bin/env bash
# Run the benchmarks of speed on a machine with a GPU, in at most eight minutes. Tables are printed
# last.
#
#   benchmarks/gpu.sh          the most important first; those there is no time for are listed
#   benchmarks/gpu.sh --dry    the same commands with tiny shapes, on a CPU
#
# Needs this repository and installed packages only. Without torch with CUDA and diffusers there is
# no peer. PYTHON is the Python to use, JSON a file to which each command's JSON line is appended.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
limit=450 # seconds, after which no command starts and the running one is stopped

size() { echo "$1"; }
S=DiT-S/2 B=DiT-B/2 L=DiT-L/2 XL=DiT-XL/2 MMDiT=MMDiT-B/2
common="--rounds 4" tiny="" turns="--steps_per_turn 8" n_steps=50 compiled=autocast+compile vae=""
remats=false,true unrolls=1,12
if [ "${1-}" = --dry ]; then
    size() { echo 2; }
    S=DiT-Ti/8 B=$S L=$S XL=$S MMDiT=MMDiT-Ti/8
    common="--rounds 1" tiny="--image_size 16" turns="" n_steps=2 limit=1800
    vae="--image_size 16 --block_out_channels 32,32"
    compiled=autocast # compiling even this takes a CPU a minute: once is enough, below
    remats=true unrolls=1
    export JAX_PLATFORMS=cpu
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false       # torch's process needs memory too
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # one GPU
export PYTHONUNBUFFERED=1
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT

done_before=";"
bench() { # SCRIPT FLAG...
    local script=$1 left=$((limit - SECONDS)) output status
    case $done_before in *";$*;"*) return ;; esac # sizes that differ on a GPU are one in a dry run
    done_before+="$*;"
    shift
    echo "--- $SECONDS s: $script $*"
    [ "$left" -gt 20 ] || { echo "left out, no time: $script $*" >>"$summary"; return; }
    # shellcheck disable=SC2086 (several words)
    output=$(timeout "$left" "$python" "benchmarks/$script" "$@" $common)
    status=$?
    echo "$output" | grep -v '^{'
    [ -z "${JSON-}" ] || echo "$output" | grep '^{' >>"$JSON"
    echo "$output" | grep -E '^(\||left out)' >>"$summary"
    [ $status -eq 0 ] || echo "left out, status $status: $script $*" >>"$summary"
    echo >>"$summary"
}
step() { bench step.py $turns $tiny --precision "${precision-bf16}" "$@"; }

step --model $XL --batch_size "$(size 32)" --remat false --peer autocast+compile
step --model $XL --batch_size "$(size 128)" --remat true --peer none
precision=bf16,fp8 step --model $XL --batch_size "$(size 64)" --remat true --peer none
step --model $B --batch_size "$(size 256)" --peer $compiled
bench attention.py --precision bf16 --batch_size "$(size 64)" --heads 12 16 --width 64 72
bench sample.py --model $XL --precision bf16 --n_steps $n_steps --peer $compiled $tiny
bench autoencoder.py --precision bf16 --batch_size "$(size 16)" $vae
step --model $S --batch_size "$(size 256)" --unroll $unrolls --peer none
step --model $XL --batch_size "$(size 64)" --remat $remats --peer none
step --model $MMDiT --batch_size "$(size 128)" --peer none
step --model $L --batch_size "$(size 64)" --remat $remats --peer none
step --model $S --batch_size "$(size 1024)" --peer $compiled
step --model $B --batch_size "$(size 64)" --unroll $unrolls --peer none

echo
echo "=== $SECONDS s; $("$python" -c 'from importlib.metadata import version as v; print("jax", v("jax"))')"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
cat "$summary"
