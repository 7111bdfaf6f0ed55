import io
import random

import pytest
from char_tokenizer import CharTokenizer
from rich.console import Console

from searche1.play import PersonWriter, next_question
from searche1.types import Question, UserError


def typed(*lines):
    """What `input` gives for these lines, then its EOFError."""
    left = iter(lines)

    def read(prompt):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def written(*lines, max_new_tokens=1000, tokenizer=None):
    console = Console(file=io.StringIO(), width=200)
    writer = PersonWriter(tokenizer or CharTokenizer(), console, read=typed(*lines))
    return writer.write((), max_new_tokens=max_new_tokens, seed=0), console.file.getvalue()


def test_a_turn_ends_with_its_tag_over_as_many_lines_as_it_takes():
    completion, _ = written("<think> hm", "well </think>", "<search> who </search>", "more")
    assert completion.text == "<think> hm\nwell </think>\n<search> who </search>"


def test_short_forms_become_tags():
    assert written("? who wrote it ")[0].text == "<search> who wrote it </search>"
    assert written("= ann")[0].text == "<answer> ann </answer>"


def test_an_empty_line_ends_a_turn_without_a_tag():
    completion, _ = written("I do not know", "")
    assert completion.text == "I do not know\n" and completion.finish_reason == "stop"


def test_a_turn_is_cut_where_the_policys_would_be():
    completion, _ = written("= a long answer", max_new_tokens=10)
    assert len(completion.token_ids) == len(completion.logprobs) == 10 and completion.finish_reason == "length"


def test_a_tokenizer_that_cannot_write_the_words_is_told():
    class Deaf(CharTokenizer):
        def encode(self, text, add_special_tokens=False):
            return super().encode(text.replace("z", ""), add_special_tokens=add_special_tokens)

    _, printed = written("= zebra", tokenizer=Deaf())
    assert "reads it as: <answer> ebra </answer>" in printed


QUESTIONS = [Question("1", "Who wrote it?", ("ann",), "nq")]


def ask(*lines, asked="", questions=QUESTIONS):
    return next_question(asked, questions, random.Random(0), typed(*lines), 3)


def test_questions_are_typed_or_drawn_until_somebody_has_had_enough():
    assert ask("") == QUESTIONS[0]
    assert ask("who wrote it?") == QUESTIONS[0]  # known, so it can be graded
    assert ask("who else?") == Question("3", "who else?", (), "typed")
    assert ask(asked="who else?").text == "who else?"
    assert ask("q") is None


def test_nothing_to_draw_from_is_told():
    with pytest.raises(UserError, match="give --data FILE, or type one"):
        ask("", questions=[])
