#!/usr/bin/env bash
# Makes the environment and runs the tests from the checkout's root; arguments go to pytest.
set -euo pipefail

case ${1:-} in
-h | --help)
    cat <<'END'
usage: scripts/test.sh [PYTEST ARGUMENTS]

  scripts/test.sh                      every test (linting and the import graph are tests too)
  scripts/test.sh tests/unit           the quick ones
  scripts/test.sh -m "not slow"        without engines and process groups
  scripts/test.sh -k pairs -x          by name, stopping at the first failure

Makes the environment first; SEARCHE1_DEVICE=cpu keeps a machine with a GPU on the CPU environment.
END
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
if [ $# = 0 ]; then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi # a file in one process
exec python -m pytest "$@"
