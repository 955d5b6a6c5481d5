#!/usr/bin/env bash
# Builds llama-cpp-python from source for the given Python and proves that the result computes.
#
#   scripts/install_llama_cpp.sh [PYTHON]          default: python3
#   CMAKE_ARGS=-DGGML_CUDA=on scripts/install_llama_cpp.sh [PYTHON]
#   FORCE=1 scripts/install_llama_cpp.sh [PYTHON]
#
# A build that works is left alone, unless CMAKE_ARGS says how it shall be, or FORCE is set: then it is built anew.
#
# Why plain `pip install` is not enough: gcc 12 at -O3 takes the stores to the AMX tile configuration in ggml's CPU
# backend for dead and drops them, so on processors with AMX the first large matrix product dies of an illegal
# instruction. And pip keeps the wheels it builds without noting flags or processor, so an old one may come back.
set -euo pipefail

PYTHON=${1:-python3}
case $PYTHON in
    /*) ;;
    */*) PYTHON=$PWD/$PYTHON ;; # relative to where the caller is
esac
cd "$(dirname "$0")/.."
VERSION=$(sed -n 's/.*"llama-cpp-python==\([^"]*\)".*/\1/p' setup.py)
LOG=$(mktemp --suffix=.log 2>/dev/null || mktemp)

say() { printf '%s\n' "$@" >&2; }

# A small model run in a process of its own; a bad build kills it, which bash would report on stderr.
works() {
    { "$PYTHON" -c 'from llava_edge.runtimes import probe; probe.run_child("llama_cpp")' >>"$LOG" 2>&1; } 2>/dev/null
}

installed() {
    local code='from importlib.metadata import version; print(version("llama-cpp-python"))'
    [ "$("$PYTHON" -c "$code" 2>>"$LOG")" = "$VERSION" ]
}

# stdin -> the log; ninja's [done/all] becomes a moving line on a terminal, a line per tenth elsewhere.
progress() {
    local line percent shown=-1
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$LOG"
        [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]] || continue
        percent=$((100 * BASH_REMATCH[1] / BASH_REMATCH[2]))
        if [ -t 2 ]; then
            printf '\r  compiling llama.cpp: %3d %% (%s of %s files)' "$percent" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" >&2
        elif [ $((percent / 10)) -gt "$shown" ]; then
            shown=$((percent / 10))
            say "  compiling llama.cpp: $percent %"
        fi
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

install() {
    local flags=""
    if [ "$(uname -s)" = Linux ]; then flags="-fno-tree-dse -fno-dse"; fi
    CFLAGS="${CFLAGS:-} $flags" CXXFLAGS="${CXXFLAGS:-} $flags" \
        SKBUILD_CMAKE_ARGS="-DCMAKE_PROJECT_llama.cpp_INCLUDE=$PWD/scripts/llama_cpp.cmake" \
        "$PYTHON" -m pip install --verbose --no-binary llama-cpp-python "llama-cpp-python==$VERSION" "$@" 2>&1 | progress
}

give_up() {
    say "" "The last lines of $LOG:"
    tail -n 15 "$LOG" >&2
    say "" "$1"
    exit 1
}

wish=""
if [ -n "${CMAKE_ARGS:-}" ]; then
    wish="CMAKE_ARGS is $CMAKE_ARGS"
elif [ -n "${FORCE:-}" ]; then
    wish="FORCE is set"
fi

if [ -z "$wish" ] && installed && works; then
    rm -f "$LOG"
    exit 0
fi

if ! command -v "${CXX:-c++}" >/dev/null; then
    say "llama.cpp is compiled on your machine, and there is no C++ compiler. On Debian or Ubuntu run:"
    say "  sudo apt-get install -y build-essential"
    rm -f "$LOG"
    exit 69
fi

# A virtual environment that was left half made has none.
"$PYTHON" -m pip --version >>"$LOG" 2>&1 || "$PYTHON" -m ensurepip >>"$LOG" 2>&1 || give_up "$PYTHON has no pip."

anew=()
if [ -n "$wish" ]; then
    say "Compiling llama-cpp-python $VERSION anew, because $wish; details in $LOG"
    anew=(--no-cache-dir) # neither takes what pip kept of another build, nor leaves this one to others
    if installed; then anew+=(--force-reinstall --no-deps); fi
else
    say "Installing llama-cpp-python $VERSION. The first time it is compiled for this processor, which takes about 5 minutes"
    say "on two cores; details in $LOG"
fi
install ${anew[@]+"${anew[@]}"} || give_up "llama-cpp-python $VERSION could not be built."
failing="llama-cpp-python $VERSION was built, but a matrix product in it fails on this processor."
if ! works; then
    if [ -n "$wish" ]; then give_up "$failing"; fi
    say "The build that pip had kept does not work on this processor; compiling a new one."
    "$PYTHON" -m pip cache remove llama_cpp_python >>"$LOG" 2>&1 || true # the cache may be switched off
    install --no-cache-dir --force-reinstall --no-deps || give_up "llama-cpp-python $VERSION could not be built."
    works || give_up "$failing"
fi
say "llama-cpp-python $VERSION is built and computes correctly."
rm -f "$LOG"
