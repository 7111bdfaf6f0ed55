import re
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from searche1.config import PromptConfig
from searche1.prompts import encode_prompt, information, normalize_question, student_prompt, teacher_prompt

PROMPT = PromptConfig()
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

# Search-R1's template, as its data preparation writes it.
SEARCH_R1 = """\
Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new \
information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query \
</search> and it will return the top searched results between <information> and </information>. You can search as \
many times as your want. If you find no further external knowledge needed, you can directly provide the answer inside \
<answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: who wrote \
Emma?
"""
CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- else %}{%- set system = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}{%- endif %}"
    "{{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class FakePassage:
    contents: str


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with Qwen2.5-Instruct's special tokens and chat template."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


def test_the_student_prompt_is_search_r1s_byte_for_byte():
    assert student_prompt("who wrote Emma", PROMPT) == SEARCH_R1


def test_the_prompt_holds_exactly_two_example_answers_so_it_must_never_be_graded():
    assert ANSWER.findall(student_prompt("who wrote Emma", PROMPT)) == [" and ", " Beijing "]
    assert ANSWER.findall(PROMPT.invalid_action) == [" and "]


def test_a_prompt_is_one_chatml_user_message_and_generation_follows(tokenizer):
    ids = encode_prompt(student_prompt("who wrote Emma?", PROMPT), tokenizer)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{SEARCH_R1}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_without_a_chat_template_the_prompt_is_the_plain_text(tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert plain.decode(encode_prompt(SEARCH_R1, plain)) == SEARCH_R1


@pytest.mark.parametrize("question", ["who wrote Emma", " who wrote Emma? ", "who wrote Emma?\n"])
def test_a_question_ends_in_one_question_mark(question):
    assert normalize_question(question) == "who wrote Emma?"


def test_an_empty_question_is_refused():
    with pytest.raises(ValueError, match="empty"):
        normalize_question("  ")


def test_an_observation_reads_as_search_r1s():
    passages = [
        FakePassage('"Paul Walker"\nalso had a large car collection.\nHe raced.'),
        FakePassage('"Furious 7"\nPaul Walker died in 2013.'),
    ]
    assert information(passages, PROMPT) == (
        '\n\n<information>Doc 1(Title: "Paul Walker") also had a large car collection.\nHe raced.\n'
        'Doc 2(Title: "Furious 7") Paul Walker died in 2013.</information>\n\n'
    )


def test_braces_in_a_passage_are_text():
    assert "{title} {rank}" in information([FakePassage('"T"\n{title} {rank}')], PROMPT)


def test_a_search_that_found_nothing_is_told_as_such():
    assert information([], PROMPT) == "\n\n<information></information>\n\n"


def test_the_teacher_prompt_is_the_students_followed_by_the_reference():
    text = teacher_prompt("who wrote Emma", "\n<think> x </think><answer> Austen </answer>\n", PROMPT)
    assert text.startswith(SEARCH_R1)
    assert "=== Reference Begin ===\n<think> x </think><answer> Austen </answer>\n=== Reference End ===" in text
