# Sourced by the other scripts with a list of requirements as argument. Sets $PYTHON to a Python
# that has them: the one of the active virtual or conda environment if it has all pinned versions,
# otherwise the one of .venv, into which missing packages are installed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1

satisfied() { # Python $1 has every pinned version of list $2; 2.13.0+cpu satisfies 2.13.0.
    [ -x "$(command -v "$1")" ] && "$1" - "$2" <<'PROGRAM'
import sys
from importlib.metadata import PackageNotFoundError, version


def pins(path):
    for line in open(path):
        if line.startswith("-r "):
            yield from pins(line[3:].strip())
        elif "==" in line:
            yield line.strip().split("==")


try:
    sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins(sys.argv[1])))
except PackageNotFoundError:
    sys.exit(1)
PROGRAM
}

PYTHON=python
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! satisfied python "$requirements"; then
    PYTHON=.venv/bin/python
    if ! satisfied $PYTHON "$requirements"; then
        if ! satisfied $PYTHON requirements.txt; then
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "Python 3.11 or newer is needed as python3; found: $(python3 --version 2>&1)" >&2
                exit 1
            }
            python3 -m venv --clear .venv
        fi
        echo "Installing $requirements into .venv (once; takes some minutes)" >&2
        $PYTHON -m pip install --quiet --disable-pip-version-check -r "$requirements"
    fi
fi
