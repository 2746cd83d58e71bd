#!/usr/bin/env bash
# A quarter of an hour on a GPU: what must hold there, and what it costs. Needs no network.
#
#   benchmarks/on_a_gpu.sh OUT first       tests, steps, augment: less than seven minutes
#   benchmarks/on_a_gpu.sh OUT second      a search for as long as there is time, and one that is stopped and resumed
#   benchmarks/on_a_gpu.sh OUT STAGE...    these stages, such as: tests steps
#
# OUT gets a text file for each stage, STAGE.txt. A stage that fails does not keep the next one from running; the script's
# exit code is then 1. Variables: PYTHON; DEVICE, cpu to try the script without a GPU, with small SIZE, BATCH, LAYERS,
# CHANNELS and ROUNDS; IMAGES, a folder with train/CLASS/ for the long search, which otherwise searches on digits;
# SEARCH_SECONDS.

set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/on_a_gpu.sh OUT first|second|STAGE...}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)

PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cuda} IMAGES=${IMAGES:-data/images}
options=(--device "$DEVICE" --sizes "${SIZE:-32}" --rounds "${ROUNDS:-9}")
options+=(${BATCH:+--batch-size "$BATCH"} ${LAYERS:+--layers "$LAYERS"} ${CHANNELS:+--init-channels "$CHANNELS"})
graphs=graphs
[ "$DEVICE" = cuda ] || graphs=

tests() {
    $PYTHON -m pytest -q -x tests/test_cuda.py
}
steps() {
    $PYTHON benchmarks/steps.py search "${options[@]}" --orders second \
        --ways "plain" "plain $graphs" "fused" "fused $graphs" "fused amp"
}
augment() {
    $PYTHON benchmarks/steps.py augment "${options[@]}" \
        --ways "fused nchw" "fused" "fused $graphs" "fused nchw amp" "fused amp" "fused amp $graphs"
}
search() {
    local data=(--dataset digits) runs
    runs=$(mktemp -d)
    [ -d "$IMAGES/train" ] && data=(--dataset folder --data-path "$IMAGES" --image-size "${SIZE:-32}")
    local words=(--device "$DEVICE" --runs-path "$runs" --order first --print-freq 10)
    timeout --signal TERM "${SEARCH_SECONDS:-270}" $PYTHON search.py "${data[@]}" "${words[@]}" --name long
    cp "$runs/search/long/log.txt" "$out/search-log.txt"
    words+=(--layers 3 --init-channels 8 --deterministic)
    $PYTHON search.py "${words[@]}" --epochs 2 --name whole || return
    $PYTHON search.py "${words[@]}" --epochs 1 --name resumed || return
    $PYTHON search.py --resume "$runs/search/resumed" --epochs 2 || return
    PYTHONPATH=.:tests $PYTHON - "$runs/search" <<'END'
import sys
from pathlib import Path
from comparing import differences, outcome
states = [outcome(Path(sys.argv[1], name))["checkpoint.pt"] for name in ("whole", "resumed")]
print("the resumed run differs in", differences(*states) or "no bit")
sys.exit(bool(differences(*states)))
END
}

declare -A limits=([tests]=120 [steps]=150 [augment]=120 [search]=420)
[ "$*" = first ] && set -- tests steps augment
[ "$*" = second ] && set -- search
failed=0
for stage in "$@"; do
    [ -n "${limits[$stage]:-}" ] || { echo "no stage $stage; there are ${!limits[*]}" >&2; exit 2; }
    echo "== $stage"
    export -f "$stage"
    variables=$(declare -p out PYTHON DEVICE IMAGES options graphs)
    timeout "${limits[$stage]}" bash -c "$variables; $stage" 2>&1 | tee "$out/$stage.txt"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "$stage failed: $code" | tee -a "$out/$stage.txt"; failed=1; }
done
exit $failed
