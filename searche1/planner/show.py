"""A plan for people: memory by phase, verdict, advice, layouts, step time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from searche1.planner.advice import Advice
from searche1.planner.phases import Memory, Phase
from searche1.planner.plan import Plan

GB = 1e9


def show_plan(plan: Plan, console: Console) -> None:
    """Print it; widths from 80 columns on."""
    _head(plan, console)
    if plan.refusal:
        _say(console, f"[bold red]It cannot run so:[/] {plan.refusal}.")
    if plan.judgement:
        _memory(plan.judgement.memory, console)
        _cache(plan, plan.judgement.memory, console)
        _host(plan.judgement.memory, console)
    _dry(plan, console)
    _verdict(plan, console)
    _advice(plan, console)
    _layouts(plan, console)
    if plan.judgement:
        _time(plan, console)
    _assumptions(plan, console)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)


def _table(*columns: str, left: int = 1) -> Table:
    """The first `left` columns hold words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < left else "right")
    return table


def _head(plan: Plan, console: Console) -> None:
    setting, sizes = plan.setting, plan.sizes
    cluster = setting.cluster
    experts = f", {plan.active_parameters / 1e9:.2f}e9 of its layers per token" if setting.shape.num_experts else ""
    _say(console, f"[bold]{setting.config.model.path}[/]: {plan.parameters / 1e9:.2f}e9 parameters{experts}")
    axes = [
        f"{name} {size}"
        for name, size in (
            ("tensor", sizes.tensor),
            ("pipeline", sizes.pipeline),
            ("context", sizes.context),
            ("expert", sizes.expert),
        )
        if size > 1
    ]
    data = "" if plan.refusal else f"data {sizes.data}"
    axes += [data] if data else []
    _say(
        console,
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: {', '.join(axes) or 'the model is not split'}"
        f"{', sequence parallel' if sizes.sequence else ''}; train.recompute={setting.config.train.recompute} "
        f"train.max_tokens={setting.config.train.max_tokens}",
    )


def _memory(memory: Memory, console: Console) -> None:
    names = list(dict.fromkeys(part.name for phase in memory.phases for part in phase.parts))
    table = _table("GB on the fullest GPU", *(phase.name for phase in memory.phases))
    for name in names:
        table.add_row(name, *(_part(phase, name) for phase in memory.phases))
    table.add_section()
    totals = (f"[{'bold' if phase.fits else 'bold red'}]{phase.total / GB:.1f}[/]" for phase in memory.phases)
    table.add_row("total", *totals)
    table.add_row("the GPU", *(f"{phase.available / GB:.0f}" for phase in memory.phases))
    if any(phase.stage for phase in memory.phases):
        table.add_row("pipeline stage", *(str(phase.stage) for phase in memory.phases))
    console.print(table)


def _part(phase: Phase, name: str) -> str:
    found = [part.bytes for part in phase.parts if part.name == name]
    return f"{sum(found) / GB:.1f}" if found else ""


def _cache(plan: Plan, memory: Memory, console: Console) -> None:
    if memory.cache is None:
        _say(console, "The engines run elsewhere (engine.urls) and are not planned.")
        return
    cache, tensor = memory.cache, plan.setting.config.engine.tensor
    size = f"{cache.engines} engine{'s' * (cache.engines > 1)} of {tensor} GPU{'s' * (tensor > 1)}"
    if cache.tokens <= 0:
        _say(console, f"{size}: [red]engine.mem_fraction leaves no room beside the weights[/].")
        return
    _say(
        console,
        f"{size}: a cache of {cache.tokens:,} tokens each holds {cache.tokens // cache.trajectory:,} trajectories of "
        f"full length ({cache.trajectory:,}); about {plan.running_together:.0f} of mean length run together.",
    )


def _host(memory: Memory, console: Console) -> None:
    if memory.host:
        total = sum(part.bytes for part in memory.host)
        parts = ", ".join(f"{part.name} {part.bytes / GB:.0f}" for part in memory.host)
        _say(console, f"Host memory of a node: {total / GB:.0f} GB ({parts}).")


def _dry(plan: Plan, console: Console) -> None:
    dry = plan.dry
    if dry is None:
        return
    heavy, light = dry.heaviest, dry.lightest
    span = f"{light.parameters / 1e9:.3f}e9"
    if light.parameters < heavy.parameters:
        span += f" to {heavy.parameters / 1e9:.3f}e9 (stage {heavy.pipeline_rank})"
    kinds = f"{len(dry.ranks)} kind{'s' * (len(dry.ranks) > 1)} of rank"
    _say(
        console,
        f"Dry build: {dry.world} ranks are of {kinds}, each built with DDP, optimizer and adapters in "
        f"{dry.seconds:.1f} s; {span} parameters a rank; their shards make up all {dry.num_tensors:,} "
        "tensors of the model exactly.",
    )


def _verdict(plan: Plan, console: Console) -> None:
    console.print()
    if plan.dry_problem:
        _say(console, f"[bold red]The model cannot be built:[/] {plan.dry_problem}")
    if plan.judgement is None:
        return
    memory = plan.judgement.memory
    gpu = plan.setting.cluster.gpu
    if plan.fits:
        fullest = memory.fullest
        free = (fullest.available - fullest.total) / GB
        _say(
            console,
            f"[bold green]It fits[/]: {fullest.name} needs most and leaves {free:.1f} GB of {gpu.memory / GB:.0f}.",
        )
        return
    for phase in memory.phases:
        if not phase.fits:
            missing = (phase.total - phase.available) / GB
            _say(console, f"[bold red]{phase.name} does not fit[/]: {missing:.1f} GB more than the GPU has.")
    if memory.cache is not None and not memory.cache.fits:
        _say(
            console,
            f"[bold red]The engine's cache does not fit[/]: {max(0, memory.cache.tokens):,} tokens, "
            f"one sequence may have {memory.cache.longest:,}.",
        )


def _advice(plan: Plan, console: Console) -> None:
    if not plan.advice:
        if plan.judgement and not plan.fits:
            _say(console, "Nothing tried would make it fit, on up to 64 nodes.")
        return
    _say(console, "Would fit too, and be quicker:" if plan.fits else "Would fit:")
    table = _table("change", "GB", "cache tokens", "step")
    for advice in plan.advice:
        table.add_row(
            _change(plan, advice),
            f"{advice.fullest / GB:.1f}",
            f"{advice.cache_tokens:,}" if advice.cache_tokens else "",
            _seconds(advice.step_seconds),
        )
    console.print(table)


def _change(plan: Plan, advice: Advice) -> str:
    nodes = f"--nodes {advice.nodes}" if advice.nodes != plan.setting.cluster.nodes else ""
    return " ".join(filter(None, [nodes, as_overrides(advice.changes)]))


def as_overrides(changes: Mapping[str, Any]) -> str:
    """As the command line takes them."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def _layouts(plan: Plan, console: Console) -> None:
    if not plan.layouts:
        return
    engine = plan.layouts[0].engine_tensor
    other = "the other settings as they are"
    if engine != plan.setting.config.engine.tensor:
        other = f"engine.tensor={engine} and {other}"
    layouts = f"{plan.num_layouts} legal layout{'s' * (plan.num_layouts > 1)}"
    _say(console, f"{layouts}; with {other} {plan.num_fitting} of them fit:")
    has_experts = bool(plan.setting.shape.num_experts)
    columns = ["tensor", "pipeline", "context", *(["expert"] if has_experts else []), "data", "recompute"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*columns, "GB", "fits", "step"):
        table.add_column(column, justify="left" if column in ("recompute", "fits") else "right")
    for candidate in plan.layouts:
        sizes = candidate.sizes
        expert = [str(sizes.expert)] if has_experts else []
        table.add_row(
            *(str(sizes.tensor), str(sizes.pipeline), str(sizes.context), *expert, str(sizes.data)),
            candidate.recompute,
            f"{candidate.fullest / GB:.1f}",
            "yes" if candidate.fits else "[red]no[/]",
            _seconds(candidate.step_seconds),
        )
    console.print(table)


def _time(plan: Plan, console: Console) -> None:
    assert plan.judgement is not None
    time, config = plan.judgement.time, plan.setting.config
    _say(console, f"A GRPO step of {time.sequences:,} trajectories, estimated; no GPU has run it:")
    table = _table("part", "time", "share")
    for part in time.parts:
        table.add_row(part.name, _seconds(part.seconds), f"{part.seconds / time.total:.0%}")
    table.add_section()
    table.add_row("step", f"[bold]{_seconds(time.total)}[/]", "")
    table.add_row(f"round of grpo.steps={config.grpo.steps}", _seconds(time.total * config.grpo.steps), "")
    table.add_row(f"OPSD update of {config.opsd.pairs_per_step} pairs", _seconds(time.opsd_update), "")
    console.print(table)


def _seconds(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 99.5:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


def _assumptions(plan: Plan, console: Console) -> None:
    guess, lengths, gpu = plan.setting.guess, plan.setting.lengths, plan.setting.cluster.gpu
    sentences = (
        f"Assumed: trajectories of {lengths.turns:g} turns of {lengths.turn_tokens:g} tokens, observations of "
        f"{lengths.observation_tokens:g}, a prompt of {lengths.prompt_tokens:g}",
        f"(--mean-...: {lengths.total:.0f} in all).",
        f"Vendor's peaks of {gpu.name}: {gpu.flops / 1e12:.0f} TFLOP/s, memory {gpu.memory_rate / 1e12:.2f} TB/s,",
        f"NVLink {gpu.nvlink_rate / 1e9:.0f} GB/s both ways, network {gpu.network_rate / 1e9:.0f} GB/s a GPU, PCIe",
        f"{gpu.host_rate / 1e9:.0f} GB/s. Assumed shares of them: training {guess.train_share:.0%},",
        f"reading {guess.prefill_share:.0%}, writing {guess.decode_share:.0%} of the memory rate,",
        f"NVLink {guess.nvlink_share:.0%}, network {guess.network_share:.0%}, PCIe {guess.host_share:.0%};",
        f"a rollout's tail makes it {guess.tail:g} times as long.",
        "Nothing overlaps; waiting for the retriever is not counted.",
    )
    _say(console, f"[dim]{' '.join(sentences)}[/]")
