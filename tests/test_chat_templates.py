"""Chats become the text and the ids that transformers makes of them, and what is trained is what a model writes."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lowres.conversation import Conversation
from lowres.data import Tokenizer, open_tokenizer
from lowres.data.chat import BadRow, Example, Template, encode, encode_batch, open_template, prompt
from lowres.data.tokenizer import train
from lowres.errors import UserError
from lowres.sample import Sampling
from tests.helpers import lowres_here
from tests.test_tokenizers import converted, sentencepiece_model

Chat = list[dict[str, Any]]
ALWAYS = 10**6

# In the shape of published templates.
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set front = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set turns = messages %}{% set front = '' %}{% endif %}"
        "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.first %}{% set text = front + turn['content'] %}"
        "{% else %}{% set text = turn['content'] %}{% endif %}"
        "{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{- message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "qwen": (
        "{%- if messages[0].role != 'system' %}\n"
        "    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
        "{% else %}{{ '[INST]' + message.content + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n"
        "    {% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
        "    {% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
        "    {% else %}\n"
        "{{ '<|assistant|>\\n' + message['content'] + eos_token }}\n"
        "    {% endif %}\n"
        "    {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    # the reasoning of earlier answers is dropped
    "thinking": (
        "{%- set last = namespace(at=0) %}\n"
        "{%- for message in messages if message.role == 'user' %}{% set last.at = last.at + 1 %}{% endfor %}\n"
        "{%- set seen = namespace(at=0) %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' %}{% set seen.at = seen.at + 1 %}{% endif %}\n"
        "    {%- set text = message.content %}{% set thought = message.reasoning_content %}\n"
        "    {%- if not thought and '</think>' in text %}\n"
        "        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\n"
        "        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}\n"
        "    {%- endif %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
        "    {%- if message.role == 'assistant' and seen.at == last.at %}\n"
        "        {{- '<think>\\n' + (thought or '') + '\\n</think>\\n\\n' }}\n"
        "    {%- endif %}\n"
        "    {{- text + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # the prompt begins a thought, which no answer in the chat has; only the last answer ends with eos
    "forced": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>' + message.content.split('</think>')[-1] }}"
        "{{ eos_token if loop.last else '<|im_end|>' }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|><think>\\n' }}{% endif %}"
    ),
}
WORDS = "the cat sat on a mat Hello Hi there user assistant system Be helpful kind INST SYS think why how And"
SPECIALS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]"),
)


def chat(*texts: str, system: str | None = None) -> Chat:
    """User and assistant in turns."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def byte_level(normalizer: Any = None, **flags: bool) -> library.Tokenizer:
    """Words are tokens, and templates have theirs. flags: of <|im_end|> and <|im_start|>."""
    made = library.Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIALS[:2]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([f"{WORDS} {WORDS.replace(' ', chr(10))}\n\n \n"] * 2, trainer)
    return with_specials(made, **flags)


def with_specials(made: library.Tokenizer, **flags: bool) -> library.Tokenizer:
    marked = [library.AddedToken(token, normalized=False, **flags) for token in SPECIALS[2:4]]
    made.add_special_tokens([*marked, *SPECIALS[4:]])
    made.add_tokens([library.AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return made


KINDS: dict[str, Callable[[], library.Tokenizer]] = {
    "byte-level": byte_level,
    "nfc": lambda: byte_level(normalizers.NFC()),
    "stripping": lambda: byte_level(lstrip=True, rstrip=True),
    "whole words": lambda: byte_level(single_word=True),
    "first": lambda: with_specials(converted(sentencepiece_model(), "first")),
    "always": lambda: with_specials(converted(sentencepiece_model(), "always")),
    "prepend": lambda: with_specials(converted(sentencepiece_model(), "prepend")),
}


class Both:
    """Our tokenizer and that of transformers."""

    def __init__(self, folder: Path, made: library.Tokenizer) -> None:
        made.save(str(folder / "tokenizer.json"))
        self.ours = open_tokenizer(folder, bos="<s>", eos="</s>")
        self.theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>"
        )
        self.folder = folder

    def template(self, name: str) -> Template:
        return open_template(self._place(name), self.ours)

    def text(self, messages: Chat, source: str, prompted: bool = False) -> str:
        found: str = self.theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=prompted
        )
        return found

    def ids(self, messages: Chat, source: str, prompted: bool = False) -> list[int]:
        found: list[int] = self.theirs.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=prompted, return_dict=False
        )
        return found

    def _place(self, name: str) -> str:
        if name not in TEMPLATES:
            return name
        path = self.folder / f"{name}.jinja"
        path.write_text(TEMPLATES[name], "utf-8")
        return str(path)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    return {name: Both(tmp_path_factory.mktemp("tokenizer"), make()) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def both(kinds: dict[str, Both]) -> Both:
    return kinds["byte-level"]


CHATS = [
    chat("Hello", "Hi there"),
    chat("Hello", "Hi there", "why", "a cat"),
    chat(" Hello\n", "\n\n Hi  ", "", "\n", system=" Be kind "),
    chat("e\u0301 \U0001f600<a>", " \u4e2d\u6587\n\n\n", "\tthe\r\ncat", "<b> [x] \ue000"),
    chat("why", "<think>\nthe cat\n</think>\n\nHi", "how", "<think>\nAnd\n</think>\n\nHello"),
]
ALL = [*TEMPLATES, "tulu", "chatml"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_text_and_ids_are_those_of_transformers(kinds: dict[str, Both], kind: str, name: str) -> None:
    both = kinds[kind]
    template = both.template(name)
    examples = encode_batch(both.ours, template, CHATS, "assistant", ALWAYS)
    for messages, example in zip(CHATS, examples, strict=True):
        assert template.render(messages) == both.text(messages, template.source)
        assert isinstance(example, Example), example
        assert example.ids.tolist() == both.ids(messages, template.source)
        question = messages[:-1]
        assert prompt(both.ours, template, question) == both.ids(question, template.source, prompted=True)


def shown(tokenizer: Tokenizer, example: Example) -> str:
    """Tokens between strokes; those that are trained in brackets."""
    spelt = {special.id: token for token, special in tokenizer.specials.items()}
    names = [spelt.get(i) or tokenizer.decode([i]) for i in example.ids.tolist()]
    return "|".join(f"[{name}]" if t else name for name, t in zip(names, example.trained, strict=True))
