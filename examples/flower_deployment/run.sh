#!/usr/bin/env bash
# Three sites and a coordinator on this machine, with TLS and keys: ./run.sh FOLDER
# Each site has one office of the invented country that ships with the package.
set -euo pipefail
folder=${1:?usage: run.sh FOLDER}
orchard=${ORCHARD:-orchard}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder"
export OMP_NUM_THREADS=1

python=${PYTHON:-python}
"$python" "$here/write_offices.py" "$folder/data"
names=$(basename -s .jsonl "$folder"/data/*.jsonl)

if [ ! -e "$folder/keys" ]; then
    # shellcheck disable=SC2046
    "$orchard" keys "$folder/keys" --host 127.0.0.1 $(printf -- '--site %s ' $names)
fi

sites=()
trap 'kill "${sites[@]}" 2>/dev/null || true; wait' EXIT
for name in $names; do
    # In a terminal of its own, on a machine of its own.
    "$orchard" site --data "$folder/data/$name.jsonl" --store "$folder/$name" \
        --superlink 127.0.0.1:8443 --keys "$folder/keys" 2>"$folder/$name.log" &
    sites+=($!)
done

"$orchard" coordinate "$here/recipe.toml" --address 127.0.0.1:8443 \
    --keys "$folder/keys" --out "$folder/run"
"$orchard" audit "$folder/$(echo "$names" | head -n 1)"
