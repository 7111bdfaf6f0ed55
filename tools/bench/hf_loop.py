"""What a user would write with HuggingFace generate: search-interleaved rollouts in a loop over turns.

Its best case: all trajectories that still run are one padded batch, each stops at its own tag, and the searches of a
turn go out together. Turn rules are ours, so that only speed differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from searche1.config import Config
from searche1.models import load_tokenizer
from searche1.retrieval.client import RetrieverClient
from searche1.rollout import protocol
from searche1.types import Completion, Trajectory

TOY_POLICY = Path(__file__).resolve().parents[2] / "searche1" / "assets" / "toy_policy"


class EndsAt(StoppingCriteria):
    """A row is done when its last token is one of these."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = torch.tensor(sorted(ids))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.ids)


def left_padded(contexts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of a batch for generate."""
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + list(context) for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    return ids, mask


class TurnLoop:
    """HuggingFace generate over all trajectories that still run, turn by turn; searches of a turn go out together."""

    def __init__(
        self, model: PreTrainedModel, config: Config, retriever: RetrieverClient, *, most_new_tokens: int
    ) -> None:
        """`most_new_tokens` ends every turn: rows that find no tag would have all others wait."""
        self.model = model
        self.config = config
        self.retriever = retriever
        self.tokenizer = load_tokenizer(TOY_POLICY, config.prompt)
        closing = [self.tokenizer.encode(tag, add_special_tokens=False) for tag in ("</search>", "</answer>")]
        assert all(len(ids) == 1 for ids in closing), "the toy tokenizer has a token for each tag"
        self.closing_ids = [ids[0] for ids in closing]
        self.stop = StoppingCriteriaList([EndsAt(self.closing_ids)])
        self.most_new_tokens = most_new_tokens

    def run(self, prompts: Sequence[Sequence[int]]) -> list[Trajectory]:
        """One trajectory of each prompt."""
        rollout, tokenizer = self.config.rollout, self.tokenizer
        states = [protocol.start(prompt, rollout=rollout) for prompt in prompts]
        done: dict[int, Trajectory] = {}
        while len(done) < len(states):
            asked: dict[int, protocol.Generate] = {}
            searches: dict[int, str] = {}
            for number, state in enumerate(states):
                if number in done:
                    continue
                match protocol.next_step(state, rollout=rollout, tokenizer=tokenizer):
                    case Trajectory() as trajectory:
                        done[number] = trajectory
                    case protocol.Search(query):
                        searches[number] = query
                    case protocol.Generate() as generate:
                        asked[number] = generate
            for number, passages in zip(searches, self._search(list(searches.values())), strict=True):
                states[number] = protocol.add_passages(
                    states[number], passages, rollout=rollout, prompt=self.config.prompt, tokenizer=tokenizer
                )
            for number, completion in zip(asked, self._generate(asked), strict=True):
                states[number] = protocol.add_completion(
                    states[number], completion, rollout=rollout, prompt=self.config.prompt, tokenizer=tokenizer
                )
        return [done[number] for number in range(len(states))]

    def _search(self, queries: list[str]) -> list[Any]:
        async def ask() -> list[Any]:
            try:
                return await asyncio.gather(*map(self.retriever.search, queries))
            finally:
                await self.retriever.close()

        return asyncio.run(ask()) if queries else []

    def _generate(self, asked: dict[int, protocol.Generate]) -> list[Completion]:
        """A turn of each trajectory that is under way, by its number."""
        if not asked:
            return []
        contexts = [one.context_ids for one in asked.values()]
        ids, mask = left_padded(contexts)
        width = ids.shape[1]
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=min(self.config.rollout.max_response_tokens, self.most_new_tokens),
                pad_token_id=0,
                stopping_criteria=self.stop,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = out.sequences[:, width:]
            logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
        completions = []
        for row, row_logprobs in zip(new.tolist(), logprobs.tolist(), strict=True):
            length = row.index(0) if 0 in row else len(row)
            text = self.tokenizer.decode(row[:length], skip_special_tokens=False)
            completions.append(Completion(tuple(row[:length]), tuple(row_logprobs[:length]), text, "stop", ""))
        return completions
