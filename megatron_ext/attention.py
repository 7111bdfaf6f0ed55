"""Scaled-dot-product core attention over packed sequences, for machines without Transformer Engine.

Shapes: T packed tokens, h query heads and g key-value heads on this tensor-parallel rank, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedSelfAttention(torch.nn.Module):
    """Causal attention inside each sequence of a packed batch; tokens never see a neighbour sequence.

    Megatron's own local attention refuses packed input, so this takes its place in the layer spec.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_: Any
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        self.scale = config.softmax_scale  # None: 1 / sqrt(d)

    def forward(
        self,
        query: Tensor,  # [T, h, d]
        key: Tensor,  # [T, g, d]
        value: Tensor,  # [T, g, d]
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, h * d]
        assert packed_seq_params is not None and attention_bias is None
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(outputs).flatten(1)
