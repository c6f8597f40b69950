# Sourced by the other scripts: leaves $PYTHON with the versions of requirements.txt installed.
# An active virtual or conda environment that has them is used as it is; else .venv is made here.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

satisfied() { # every pin of requirements.txt is installed; 2.13.0+cpu or +cu130 satisfies 2.13.0
    [ -x "$(command -v "$1")" ] && "$1" - <<'EOF'
import sys
from importlib.metadata import PackageNotFoundError, version

pins = (line.strip().split("==") for line in open("requirements.txt") if "==" in line)
try:
    sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins))
except PackageNotFoundError:
    sys.exit(1)
EOF
}

PYTHON=python
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! satisfied python; then
    PYTHON=.venv/bin/python
    if ! satisfied $PYTHON; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "Python 3.11 or newer is needed as python3; found: $(python3 --version 2>&1)" >&2
            exit 1
        }
        echo "Installing the versions of requirements.txt into .venv (once, some minutes)" >&2
        python3 -m venv --clear .venv
        $PYTHON -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
fi
