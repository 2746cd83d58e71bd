#!/usr/bin/env bash
# Half an hour on a GPU: what must hold there, and what it costs. Needs no network.
#
#   benchmarks/on_a_gpu.sh OUT             all stages, each of less than nine minutes; those that have ended are left out
#   benchmarks/on_a_gpu.sh OUT STAGE...    these stages, again if need be
#
# OUT gets a text file for each stage, STAGE.txt, and its figures as lines of JSON, STAGE.json. A stage that fails does not
# keep the next from running; the script's exit code is then 1. Variables: PYTHON; DEVICE, cpu for trying it without a GPU,
# at a small SIZE, BATCH, LAYERS and ROUNDS; IMAGES, a folder with train/CLASS/ for the last stage, without which it searches
# on digits; BEFORE, another checkout, whose step is timed as well.

set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/on_a_gpu.sh OUT [STAGE...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)

PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cuda}
SIZE=${SIZE:-32} BATCH=${BATCH:-64} LAYERS=${LAYERS:-8} ROUNDS=${ROUNDS:-10}
IMAGES=${IMAGES:-data/images}
cuda=()
[ "$DEVICE" = cuda ] && cuda=(--cuda)
common=(--batch-size "$BATCH" --layers "$LAYERS" --rounds "$ROUNDS")

tests() {
    $PYTHON -m pytest -q -x tests/test_cuda.py
}
quick_tests() {
    $PYTHON -m pytest -q -x tests/test_architect.py tests/test_precision.py tests/test_gpu_step.py tests/test_training.py
}
tf32() {
    $PYTHON benchmarks/gpu.py tf32 --device "$DEVICE" --size 8 --batch-size "$BATCH" --layers "$LAYERS" --json "$1" &&
        $PYTHON benchmarks/gpu.py tf32 --device "$DEVICE" --size "$SIZE" --batch-size "$BATCH" --layers "$LAYERS" --json "$1"
}
step() {
    $PYTHON benchmarks/search_step.py --sizes "$SIZE" "${common[@]}" "${cuda[@]}" --json "$1" || return
    if [ -n "${BEFORE:-}" ]; then
        (cd "$BEFORE" && $PYTHON benchmarks/search_step.py --sizes "$SIZE" "${common[@]}" "${cuda[@]}") || return
        $PYTHON benchmarks/search_step.py --sizes "$SIZE" "${common[@]}" "${cuda[@]}" --json "$1"
    fi
}
profile() {
    $PYTHON benchmarks/gpu.py profile --device "$DEVICE" --size "$SIZE" "${common[@]}" --json "$1"
}
graphs() {
    $PYTHON benchmarks/gpu.py graphs --device "$DEVICE" --size "$SIZE" "${common[@]}" --json "$1"
}
layouts() {
    $PYTHON benchmarks/gpu.py layouts --device "$DEVICE" --size "$SIZE" "${common[@]}" --json "$1"
}
augment() {
    local words=(--size "$SIZE" --rounds "$ROUNDS" "${cuda[@]}" --json "$1")
    [ "$DEVICE" = cuda ] || words+=(--layers 3 --init-channels 4 --batch-size 8)
    $PYTHON benchmarks/augment_step.py "${words[@]}" && $PYTHON benchmarks/augment_step.py "${words[@]}" --amp
}
search() {
    # As long as there is time; then one that is stopped and goes on, against one that is not.
    local data=(--dataset digits) runs seconds=${SEARCH_SECONDS:-270}
    runs=$(mktemp -d)
    [ -d "$IMAGES/train" ] && data=(--dataset folder --data-path "$IMAGES" --image-size "$SIZE")
    local words=(--device "$DEVICE" --runs-path "$runs" --layers "$LAYERS" --print-freq 10 --deterministic)
    timeout --signal TERM "$seconds" $PYTHON search.py "${data[@]}" "${words[@]}" --name long
    cp "$runs/search/long/log.txt" "$out/search-log.txt"
    words+=(--layers 3 --init-channels 8 --epochs 2)
    $PYTHON search.py "${words[@]}" --name whole || return
    $PYTHON search.py "${words[@]}" --name parts --epochs 1 || return
    $PYTHON search.py --resume "$runs/search/parts" --epochs 2 || return
    $PYTHON - "$runs/search" "$1" <<'END'
import json, sys, torch
states = [torch.load(f"{sys.argv[1]}/{name}/checkpoint.pt", weights_only=True)["keeps"]["net"] for name in ("whole", "parts")]
same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
print("a resumed run has the same bits:", same)
open(sys.argv[2], "a").write(json.dumps({"resumed_with_the_same_bits": same}) + "\n")
sys.exit(not same)
END
}

all=(tests quick_tests tf32 step profile graphs layouts augment search)
failed=0
export -f "${all[@]}"
for stage in "${@:-${all[@]}}"; do
    case " ${all[*]} " in *" $stage "*) ;; *) echo "no stage $stage; there are ${all[*]}" >&2; exit 2 ;; esac
    [ $# -eq 0 ] && [ -e "$out/$stage.done" ] && continue
    echo "== $stage"
    rm -f "$out/$stage.json" "$out/$stage.done"
    timeout 530 bash -c "$(declare -p out PYTHON DEVICE SIZE BATCH LAYERS ROUNDS IMAGES cuda common); $stage $out/$stage.json" \
        2>&1 | tee "$out/$stage.txt"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 0 ]; then touch "$out/$stage.done"; else echo "$stage failed: $code" | tee -a "$out/$stage.txt"; failed=1; fi
done
exit $failed
