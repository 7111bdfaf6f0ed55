"""Extensions of Megatron-core. Nothing here imports searche1; messages name its settings, docstrings its paper."""

import warnings

# Megatron-core and torch say these at every import or call, on every rank. They name optional accelerators that a
# CPU cannot have (`searche1 doctor` reports what a GPU machine lacks) and renamed functions that Megatron-core calls.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`torch.distributed.*` is deprecated",
    "When using async grad allreduce it is recommended to set",
    "When using sequence parallelism it is recommended to set",  # a CUDA launch setting that newer GPUs ignore
    "The .grad attribute of a Tensor that is not a leaf",  # the CPU mode passes such reads of Megatron's through
):
    warnings.filterwarnings("ignore", message=_message)
