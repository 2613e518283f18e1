"""Chats become the text and ids that transformers makes of them; what a model writes is what is trained."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

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
from lowres.data.chat import template as template_module
from lowres.data.tokenizer import exported, train, with_chat_template
from lowres.engine.cache import Reader, Rereading
from lowres.errors import UserError
from lowres.runs import OpenRun
from lowres.sample import Sampling
from tests.helpers import lowres_here, make_config
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
        "{%- for m in messages if m.role == 'user' %}{% set last.at = last.at + 1 %}{% endfor %}\n"
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
    # an answer that calls something has no end, unless it is the last
    "calls": (
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if loop.last else '<|im_end|>' if not m.calls else '' }}{% endfor %}"
    ),
    # a token and what always follows it; at the end of the chat another one on a line of its own
    "two ends": (
        "{% for m in messages %}{{ '[INST]' + m.role + '[/INST]' + m.content + '<|eot_id|><|im_end|>\\n' }}"
        "{% endfor %}{{ '[INST]assistant[/INST]' if add_generation_prompt else eos_token }}"
    ),
}
WORDS = "the cat sat on a mat Hello Hi there user assistant system Be helpful kind INST SYS think why how And"
SPECIALS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]"),
)
THOUGHTS = ("<think>", "</think>")


def chat(*texts: str, system: str | None = None) -> Chat:
    """User and assistant in turns."""
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def byte_level(normalizer: Any = None, word: bool = False, **flags: bool) -> library.Tokenizer:
    """Words are tokens, and templates have theirs. flags: see `with_specials`."""
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
    return with_specials(made, word, **flags)


def with_specials(made: library.Tokenizer, word: bool = False, **flags: bool) -> library.Tokenizer:
    """word: whether <think> and </think> are none inside a word. flags: of <|im_start|> and <|im_end|>."""
    marked = [library.AddedToken(token, normalized=False, **flags) for token in SPECIALS[2:4]]
    made.add_special_tokens([*marked, *SPECIALS[4:]])
    thoughts = [library.AddedToken(token, normalized=False, single_word=word) for token in THOUGHTS]
    made.add_tokens(thoughts)
    return made


KINDS: dict[str, Callable[[], library.Tokenizer]] = {
    "byte-level": byte_level,
    "nfc": lambda: byte_level(normalizers.NFC()),
    "stripping": lambda: byte_level(lstrip=True, rstrip=True),
    "whole words": lambda: byte_level(word=True),
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
    chat("why", "a<think>b </think>", "how", "<think>!"),
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


A_CHAT = chat("Hello", "Hi there", "why", "a cat")
WITH_SPACES = chat(" Hello", " Hi ", "", "\n\nthe cat")
REASONED = [
    *chat("why", "Hi", "how"),
    {"role": "assistant", "content": "Hello", "reasoning": "think"},
    *chat("And", "<think>a</think>on"),
]
HEADER = "<|start_header_id|>|%s|<|end_header_id|>|\n|\n"


@pytest.mark.parametrize(
    ("name", "messages", "wanted"),
    [
        (
            "tulu",
            A_CHAT,
            "<s>|<|||user|||>|\n|Hello|\n|<|||assistant|||>|\n|[Hi]|[ there]|[</s>]|\n"
            "|<|||user|||>|\n|why|\n|<|||assistant|||>|\n|[a]|[ cat]|[</s>]",
        ),
        (
            "tulu",
            WITH_SPACES,  # a token over the edge between prompt and answer is not the model's
            "<s>|<|||user|||>|\n| Hello|\n|<|||assistant|||>|\n|[ Hi]|[ ]|[</s>]|\n"
            "|<|||user|||>|\n|\n|<|||assistant|||>|\n\n|[\n]|[the]|[ cat]|[</s>]",
        ),
        (
            "chatml",
            chat("Hello", "Hi there", system="Be kind"),
            "<|im_start|>|system|\n|Be| kind|<|im_end|>|\n|<|im_start|>|user|\n|Hello|<|im_end|>|\n"
            "|<|im_start|>|assistant|\n|[Hi]|[ there]|[<|im_end|>]|\n",
        ),
        (
            "qwen",
            chat("Hello", ""),  # nothing to say
            "<|im_start|>|system|\n|Be| helpful|.|<|im_end|>|\n|<|im_start|>|user|\n|Hello|<|im_end|>|\n"
            "|<|im_start|>|assistant|\n|[<|im_end|>]|\n",
        ),
        (
            "llama2",
            WITH_SPACES,  # which it strips, and puts others there
            "<s>|[INST]| Hello| |[/INST]|[ Hi]|[ ]|[</s>]|<s>|[INST]| | |[/INST]|[ the]|[ cat]|[ ]|[</s>]",
        ),
        (
            "llama3",
            WITH_SPACES,
            f"<s>|{HEADER % 'user'}|Hello|<|eot_id|>|{HEADER % 'assistant'}|[Hi]|[<|eot_id|>]"
            f"|{HEADER % 'user'}|<|eot_id|>|{HEADER % 'assistant'}|[the]|[ cat]|[<|eot_id|>]".replace(
                "\n|\n|<|eot_id|>", "\n\n|<|eot_id|>"
            ),
        ),
        (
            "mistral",
            A_CHAT,
            "<s>|[INST]|Hello|[/INST]|[Hi]|[ there]|[</s>]|[INST]|why|[/INST]|[a]|[ cat]|[</s>]",
        ),
        (
            "zephyr",
            chat("Hello", "Hi"),
            "<|||user|||>|\n|Hello|</s>|\n|<|||assistant|||>|\n|[Hi]|[</s>]|\n",
        ),
        (
            "thinking",
            REASONED,  # what is dropped is not trained
            "<|im_start|>|user|\n|why|<|im_end|>|\n|<|im_start|>|assistant|\n|[Hi]|[<|im_end|>]|\n"
            "|<|im_start|>|user|\n|how|<|im_end|>|\n|<|im_start|>|assistant|\n|[Hello]|[<|im_end|>]|\n"
            "|<|im_start|>|user|\n|And|<|im_end|>|\n|<|im_start|>|assistant|\n"
            "|[<think>]|[\n]|[a]|[\n]|[</think>]|[\n]|[\n]|[on]|[<|im_end|>]|\n",
        ),
        (
            "thinking",
            REASONED[:4],
            "<|im_start|>|user|\n|why|<|im_end|>|\n|<|im_start|>|assistant|\n|[Hi]|[<|im_end|>]|\n"
            "|<|im_start|>|user|\n|how|<|im_end|>|\n|<|im_start|>|assistant|\n"
            "|[<think>]|[\n]|[think]|[\n]|[</think>]|[\n]|[\n]|[Hello]|[<|im_end|>]|\n",
        ),
        (
            "two ends",
            A_CHAT[2:],
            "[INST]|user|[/INST]|why|<|eot_id|>|<|im_end|>|\n"
            "|[INST]|assistant|[/INST]|[a]|[ cat]|[<|eot_id|>]|[<|im_end|>]|\n|</s>",
        ),
        (
            "forced",
            A_CHAT,
            "<s>|Hello|<|im_start|>|[Hi]|[ there]|[<|im_end|>]|why|<|im_start|>|[a]|[ cat]|[</s>]",
        ),
    ],
)
def test_what_is_trained_token_by_token(both: Both, name: str, messages: Chat, wanted: str) -> None:
    example = encode(both.ours, both.template(name), messages, "assistant", ALWAYS)
    assert shown(both.ours, example) == wanted
    everything = encode(both.ours, both.template(name), messages, "all", ALWAYS)
    assert everything.ids.tolist() == example.ids.tolist()
    assert everything.trained.tolist() == [False] + [True] * (len(example.ids) - 1)


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_the_marks_of_a_template_say_the_same(both: Both, tmp_path: Path) -> None:
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED)
    template = open_template(str(path), both.ours)
    assert not any("generation marks" in note for note in template.notes)
    for messages in (A_CHAT, REASONED[:3] + A_CHAT[1:]):
        theirs = both.theirs.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        example = encode(both.ours, template, messages, "assistant", ALWAYS)
        assert example.ids.tolist() == theirs["input_ids"]
        assert example.trained.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("length", [1, 9, 16, 18, 100])
def test_the_end_is_cut_off_and_counted(both: Both, length: int) -> None:
    whole = encode(both.ours, both.template("tulu"), chat("Hello", "Hi there"), "assistant", ALWAYS)
    assert len(whole.ids) == 18 and whole.truncated == 0
    cut = encode(both.ours, both.template("tulu"), chat("Hello", "Hi there"), "assistant", length)
    assert cut.ids.tolist() == whole.ids[:length].tolist()
    assert cut.trained.tolist() == whole.trained[:length].tolist()
    assert cut.truncated == max(0, 18 - length)


# special strings


PARTS = (
    *SPECIALS,
    *THOUGHTS,
    "<|im_",
    "<|im_end|",
    "end|>",
    "<",
    "|>",
    "[INS",
    "\ue000",
    "\ue001",
    " ",
    "\n",
    "Hi",
)
CONTENTS = st.lists(st.sampled_from(PARTS) | st.text("<|/ cat", max_size=3), max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(question=CONTENTS, answer=CONTENTS)
def test_special_strings_in_a_message_stay_text(kinds: dict[str, Both], question: str, answer: str) -> None:
    for name in ("chatml", "tulu", "mistral"):
        ours, template = kinds["byte-level"].ours, kinds["byte-level"].template(name)
        controls = {special.id for special in ours.specials.values() if not special.is_text}
        wanted = encode(ours, template, chat("Hi", "Hi"), "assistant", ALWAYS)
        found = encode(ours, template, chat(question, answer), "assistant", ALWAYS)
        assert [i for i in found.ids.tolist() if i in controls] == [
            i for i in wanted.ids.tolist() if i in controls
        ]
        text = template.render(chat("\0", "\1"))
        for token in SPECIALS:
            text = text.replace(token, "")
        assert ours.decode(found.ids.tolist()) == text.replace("\0", question).replace("\1", answer)
        thoughts = {ours.specials[token].id for token in THOUGHTS}
        assert not thoughts & set(found.ids[~found.trained].tolist())
        said = ours.decode(found.ids[found.trained].tolist())
        assert answer.endswith(said) and len(answer) - len(said) <= 2  # tokens over the edge


def test_a_special_string_that_two_parts_make_together_stays_text(both: Both, tmp_path: Path) -> None:
    (tmp_path / "parts.jinja").write_text(
        "{% for m in messages %}{{ m.content if m.content is string else m.content | join('', 'text') }}"
        "{{ eos_token }}{% endfor %}"
    )
    template = open_template(str(tmp_path / "parts.jinja"), both.ours)
    message = {"role": "user", "content": [{"text": "Hi <|im_ "}, {"text": "</"}, {"text": "s> cat"}]}
    example = encode(both.ours, template, [message, {"role": "assistant", "content": "a"}], "all", ALWAYS)
    assert both.ours.decode(example.ids.tolist()) == "Hi <|im_ </s> cata"
    assert example.ids.tolist().count(both.ours.eos_id) == 2


def test_a_template_that_looks_for_special_strings_refuses_them_in_a_message(
    both: Both, tmp_path: Path
) -> None:
    (tmp_path / "looks.jinja").write_text(
        "{% for m in messages %}{{ 'tool ' if m.content.startswith('<think>') }}{{ m.content + eos_token }}"
        "{% endfor %}"
    )
    template = open_template(str(tmp_path / "looks.jinja"), both.ours)
    assert encode(both.ours, template, chat("<thin", "<think>"), "all", ALWAYS)
    with pytest.raises(BadRow, match=r"spelling of a special token, for which .*looks\.jinja looks"):
        encode(both.ours, template, chat("<think>", "Hi"), "all", ALWAYS)


@pytest.mark.parametrize("form", ["exact", "own"])
def test_a_sentencepiece_model_encodes_each_text_between_its_tokens(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model() if form == "own" else train([WORDS] * 40, 300, exact=False)[0])
    ours = open_tokenizer(path, form)
    template = open_template("tulu", ours)
    messages = chat("Hi </s>", " the cat", "how", "a mat", system="Be kind")
    example = encode(ours, template, messages, "assistant", ALWAYS)
    texts = [
        "<|system|>\nBe kind\n<|user|>\nHi </s>\n<|assistant|>\n the cat",
        "\n<|user|>\nhow\n<|assistant|>\na mat",
    ]
    first, second = map(ours.encode, texts)
    assert example.ids.tolist() == [ours.bos_id, *first, ours.eos_id, *second, ours.eos_id]
    runs = "".join("x" if t else " " for t in example.trained).split()
    assert len(runs) == 2
    said = [ours.decode(example.ids[a:b].tolist()) for a, b in edges(example)]
    assert said == [" the cat" if form == "exact" else "the cat", "a mat"]


@pytest.mark.parametrize("kind", ["exact", "own", "byte-level"])
def test_a_template_comes_along_and_is_exported(both: Both, tmp_path: Path, kind: Any) -> None:
    if kind == "byte-level":
        ours = both.ours
    else:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
        ours = open_tokenizer(tmp_path, kind)
    template = open_template("tulu", ours)
    kept = with_chat_template(ours, template.source)
    assert kept.fingerprint == ours.fingerprint
    run, out = tmp_path / "run", tmp_path / "out"
    for folder, files in ((run, {kept.file_name: kept.content}), (out, exported(kept).files)):
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    again = open_tokenizer(run, None if kind == "byte-level" else "own")
    assert open_template(None, again).fingerprint == template.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for messages in CHATS[:4]:
        ids = encode(again, open_template(None, again), messages, "assistant", ALWAYS).ids.tolist()
        assert ids == theirs.apply_chat_template(messages, return_dict=False)


def test_files_beside_a_tokenizer_name_the_tokens_of_its_template(both: Both, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((both.folder / "tokenizer.json").read_bytes())
    source = "{{ bos_token }}{{ pad_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    named = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[INST]", "eos_token": "</s>"}')
    ours = open_tokenizer(tmp_path, bos="<s>")
    template = open_template(None, ours)
    assert template.render(chat("Hi", "cat")) == "[INST]Hi<|im_end|>cat<|im_end|>"
    assert template.ends == {ours.specials["<|im_end|>"].id} and template.notes == []


def edges(example: Example) -> list[tuple[int, int]]:
    """Where stretches of trained tokens begin and end."""
    padded = [False, *example.trained.tolist(), False]
    places = [i for i in range(len(padded) - 1) if padded[i] != padded[i + 1]]
    return list(zip(places[::2], places[1::2], strict=True))


# what is refused


BAD_TEMPLATES = {
    "no end": (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "eos_token.* after each answer",
    ),
    "an end that is no token": (
        "{% for m in messages %}<|turn|>{{ m.role + m.content }}<|stop|>{% endfor %}",
        "eos_token.* after each answer",
    ),
    "no end at the last": (
        "{% for m in messages %}{{ m.content }}{{ eos_token if not loop.last }}{% endfor %}",
        "eos_token.* after each answer",
    ),
    "an end before the answer": (
        "{% for m in messages %}{{ eos_token + m.content }}{% endfor %}",
        "would not learn to stop",
    ),
    "two bos": (
        "<s>{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
        "begins a chat with <s> twice; take one out",
    ),
    "no messages": ("{{ eos_token }}", "a message of role user is not written once"),
    "an error": ("{{ raise_exception('I want tools') }}", " fails: I want tools; give another template$"),
    "a wrong mark": (
        "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}",
        "generation marks are not around what the assistant says",
    ),
    "a syntax error": ("\n{% for m in messages %}", r"not a Jinja template \(.*in line 2\)"),
    "a way out": ("{{ messages.__class__ }}{{ ''.__class__.__mro__ }}", "fails: .*unsafe"),
    "another way out": ("{% set a = namespace(__class__=1) %}", "fails: a namespace has no attribute"),
    "a change": ("{{ messages.append(1) }}", "fails: .*unsafe"),
}


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_templates_that_cannot_be_trained_on(both: Both, tmp_path: Path, fault: str) -> None:
    source, reason = BAD_TEMPLATES[fault]
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(
        UserError, match=rf"^data\.chat_template {tmp_path}/bad\.jinja(?s:.*){reason}"
    ) as caught:
        open_template(str(tmp_path / "bad.jinja"), both.ours)
    assert "\n" not in str(caught.value)


def test_what_is_no_template(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, reason in {
        "tulu3": "data.chat_template tulu3: no such file, and not one of tulu, chatml",
        str(tmp_path): "not the file of a Jinja template",
        str(tmp_path / "bytes"): "not UTF-8",
    }.items():
        with pytest.raises(UserError, match=reason):
            open_template(name, both.ours)
    with pytest.raises(
        UserError, match=r"^data\.chat_template: the tokenizer .* has none of its own; set it"
    ):
        open_template(None, both.ours)
    monkeypatch.setattr(template_module, "version", lambda _: "3.1.5")
    template_module._environment.cache_clear()
    with pytest.raises(UserError, match=r"jinja2 3\.1\.6 or newer"):
        open_template("tulu", both.ours)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"need the package jinja2: pip install 'lowres\[chat\]'"):
        open_template("tulu", both.ours)


ENDED = "{{ message.content + '<|im_end|>' }}{% endgeneration %}"
LATER = "{{ message.content }}{% endgeneration %}<|im_end|>"


@pytest.mark.parametrize(
    ("source", "note"),
    [
        (
            "{% for m in messages %}{{ '[INST]' + m.role + m.content + eos_token }}{% endfor %}",
            r"ignores add_generation_prompt, so '\[INST\]assistant' is trained too",
        ),
        (TEMPLATES["forced"], r"asks for an answer with '<\|im_start\|><think>\\n', but no answer"),
        (MARKED, "do not begin with <s>"),
        (MARKED.replace(ENDED, LATER), r"marks have '\.\.\.' where '\.\.\.<\|im_end\|>' is trained"),
    ],
)
def test_what_is_odd_in_a_template_is_noted(both: Both, tmp_path: Path, source: str, note: str) -> None:
    (tmp_path / "odd.jinja").write_text(source)
    notes = open_template(str(tmp_path / "odd.jinja"), both.ours).notes
    assert any(re.search(note, one) for one in notes), notes


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        (
            "tulu",
            [*chat("Hi"), {"role": "tool", "content": "1"}, *chat("", "a")[1:]],
            "tulu has no role tool",
        ),
        ("llama2", [*chat("Hi"), *chat("Hi", "a")], "roles must alternate"),
        ("mistral", [{"role": "user", "content": "a"}, {"role": "assistant"}], "fails: "),
        (
            "calls",
            [*chat("Hi"), {"role": "assistant", "content": "a", "calls": 1}, *A_CHAT],
            "no token after",
        ),
    ],
)
def test_a_row_that_a_template_refuses(both: Both, name: str, messages: Chat, reason: str) -> None:
    template = both.template(name)
    with pytest.raises(BadRow, match=reason):
        encode(both.ours, template, messages, "assistant", ALWAYS)
    good, bad = encode_batch(both.ours, template, [A_CHAT, messages], "assistant", ALWAYS)
    assert isinstance(good, Example) and isinstance(bad, BadRow)


def test_a_message_has_other_keys(both: Both, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content }}{{ m.thinking }}{{ m.name }}{{ eos_token }}{% endfor %}"
    (tmp_path / "keys.jinja").write_text(source)
    messages: Chat = [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "a", "reasoning": "b"},
    ]
    template = open_template(str(tmp_path / "keys.jinja"), both.ours)
    assert template.render(messages) == "Hi</s>ab</s>"
    if not transformers.__version__.startswith("4."):  # which writes None, and nothing of reasoning
        assert both.text(messages, source) == "Hi</s>ab</s>"


def test_the_day_is_always_the_same(both: Both, tmp_path: Path) -> None:
    (tmp_path / "day.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{{ {'b': 'e\u0301<', 'a': 1} | tojson }}"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    template = open_template(str(tmp_path / "day.jinja"), both.ours)
    assert template.render(chat("Hi")) == '26 Jul 2024{"b": "e\u0301<", "a": 1}Hi</s>'
    other = open_template("tulu", both.ours)
    assert template.fingerprint != other.fingerprint == open_template("tulu", both.ours).fingerprint


# talking


class Scripted:
    """An engine that writes what it is told to, and keeps what it has read."""

    fetched = 0

    def __init__(self, vocab_size: int, *ids: int) -> None:
        self._vocab_size, self._ids = vocab_size, list(ids)
        self.read: list[list[int]] = []

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.read.append(tokens[0].tolist())
        return torch.eye(self._vocab_size)[[self._ids.pop(0)]]

    def reader(self, sequences: int, length: int) -> Reader:
        return Rereading(self.logits)


def test_a_conversation_is_what_the_template_makes_of_all_that_was_said(both: Both) -> None:
    end, start = both.ours.specials["<|im_end|>"].id, both.ours.specials["<|im_start|>"].id
    said = both.ours.encode("Hi there")
    engine = Scripted(both.ours.vocab_size, *said, end, start, both.ours.end_id, *said, end)
    template = both.template("qwen")
    questions = {"Hello": "Hi there", "why": "", "how </s>": "Hi"}
    messages: Chat = [{"role": "system", "content": "Be kind"}]
    wanted = []
    for question, answer in questions.items():
        messages.append({"role": "user", "content": question})
        wanted.append(both.ids(messages, template.source, prompted=True))
        messages.append({"role": "assistant", "content": answer})
    how = Sampling(tokens=3, seq_len=len(wanted[1]) + 1, temperature=0)
    talk = Conversation(cast(Any, engine), both.ours, template, how, system="Be kind")
    for (question, answer), ids in zip(questions.items(), wanted, strict=True):
        engine.read.clear()
        assert talk.answer(question) == (answer if question != "how </s>" else "Hi there")
        if question == "how </s>":  # more than there is room for
            assert talk.cut_off and len(engine.read[0]) == how.seq_len
        else:
            assert engine.read[0] == ids and not talk.cut_off


def test_every_answer_is_drawn_anew(both: Both) -> None:
    class Flat(Scripted):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, self._vocab_size)

    def answers() -> list[str]:
        engine = cast(Any, Flat(both.ours.vocab_size))
        talk = Conversation(engine, both.ours, both.template("tulu"), Sampling(9, 64, top_k=0, seed=3))
        return [talk.answer("Hi") for _ in range(3)]

    assert answers() == answers() and len(set(answers())) == 3


def test_the_command_talks(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [both.ours.encode("Hi there"), both.ours.encode("a cat")]
    ids = [i for one in said for i in (*one, both.ours.end_id)]
    config = make_config(data={"chat_template": "tulu"}, train={"batch_tokens": 64})
    opened = {"config": config, "ids": ids}

    class Model:
        tokenizer = both.ours

        @property
        def config(self) -> Any:
            return opened["config"]

        def open(self, *_: object, **__: object) -> OpenRun:
            engine = Scripted(both.ours.vocab_size, *cast(Any, opened["ids"]))
            return OpenRun(self.config, cast(Any, engine), both.ours)

    monkeypatch.setattr("lowres.session.find_model", lambda path: Model())
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n  \nwhy\n"))
    assert lowres_here("sample", tmp_path, "--chat", "--temperature", 0).stdout == "Hi there\na cat\n"
    once = lowres_here("sample", tmp_path, "--chat", "--prompt", "Hello", "--system", "Be", "--top-k", 1)
    assert once.stdout == "Hi there\n" and once.stderr == ""
    for more, reason in ((["--system", "Be"], "--system"), ([], "--prompt")):
        prompt = ["--prompt", "Hi"] if more else []
        assert reason in lowres_here("sample", tmp_path, *more, *prompt, code=2).stderr
    opened["config"] = make_config()
    error = lowres_here("sample", tmp_path, "--chat", "--prompt", "Hello", code=2).stderr
    assert re.fullmatch(r"lowres: --chat: .* has no chat template; .*\n", error)
