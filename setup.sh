#!/bin/sh
# Make a virtual environment, .venv unless VENV names another, and install a file of requirements into it
# (requirements.txt unless another is named); install graphviz's `dot` and a C compiler where that can be done without
# asking. Run by make; PYTHON names the interpreter to use.
set -eu
requirements=${1:-requirements.txt}
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-.venv}

can_apt() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
apt_install() {
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "$@" >/dev/null
}

command -v "$python" >/dev/null || { echo "setup: no $python here; install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: $python is $("$python" -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12, say" >&2; exit 2; }

if ! command -v dot >/dev/null; then
    if can_apt && apt_install graphviz; then
        echo "setup: installed graphviz"
    else
        echo "setup: graphviz's dot is missing; all works, but cells are kept as .gv sources instead of pictures." \
            "To draw them: apt-get install graphviz, or brew install graphviz" >&2
    fi
fi

if [ -z "${CC:-}" ] && ! command -v cc >/dev/null; then # models/fast/native.py compiles with it
    if can_apt && apt_install gcc libc6-dev; then
        echo "setup: installed gcc"
    else
        echo "setup: a C compiler is missing; all works, but what runs on the CPU takes longer." \
            "To have one: apt-get install gcc libc6-dev" >&2
    fi
fi

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian and Ubuntu ship these apart
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    can_apt && apt_install "python$version-venv" ||
        { echo "setup: $python lacks venv; apt-get install python$version-venv" >&2; exit 2; }
fi
echo "setup: installing $requirements into $venv; the first time this downloads PyTorch"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
"$venv/bin/python" -c 'import torch; print("setup: done; torch", torch.__version__, "with CUDA" if torch.cuda.is_available() else "on the CPU")'
