"""LoRA adapters in PEFT's format: writing ours, reading anybody's, and merging one into a HuggingFace folder.

Beside PEFT's two files an adapter of ours has base.json, the fingerprint of the weights it was trained on, so that it
is merged into these and no others. A merged folder has merged_lora.json, which says what went into it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.hf_io import MERGED_NAME, HFReader, publish
from megatron_ext.lora import STORED, hf_modules
from megatron_ext.torch_dist import TorchDistReader

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
BASE_NAME = "base.json"
PREFIX = "base_model.model."
SAMPLED_BYTES = 4096  # of either end of a tensor; a training step changes all of them
# Settings of PEFT that change what a merged weight is and are not computed here, with the values that are.
UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
NARROWING = (
    "layers_to_transform",
    "exclude_modules",
    "target_parameters",
)  # to fewer modules than target_modules names


def fingerprint(folder: Path) -> str:
    """Identifies the weights of a HuggingFace folder: names, types, shapes, and both ends of every tensor."""
    reader, digest = HFReader(folder), hashlib.sha256()
    for name in sorted(reader.names()):
        tensor = reader.tensor(name)
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in (raw[:SAMPLED_BYTES], raw[-SAMPLED_BYTES:]):
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def write_peft_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, base: Path) -> None:
    """An adapter folder that `peft.PeftModel.from_pretrained` loads, with its base's fingerprint. Atomic.

    Args:
        tensors: by PEFT's names, "base_model.model.MODULE.lora_A.weight" [r, in] and "....lora_B.weight" [out, r].
        config: what adapter_config.json holds beside the base.
        base: the HuggingFace folder the adapter was trained on.
    """

    def write(partial: Path) -> None:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, partial / WEIGHTS_NAME)
        settings = {**config, "base_model_name_or_path": str(base)}
        (partial / CONFIG_NAME).write_text(json.dumps(settings, indent=2))
        (partial / BASE_NAME).write_text(json.dumps({"fingerprint": fingerprint(base)}, indent=2))

    publish(write, folder)


@dataclass(frozen=True)
class PeftAdapter:
    """W + scale * B A for some weights of a model."""

    low_rank: dict[str, tuple[Tensor, Tensor]]  # HuggingFace weight name -> A [r, in], B [out, r]
    scale: float
    base_fingerprint: str | None  # None: the adapter does not say, as PEFT's own do not
    targets: Sequence[str] | str = ()  # modules that it says it changes: endings of names, or an expression for names

    @property
    def checksum(self) -> str:
        """The same from every format."""
        digest = hashlib.sha256(f"{self.scale}\n".encode())
        for name, pair in sorted(self.low_rank.items()):
            digest.update(name.encode())
            for tensor in pair:
                digest.update(tensor.float().contiguous().numpy().data)
        return digest.hexdigest()


def read_adapter(folder: Path) -> PeftAdapter:
    """From PEFT's format, or from the shards of a Megatron checkpoint of training here. Raises ValueError."""
    if (folder / CONFIG_NAME).is_file():
        return read_peft_folder(folder)
    try:
        return read_megatron_adapter(folder)
    except ValueError as error:
        raise ValueError(f"{folder} has no {CONFIG_NAME}, so it is no PEFT adapter; and {error}") from error


def read_megatron_adapter(folder: Path) -> PeftAdapter:
    """The adapter in a checkpoint of any layout. Raises ValueError if there is none."""
    reader = TorchDistReader(folder)
    settings = reader.common().get("state", {}).get("lora")
    stored = {target: key for target, key in STORED.items() if f"{key}.a.0" in reader.names()}
    if settings is None or not stored:
        raise ValueError(f"{reader.folder} is a checkpoint of whole weights without an adapter")
    low_rank = {}
    for target, key in stored.items():
        for layer in range(reader.size(f"{key}.a.0")[0]):
            for k, module in enumerate(hf_modules(target, layer)):
                a, b = (reader.tensor(f"{key}.{kind}.{k}", (layer,)).clone() for kind in "ab")  # keep no file open
                low_rank[f"{module}.weight"] = (a, b)
    return PeftAdapter(low_rank, settings["alpha"] / settings["rank"], settings["base_fingerprint"])


def read_peft_folder(folder: Path) -> PeftAdapter:
    """Raises ValueError if it is no LoRA adapter, or one whose merge this code would not get right."""
    config = _json(folder / CONFIG_NAME, "a PEFT adapter has it beside its weights")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA can be merged")
    for name, supported in UNSUPPORTED.items():
        if config.get(name) not in supported:
            raise ValueError(f"{folder} has {name}={config[name]!r}, which cannot be merged here; merge it with peft")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{folder} has init_lora_weights={start!r}, which took from the base what the adapter began with; merge it "
            "with peft, or save it with path_initial_model_for_weight_conversion"
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(
            f"{folder} holds no {WEIGHTS_NAME}; an adapter_model.bin is a pickle, which is not read: "
            "load it with peft and save it again with safe_serialization=True"
        )
    tensors = load_file(weights)
    low_rank = {}
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        other = f"{module}.lora_B.weight"
        if other not in tensors:
            raise ValueError(f"{weights} has {name} without {other}; the file is not whole")
        low_rank[module.removeprefix(PREFIX) + ".weight"] = (tensors[name], tensors[other])
    if len(tensors) != 2 * len(low_rank) or not low_rank:
        strange = sorted(n for n in tensors if ".lora_A.weight" not in n and ".lora_B.weight" not in n)
        raise ValueError(f"{weights} holds {strange[:3] or 'no'} tensors besides pairs of lora_A and lora_B weights")
    rank, alpha = config["r"], config["lora_alpha"]
    base = folder / BASE_NAME
    return PeftAdapter(
        low_rank=low_rank,
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        base_fingerprint=json.loads(base.read_text())["fingerprint"] if base.is_file() else None,
        # With a choice of layers, or exceptions, that a module has no update says nothing.
        targets=() if any(config.get(name) for name in NARROWING) else config.get("target_modules") or (),
    )


def check_base(adapter: PeftAdapter, base: Path) -> str:
    """The base's fingerprint. Raises ValueError if the adapter does not belong on it, or is in it already."""
    merged = base / MERGED_NAME
    if merged.is_file() and adapter.checksum in json.loads(merged.read_text())["adapters"]:
        raise ValueError(f"{base} was made by merging this very adapter; merging it again would apply it twice")
    found = fingerprint(base)
    if adapter.base_fingerprint not in (None, found):
        raise ValueError(
            f"the adapter was trained on other weights than those in {base} (fingerprint "
            f"{adapter.base_fingerprint[:12] if adapter.base_fingerprint else ''}, this folder has {found[:12]}); "
            "give the folder that the adapter's training started from"
        )
    reader = HFReader(base)
    unknown = sorted(set(adapter.low_rank) - reader.names())
    if unknown:
        raise ValueError(f"the adapter changes {len(unknown)} weights that {base} does not have, first: {unknown[0]}")
    unmerged = sorted(_targeted(adapter.targets, reader.names()) - set(adapter.low_rank))
    if unmerged:
        raise ValueError(
            f"the adapter says it changes {len(unmerged)} weights for which it has no update, first: {unmerged[0]}; "
            "its file is not whole, or its target_modules are not those it was trained with"
        )
    for name, (a, b) in adapter.low_rank.items():
        if (b.shape[0], a.shape[1]) != reader.spec(name).size or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the adapter's update of {name} is {b.shape[0]} x {a.shape[1]}, the weight {reader.spec(name).size}"
            )
    return found


def _targeted(targets: Sequence[str] | str, names: set[str]) -> set[str]:
    """The matrices that PEFT's target_modules choose: names or their endings, an expression, or all but the head."""
    modules = {name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")}
    if targets == "all-linear":
        chosen = modules
    elif isinstance(targets, str):
        chosen = {module for module in modules if re.fullmatch(targets, module)}
    else:
        chosen = {module for module in modules if any(f".{module}".endswith(f".{target}") for target in targets)}
    return {f"{module}.weight" for module in chosen}


def merged_tensors(adapter: PeftAdapter, base: Path) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors one after another, updated in float32 and rounded to their own type once."""
    reader = HFReader(base)
    for name in reader.in_file_order():
        tensor = reader.tensor(name)
        if name in adapter.low_rank:
            a, b = adapter.low_rank[name]
            tensor = (tensor.float() + adapter.scale * (b.float() @ a.float())).to(tensor.dtype)
        yield name, tensor


def record_merge(adapter: PeftAdapter, base: Path, out: Path, *, base_fingerprint: str) -> None:
    """Write down in a merged folder what went into it, its base's own merges included."""
    earlier = base / MERGED_NAME
    before = json.loads(earlier.read_text())["adapters"] if earlier.is_file() else []
    record = {"base_fingerprint": base_fingerprint, "adapters": [*before, adapter.checksum]}
    (out / MERGED_NAME).write_text(json.dumps(record, indent=2))


def _json(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {hint}")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
