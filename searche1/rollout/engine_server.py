"""`python -m searche1.rollout.engine_server ARGS` is `python -m sglang.launch_server ARGS` with two differences.

The API key comes in the environment: a command line is there for everybody on the machine to read. And where
torchvision is absent, as on CPUs, a stub stands in: SGLang 0.5.17 imports it before it looks for platform plugins. Its
scheduler and detokenizer are spawned, and a spawned process imports the main module first: this one, which puts the
stub in place there too.
"""

import importlib.util
import os
import runpy
import sys

from searche1.rollout.torchvision_stub import stub_torchvision

KEY_VARIABLE = "SEARCHE1_ENGINE_KEY"

if __name__ in ("__main__", "__mp_main__") and importlib.util.find_spec("torchvision") is None:
    stub_torchvision()

if __name__ == "__main__":
    if key := os.environ.pop(KEY_VARIABLE, ""):
        sys.argv += ["--api-key", key]
    runpy.run_module("sglang.launch_server", run_name="__main__")
