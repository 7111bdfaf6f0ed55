"""A small invented world in which a tiny policy really learns to search.

Three hundred people, three hundred books and sixty cities with made-up names; 1,200 facts, one passage
each; questions of one and two hops. The seed draws names and facts anew, so a policy that answers must
have searched. Two scripts play the policy: a clean one that searches well, and an imperfect one with the
habits that training is to remove; the warm-start of the toy policy imitates the second.

No seed changes the language: `TAGS`, with nothing before them, and `WORDS` and names, with one space before
them. The toy policy's tokenizer makes one token of every tag, word and syllable.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from searche1.config import PromptConfig
from searche1.prompts import information
from searche1.types import Question

NUM_PEOPLE = 300  # and as many books: book i is written by person i
NUM_CITIES = 60
TRAIN, VALIDATION, TEST = range(150), range(150, 190), range(200, 300)  # people and books of each split
MAX_SEARCHES = 4
TOPK = 3

TOY_PROMPT = PromptConfig(
    user="<q> {question}</q>",
    teacher="{student_prompt}<ref>{reference}</ref>{student_prompt}",
    document=" {text}",
    information="<information> {documents}</information>",
    invalid_action=" again",
)

TAGS = tuple(
    f"<{slash}{tag}>" for tag in ("q", "ref", "think", "search", "information", "answer") for slash in ("", "/")
)
WORDS = ("what", "is", "the", "of", "birthplace", "residence", "author", "printer", "need", "check", "again", "?", ".")
ATTRIBUTES = ("birthplace", "residence", "author", "printer")
RHYMES = ("al", "ar", "em", "en", "is", "iv", "ol", "on", "um", "ur")
SYLLABLES = tuple(onset + rhyme for onset in "bdfghklmnprstvyz" for rhyme in RHYMES)


@dataclass(frozen=True)
class Fact:
    """One passage. A full query is its prefix: such passages are what a tiny policy learns to read in minutes."""

    entity: str
    attribute: str
    value: str

    @property
    def query(self) -> str:
        return f"{self.entity} {self.attribute}"

    @property
    def line(self) -> str:
        return f"{self.query} {self.value} ."

    @property
    def contents(self) -> str:
        """The passage as Search-R1's corpus stores it: the quoted title, then the text."""
        return f'"{self.entity}"\n{self.line}'


@dataclass(frozen=True)
class Puzzle:
    """A question with the facts that answer it, one per hop, in the order in which they have to be found."""

    question: Question
    hops: tuple[Fact, ...]


@dataclass(frozen=True)
class World:
    """All facts in corpus order, and the questions of three splits that share no person and no book."""

    facts: tuple[Fact, ...]
    train: tuple[Puzzle, ...]
    validation: tuple[Puzzle, ...]
    test: tuple[Puzzle, ...]


def build_world(seed: int, *, is_warm_start: bool = False) -> World:
    """The world of a seed. No warm-start world shares a fact with any other world, whatever the seeds.

    Facts are told apart by a bit of their text's hash, so the separation holds by construction and
    leaves no pattern in the names that a policy could pick up.
    """
    rng = random.Random(f"world {seed} {is_warm_start}")

    def belongs(fact: Fact) -> bool:
        return (sha256(fact.line.encode()).digest()[0] % 2 == 0) == is_warm_start

    def fact_with(entity: str, attribute: str, values: Sequence[str], *, other_than: str = "") -> Fact:
        """A random fact of this kind of world."""
        while True:
            fact = Fact(entity, attribute, rng.choice(values))
            if belongs(fact) and fact.value != other_than:
                return fact

    people, spare_books, cities = _names(rng)
    books = []
    for person in people:  # the first spare name that may be a book of this author
        books.append(next(book for book in spare_books if belongs(Fact(book, "author", person))))
        spare_books.remove(books[-1])
    authors = [Fact(book, "author", person) for book, person in zip(books, people, strict=True)]
    births = [fact_with(person, "birthplace", cities) for person in people]
    # Distractors: the same kind of value in a neighbouring passage, never the right one by luck.
    residences = [fact_with(birth.entity, "residence", cities, other_than=birth.value) for birth in births]
    printers = [
        fact_with(book, "printer", cities, other_than=birth.value) for book, birth in zip(books, births, strict=True)
    ]
    facts = authors + births + residences + printers
    rng.shuffle(facts)

    def puzzles(indices: range) -> tuple[Puzzle, ...]:
        hops = [hops for i in indices for hops in ((births[i],), (authors[i],), (authors[i], births[i]))]
        return tuple(_puzzle(3 * indices.start + number, each) for number, each in enumerate(hops))

    return World(facts=tuple(facts), train=puzzles(TRAIN), validation=puzzles(VALIDATION), test=puzzles(TEST))


def write_world(world: World, folder: Path) -> None:
    """corpus.jsonl, train.jsonl, validation.jsonl and test.jsonl as the retriever and the data loader read them."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [{"id": str(row), "contents": fact.contents} for row, fact in enumerate(world.facts)]
    _write_jsonl(folder / "corpus.jsonl", corpus)
    for name, puzzles in (("train", world.train), ("validation", world.validation), ("test", world.test)):
        _write_jsonl(folder / f"{name}.jsonl", [_question_row(puzzle.question) for puzzle in puzzles])


# --- the scripts ---

Retrieve = Callable[[str], Sequence[Fact]]


@dataclass(frozen=True)
class Piece:
    """Some tags and words of a trajectory, and what they are good for.

    "step" is right where it stands, "mistake" are the words by which a script leaves the right path (the
    words after them are steps again: right, given the mistake), "malformed" is a turn without a complete
    tag, "observation" is what the environment writes.
    """

    kind: Literal["step", "mistake", "malformed", "observation"]
    text: str


@dataclass(frozen=True)
class Habits:
    """Probabilities of the imperfect script's mistakes, each taken anew at every occasion."""

    guess: float = 0.0  # answer without a search
    half_name: float = 0.0  # query one word of a name: every word belongs to about twelve entities
    give_up: float = 0.0  # after a search that found nothing, answer a value of another passage
    repeat: float = 0.0  # repeat a search that has found its fact, again and again
    stop_early: float = 0.0  # answer the city beside the author instead of asking for the author's birthplace
    misread: float = 0.0  # take the value of the neighbouring passage about the same entity
    malformed: float = 0.0  # write a turn without a complete tag first


CLEAN = Habits()
IMPERFECT = Habits(guess=0.05, half_name=0.5, give_up=0.35, repeat=0.6, stop_early=0.15, misread=0.28, malformed=0.03)


def write_trajectory(puzzle: Puzzle, retrieve: Retrieve, *, habits: Habits, rng: random.Random) -> tuple[Piece, ...]:
    """A script's attempt at a question, in the protocol's tags, with the retriever's real observations."""
    return tuple(_attempt(puzzle, retrieve, habits, rng))


def trajectory_text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def overlap_retriever(facts: Sequence[Fact], *, attribute_weight: float = 1.0, topk: int = TOPK) -> Retrieve:
    """Passages by the summed idf of the words shared with the query, ties in corpus order.

    `attribute_weight` multiplies the idf of the word that is no name: a small one brings other facts about the same
    entity, a large one, like a text embedding, the same fact about entities of similar names.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, fact in enumerate(facts):
        for word in set(fact.line.split()):
            rows_of[word].append(row)

    def retrieve(query: str) -> tuple[Fact, ...]:
        scores: dict[int, float] = defaultdict(float)
        for word in set(query.split()) & rows_of.keys():
            for row in rows_of[word]:
                weight = attribute_weight if word in ATTRIBUTES else 1.0
                scores[row] += weight * math.log(len(facts) / len(rows_of[word]))
        best = sorted(scores, key=lambda row: (-scores[row], row))[:topk]
        return tuple(facts[row] for row in best)

    return retrieve


def _attempt(puzzle: Puzzle, retrieve: Retrieve, habits: Habits, rng: random.Random) -> Iterator[Piece]:
    asked = puzzle.hops[-1].attribute
    if rng.random() < habits.guess:
        yield from _wrong_answer(asked, "".join(rng.choices(SYLLABLES, k=2)))
        return
    turns_left = MAX_SEARCHES
    thought = f"need {puzzle.hops[0].attribute}"
    passages: Sequence[Fact] = ()
    for index, hop in enumerate(puzzle.hops):
        hops_left = len(puzzle.hops) - index
        while hop not in passages:
            # What costs a turn happens only while the rest of the way stays affordable.
            can_waste = turns_left > hops_left
            turns_left -= 1
            if can_waste and rng.random() < habits.malformed:
                yield from _malformed_turn(rng)
                continue
            query = hop.query
            if can_waste and rng.random() < habits.half_name:
                query = f"{rng.choice(hop.entity.split())} {hop.attribute}"
            yield from _search_turn(thought, query=query, right_query=hop.query)
            passages = retrieve(query)
            yield Piece("observation", information(passages, TOY_PROMPT))
            if hop not in passages and (turns_left == 0 or rng.random() < habits.give_up):
                yield from _wrong_answer(asked, rng.choice(passages).value)
                return
            thought = f"need {hop.attribute}"
        while turns_left >= hops_left and rng.random() < habits.repeat:
            turns_left -= 1
            yield Piece("step", "<think>")
            yield Piece("mistake", " check")
            yield Piece("step", f" {hop.attribute}</think><search> {hop.query}</search>")
            passages = retrieve(hop.query)
            yield Piece("observation", information(passages, TOY_PROMPT))
        neighbours = [fact.value for fact in passages if fact.entity == hop.entity and fact != hop]
        habit = habits.misread if hop == puzzle.hops[-1] else habits.stop_early
        if neighbours and rng.random() < habit:
            yield from _wrong_answer(asked, neighbours[0])
            return
        thought = f"{hop.attribute} {hop.value}"
    yield Piece("step", f"<think> {thought}</think><answer> {puzzle.hops[-1].value}</answer>")


def _search_turn(thought: str, *, query: str, right_query: str) -> Iterator[Piece]:
    """The turn in pieces: the first word that differs from the right query is the mistake."""
    words, right_words = ([f" {word}" for word in text.split()] for text in (query, right_query))
    pairs = zip(words, right_words, strict=False)
    same = next((i for i, (word, right) in enumerate(pairs) if word != right), len(words))
    yield Piece("step", f"<think> {thought}</think><search>" + "".join(words[:same]))
    if words[same:]:
        yield Piece("mistake", words[same])
    yield Piece("step", "".join(words[same + 1 :]) + "</search>")


def _wrong_answer(attribute: str, value: str) -> Iterator[Piece]:
    yield Piece("step", "<think>")
    yield Piece("mistake", f" {attribute} {value}")
    yield Piece("step", f"</think><answer> {value}</answer>")


def _malformed_turn(rng: random.Random) -> Iterator[Piece]:
    """Stray words, half of the time ended by a closing tag that nothing opened."""
    words = [f" {word}" for word in rng.choices(WORDS + SYLLABLES, k=rng.randint(1, 10))]
    yield Piece("malformed", "".join(words) + rng.choice(("", "</search>")))
    yield Piece("observation", TOY_PROMPT.invalid_action)


# --- names, questions, files ---


def _names(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """People, more than enough books, and cities.

    A person or book is two words of one syllable, a city one word of two. First and last words come from
    pools of 25, so that half a name says little.
    """
    syllables = list(SYLLABLES)
    rng.shuffle(syllables)
    pools = [syllables[start : start + 25] for start in (0, 25, 50, 75)] + [syllables[100:130], syllables[130:]]

    def pairs(first: list[str], second: list[str], *, separator: str) -> list[str]:
        names = [one + separator + other for one in first for other in second]
        rng.shuffle(names)
        return names

    people = pairs(pools[0], pools[1], separator=" ")[:NUM_PEOPLE]
    books = pairs(pools[2], pools[3], separator=" ")
    return people, books, pairs(pools[4], pools[5], separator="")[:NUM_CITIES]


def _puzzle(number: int, hops: tuple[Fact, ...]) -> Puzzle:
    """For two hops: "what is the birthplace of the author of B ?"."""
    chain = " of the ".join(hop.attribute for hop in reversed(hops))
    text = f"what is the {chain} of {hops[0].entity} ?"
    source = {1: "one_hop", 2: "two_hop"}[len(hops)]
    return Puzzle(Question(id=str(number), text=text, answers=(hops[-1].value,), source=source), hops)


def _question_row(question: Question) -> dict[str, object]:
    return {
        "id": question.id,
        "question": question.text,
        "golden_answers": list(question.answers),
        "data_source": question.source,
    }


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the corpus and the questions of a toy world.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus, train, validation and test .jsonl")
    options = parser.parse_args()
    write_world(build_world(options.seed), options.out)


if __name__ == "__main__":
    main()
