"""One real SGLang server against transformers, on a random Qwen2 of a few thousand parameters."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import torch
from small_engine import (
    TOLERANCE,
    complete,
    load,
    make_model,
    prompts_of_many_lengths,
    start_options,
    true_logprobs,
    worst_gap,
)

from megatron_ext.buckets import fill_buckets
from megatron_ext.hf_mapping import model_shape
from megatron_ext.shared_weights import SharedWeights
from searche1.colocation import Colocation, Phase
from searche1.config import PromptConfig, RolloutConfig
from searche1.retrieval.client import Passage
from searche1.rollout.engine import (
    CACHE,
    COMPARE,
    WEIGHTS,
    Engine,
    EngineError,
    EngineLost,
    shared,
    start_engine,
)
from searche1.rollout.fleet import Fleet
from searche1.rollout.sampler import Rollouts, Sampler
from searche1.types import Completion, Group, Question, UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log_path = tmp_path_factory.mktemp("log") / "engine.log"
    with pytest.MonkeyPatch.context() as patch:
        # What torchrun sets: a trainer starts its engines under it, and they must not take it for theirs.
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        engine = start_engine(**start_options(folder, log_path))
    with engine:
        engine.wait_until_ready(timeout_s=300)
        yield engine


def test_many_requests_at_once_get_the_logprobs_of_transformers(engine, reference):
    prompts = prompts_of_many_lengths()
    completions = complete(engine, prompts)
    log = engine.log_path.read_text()
    assert "SGLang's own modules" not in log and "the scheduler rests" not in log  # but ours
    assert max(worst_gap(reference, p, c) for p, c in zip(prompts, completions, strict=True)) < TOLERANCE
    assert {c.weight_version for c in completions} == {"default"}


def test_a_second_turn_reuses_the_cached_first_and_stays_exact(engine, reference):
    prompts = prompts_of_many_lengths()[10:14]
    for completion, prompt in zip(complete(engine, prompts), prompts, strict=True):
        longer = [*prompt, *completion.token_ids, *range(40, 60)]
        assert worst_gap(reference, longer, complete(engine, [longer])[0]) < TOLERANCE


def test_greedy_decoding_takes_the_likeliest_ids(engine, reference):
    prompt = prompts_of_many_lengths()[3]
    completion = complete(engine, [prompt], temperature=0.0)[0]
    with torch.no_grad():
        logits = reference(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(completion.token_ids)


def test_logprobs_are_those_of_temperature_one_at_any_temperature(engine, reference):
    prompt = prompts_of_many_lengths()[3]
    for temperature in (0.0, 0.5):
        completion = complete(engine, [prompt], temperature=temperature)[0]
        assert worst_gap(reference, prompt, completion) < TOLERANCE


def test_a_seed_gives_the_same_ids_in_any_company(engine):
    prompts = prompts_of_many_lengths()[:8]
    together = complete(engine, prompts, temperature=1.0)
    alone = [complete(engine, [prompt], seed=i)[0] for i, prompt in enumerate(prompts)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]

    async def beside_greedy_ones() -> list[Completion]:
        settings = {"top_p": 1.0, "stop": ()}
        async with aiohttp.ClientSession() as session:
            requests = (
                engine.generate(session, ids, seed=i, temperature=temperature, max_new_tokens=count, **settings)
                for i, ids in enumerate(prompts)
                for temperature, count in ((1.0, 24), (0.0, 7))  # on a CPU SGLang's batches, and ours behind them
            )
            return (await asyncio.gather(*requests))[::2]

    assert [c.token_ids for c in asyncio.run(beside_greedy_ones())] == [c.token_ids for c in together]
    assert len({c.token_ids for c in complete(engine, [prompts[0]] * 8)}) == 8


def test_contexts_stay_exact_where_requests_end_and_others_take_their_place(engine, reference):
    """A request's row is another's as soon as it ends, while a batch with its last token may still be computed."""
    prompts = [[3 + i, *ids] for i, ids in enumerate(prompts_of_many_lengths() * 3)]

    async def two_turns() -> list[tuple[list[int], Completion]]:
        free = asyncio.Semaphore(12)
        settings = {"temperature": 1.0, "top_p": 1.0, "stop": ()}
        async with aiohttp.ClientSession() as session:

            async def one(number: int, prompt: list[int]) -> tuple[list[int], Completion]:
                async with free:
                    options = {"max_new_tokens": 1 + number % 9, "seed": number, **settings}
                    first = await engine.generate(session, prompt, **options)
                context = [*prompt, *first.token_ids, 7, 8, 9]
                async with free:
                    return context, await engine.generate(session, context, **{**options, "max_new_tokens": 3})

            return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))

    assert max(worst_gap(reference, context, c) for context, c in asyncio.run(two_turns())) < TOLERANCE


def test_a_stop_string_ends_the_completion_and_stays_in_it(engine, tokenizer):
    prompt = prompts_of_many_lengths()[5]
    free = complete(engine, [prompt], max_new_tokens=40)[0]
    assert free.finish_reason == "length"
    stop = tokenizer.decode(free.token_ids[8:12])
    stopped = complete(engine, [prompt], max_new_tokens=40, stop=(stop,))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text.endswith(stop)
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert tokenizer.decode(stopped.token_ids) == stopped.text


def test_prompt_logprobs_are_those_of_transformers(engine, reference):
    sequences = prompts_of_many_lengths()[2:6]
    for given, ids in zip(engine.logprobs(sequences), sequences, strict=True):
        assert torch.allclose(torch.tensor(given), true_logprobs(reference, ids), atol=TOLERANCE)


def response_ids(group: Group) -> list[tuple[int, ...]]:
    return [trajectory.response_ids for trajectory in group.trajectories]


class OnePassage:
    async def search(self, query: str) -> tuple[Passage, ...]:
        return (Passage(id="0", contents='"Title"\ntext', score=1.0),)

    async def close(self) -> None:
        pass


def test_trajectories_hold_the_ids_and_logprobs_that_the_engine_sampled(engine, reference, tokenizer):
    sampler = Sampler(
        fleet=Fleet([engine]),
        retriever=OnePassage(),
        tokenizer=tokenizer,
        rollout=RolloutConfig(max_response_tokens=12),
        prompt=PromptConfig(user="{question}"),
    )
    questions = [Question(id=str(i), text=f"q{i}", answers=("a",), source="test") for i in range(6)]
    rollouts = Rollouts(sampler.starts(questions), samples=2)
    groups = sampler.sample(rollouts, temperature=1.0, seed=3)
    for trajectory in (t for group in groups for t in group.trajectories):
        assert trajectory.status == "unanswered"  # random weights do not find the tags
        assert [span.kind for span in trajectory.spans] == ["invalid", "error"] * 4 + ["final"]
        ids = [*trajectory.prompt_ids, *trajectory.response_ids]
        expected = true_logprobs(reference, ids)[len(trajectory.prompt_ids) - 1 :]
        expected = expected[torch.tensor(trajectory.policy_mask)]
        assert torch.allclose(torch.tensor(trajectory.engine_logprobs), expected, atol=TOLERANCE)
    again = sampler.sample(Rollouts(sampler.starts(questions), samples=2), temperature=1.0, seed=3)
    assert [response_ids(group) for group in again] == [response_ids(group) for group in groups]


def test_new_weights_take_effect_and_completions_carry_their_version(engine, reference):
    prompts = prompts_of_many_lengths()[:10]
    engine.logprobs(prompts)  # fills the prefix cache with keys and values of the old weights
    new = make_model(vocab_size=reference.config.vocab_size, seed=1)
    named = [(name, p.detach()) for name, p in new.named_parameters()]
    before = named[0][1].clone()
    try:
        load(engine, named, version="step-1")
        completions = complete(engine, prompts)
        assert max(worst_gap(new, p, c) for p, c in zip(prompts, completions, strict=True)) < TOLERANCE
        assert min(worst_gap(reference, p, c) for p, c in zip(prompts, completions, strict=True)) > 0.01
        assert {c.weight_version for c in completions} == {"step-1"}
        assert torch.equal(named[0][1], before)
        assert not named[0][1].is_shared()  # the trainer's memory is its own
    finally:
        load(engine, [(name, p.detach()) for name, p in reference.named_parameters()], version="default")


def test_an_engine_computes_with_memory_that_the_trainer_writes(engine, folder, reference):
    """Handed over once; what is written later takes effect without a message."""
    shape, prompts = model_shape(reference.config), prompts_of_many_lengths()[:10]
    memory = SharedWeights(shape, torch.float32)
    for seed in (5, 6):
        new = make_model(vocab_size=reference.config.vocab_size, seed=seed)
        named = [(name, p.detach()) for name, p in new.named_parameters()]
        if seed == 5:
            load(engine, named, version="5", memory=memory)
        else:
            engine.begin_update()
            assert not list(memory.take(named))
            engine.end_update(version="6")
        assert max(worst_gap(new, p, c) for p, c in zip(prompts, complete(engine, prompts), strict=True)) < TOLERANCE
    log = engine.log_path.read_text()
    assert "SGLang's own modules" not in log and "slower" not in log
    load(engine, [(name, p.detach()) for name, p in reference.named_parameters()], version="default")  # buckets, too
    held = dict(memory.tensors())
    assert all(torch.equal(held[name], p) for name, p in reference.named_parameters())  # land in that memory


def test_sleeping_parts_wake_and_the_server_serves_on(engine, reference):
    for part in (CACHE, WEIGHTS):
        engine.sleep(part)
    for part in (WEIGHTS, CACHE):
        engine.wake(part)
    prompt = prompts_of_many_lengths()[4]
    assert worst_gap(reference, prompt, complete(engine, [prompt])[0]) < TOLERANCE


class RecordingEngine(Engine):
    """A client of the same server that writes down what it asks."""

    def _begin_post(self, route, request, **options):
        self.asked = [*getattr(self, "asked", []), " ".join([route, *(request or {}).get("tags", [])])]
        return super()._begin_post(route, request, **options)


class TrainerOfNothing:
    def optimizer_to_host(self) -> int:
        return 0

    def weights_to_host(self) -> int:
        return 0

    def to_device(self) -> None: ...


def test_an_update_that_failed_on_the_way_leaves_no_session_open(engine, reference):
    client = RecordingEngine(url=engine.url, log_path=engine.log_path, key=engine.key)
    name, weight = next((name, p.detach()) for name, p in reference.named_parameters())
    for _ in range(2):  # the first gets no end
        client.begin_update()
        client.load_bucket([shared(next(fill_buckets([(name, weight)], bucket_bytes=1)).tensors())])
    client.end_update(version="default")
    updates = [route for route in client.asked if route.endswith("_weight_update")]
    assert updates == ["/begin_weight_update", "/end_weight_update"] * 2


def test_a_step_asks_the_server_in_the_one_order_that_fits(engine, reference):
    client = RecordingEngine(url=engine.url, log_path=engine.log_path, key=engine.key)
    colocation = Colocation(is_on=True, engines={0: client}, free_bytes=None, together=lambda work: work())
    trainer = TrainerOfNothing()
    colocation.to(Phase.TRAIN, trainer)
    colocation.to(Phase.SYNC, trainer)
    load(client, [(name, p.detach()) for name, p in reference.named_parameters()], version="default")
    colocation.to(Phase.ROLLOUT, trainer)
    asked = [question for question, _ in itertools.groupby(client.asked)]
    assert asked == [
        "/flush_cache",
        "/release_memory_occupation kv_cache",
        "/flush_cache",
        "/release_memory_occupation weights",
        "/resume_memory_occupation weights",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/update_weight_version",  # and meanwhile
        "/flush_cache",
        "/resume_memory_occupation kv_cache",
    ]
    prompt = prompts_of_many_lengths()[4]
    assert worst_gap(reference, prompt, complete(client, [prompt])[0]) < TOLERANCE


def test_weights_from_a_folder_take_effect(engine, folder, reference, tmp_path):
    new = make_model(vocab_size=reference.config.vocab_size, seed=2)
    shutil.copytree(folder, tmp_path / "new")
    new.save_pretrained(tmp_path / "new")
    prompt = prompts_of_many_lengths()[4]
    try:
        engine.load_folder(tmp_path / "new", version="folder")
        completion = complete(engine, [prompt])[0]
        assert worst_gap(new, prompt, completion) < TOLERANCE
        assert completion.weight_version == "folder"
    finally:
        engine.load_folder(folder, version="default")
    with pytest.raises(EngineError, match=r"did not load .*nowhere.*filesystem that the server's machine sees"):
        engine.load_folder(tmp_path / "nowhere", version="x")


def test_a_refused_request_is_an_engine_error(engine):
    with pytest.raises(EngineError, match="400"):
        complete(engine, [list(range(200)) * 10])
    assert complete(engine, [[1, 2, 3]])[0].token_ids


def test_nobody_without_the_key_is_answered(engine):
    """Who may ask an engine may give it weights, and those are pickles."""
    stranger = Engine(url=engine.url, log_path=engine.log_path)
    with pytest.raises(EngineError, match=r"HTTP status 401.*engine\.token_file"):
        stranger.check_key()
    with pytest.raises(EngineError, match="401"):
        complete(stranger, [[1, 2, 3]])
    with pytest.raises(EngineError, match="401"):
        stranger.load_bucket(["payload"])
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if engine.key.encode() in command]
    engine.check_key()


def test_a_taken_port_is_told_before_anything_starts(folder, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"engine.port: cannot listen on 127.0.0.1:{port}.*choose another port"):
            start_engine(**{**start_options(folder, tmp_path / "log"), "port": port})


def test_an_engine_that_cannot_start_tells_why(tmp_path):
    with (
        start_engine(**start_options(tmp_path / "no-such-model", tmp_path / "log")) as engine,
        pytest.raises(EngineError, match=r"(?s)stopped while starting.*exit code.*no-such-model"),
    ):
        engine.wait_until_ready(timeout_s=300)


def members_of(group: int) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "pgid=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(maxsplit=1) for line in listing.splitlines())
    return [args for pgid, args in rows if int(pgid) == group]


def wait_for(condition: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_engine_and_workers_die_when_we_are_killed(folder, tmp_path):
    script = (
        "import os, time\nfrom pathlib import PosixPath\nfrom searche1.rollout.engine import start_engine\n"
        f"engine = start_engine(**{start_options(folder, tmp_path / 'log')!r})\n"
        "print(os.getpgid(engine._process.pid), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        group = int(owner.stdout.readline())
        workers = ("scheduler", "detokenizer")
        wait_for(lambda: all(any(w in args for args in members_of(group)) for w in workers), timeout_s=300)
        time.sleep(1)  # they have named themselves; next they tie their lives to the server's
        owner.kill()
    wait_for(lambda: members_of(group) == [], timeout_s=20)


def test_an_engine_that_dies_tells_why(engine):
    """A tensor of the wrong shape takes SGLang down; the tests behind it start it again."""
    with pytest.raises(EngineError, match=r"(?s)update_weights_from_tensor failed.*load_weights"):
        load(engine, [("model.embed_tokens.weight", torch.zeros(3, 4))], version="broken")
    with pytest.raises(EngineLost, match="failed"):
        complete(engine, [[1, 2, 3]])


def test_an_engine_that_died_is_started_again(engine, reference):
    assert engine.has_stopped()
    engine.restart()
    engine.wait_until_ready(timeout_s=300)
    prompt = prompts_of_many_lengths()[4]
    assert worst_gap(reference, prompt, complete(engine, [prompt])[0]) < TOLERANCE


def test_an_exact_comparison_names_the_tensor_that_is_another(engine, reference):
    """Ends the engine: what it holds cannot be trusted."""
    changed = reference.model.layers[1].mlp.up_proj.weight.detach().clone()
    changed[2, 3] += 1e-3
    engine.begin_update()
    bucket = next(fill_buckets([("model.layers.1.mlp.up_proj.weight", changed)], bucket_bytes=1))
    with pytest.raises(EngineError, match=r"layers.1.mlp.up_proj.weight differs from the trainer's in 1 of 12288"):
        engine.load_bucket([shared(bucket.tensors())], load_format=COMPARE)
