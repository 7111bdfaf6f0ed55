"""The turn loop with TRL's generation: what its GRPOTrainer calls at first and after every round of tool calls.

TRL parses tool calls of chat messages; the paper's tags are none, so the loop and its rules are `hf_loop.TurnLoop`'s,
and a turn's tokens come from `GRPOTrainer._generate_single_turn`. Without vLLM, which has no build for this CPU, that
is HuggingFace generate on the model in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from grpo_step import trl_settings
from hf_loop import TurnLoop
from transformers import PreTrainedModel
from trl import GRPOTrainer

from searche1.config import Config
from searche1.retrieval.client import RetrieverClient
from searche1.rollout import protocol
from searche1.types import Completion


class TrlLoop(TurnLoop):
    """Its trainer is made for `trajectories` a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        retriever: RetrieverClient,
        *,
        most_new_tokens: int,
        trajectories: int,
        work: Path,
    ) -> None:
        super().__init__(model, config, retriever, most_new_tokens=most_new_tokens)
        args = trl_settings(work / "trl", steps=1, trajectories=trajectories, group=2, grpo=config.grpo)
        args.max_completion_length = min(config.rollout.max_response_tokens, most_new_tokens)
        args.generation_kwargs = {"top_k": 0}
        # Where TRL's generation stops, and where it cuts a row that waited for others. The other loop stops there too.
        model.generation_config.eos_token_id = [self.tokenizer.eos_token_id, *self.closing_ids]
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["question"] * trajectories}),
            processing_class=self.tokenizer,
        )

    def _generate(self, asked: dict[int, protocol.Generate]) -> list[Completion]:
        if not asked:
            return []
        contexts = [list(one.context_ids) for one in asked.values()]
        rows, _ = self.trainer._generate_single_turn(contexts, None, {}, 1)
        assert not any(self.tokenizer.pad_token_id in ids for ids in rows), "padding is no token of a turn"
        return [
            Completion(tuple(ids), (0.0,) * len(ids), self.tokenizer.decode(ids, skip_special_tokens=False), "stop", "")
            for ids in rows
        ]
