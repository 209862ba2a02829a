#!/usr/bin/env bash
# Train on a machine that is lent for minutes at a time and forgets everything.
#
#   examples/train_in_pieces.sh CONFIG PLACE SECONDS DEVICE DATA... [-- HELD_OUT...]
#
# The first call measures how training is fastest here, and begins a run in PLACE/1. After about
# SECONDS it stops, and every file in PLACE is small enough to be carried away. Bring them all to
# PLACE on the next machine, call again, and the run goes on. Once it is through, the model is
# in PLACE/model.safetensors, with its scores on the HELD_OUT folders.
#
#   CONFIG    TOML file, or the name of a bundled config
#   SECONDS   for probe and training together; saving, exporting and scoring come on top
#   DEVICE    cuda, cpu, ...
#   DATA      class folders or flat folders of pictures, or zip files of them
#   HELD_OUT  folders of pictures that are not in DATA
#
# In the environment: PYTHON (python3); SETTINGS, keys of the config to set anew, such as
# "optim.steps=8000 run.log_every=50"; PROBE, seconds after which the probe begins no further
# trial (90); EVALUATE, options for 'cdnctl evaluate', such as "--limit 500"; PIECE, the largest
# size of a file in bytes (16 MiB).
set -euo pipefail

die() {
    echo "train_in_pieces: $*" >&2
    exit 2
}

[ $# -ge 5 ] || die "usage: CONFIG PLACE SECONDS DEVICE DATA... [-- HELD_OUT...]"
config=$1 place=$2 limit=$3 device=$4
shift 4
data=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    data+=("$1")
    shift
done
held_out=("${@:2}")
python=${PYTHON:-python3}
piece=${PIECE:-16777216}
run=$place/1
read -ra evaluate <<<"${EVALUATE:-}"
read -ra settings <<<"${SETTINGS:-}"

"$python" -c 'import cdnctl.images, safetensors' ||
    die "$python cannot import all that cdnctl needs: set PYTHON, or PYTHONPATH"
mkdir -p "$place"

# What was carried here: whole, and in one piece again.
if [ -f "$place/SHA256SUMS" ]; then
    (cd "$place" && sha256sum --check --quiet SHA256SUMS) ||
        die "files in $place are missing or damaged: bring all of them again"
    rm "$place/SHA256SUMS"
    while IFS= read -r -d '' first; do
        file=${first%.part-000}
        cat "$file".part-??? >"$file"
        rm "$file".part-???
    done < <(find "$place" -name '*.part-000' -print0)
fi

time_left() {
    echo $((limit > SECONDS ? limit - SECONDS : 0))
}

if compgen -G "$run/last/state*.safetensors" >/dev/null; then
    "$python" -m cdnctl train "${data[@]}" --resume "$run" --device "$device" \
        --max-seconds "$(time_left)"
else
    if [ -d "$run" ]; then # left by a call that was ended before it saved its state
        rm -rf "$run"/{config.json,results.csv,best,last}
        rmdir "$run"
    fi
    chosen=(--config "$config" --device "$device" "${settings[@]/#/--set=}")
    "$python" -m cdnctl train "${data[@]}" "${chosen[@]}" --probe --json \
        --max-seconds "${PROBE:-90}" >"$place/probe.json"
    cat "$place/probe.json" >&2
    mapfile -t fastest < <("$python" -c 'if True:
        import json, sys
        for key, value in json.load(sys.stdin)["choice"].items():
            print(f"--set={key}={json.dumps(value)}")' <"$place/probe.json")
    "$python" -m cdnctl train "${data[@]}" "${chosen[@]}" "${fastest[@]}" --runs "$place" \
        --max-seconds "$(time_left)"
fi

through=$("$python" -c 'if True:
    import csv, json, sys
    with open(sys.argv[1] + "/config.json") as file:
        steps = json.load(file)["config"]["optim"]["steps"]
    try:
        with open(sys.argv[1] + "/results.csv") as file:
            done = max(int(row["step"]) for row in csv.DictReader(file))
    except FileNotFoundError:  # stopped before the first report
        done = 0
    print("yes" if done >= steps else "no")' "$run")

if [ "$through" = yes ]; then
    model=$place/model.safetensors
    "$python" -m cdnctl models export "$run/last/model.safetensors" "$model" --half
    scores=()
    for folder in "${held_out[@]}"; do
        name=$(basename "$folder")
        "$python" -m cdnctl evaluate "$folder" --model "$model" --device "$device" --json \
            "${evaluate[@]}" >"$place/scores-$name.json"
        scores+=("--scores=$name=$place/scores-$name.json")
    done
    [ ${#scores[@]} -eq 0 ] || # once more, with the scores in it
        "$python" -m cdnctl models export "$run/last/model.safetensors" "$model" --half \
            "${scores[@]}"
else
    rm -f "$run/last/model.safetensors" # the same weights are in the state beside it
fi

# Ready to be carried away.
while IFS= read -r -d '' file; do
    split --bytes="$piece" --numeric-suffixes --suffix-length=3 "$file" "$file.part-"
    rm "$file"
done < <(find "$place" -type f -size +"$piece"c -print0)
(cd "$place" && find . -type f ! -name 'SHA256SUMS*' -exec sha256sum {} + >SHA256SUMS.new &&
    mv SHA256SUMS.new SHA256SUMS)
if [ "$through" = yes ]; then
    echo "through: the model is in $place"
else
    echo "not through yet: carry all of $place to the next machine, and call again there"
fi
