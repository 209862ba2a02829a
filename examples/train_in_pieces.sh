#!/usr/bin/env bash
# Train on machines that are lent for minutes at a time and forget everything, such as those of
# notebook services. (Where the disk stays, 'cdnctl train --max-seconds' and '--resume' will do.)
#
#   examples/train_in_pieces.sh CONFIG PLACE SECONDS DEVICE DATA... [-- HELD_OUT...]
#
# Call it, carry the folder PLACE away before the machine is gone, bring it to the next one, and
# make the same call there, until it says 'through'. Then PLACE/model.safetensors is the model,
# with its scores on the HELD_OUT folders. The first call also measures how training is fastest.
#
#   CONFIG    TOML file, or the name of a bundled config
#   SECONDS   for measuring and training; leave a minute or two for saving and scoring
#   DEVICE    cuda, cpu, ...
#   DATA      class folders or flat folders of pictures, or zip files of them
#   HELD_OUT  folders of pictures that are not in DATA
#
# In the environment, where needed:
#   PYTHON    the Python that has cdnctl, if it is not python3
#   SETTINGS  of the first call, to train otherwise than CONFIG says: "optim.steps=8000 run.seed=1"
#   PROBE     seconds after which measuring begins nothing more (90): fewer where SECONDS are few
#   PIECE     bytes of a file that can be carried, if they are not 16 MiB
#   EVALUATE  options of 'cdnctl evaluate', if scoring takes too long: "--limit 500"
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
read -ra evaluate <<<"${EVALUATE:-}"
read -ra settings <<<"${SETTINGS:-}"
run=$place/1
trained=$run/last/model.safetensors

cdnctl() {
    "$python" -m cdnctl "$@"
}

time_left() { # bash counts SECONDS from the start of the script
    echo $((limit > SECONDS ? limit - SECONDS : 0))
}

"$python" -c 'import cdnctl.images, safetensors' ||
    die "$python cannot import all that cdnctl needs: set PYTHON, or PYTHONPATH"
mkdir -p "$place"

# Is all there that was carried here? Then put files together again.
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

if compgen -G "$run/last/state*.safetensors" >/dev/null; then
    cdnctl train "${data[@]}" --resume "$run" --device "$device" --max-seconds "$(time_left)"
else
    if [ -d "$run" ]; then # of a call that was ended before it saved its state
        rm -rf "$run"/{config.json,passed_over.txt,results.csv,curves.png,samples,best,last}
        rmdir "$run"
    fi
    chosen=(--config "$config" --device "$device" "${settings[@]/#/--set=}")
    cdnctl train "${data[@]}" "${chosen[@]}" --probe --json --max-seconds "${PROBE:-90}" |
        tee "$place/probe.json" >&2
    mapfile -t fastest < <("$python" -c 'if True:
        import json, sys
        for key, value in json.load(sys.stdin)["choice"].items():
            print(f"--set={key}={json.dumps(value)}")' <"$place/probe.json")
    cdnctl train "${data[@]}" "${chosen[@]}" "${fastest[@]}" --runs "$place" \
        --max-seconds "$(time_left)"
fi

through=$("$python" -c 'if True:
    import json, safetensors, sys
    header = json.loads(safetensors.safe_open(sys.argv[1], "numpy").metadata()["cdnctl"])
    done = header["training"]
    print("yes" if done["steps"] >= done["config"]["optim"]["steps"] else "no")' "$trained")

if [ "$through" = yes ]; then
    model=$place/model.safetensors
    cdnctl models export "$trained" "$model" --half
    for folder in "${held_out[@]}"; do
        name=$(basename "$folder")
        scores=$place/scores-$name.json
        cdnctl evaluate "$folder" --model "$model" --device "$device" --json "${evaluate[@]}" \
            >"$scores"
        cdnctl models export "$model" "$model" --half --scores "$name=$scores"
    done
else
    rm "$trained" # the same weights are in the state beside it
fi

# Cut what is too large to be carried, and note what has to arrive.
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
