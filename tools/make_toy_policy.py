"""Make the toy policy that the quickstart starts from: half a million parameters, taught from scratch.

    python tools/make_toy_policy.py --seed 0 --out searche1/assets/toy_policy

A supervised warm-start in plain PyTorch, in two stages: copying (recall facts from a list), then the
trajectory format, by imitating the imperfect script of `searche1.world` in worlds that share no fact with
the quickstart's. The policy learns both prompts, the student's and the teacher's with a reference: a policy
that does not know the second has nothing to teach itself in OPSD.

One CPU core is enough, and on one thread the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AddedToken, DynamicCache, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from searche1.prompts import information, student_prompt, teacher_prompt
from searche1.tags import Action, parse_action
from searche1.world import (
    CLEAN,
    IMPERFECT,
    MAX_SEARCHES,
    RHYMES,
    SYLLABLES,
    TAGS,
    TOY_PROMPT,
    WORDS,
    Habits,
    Puzzle,
    Retrieve,
    build_world,
    overlap_retriever,
    trajectory_text,
    write_trajectory,
)

# What an attempt under the teacher prompt has done wrong so far. These mistakes carry no loss: the lesson
# is that, whatever came before, the reference shows how to go on.
ASTRAY = Habits(guess=0.03, half_name=0.4, give_up=0.15, repeat=0.4, stop_early=0.1, misread=0.1, malformed=0.03)
# References are right but not always frugal, like those that a policy finds among its own trajectories.
REFERENCE = Habits(half_name=0.2, repeat=0.25)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
SPACE = "\u0120"  # a space in the alphabet of byte-level BPE
MAX_POSITIONS = 1024

COPY_STEPS, COPY_SEQUENCES, COPY_LR = 300, 96, 5e-3
FORMAT_STEPS, STUDENT_SEQUENCES, TEACHER_SEQUENCES, FORMAT_LR = 1900, 20, 12, 4e-3
ATTRIBUTE_WEIGHTS = (1.0, 2.0, 3.0, 4.0)  # worlds differ in which wrong passages a search brings
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.05
MAX_CHUNK_TOKENS = 1536
MAX_TURN_TOKENS = 40
EVALUATION_WORLD = 1_000_000  # seed of the world that judges the policy


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the toy policy: supervised warm-start on one CPU core.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="HuggingFace folder to write")
    parser.add_argument("--copy-steps", type=int, default=COPY_STEPS)
    parser.add_argument("--format-steps", type=int, default=FORMAT_STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()

    tokenizer = make_tokenizer()
    policy = make_policy(vocab_size=len(tokenizer), seed=options.seed)
    rng = random.Random(options.seed)
    train(policy, copy_batches(tokenizer, rng), steps=options.copy_steps, lr=COPY_LR, name="copy")
    print(f"copy accuracy {copy_accuracy(policy, next(copy_batches(tokenizer, rng))):.3f}", flush=True)
    train(policy, format_batches(tokenizer, rng), steps=options.format_steps, lr=FORMAT_LR, name="format")
    numbers = evaluate(policy, tokenizer, seed=options.seed)
    minutes = (time.perf_counter() - started) / 60

    policy.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    sizes = {"parameters": policy.num_parameters(), "vocab_size": len(tokenizer)}
    card = model_card(numbers, seed=options.seed, minutes=minutes, **sizes)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


# --- tokenizer and policy ---


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE; every tag, word and syllable of the toy worlds is one token."""
    merges = bpe_merges()
    letters = sorted({letter for text in WORDS + SYLLABLES for letter in text} | {SPACE})
    tokens = [*SPECIAL_TOKENS, *TAGS, *letters, *(left + right for left, right in merges)]
    pad, eos, unk = SPECIAL_TOKENS
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def bpe_merges() -> list[tuple[str, str]]:
    """Merges that make " bal" one token and " balkem" two, and then the plain words letter by letter.

    In a name a vowel is followed by a consonant only inside a syllable, so rhymes can be merged first.
    """
    merges = [(rhyme[0], rhyme[1]) for rhyme in RHYMES]
    merges += [(syllable[0], syllable[1:]) for syllable in SYLLABLES]
    merges += [(SPACE, syllable) for syllable in SYLLABLES]
    for word in WORDS:
        parts = [part for part in re.split(f"({'|'.join((*SYLLABLES, *RHYMES))}|.)", word) if part]
        prefix = SPACE
        for part in parts:
            if (prefix, part) not in merges:
                merges.append((prefix, part))
            prefix += part
    return merges


def make_policy(*, vocab_size: int, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 3 layers with weights of standard deviation 1/sqrt(fan_in).

    The small rotary base and the wide heads let induction (find the name again, copy what follows) form
    within minutes; with Qwen2's base of 1e6 and an initial deviation of 0.02 it does not.
    """
    pad, eos, _ = range(len(SPECIAL_TOKENS))
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        dtype="float32",
    )
    config.rope_theta = 100.0  # where readers of transformers 4 look for it
    policy = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
    return policy


# --- what is imitated ---


@dataclass(frozen=True)
class Lesson:
    token_ids: tuple[int, ...]
    is_learned: tuple[bool, ...]  # one per token; False on prompts, observations and what is only context


def copy_batches(tokenizer: Qwen2Tokenizer, rng: random.Random) -> Iterator[list[Lesson]]:
    """Two facts, then the same two in either order, which is what is learned.

    Exactly two, with nothing between: more facts or fillers make copying an order of magnitude slower to learn.
    """

    def name() -> str:
        return " " + rng.choice((" ", "")).join(rng.sample(SYLLABLES, 2))

    while True:
        texts = []
        for _ in range(COPY_SEQUENCES):
            facts = [f"{name()} {rng.choice(('birthplace', 'author'))}{name()} ." for _ in range(2)]
            texts.append(("".join(facts), "".join(rng.sample(facts, 2))))
        ids = tokenizer([text for pair in texts for text in pair], add_special_tokens=False)["input_ids"]
        yield [_lesson([(seen, False), (recalled, True)]) for seen, recalled in zip(ids[::2], ids[1::2], strict=True)]


def format_batches(tokenizer: Qwen2Tokenizer, rng: random.Random) -> Iterator[list[Lesson]]:
    """Imperfect attempts under the student prompt; attempts gone astray, under the teacher prompt.

    Every batch plays in a world of its own: names and facts that come back would be memorised instead of read.
    """
    while True:
        world = build_world(rng.getrandbits(48), is_warm_start=True)
        retrieve = overlap_retriever(world.facts, attribute_weight=rng.choice(ATTRIBUTE_WEIGHTS))
        puzzles = rng.sample(world.train + world.validation + world.test, STUDENT_SEQUENCES + TEACHER_SEQUENCES)
        students = [
            ((student_prompt(puzzle.question.text, TOY_PROMPT), "prompt"), *_pieces(puzzle, retrieve, IMPERFECT, rng))
            for puzzle in puzzles[:STUDENT_SEQUENCES]
        ]
        teachers = [
            (
                (privileged_prompt(puzzle, retrieve, habits=REFERENCE, rng=rng), "prompt"),
                *_pieces(puzzle, retrieve, ASTRAY, rng),
            )
            for puzzle in puzzles[STUDENT_SEQUENCES:]
        ]
        lessons = _lessons(tokenizer, students, learned=("step", "mistake"))
        yield lessons + _lessons(tokenizer, teachers, learned=("step",))


def privileged_prompt(puzzle: Puzzle, retrieve: Retrieve, *, habits: Habits, rng: random.Random) -> str:
    """The teacher prompt with a script's correct trajectory as the reference."""
    reference = trajectory_text(write_trajectory(puzzle, retrieve, habits=habits, rng=rng))
    return teacher_prompt(puzzle.question.text, reference, TOY_PROMPT)


def _pieces(puzzle: Puzzle, retrieve: Retrieve, habits: Habits, rng: random.Random) -> list[tuple[str, str]]:
    pieces = [(piece.text, piece.kind) for piece in write_trajectory(puzzle, retrieve, habits=habits, rng=rng)]
    return [*pieces, (SPECIAL_TOKENS[1], "step")]


def _lessons(
    tokenizer: Qwen2Tokenizer, texts: Sequence[Sequence[tuple[str, str]]], *, learned: Sequence[str]
) -> list[Lesson]:
    ids = iter(tokenizer([text for parts in texts for text, _ in parts], add_special_tokens=False)["input_ids"])
    return [_lesson([(next(ids), kind in learned) for _, kind in parts]) for parts in texts]


def _lesson(parts: Sequence[tuple[list[int], bool]]) -> Lesson:
    return Lesson(
        token_ids=tuple(index for ids, _ in parts for index in ids),
        is_learned=tuple(learned for ids, learned in parts for _ in ids),
    )


# --- training ---


def train(policy: Qwen2ForCausalLM, batches: Iterator[list[Lesson]], *, steps: int, lr: float, name: str) -> None:
    """AdamW with a short warm-up and cosine decay; the loss is the mean over all learned tokens of a batch."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, step / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        lessons = next(batches)
        num_learned = sum(sum(lesson.is_learned) for lesson in lessons)
        losses = []
        for chunk in _chunks(lessons):
            logits, targets = _learned_logits(policy, chunk)
            losses.append(functional.cross_entropy(logits, targets, reduction="sum") / num_learned)
            losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            loss, seconds = sum(loss.item() for loss in losses), time.perf_counter() - started
            print(f"{name} {step}/{steps} loss {loss:.3f} {seconds:.0f} s", flush=True)


def _chunks(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Lessons of about the same length, to be padded together to at most MAX_CHUNK_TOKENS."""
    chunk: list[Lesson] = []
    for lesson in sorted(lessons, key=lambda lesson: len(lesson.token_ids)):
        if (len(chunk) + 1) * len(lesson.token_ids) > MAX_CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(lesson)
    yield chunk


def _learned_logits(policy: Qwen2ForCausalLM, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, V] and targets [R] of the learned tokens. Padding is on the right, where causality hides it."""
    length = max(len(lesson.token_ids) for lesson in lessons)
    ids = torch.zeros(len(lessons), length, dtype=torch.long)  # [B, T]
    learned = torch.zeros(len(lessons), length, dtype=torch.bool)
    for row, lesson in enumerate(lessons):
        ids[row, : len(lesson.token_ids)] = torch.tensor(lesson.token_ids)
        learned[row, : len(lesson.token_ids)] = torch.tensor(lesson.is_learned)
    hidden = policy.model(input_ids=ids[:, :-1]).last_hidden_state  # [B, T-1, H]
    return policy.lm_head(hidden[learned[:, 1:]]), ids[:, 1:][learned[:, 1:]]


@torch.no_grad()
def copy_accuracy(policy: Qwen2ForCausalLM, lessons: Sequence[Lesson]) -> float:
    logits, targets = _learned_logits(policy, lessons)
    return (logits.argmax(-1) == targets).float().mean().item()


# --- evaluation ---


@dataclass
class Attempt:
    """A rollout in progress: the prompt and what was written and observed so far."""

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    turn_start: int = 0  # in response_ids
    num_turns: int = 0
    num_policy_tokens: int = 0
    # (response length, turns) after every observation: where another attempt may go on
    resumable: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    num_searches: int = 0
    is_well_formed: bool = True
    answer: str | None = None
    is_done: bool = False

    def resumed_under(self, prompt_ids: list[int], rng: random.Random) -> Attempt:
        """A new attempt that shares the beginning of this one, up to the end of a random observation."""
        length, num_turns = rng.choice(self.resumable)
        return Attempt(prompt_ids, self.response_ids[:length], turn_start=length, num_turns=num_turns)


def evaluate(policy: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, seed: int) -> dict[str, float]:
    """Sampled (T=1) and greedy EM on 300 held-out questions, and the teacher's lead where the student went wrong."""
    world = build_world(EVALUATION_WORLD)
    retrieve = overlap_retriever(world.facts)
    rng = random.Random(seed)
    prompts = [_encode(tokenizer, student_prompt(puzzle.question.text, TOY_PROMPT)) for puzzle in world.test]
    references = [privileged_prompt(puzzle, retrieve, habits=CLEAN, rng=rng) for puzzle in world.test]
    privileged = [_encode(tokenizer, text) for text in references]

    def run(attempts: list[Attempt], *, temperature: float = 1.0) -> list[Attempt]:
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        roll_out(policy, tokenizer, attempts, retrieve, temperature=temperature, generator=generator)
        return attempts

    def exact_match(attempts: Sequence[Attempt], puzzles: Sequence[Puzzle] = world.test * 2) -> float:
        hits = [attempt.answer in puzzle.question.answers for attempt, puzzle in zip(attempts, puzzles, strict=False)]
        return sum(hits) / len(attempts)

    students = run([Attempt(prompt) for prompt in prompts * 2])
    wrong = [i for i, attempt in enumerate(students) if attempt.answer not in world.test[i % 300].question.answers]
    cuts = random.Random(seed), random.Random(seed)  # the same cuts under both prompts
    wrong_puzzles = [world.test[i % 300] for i in wrong]
    as_teacher = run([students[i].resumed_under(privileged[i % 300], cuts[0]) for i in wrong])
    as_student = run([students[i].resumed_under(prompts[i % 300], cuts[1]) for i in wrong])
    two_hop = [i for i, puzzle in enumerate(world.test * 2) if len(puzzle.hops) == 2]
    return {
        "student EM, T=1": exact_match(students),
        "student EM, T=1, two hops": exact_match(
            [students[i] for i in two_hop], [world.test[i % 300] for i in two_hop]
        ),
        "student EM, greedy": exact_match(run([Attempt(prompt) for prompt in prompts], temperature=0.0)),
        "teacher EM with a clean reference, T=1": exact_match(run([Attempt(prompt) for prompt in privileged])),
        "EM continuing a wrong student trajectory, teacher prompt": exact_match(as_teacher, wrong_puzzles),
        "EM continuing a wrong student trajectory, student prompt": exact_match(as_student, wrong_puzzles),
        "share of well-formed trajectories": sum(a.is_well_formed for a in students) / len(students),
        "searches per trajectory": sum(a.num_searches for a in students) / len(students),
        "policy tokens per trajectory": sum(a.num_policy_tokens for a in students) / len(students),
    }


@torch.no_grad()
def roll_out(
    policy: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    attempts: Sequence[Attempt],
    retrieve: Retrieve,
    *,
    temperature: float,
    generator: torch.Generator,
) -> None:
    """Complete all attempts in place, in lock step: every row is at the same position, reading or writing."""
    cache = DynamicCache(config=policy.config)
    active = list(attempts)
    ends = set(tokenizer.convert_tokens_to_ids(["</search>", "</answer>", "<eos>"]))
    position = 0
    while active:
        tokens = [_token_at(attempt, position) for attempt in active]
        logits = policy(input_ids=torch.tensor(tokens)[:, None], past_key_values=cache).logits[:, -1]  # [B, V]
        if temperature == 0.0:
            sampled = logits.argmax(-1).tolist()
        else:
            sampled = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        position += 1
        for attempt, token in zip(active, sampled, strict=True):
            is_writing = position == len(attempt.prompt_ids) + len(attempt.response_ids)
            if is_writing and not attempt.is_done:
                attempt.response_ids.append(token)
                attempt.num_policy_tokens += 1
                if token in ends or len(attempt.response_ids) - attempt.turn_start == MAX_TURN_TOKENS:
                    _end_turn(attempt, tokenizer, retrieve)
        kept = [row for row, attempt in enumerate(active) if not attempt.is_done]
        if len(kept) < 0.8 * len(active):
            cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
            active = [active[row] for row in kept]


def _token_at(attempt: Attempt, position: int) -> int:
    """The token a row reads at a position; a finished row reads padding until it is dropped."""
    index = position - len(attempt.prompt_ids)
    if index < 0:
        return attempt.prompt_ids[position]
    return attempt.response_ids[index] if index < len(attempt.response_ids) else 0


def _end_turn(attempt: Attempt, tokenizer: Qwen2Tokenizer, retrieve: Retrieve) -> None:
    turn = tokenizer.decode(attempt.response_ids[attempt.turn_start :], skip_special_tokens=True)
    action = parse_action(turn)
    attempt.num_turns += 1
    if action.kind == "answer":
        attempt.answer = action.content
    elif attempt.num_turns <= MAX_SEARCHES:
        attempt.response_ids += _encode(tokenizer, _observation(action, retrieve))
        attempt.turn_start = len(attempt.response_ids)
        attempt.num_searches += action.kind == "search"
        attempt.resumable.append((attempt.turn_start, attempt.num_turns))
    attempt.is_well_formed &= action.kind != "invalid"
    attempt.is_done = action.kind == "answer" or attempt.num_turns > MAX_SEARCHES


def _observation(action: Action, retrieve: Retrieve) -> str:
    if action.kind == "search":
        return information(retrieve(action.content), TOY_PROMPT)
    return TOY_PROMPT.invalid_action


def _encode(tokenizer: Qwen2Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def model_card(numbers: dict[str, float], *, seed: int, parameters: int, vocab_size: int, minutes: float) -> str:
    rows = "\n".join(f"| {name} | {number:.3f} |" for name, number in numbers.items())
    return f"""# Toy policy

A Qwen2 model of {parameters:,} parameters with a vocabulary of {vocab_size} tokens, taught from scratch to
search in the invented worlds of `searche1.world`. The quickstart starts from it as a real run starts from
Qwen2.5. It is imperfect on purpose: it imitates a script that queries half a name, repeats searches, gives up
and misreads, and training is to remove these habits. It knows no facts: names and facts of every world are new to it.

Made by `python tools/make_toy_policy.py --seed {seed} --out DIR` in {minutes:.0f} minutes on one CPU core.

Measured in a held-out world (300 questions; 600 sampled trajectories for the student; word-overlap retrieval):

| quantity | value |
|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
