"""The toy world: what makes its questions answerable only by searching, and its policy fit for them."""

import json
import random
from hashlib import sha256
from pathlib import Path

import pytest

import searche1
from searche1.config import load_config
from searche1.prompts import encode_prompt, information, student_prompt, teacher_prompt
from searche1.tags import last_answer, parse_action
from searche1.world import (
    CLEAN,
    IMPERFECT,
    MAX_SEARCHES,
    TOY_PROMPT,
    Piece,
    World,
    build_world,
    overlap_retriever,
    trajectory_text,
    write_trajectory,
    write_world,
)

REPOSITORY = Path(__file__).parents[2]
POLICY_FOLDER = Path(searche1.__file__).parent / "assets" / "toy_policy"


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


def all_puzzles(world: World):
    return world.train + world.validation + world.test


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def imperfect_attempts(world: World, *, seed: int) -> list[tuple[Piece, ...]]:
    retrieve, rng = overlap_retriever(world.facts), random.Random(seed)
    return [write_trajectory(puzzle, retrieve, habits=IMPERFECT, rng=rng) for puzzle in all_puzzles(world)]


def test_a_seed_decides_the_world(world):
    assert build_world(0) == world
    assert build_world(1) != world


def test_the_splits_have_the_promised_sizes_and_share_no_person_and_no_book(world):
    assert [len(split) for split in (world.train, world.validation, world.test)] == [450, 120, 300]
    entities = [
        {hop.entity for puzzle in split for hop in puzzle.hops} for split in (world.train, world.validation, world.test)
    ]
    assert not (entities[0] & entities[1] or entities[0] & entities[2] or entities[1] & entities[2])


def test_a_third_of_the_questions_takes_two_hops(world):
    assert sum(puzzle.question.source == "two_hop" for puzzle in world.test) == 100


def test_question_keys_are_unique_over_all_splits(world):
    keys = [puzzle.question.key for puzzle in all_puzzles(world)]
    assert len(set(keys)) == len(keys) == 870


def test_the_clean_script_answers_every_question_with_one_search_per_hop(world):
    retrieve = overlap_retriever(world.facts)
    for puzzle in all_puzzles(world):
        pieces = write_trajectory(puzzle, retrieve, habits=CLEAN, rng=random.Random(0))
        assert last_answer(trajectory_text(pieces)) == puzzle.question.answers[0]
        assert sum(piece.kind == "observation" for piece in pieces) == len(puzzle.hops)


def test_the_imperfect_script_leaves_about_half_of_the_questions_wrong_and_searches_too_much(world):
    attempts = imperfect_attempts(world, seed=0)
    answers = [last_answer(trajectory_text(pieces)) for pieces in attempts]
    right = sum(a in p.question.answers for a, p in zip(answers, all_puzzles(world), strict=True)) / len(answers)
    searches = sum(trajectory_text(pieces).count("<information>") for pieces in attempts) / len(attempts)
    assert 0.4 < right < 0.6
    assert searches > 1.7


def test_the_imperfect_script_keeps_to_the_search_budget_and_always_answers(world):
    for pieces in imperfect_attempts(world, seed=1):
        assert sum(piece.kind == "observation" for piece in pieces) <= MAX_SEARCHES
        assert pieces[-1].text.endswith("</answer>")


def test_malformed_turns_ask_for_nothing(world):
    attempts = [piece for seed in range(3) for pieces in imperfect_attempts(world, seed=seed) for piece in pieces]
    malformed = [piece.text for piece in attempts if piece.kind == "malformed"]
    assert malformed
    assert all(parse_action(text).kind == "invalid" for text in malformed)


def test_no_passage_of_the_first_search_contains_the_answer_of_a_two_hop_question(world):
    retrieve = overlap_retriever(world.facts)
    for puzzle in all_puzzles(world):
        if puzzle.question.source == "two_hop":
            own_lines = [fact.line for fact in world.facts if fact.entity == puzzle.hops[0].entity]
            lines = own_lines + [fact.line for fact in retrieve(puzzle.hops[0].query)]
            assert not any(puzzle.question.answers[0] in line for line in lines)


def test_half_a_name_seldom_finds_the_fact(world):
    retrieve = overlap_retriever(world.facts)
    births = [puzzle.hops[0] for puzzle in all_puzzles(world) if puzzle.hops[0].attribute == "birthplace"]
    found = sum(fact in retrieve(f"{fact.entity.split()[0]} birthplace") for fact in births) / len(births)
    assert 0.1 < found < 0.45


def test_no_warm_start_world_contains_a_fact_of_another_world(world):
    """By construction, for all seeds: a bit of its hash says in which kind of world a fact may be."""

    def bits(facts):
        return {sha256(fact.line.encode()).digest()[0] % 2 for fact in facts}

    warm_start_worlds = [build_world(seed, is_warm_start=True) for seed in range(20)]
    assert not any(set(world.facts) & set(other.facts) for other in warm_start_worlds)
    assert bits(world.facts) == bits(build_world(7).facts) == {1}
    assert all(bits(other.facts) == {0} for other in warm_start_worlds)


def test_the_files_are_what_retriever_and_data_loader_read(world, tmp_path):
    write_world(world, tmp_path)
    corpus = read_jsonl(tmp_path / "corpus.jsonl")
    assert [row["id"] for row in corpus] == [str(number) for number in range(1200)]
    title, _, line = corpus[5]["contents"].partition("\n")
    assert title == f'"{world.facts[5].entity}"'
    assert line == world.facts[5].line
    rows = read_jsonl(tmp_path / "test.jsonl")
    assert rows[2].keys() == {"id", "question", "golden_answers", "data_source"}
    assert rows[2]["golden_answers"] == list(world.test[2].question.answers)
    assert [len(read_jsonl(tmp_path / f"{name}.jsonl")) for name in ("train", "validation")] == [450, 120]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY_FOLDER)


def test_every_text_of_a_world_survives_the_shipped_tokenizer(world, tokenizer):
    texts = [trajectory_text(pieces) + TOY_PROMPT.invalid_action for pieces in imperfect_attempts(world, seed=2)]
    for puzzle, text in zip(all_puzzles(world), texts, strict=True):
        prompt = teacher_prompt(puzzle.question.text, text, TOY_PROMPT)
        ids = encode_prompt(prompt, tokenizer)
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
        assert tokenizer.unk_token_id not in ids


def test_spans_encoded_one_by_one_give_the_ids_of_the_whole_text(world, tokenizer):
    """Rollouts append encoded observations; references are encoded as one text. The policy must see the same ids."""
    for pieces in imperfect_attempts(world, seed=3)[:100]:
        one_by_one = [i for piece in pieces for i in tokenizer.encode(piece.text, add_special_tokens=False)]
        assert one_by_one == tokenizer.encode(trajectory_text(pieces), add_special_tokens=False)


def test_tags_words_and_syllables_are_single_tokens(world, tokenizer):
    fact = next(fact for fact in world.facts if fact.attribute == "birthplace")
    ids = tokenizer.encode(f"<search> {fact.query}</search>", add_special_tokens=False)
    assert len(ids) == 2 + len(fact.query.split())
    assert len(tokenizer.encode(f" {fact.value}", add_special_tokens=False)) == 2


def test_the_teacher_prompt_ends_like_the_student_prompt(world):
    text = world.test[0].question.text
    assert teacher_prompt(text, "<think> x</think>", TOY_PROMPT).endswith("</ref>" + student_prompt(text, TOY_PROMPT))


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart-fast.yaml"])
def test_the_quickstart_prompts_the_policy_as_it_was_taught(name):
    assert load_config(REPOSITORY / "configs" / name).prompt == TOY_PROMPT


def test_an_observation_is_one_line(world):
    assert "\n" not in information(world.facts[:3], TOY_PROMPT)


def test_the_shipped_policy_searches_for_what_it_is_asked(world, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(POLICY_FOLDER).eval()
    assert policy.get_input_embeddings().num_embeddings == len(tokenizer)
    closing = tokenizer.convert_tokens_to_ids("</search>")
    actions = []
    for puzzle in world.test[:15]:
        prompt = torch.tensor([encode_prompt(student_prompt(puzzle.question.text, TOY_PROMPT), tokenizer)])
        ids = policy.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=closing)[0, prompt.shape[1] :]
        actions.append(parse_action(tokenizer.decode(ids.tolist(), skip_special_tokens=True)))
    assert all(action.kind == "search" for action in actions)
    asked = [puzzle.hops[0] for puzzle in world.test[:15]]
    assert sum(a.content.endswith(hop.attribute) for a, hop in zip(actions, asked, strict=True)) >= 14
