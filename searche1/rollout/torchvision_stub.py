"""The names of torchvision that SGLang imports at start-up, for machines without it. Imports no SGLang itself."""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types


def stub_torchvision() -> None:
    """Gives SGLang the names that it imports for image models, so that text models run without torchvision.

    torchvision's wheels do not load beside a CPU build of torch, so the CPU requirements leave it out.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    # Without torchvision transformers exports a dummy that raises; SGLang only calls .register(), which fills a table.
    # The import above may have replaced the lazy top module, so the old and the new one are patched.
    for module in (transformers, sys.modules["transformers"]):
        vars(module)["AutoImageProcessor"] = AutoImageProcessor

    class InterpolationMode(enum.Enum):
        BILINEAR = "bilinear"
        BICUBIC = "bicubic"

    # transformers has looked for torchvision by now and keeps its answer, "not installed".
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.io")
    for name in names:
        stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        stub.__path__ = []
        sys.modules[name] = stub
    package, transforms, functional, io = (vars(sys.modules[name]) for name in names)
    package["transforms"], transforms["functional"] = sys.modules[names[1]], sys.modules[names[2]]
    package["io"], io["decode_jpeg"] = sys.modules[names[3]], _no_images  # imported by 0.5.17 only
    transforms["InterpolationMode"] = functional["InterpolationMode"] = InterpolationMode


def _no_images(*arguments: object) -> None:
    raise ImportError("decoding images needs torchvision, which is not installed: text models only")
