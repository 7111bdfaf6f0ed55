"""Search-E1: GRPO rounds and on-policy self-distillation rounds for search agents (arXiv 2605.22511).

Importing this package is cheap: torch, Megatron-core and SGLang load only where they are used.
"""

__version__ = "0.1.0"
