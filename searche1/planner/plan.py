"""One plan: the config judged on a cluster, its legal neighbours, and what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.dry_build import DryBuild, dry_build
from megatron_ext.hf_mapping import ModelShape
from megatron_ext.known_models import read_shape
from megatron_ext.memory import ParallelSizes, active_parameters, model_parameters
from searche1.config import Config
from searche1.planner.advice import (
    SHOWN,
    Advice,
    Candidate,
    Judgement,
    Setting,
    advise,
    advise_layout,
    judge,
    layout_refusal,
    rank_layouts,
    settings_refusal,
)
from searche1.planner.fit import fit_to_gpu, leaves_open, with_least_memory
from searche1.planner.hardware import Assumptions, Cluster, Lengths
from searche1.planner.phases import sizes_of
from searche1.planner.speed import running_together
from searche1.types import UserError


@dataclass(frozen=True)
class Plan:
    setting: Setting
    sizes: ParallelSizes
    parameters: int  # of the model
    active_parameters: int  # of its layers, that one token meets
    refusal: str  # why the config cannot run at all; empty if it can
    judgement: Judgement | None  # None of one that cannot
    running_together: float  # trajectories that an engine decodes at once; 0 without engines here
    advice: tuple[Advice, ...]
    layouts: tuple[Candidate, ...]  # the best of them
    num_layouts: int
    num_fitting: int
    dry: DryBuild | None  # None if it was not asked for or failed
    dry_problem: str

    @property
    def fits(self) -> bool:
        return self.judgement is not None and self.judgement.memory.fits and not self.dry_problem


def make_plan(
    config: Config,
    cluster: Cluster,
    *,
    lengths: Lengths | None = None,
    guess: Assumptions | None = None,
    builds: bool = True,
) -> Plan:
    """Judge a config on a cluster. `builds` also builds every kind of rank without memory.

    Raises UserError if the model's numbers are not known.
    """
    shape = shape_of(config)
    guess = guess or Assumptions()
    if leaves_open(config):
        least = with_least_memory(config)
        config = least if layout_refusal(least, shape, cluster) else fit_to_gpu(config, shape, cluster, guess)
    setting = Setting(config, shape, cluster, guess, lengths or Lengths())
    sizes = sizes_of(config, cluster.world)
    layout_problem = layout_refusal(config, shape, cluster)
    problem = layout_problem or settings_refusal(config, shape, cluster)
    judgement = None if problem else judge(setting)
    ranked = rank_layouts(setting)
    dry, dry_problem = _built(config, shape, sizes) if builds and not problem else (None, "")
    cache = judgement.memory.cache if judgement else None
    return Plan(
        setting=setting,
        sizes=sizes,
        parameters=model_parameters(shape),
        active_parameters=active_parameters(shape),
        refusal=problem,
        judgement=judgement,
        running_together=running_together(config, cache, setting.lengths) if cache else 0.0,
        advice=tuple(advise_layout(setting) if layout_problem else [] if problem else advise(setting)),
        layouts=tuple(ranked[:SHOWN]),
        num_layouts=len(ranked),
        num_fitting=sum(candidate.fits for candidate in ranked),
        dry=dry,
        dry_problem=dry_problem,
    )


def shape_of(config: Config) -> ModelShape:
    """Raises UserError for a model whose numbers are neither in a folder nor known."""
    try:
        return read_shape(config.model.path)
    except ValueError as error:
        raise UserError(f"model.path: {error}") from error


def _built(config: Config, shape: ModelShape, sizes: ParallelSizes) -> tuple[DryBuild | None, str]:
    try:
        found = dry_build(
            shape,
            sizes,
            recompute=config.train.recompute,
            distributed_optimizer=config.train.distributed_optimizer,
            lora_rank=config.opsd.lora_rank,
        )
    except ValueError as error:
        return None, str(error)
    return found, ""


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON, totals and verdicts included. Bytes and seconds."""
    setting = plan.setting
    judged = plan.judgement
    return {
        "fits": plan.fits,
        "refusal": plan.refusal,
        "model": {
            "path": setting.config.model.path,
            "parameters": plan.parameters,
            "active_layer_parameters": plan.active_parameters,
        },
        "cluster": dataclasses.asdict(setting.cluster),
        "layout": {**dataclasses.asdict(plan.sizes), "data": plan.sizes.data},
        "phases": [
            {
                "name": phase.name,
                "stage": phase.stage,
                "parts": {part.name: part.bytes for part in phase.parts},
                "total": phase.total,
                "available": phase.available,
                "fits": phase.fits,
            }
            for phase in (judged.memory.phases if judged else ())
        ],
        "cache": dataclasses.asdict(judged.memory.cache) if judged and judged.memory.cache else None,
        "host": {part.name: part.bytes for part in judged.memory.host} if judged else {},
        "advice": [dataclasses.asdict(advice) for advice in plan.advice],
        "layouts": [dataclasses.asdict(candidate) for candidate in plan.layouts],
        "num_layouts": plan.num_layouts,
        "num_fitting": plan.num_fitting,
        "step": _step_json(judged) if judged else None,
        "lengths": dataclasses.asdict(setting.lengths),
        "assumptions": dataclasses.asdict(setting.guess),
        "dry_build": dataclasses.asdict(plan.dry) if plan.dry else None,
        "dry_build_problem": plan.dry_problem,
    }


def _step_json(judged: Judgement) -> Mapping[str, Any]:
    time = judged.time
    return {
        "seconds": time.total,
        "parts": {part.name: part.seconds for part in time.parts},
        "sequences": time.sequences,
        "updates": time.updates,
        "opsd_update_seconds": time.opsd_update,
    }
