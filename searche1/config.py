"""Every setting, once: name, default, and the comment that `searche1 config` prints as its help.

Defaults are the paper's values for Qwen2.5-3B where it gives them; where it does not, the choice is
listed with its reason in docs/decisions.md. A YAML file and `key=value` arguments override them;
a key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from searche1.addresses import http_address
from searche1.types import UserError

SEARCH_R1_USER = (
    "Answer the given question. "
    "You must conduct reasoning inside <think> and </think> first every time you get new information. "
    "After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query </search> "
    "and it will return the top searched results between <information> and </information>. "
    "You can search as many times as your want. "
    "If you find no further external knowledge needed, you can directly provide the answer inside <answer> and "
    "</answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: {question}\n"
)
PRIVILEGED_USER = (
    "{student_prompt}"
    "Here is an expert reference trajectory that answers this question correctly:\n"
    "=== Reference Begin ===\n"
    "{reference}\n"
    "=== Reference End ===\n"
    "\n"
    "Read the reference carefully and make sure you understand why each step was taken. "
    "Then attempt the same question yourself, in your own words, following the required format above."
)
DIRECT_USER = (
    "Answer the given question. "
    "Give the final answer inside <answer> and </answer>, without detailed illustrations. "
    "For example, <answer> Beijing </answer>. Question: {question}\n"
)
RAG_USER = (
    "Answer the given question with the help of the documents. "
    "Give the final answer inside <answer> and </answer>, without detailed illustrations. "
    "For example, <answer> Beijing </answer>. Documents:\n{documents}\nQuestion: {question}\n"
)
INVALID_ACTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)


@dataclass(frozen=True)
class RunConfig:
    out: str = "runs/search-e1"  # run directory; everything a run writes is inside
    seed: int = 0  # data order, sampling, initialisation
    device: str = "auto"  # auto, cpu or cuda
    wandb: str = ""  # project at Weights & Biases; empty sends nothing


@dataclass(frozen=True)
class ModelConfig:
    path: str = "Qwen/Qwen2.5-3B-Instruct"  # HuggingFace folder or hub id of the starting policy


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1  # tensor-parallel ranks; must divide heads and key-value heads
    pipeline: int = 1  # pipeline stages; must divide the number of layers
    context: int = 1  # context-parallel ranks that share every packed sequence; for long teacher prompts
    sequence: bool = False  # sequence parallelism inside the tensor-parallel group
    expert: int = 1  # data- and context-parallel ranks that share the experts of a mixture-of-experts model


@dataclass(frozen=True)
class TrainConfig:
    dtype: str = "auto"  # auto, float32 or bfloat16; auto is bfloat16 on a GPU (main parameters float32), else float32
    max_tokens: int = 16384  # tokens in one packed micro-batch, prompts included; 0: what the GPU's memory holds
    recompute: str = "none"  # activation recompute: none, selective, full; auto: the least that fits the GPU
    share_prefix: str = "auto"  # pack a group's prompt once: auto (on a CPU), always or never
    threads: int = 0  # CPU threads of a trainer rank that has no GPU; 0: its share of the cores, on which engines rest
    offload: str = "auto"  # move trainer state to the host during rollouts: auto (on a GPU), always or never
    distributed_optimizer: bool = True  # shard optimizer state over data-parallel ranks
    loss_mode: str = "chunked"  # head and loss: chunked (gradient in forward), recompute or materialized (all logits)
    logits_chunk: int = 2048  # rows of the head at once, unless materialized (fewer on a CPU); bounds logit memory
    timeout_s: float = 1800.0  # how long ranks wait for one another without a sign of progress
    keep_last: int = 2  # checkpoints of a round that are kept, beside the one with the best score
    keep_every: int = 0  # also keep those of every so many steps; 0: none
    sync_tolerance: float = 0.0  # mean |engine - trainer| logprob allowed after a sync; 0: 1e-4 float32, 0.05 bfloat16


@dataclass(frozen=True)
class EngineConfig:
    port: int = 0  # first HTTP port of the engines; 0 picks a free one
    tensor: int = 1  # tensor-parallel size of one SGLang engine
    count: int = 0  # engines in all; 0: as many as the job's GPUs hold, one on a CPU
    urls: list[str] = field(default_factory=list)  # SGLang servers started elsewhere; they take weights from a folder
    token_file: str = ""  # file with the API key of those servers; empty sends none
    mem_fraction: float = 0.6  # share of GPU memory an engine may take
    max_total_tokens: int = 0  # size of the key-value cache in tokens; 0 lets SGLang decide
    max_running: int = 256  # requests decoded together
    sync_bucket_mb: int = 512  # size of one weight-sync bucket
    share_weights: str = "auto"  # engines compute with memory the trainer writes: auto (on a CPU with room) or never
    verify_sync: str = "probe"  # probe: compare logprobs after a sync; exact: compare every weight as well
    start_timeout_s: float = 600.0  # how long an engine may take to become healthy
    request_timeout_s: float = 600.0  # how long one generation may take
    attention_backend: str = ""  # SGLang attention backend; empty chooses by device
    sampling_backend: str = ""  # SGLang sampling backend; empty lets SGLang choose
    cuda_graph: bool = True  # capture decoding in CUDA graphs; needs nvcc or prebuilt kernels on some machines


@dataclass(frozen=True)
class RolloutConfig:
    group_size: int = 5  # G, trajectories per question in GRPO (paper 4.1)
    temperature: float = 1.0  # paper 4.1
    top_p: float = 1.0  # Search-R1's code leaks 0.95; its paper says 1.0
    max_searches: int = 4  # T_max (paper 4.1): turns that may search; one final generation follows
    max_response_tokens: int = 500  # per generation (Search-R1)
    max_observation_tokens: int = 500  # per observation, wrapper included (Search-R1)
    max_start_tokens: int = 2048  # initial prompt kept, cut on the left (Search-R1)
    max_context_tokens: int = 4096  # rolling context cut on the left, whole response cut on the right (Search-R1)
    max_in_flight: int = 512  # trajectories under way at once on one engine; some of them search meanwhile
    max_errors: float = 0.2  # share of trajectories that may fail for engine or retriever faults before the run stops


@dataclass(frozen=True)
class PromptConfig:
    user: str = SEARCH_R1_USER  # {question}; Eq. 3
    direct: str = DIRECT_USER  # {question}; the baseline without retrieval, wording ours
    rag: str = RAG_USER  # {question} and {documents}; the baseline that retrieves once, wording ours
    teacher: str = PRIVILEGED_USER  # {student_prompt} or {question}, and {reference}; Eq. 4, wording ours
    document: str = "Doc {rank}(Title: {title}) {text}\n"  # one passage of an observation (Search-R1)
    information: str = "\n\n<information>{documents}</information>\n\n"  # an observation (Search-R1)
    invalid_action: str = INVALID_ACTION  # what a turn without a complete tag is told (Search-R1)


@dataclass(frozen=True)
class RetrieverConfig:
    url: str = ""  # address of a running /retrieve server; empty starts one for this run
    corpus: str = ""  # jsonl of {"id", "contents"}; needed when url is empty
    index: str = ""  # folder of tools/build_index.py, or a FAISS file (then encoder and style too), unless url is set
    encoder: str = ""  # "minilm", folder or hub id; empty takes the one the index folder names
    style: str = ""  # e5, bge, plain or sentence-transformers: prefixes and pooling of an encoder given here
    device: str = "cpu"  # where the server this run starts encodes queries: cpu, cuda or cuda:N
    threads: int = 1  # CPU threads of the server this run starts; 0 takes all cores, as a large exact index needs
    topk: int = 3  # passages per query (paper 4.1)
    port: int = 0  # port of the server this run starts; 0 picks a free one
    token_file: str = ""  # file with the token of a retriever on other machines; empty sends none
    timeout_s: float = 30.0  # one HTTP request
    retries: int = 10  # tries of a request that meets time-outs, 429 or 5xx, before its trajectories count as errors
    deadline_s: float = 600.0  # one search in all, waiting for a retriever that is down included


@dataclass(frozen=True)
class DataConfig:
    train: str = ""  # training questions: .jsonl or Search-R1 .parquet
    validation: str = ""  # questions that choose the OPSD adapter; disjoint from train
    test: str = ""  # held-out questions that judge every stage


@dataclass(frozen=True)
class GRPOConfig:
    steps: int = 200  # rollout batches in a round (paper 4.1)
    prompts_per_step: int = 512  # questions per rollout batch (Search-R1)
    mini_batch_size: int = 256  # sequences per optimizer update (Search-R1); 0 takes the whole rollout batch
    lr: float = 1.0e-6  # paper 4.1
    warmup_ratio: float = 0.285  # linear warm-up share of the round, then constant (Search-R1)
    adam_betas: tuple[float, float] = (0.9, 0.999)  # Search-R1
    weight_decay: float = 0.01  # Search-R1
    grad_clip: float = 1.0  # global gradient norm (Search-R1)
    clip_eps: float = 0.2  # epsilon in Eq. 2
    kl_coef: float = 0.001  # beta (paper 4.1); 0 skips the reference model
    entropy_coef: float = 0.001  # entropy bonus (a default of Search-R1's code)
    advantage_eps: float = 1.0e-6  # added to the standard deviation of Eq. 1
    loss_norm: str = "token_mean"  # token_mean over the mini-batch (verl) or sequence_mean
    save_every: int = 50  # steps between checkpoints to continue from; 0 saves none


@dataclass(frozen=True)
class PoolConfig:
    rollouts_per_question: int = 5  # K; not in the paper, equal to G
    max_questions: int = 0  # questions rolled out; 0 goes on until the pairs suffice
    chunk_questions: int = 256  # questions per restartable piece of the pool


@dataclass(frozen=True)
class PairsConfig:
    min_ref_searches: int = 0  # smallest number of searches a reference may have; 0 is the paper's rule
    text: str = "full"  # text compared: full response or policy only


@dataclass(frozen=True)
class OPSDConfig:
    max_steps: int = 200  # updates
    epochs: int = 1  # passes over the pairs at most
    pairs_per_step: int = 32  # OPSD's effective batch
    lr: float = 5.0e-6  # OPSD
    lr_decay: str = "constant"  # constant or linear
    weight_decay: float = 0.0  # OPSD
    grad_clip: float = 0.1  # OPSD
    kl_clip: float = 10.0  # tau_clip of Eq. 7 (paper 4.1)
    temperature: float = 1.0  # both distributions
    loss_norm: str = "sequence_mean"  # sequence_mean is Eq. 7; token_mean is OPSD's
    lora_rank: int = 64  # OPSD
    lora_alpha: int = 128  # OPSD
    validate_every: int = 25  # updates between validation EMs; step 0 is a candidate too
    max_teacher_tokens: int = 10240  # longer teacher prompts drop their pair, never a token of the student
    teacher_check_questions: int = 64  # wrong trajectories continued under both prompts before the round; 0 skips


@dataclass(frozen=True)
class EvalConfig:
    method: str = "search"  # search: as trained; direct: no retrieval; rag: the question's passages in the prompt
    sources: list[str] = field(default_factory=list)  # data sources to evaluate; empty takes all
    limit: int = 0  # first questions of each source; 0 takes all
    temperature: float = 0.0  # 0 is greedy
    samples: int = 1  # trajectories per question at temperature > 0
    greedy: bool = True  # stages of a run: also evaluate greedily when temperature > 0
    validation_temperature: float = 0.0  # decoding that chooses the adapter
    validation_samples: int = 1  # trajectories per validation question


@dataclass(frozen=True)
class CycleConfig:
    cycles: int = 2  # GRPO + OPSD rounds in turn (paper 5)
    skip_opsd: bool = False  # GRPO rounds only: the control experiment
    until_no_gain: bool = True  # a cycle whose best validation EM is not above the one before's is the last
    evaluate_stages: bool = True  # take held-out EM after every stage


@dataclass(frozen=True)
class HealthConfig:
    window: int = 10  # steps that are averaged before anything is called a trend
    reward_drop: float = 0.5  # collapse: share of the best average EM that a GRPO round may lose; 0 looks away
    on_collapse: str = "end_round"  # end_round (hand on the best checkpoint), roll_back, stop or warn
    max_roll_backs: int = 2  # of one round, each with new draws and a lower learning rate; then it ends
    roll_back_lr: float = 0.5  # factor of the learning rate after each
    on_alarm: str = "warn"  # of all other alarms: warn or stop
    max_kl: float = 1.0  # average KL to the start of the round, per token; 0 looks away, here and below
    min_entropy: float = 0.01  # average entropy per token
    max_ratio: float = 20.0  # largest probability ratio of an update
    max_grad_norm: float = 100.0  # average norm before clipping
    max_engine_gap: float = 0.05  # mean |engine - trainer| logprob of a rollout
    max_invalid_share: float = 0.5  # turns without a complete tag
    min_answered_share: float = 0.2  # trajectories that end in an answer
    max_truncated_share: float = 0.5  # trajectories with a text that was cut
    max_error_share: float = 0.1  # trajectories lost to engine or retriever faults
    max_same_reward_share: float = 0.98  # groups that give no gradient
    max_length_growth: float = 3.0  # response tokens, as a multiple of those at the start of the round
    min_searches_kept: float = 0.2  # searches, as a share of those at the start of the round


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    opsd: OPSDConfig = field(default_factory=OPSDConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cycle: CycleConfig = field(default_factory=CycleConfig)
    health: HealthConfig = field(default_factory=HealthConfig)


def config_keys(node: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key, e.g. "grpo.clip_eps"."""
    keys: list[str] = []
    for f in dataclasses.fields(node):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        nested = dataclasses.is_dataclass(default)
        keys += config_keys(type(default), f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides. Raises UserError on anything that does not fit."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    source = str(path)
    try:
        if path is not None:
            if not Path(path).is_file():
                raise UserError(
                    f"config file not found: {path}; give an existing YAML file, such as configs/quickstart.yaml"
                )
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise UserError(f"{path} is a list; a config file holds sections such as `grpo:` with settings in them")
            merged = OmegaConf.merge(merged, loaded)
        for override in overrides or []:
            source = override
            if "=" not in override:
                raise UserError(f"an override must be key=value, got {override!r}; for example grpo.steps=10")
            override += "''" if override.endswith("=") else ""  # "key=" means empty, which YAML reads as null
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error, source)) from error
    except yaml.YAMLError as error:  # the parser's message carries line and column
        raise UserError(f"{source} is not valid YAML: {error}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check_values(config)
    return config


CHOICES = {
    "run.device": ("auto", "cpu", "cuda"),
    "train.dtype": ("auto", "float32", "bfloat16"),
    "train.recompute": ("none", "selective", "full", "auto"),
    "train.share_prefix": ("auto", "always", "never"),
    "train.offload": ("auto", "always", "never"),
    "train.loss_mode": ("chunked", "recompute", "materialized"),
    "engine.verify_sync": ("probe", "exact"),
    "engine.share_weights": ("auto", "never"),
    "grpo.loss_norm": ("token_mean", "sequence_mean"),
    "opsd.loss_norm": ("token_mean", "sequence_mean"),
    "opsd.lr_decay": ("constant", "linear"),
    "pairs.text": ("full", "policy"),
    "eval.method": ("search", "direct", "rag"),
    "health.on_collapse": ("end_round", "roll_back", "stop", "warn"),
    "health.on_alarm": ("warn", "stop"),
}
# Settings that may be 0, where 0 means "none" or "choose"; every other number must be positive.
MAY_BE_ZERO = {
    "run.seed",
    "train.sync_tolerance",
    "train.max_tokens",
    "train.threads",
    "engine.port",
    "engine.count",
    "engine.max_total_tokens",
    "rollout.max_errors",
    "retriever.port",
    "retriever.threads",
    "grpo.mini_batch_size",
    "grpo.warmup_ratio",
    "grpo.weight_decay",
    "grpo.kl_coef",
    "grpo.entropy_coef",
    "grpo.advantage_eps",
    "grpo.save_every",
    "pool.max_questions",
    "pairs.min_ref_searches",
    "opsd.weight_decay",
    "opsd.teacher_check_questions",
    "eval.limit",
    "eval.temperature",
    "eval.validation_temperature",
    "train.keep_every",
    "health.max_roll_backs",
    "health.reward_drop",
    "health.max_kl",
    "health.min_entropy",
    "health.max_ratio",
    "health.max_grad_norm",
    "health.max_engine_gap",
    "health.max_invalid_share",
    "health.min_answered_share",
    "health.max_truncated_share",
    "health.max_error_share",
    "health.max_same_reward_share",
    "health.max_length_growth",
    "health.min_searches_kept",
}


# Shares and probabilities.
AT_MOST_ONE = {
    "engine.mem_fraction",
    "rollout.top_p",
    "rollout.max_errors",
    "grpo.warmup_ratio",
    "health.reward_drop",
    "health.max_invalid_share",
    "health.min_answered_share",
    "health.max_truncated_share",
    "health.max_error_share",
    "health.max_same_reward_share",
}


def check_values(config: Config) -> None:
    """Raises UserError for a value out of range: found now, not hours into the stage that would stumble over it."""
    for key in config_keys():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key} must be {', '.join(CHOICES[key][:-1])} or {CHOICES[key][-1]}, got {value!r}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            lowest = "0 or more" if key in MAY_BE_ZERO else "more than 0"
            is_finite = math.isfinite(value) or key == "opsd.kl_clip"  # an infinite clip is none
            if not is_finite or value < 0 or (value == 0 and key not in MAY_BE_ZERO):
                raise UserError(f"{key} must be {lowest}, got {value!r}")
            if key in AT_MOST_ONE and value > 1:
                raise UserError(f"{key} must be at most 1, got {value!r}")
    if not all(0 <= beta < 1 for beta in config.grpo.adam_betas):
        raise UserError(f"grpo.adam_betas must be 0 or more and less than 1, got {list(config.grpo.adam_betas)}")
    for url in config.engine.urls:
        http_address(url, setting="an address of engine.urls", example="http://127.0.0.1:30000")
        if "@" in urlsplit(url).netloc:
            raise UserError(
                f"an address of engine.urls, of {urlsplit(url).hostname}, holds a user's name; engines know keys only: "
                "put the servers' --api-key into a file and give that as engine.token_file"
            )
    if config.retriever.url:
        http_address(config.retriever.url, setting="retriever.url", example="http://127.0.0.1:8000/retrieve")


def _explain(error: Exception, source: str) -> str:
    key = getattr(error, "full_key", None) or ""
    message = str(error).splitlines()[0]
    message = message.partition(". Did you mean")[0]  # OmegaConf's own guess stays inside one section
    keys = config_keys()
    near = difflib.get_close_matches(key, keys if "." in key else sorted({k.partition(".")[0] for k in keys}), n=1)
    hint = f" Did you mean {near[0]!r}?" if near and near[0] != key else ""
    where = f"config key {key!r}" if key else source
    return f"{where}: {message}.{hint} `searche1 config` lists every key."


def describe(config: Config) -> str:
    """Every setting as `key: value  # meaning`, with a star where the value is not the default."""
    comments = _comments()
    lines = []
    for key in config_keys():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        default = getattr(getattr(Config(), section), name)
        mark = "  " if value == default else "* "
        lines.append(f"{mark}{key}: {value!r}  # {comments[key]}")
    return "\n".join(lines)


def _comments() -> dict[str, str]:
    """The comment behind each field in this file: a setting is explained where it is defined."""
    sections = {type(getattr(Config(), f.name)).__name__: f.name for f in dataclasses.fields(Config)}
    comments: dict[str, str] = {}
    section = ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        if found := re.match(r"class (\w+)", line):
            section = sections.get(found[1], "")
        elif section and (found := re.match(r"    (\w+): .+?  # (.+)", line)):
            comments[f"{section}.{found[1]}"] = found[2]
    return comments
