#!/usr/bin/env bash
# The first 28 minutes on a GPU, unattended: is it right, then how fast. A bare machine with Python, torch, Triton and this
# repository will do; pytest, memeff and the trainer's packages are used if they are there.
#
#     bash benchmarks/gpu_session.sh [OUT]                   # results in OUT (default: gpu-session), a file for each part
#     HYMA_TINY=1 bash benchmarks/gpu_session.sh [OUT]       # every line on small shapes, in minutes; without a GPU all but --graph
#
# Each part runs under its own time limit and writes as it goes, so that whatever ends the session, OUT holds all that was
# measured until then. A part that fails does not stop the next. OUT/parts.txt says how each part ended.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${1:-gpu-session}")
PYTHON=${PYTHON:-python3}
TINY=${HYMA_TINY:-}
mkdir -p "$OUT"

# part NAME SECONDS COMMAND...: runs it under the limit; its output goes to OUT/NAME.log.
part() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    [ -n "$TINY" ] && limit=$((limit * 20)) # here only the lines count, and the machine may be any
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code after $((SECONDS - began)) of $limit s" | tee -a "$OUT/parts.txt"
    tail -n 3 "$OUT/$name.log"
    sync
}

if [ -n "$TINY" ]; then
    quick=(--quick) batch=(--batch 16) pairs=(--pairs 2) tests=(tests/test_kernels_arguments.py) rows=1200 epochs=1 graph_epochs=2
else
    quick=() batch=(--batch 512 4096 16384) pairs=(--pairs 27) rows=20000 epochs=10 graph_epochs=60
    tests=(tests/test_kernels.py tests/test_kernels_arguments.py tests/test_graphs.py)
fi
bench=("$PYTHON" -m kernels.bench)
rm -f "$OUT/parts.txt"

# Synthetic embeddings of three text and nine image encoders: noisy views of the same latent rows, as embed.py's folders are.
make_rows='
import sys
from pathlib import Path
import torch
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
latent = torch.randn(rows, 64)
dims = {"minilm": 384, "mpnet": 768, "roberta": 1024}
dims |= dict.fromkeys(("vit_s16", "deit_s16", "deit3_s16"), 384)
dims |= dict.fromkeys(("vit_b16", "deit_b16", "deit3-ft_b16"), 768)
dims |= dict.fromkeys(("vit_l16", "deit3-ft_l16", "eva2-ft_l16"), 1024)
for name, dim in dims.items():
    vectors = latent @ torch.randn(64, dim) + 8 * torch.randn(rows, dim)
    torch.save(torch.nn.functional.normalize(vectors, dim=1), folder / f"{name}.pt")
'
versions='
import platform, sys, torch
from kernels import triton_runs
import triton
print("python", sys.version.split()[0], platform.machine())
print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")
'
# Milliseconds of a step, from the first validation to the last with what these cost, and the losses, of two runs.
compare='
import json, sys
for folder in sys.argv[1:]:
    lines = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    first, last = lines[0], lines[-1]
    steps = max(1, last["step"] - first["step"])
    print(folder, 1000 * (last["seconds"] - first["seconds"]) / steps, "ms", [line["loss"] for line in lines])
'

# 1 minute: versions, clocks, one small step of every pair against torch.
part versions 30 "$PYTHON" -c "$versions"
part clocks 10 nvidia-smi -q -d CLOCK,PERFORMANCE,POWER
part smoke 60 "${bench[@]}" --quick --only pairs "${pairs[@]}" --batch 64 --json "$OUT/smoke.json"
# 6 minutes: the tests of the kernels, compiled for this GPU.
part tests 360 "$PYTHON" -m pytest -q -x -p no:cacheprovider "${tests[@]}"
# 2 minutes: everything once, quickly.
part quick 120 "${bench[@]}" --quick "${pairs[@]}" "${batch[@]}" --json "$OUT/quick.json"
# 4 minutes: launches against their alternatives.
part tune 230 "$PYTHON" -m kernels.tune "${pairs[@]}" "${batch[@]}" --json "$OUT/tune.json"
# 2 minutes: the head, K = 513, 513 padded to 528, and 1024, against the gradient in full and fused AdamW.
part head 120 "${bench[@]}" "${quick[@]}" --only head --json "$OUT/head.json"
# 6 minutes: all pairs, layers shared and layers of their own.
part factored 210 "${bench[@]}" "${quick[@]}" --only pairs "${pairs[@]}" "${batch[@]}" --json "$OUT/factored.json"
part each 150 "${bench[@]}" "${quick[@]}" --only pairs --generator each "${pairs[@]}" "${batch[@]}" --json "$OUT/each.json"
# 5 minutes: the training step in tf32, the trainer's default; then the trainer itself, and both with and without --graph: by
# the default's three pairs a step, drawn in 252 ways, and by all nine of a text encoder, in three ways.
part tf32 90 "${bench[@]}" "${quick[@]}" --only pairs --precision tf32 --pairs 3 "${batch[@]}" --json "$OUT/tf32.json"
part rows 30 "$PYTHON" -c "$make_rows" "$OUT/rows" "$rows"
for precision in tf32 bf16; do
    part "train-$precision" 45 "$PYTHON" train_hyma.py --pairs all --data "$OUT/rows" --out "$OUT/train-$precision" \
        --precision "$precision" --epochs "$epochs" --refine-steps 0
done
for each in 3 9; do
    for graph in "" --graph; do
        # $graph is one flag, or none
        part "steps-$each$graph" 40 "$PYTHON" train_hyma.py --pairs all --data "$OUT/rows" --out "$OUT/steps-$each$graph" \
            --pairs-per-step "$each" --epochs "$graph_epochs" --refine-steps 0 $graph
    done
    part "graph-$each" 10 "$PYTHON" -c "$compare" "$OUT/steps-$each" "$OUT/steps-$each--graph"
done

cat "$OUT/parts.txt"
