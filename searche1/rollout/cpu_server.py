"""`python -m searche1.rollout.cpu_server ARGS` is `python -m sglang.launch_server ARGS` on a CPU without torchvision.

SGLang 0.5.17 imports torchvision before it looks for platform plugins. Its scheduler and detokenizer are spawned, and a
spawned process imports the main module first: this one, which puts the stub in place there too.
"""

import importlib.util
import runpy

from searche1.rollout.torchvision_stub import stub_torchvision

if importlib.util.find_spec("torchvision") is None:
    stub_torchvision()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
