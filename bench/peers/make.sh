#!/usr/bin/env bash
# A throw-away environment that holds one peer beside kvshrink, so that both are measured in one process.
# usage: bench/peers/make.sh quanto     -> bench/peers/quanto/venv/bin/python
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
peer="${1:-}"
case "$peer" in
  quanto) packages=(optimum-quanto==0.2.7 ninja) ;;
  hqq) packages=(hqq==0.2.8.post1) ;;
  *) echo "usage: $0 quanto|hqq" >&2; exit 2 ;;
esac
venv="$here/$peer/venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" torch
"$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" --editable "$root" "${packages[@]}"
echo "$venv/bin/python"
