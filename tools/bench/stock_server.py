"""SGLang's server on a CPU as it comes: `python tools/bench/stock_server.py ARGS` is `sglang.launch_server ARGS`.

Our platform plugin makes SGLang run without CUDA at all; here it adds none of its own kernels.
"""

import multiprocessing
import runpy

from searche1.rollout.torchvision_stub import stub_torchvision

stub_torchvision()

if __name__ == "__main__":
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=force)  # type: ignore[assignment]

    import sglang.srt.server_args  # noqa: F401  it chooses the platform, which is ours

    from searche1.rollout.cpu_platform import CpuPlatform

    CpuPlatform.init_backend = lambda self: None  # type: ignore[method-assign]
    runpy.run_module("sglang.launch_server", run_name="__main__")
