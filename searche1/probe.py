"""The proof of a weight sync: engines and trainer compute logprobs of the same few sequences, which must agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from megatron_ext.host import half_the_threads
from megatron_ext.parallel import Layout
from searche1.colocation import Colocation, Phase
from searche1.config import Config
from searche1.packing import Sample, make_batches, padded_length, row_weights, sharing_of
from searche1.policy import Policy
from searche1.ranks import Ranks
from searche1.rollout.engine import Engine, EngineError
from searche1.types import Group, UserError

PROBE_SEQUENCES = 4
Logprobs = list[list[float]]  # a list for each sequence, a number for each of its ids but the first
Asked = Callable[[], Logprobs]  # waits for what an engine has been asked; raises EngineError


class SyncProbe:
    """Make it on every rank; `engines` on rank 0. Set `token_ids`, or `remember` trajectories, on every rank."""

    def __init__(self, config: Config, layout: Layout, ranks: Ranks, engines: Sequence[Engine]) -> None:
        self._config = config
        self._layout = layout
        self._ranks = ranks
        self._engines = engines
        self.token_ids: list[tuple[int, ...]] = []

    def remember(self, groups: Sequence[Group]) -> None:
        """The next syncs are proven with the first of these trajectories."""
        found = (
            trajectory.prompt_ids + trajectory.response_ids
            for group in groups
            for trajectory in group.trajectories
            if trajectory.status != "error"
        )
        self.token_ids = [ids for ids, _ in zip(found, range(PROBE_SEQUENCES), strict=False)]

    def prove(self, policy: Policy, colocation: Colocation) -> None:
        """Raises UserError unless every engine has the policy's logprobs; hands the GPUs to the engines. Collective."""
        if colocation.keeps_engine_weights:  # nothing moves: engines compute their side while the trainer does its own
            colocation.to(Phase.ROLLOUT, policy)
            asked = self._ask_engines()
            share_cores = self._layout.device.type == "cpu" and not self._config.engine.urls
            with half_the_threads() if share_cores else contextlib.nullcontext():
                expected = self._of_trainer(policy)
        else:
            expected = self._of_trainer(policy)
            colocation.to(Phase.ROLLOUT, policy)
            asked = self._ask_engines()
        self._ranks.from_writer(lambda: self._compare(expected, asked, policy.dtype))

    def _of_trainer(self, policy: Policy) -> Logprobs:
        if not self.token_ids:
            return []
        samples = [Sample(x[:1], x[1:], (True,) * (len(x) - 1)) for x in self.token_ids]
        sharing = sharing_of(self._layout)
        batches = make_batches(
            samples,
            row_weights(samples, "token_mean"),
            max_tokens=max(self._config.train.max_tokens, *(padded_length(s.num_inputs, sharing) for s in samples)),
            rank=0,
            num_ranks=1,
            sharing=sharing,
        )
        return policy.by_sample(batches, policy.logprobs(batches, temperature=1.0), num_samples=len(samples))

    def _ask_engines(self) -> list[Asked]:
        """All engines at once; on rank 0 there is one for each."""
        asked: list[Asked] = []

        def ask() -> None:
            try:
                for engine in self._engines if self.token_ids else ():
                    asked.append(engine.begin_logprobs(self.token_ids))
            except EngineError:
                self._wait_for(asked)
                raise

        self._ranks.from_writer(ask)
        return asked

    def _wait_for(self, asked: Sequence[Asked]) -> list[Logprobs | EngineError]:
        """Of all, also if one fails: no engine is at work then. On rank 0."""
        found: list[Logprobs | EngineError] = []
        for wait in asked:
            try:
                found.append(wait())
            except EngineError as error:
                found.append(error)
            self._ranks.beat()
        return found

    def _compare(self, expected: Logprobs, asked: Sequence[Asked], dtype: torch.dtype) -> None:
        """Raises UserError if an engine has other logprobs: a silent sync fault trains on garbage. On rank 0."""
        tolerance = self._config.train.sync_tolerance or (1e-4 if dtype == torch.float32 else 0.05)
        for number, found in enumerate(self._wait_for(asked)):
            if isinstance(found, EngineError):
                raise found
            for trainer_row, engine_row in zip(expected, found, strict=True):
                gap = (torch.tensor(trainer_row) - torch.tensor(engine_row)).abs().mean().item()
                if not gap <= tolerance:  # NaN too
                    raise UserError(
                        f"after the weight sync engine {number} and the trainer differ by {gap:.2e} per logprob, "
                        f"more than {tolerance:.0e}; the weights did not arrive whole. See logs/engine{number}.log; "
                        "engine.verify_sync=exact names the tensor, train.sync_tolerance changes the limit"
                    )
