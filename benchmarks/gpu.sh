#!/usr/bin/env bash
# Everything that needs a GPU, in one run of less than nine minutes:
#
#     benchmarks/gpu.sh [FOLDER]           # results go to benchmarks/gpu, or to FOLDER
#     benchmarks/gpu.sh --small [FOLDER]   # tiny sizes on a CPU, to see that everything runs; to a new folder
#
# The parts run one after the other and each leaves FOLDER/<part>.json, whatever becomes of the others; status.json says
# how each ended. The exit status is not 0 if any part failed, ran out of time or was left out.
#
# It needs no network, no figures and no trained weights. PYTHON is the python to use (by default .venv/bin/python or
# python3, the first one whose torch sees a GPU). Where packages are missing or too old, wheels that were brought along
# in the folder WHEELS (by default wheels/) are used, for this run alone and without touching what is installed.
set -uo pipefail
small=() gpu=(--gpu) able='import torch, sys; sys.exit(not torch.cuda.is_available())'
if [ "${1:-}" = --small ]; then small=(--small) gpu=() able='import torch'; shift; fi
out=${1:-}
case $out in "" | /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ -z "$out" ]; then [ ${#small[@]} -gt 0 ] && out=$(mktemp -d) || out=benchmarks/gpu; fi
mkdir -p "$out" || exit 1

# Each part may run until this many seconds after the start: what one leaves over is there for the next.
parts=(tests:150 observe:240 saliency:290 pruning:430 larger:525)

python=
for want in "$able" 'import torch'; do
    for one in ${PYTHON:+"$PYTHON"} .venv/bin/python python3 python; do
        if [ -z "$python" ] && command -v "$one" >/dev/null && "$one" -c "$want" 2>/dev/null; then python=$one; fi
    done
done
if [ -z "$python" ]; then echo "No python here has torch: set PYTHON to one that has." >&2; exit 2; fi

echo "$("$python" --version), $(command -v "$python")"
check() { "$python" benchmarks/versions.py ${gpu[@]+"${gpu[@]}"}; }
check; found=$?
wheels=${WHEELS:-wheels}
if [ $found -eq 3 ] && compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    echo "With the wheels in $wheels:"
    # A folder in front of the others, not an environment of its own, which might not see what python has now.
    install=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site")
    "${install[@]}" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    check; found=$?
fi
case $found in
    0) ;;
    4) echo "There is no GPU: --small runs the same parts on a CPU." >&2; exit 2 ;;
    *) echo "Bring wheels of what is marked above (pip download --no-deps NAME) in $wheels/." >&2; exit 2 ;;
esac

SECONDS=0 failed=0 lines=()
for part in "${parts[@]}"; do
    name=${part%:*} began=$SECONDS left=$((${part#*:} - SECONDS))
    rm -f "$out/$name.json"
    echo; echo "== $name: up to $left s"
    if [ $left -lt 10 ]; then
        state="left out"
    else
        run=("$python" benchmarks/gpu.py "$name" ${small[@]+"${small[@]}"} --out "$out/$name.json")
        timeout --kill-after=10 "$left" "${run[@]}"
        case $? in 0) state=done ;; 124 | 137) state="out of time" ;; *) state=failed ;; esac
    fi
    [ "$state" = done ] || failed=1
    echo "== $name: $state after $((SECONDS - began)) s, $SECONDS s since the start"
    lines+=("  \"$name\": {\"state\": \"$state\", \"seconds\": $((SECONDS - began))}")
    (IFS=$'\n'; printf '{\n%s\n}\n' "$(printf '%s,\n' "${lines[@]}" | sed '$ s/,$//')") >"$out/status.json"
done
echo; cat "$out/status.json"
exit $failed
