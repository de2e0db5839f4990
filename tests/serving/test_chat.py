"""Chat templates: where they come from, what they see, and the tokens that come out."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx
import pytest

from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError
from megakda.inference.chat import load_template, read_template
from tests.serving.standin import StandIn, serving

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]

# In the manner of a published Kimi Linear folder: no token before the first message, roles spelled
# out between two special tokens.
KIMI_LIKE = """
{%- for message in messages -%}
  {%- if message.role == 'user' -%}<|im_user|>user<|im_middle|>
  {%- else -%}<|im_system|>{{ message.role }}<|im_middle|>
  {%- endif -%}
  {{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
SPECIAL = {
    "[BOS]": 256,
    "[EOS]": 257,
    "<|im_end|>": 258,
    "<|im_user|>": 259,
    "<|im_assistant|>": 260,
    "<|im_system|>": 261,
    "<|im_middle|>": 262,
}


def hf_folder(path: Path, template: str | None) -> str:
    """A Hugging Face tokenizer of bytes with special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    fast.chat_template = template
    fast.save_pretrained(path)
    return f"hf:{path}"


def tiktoken_folder(path: Path, **config: object) -> str:
    """A rank file of bytes beside a configuration with special tokens."""
    path.mkdir()
    ranks = (b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    (path / "tiktoken.model").write_bytes(b"".join(ranks))
    config |= {
        "added_tokens_decoder": {str(i): {"content": name} for name, i in SPECIAL.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return f"tiktoken:{path / 'tiktoken.model'}"


def ids(*parts: str) -> list[int]:
    """Tokens of `tiktoken_folder`, of special tokens and texts."""
    return [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else part.encode())]


def test_chat_templates(tmp_path):
    own = load_tokenizer(hf_folder(tmp_path / "own", TEMPLATE + "{% if eos_token %}.{% endif %}"))
    with_own = load_template(own, None)(HI)
    # The template's special token is one token, and the tokenizer's names are known to it.
    assert len(with_own) == 1 + len("hi.") and own.decode(with_own) == "hi."
    assert len(load_template(own, TEMPLATE + "!!")(HI)) == 1 + len("hi!!")
    none = load_tokenizer(hf_folder(tmp_path / "none", None))
    assert load_template(none, None) is None
    byte = load_tokenizer("byte")
    assert load_template(byte, None) is None
    with_bos = "{{ bos_token + 'x' }}" + TEMPLATE
    assert byte.decode(load_template(byte, with_bos)(HI)) == "x<|user|>hi"


@pytest.mark.parametrize(
    "form",
    [
        {"chat_template": KIMI_LIKE},
        {
            "chat_template": [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": KIMI_LIKE},
            ]
        },
        {"chat_template": "no", "file": KIMI_LIKE},
    ],
    ids=["text", "list", "file"],
)
def test_a_tiktoken_folder_over_http(tmp_path, form):
    file = form.pop("file", None)
    tokenizer = load_tokenizer(tiktoken_folder(tmp_path / "model", **form))
    if file is not None:
        (tmp_path / "model" / "chat_template.jinja").write_text(file)
    messages = [{"role": "system", "content": "be brief"}, *HI]
    found = chat(load_template(tokenizer, None), messages)
    assert found.json()["prompt_token_ids"] == ids(
        *("<|im_system|>", "system", "<|im_middle|>", "be brief", "<|im_end|>"),
        *("<|im_user|>", "user", "<|im_middle|>", "hi", "<|im_end|>"),
        *("<|im_assistant|>", "assistant", "<|im_middle|>"),
    )


def test_a_tiktoken_folder_without_a_template(tmp_path):
    tokenizer = load_tokenizer(tiktoken_folder(tmp_path / "model"))
    found = chat(load_template(tokenizer, None), HI)
    assert found.status_code == 400 and found.json()["error"]["code"] == "no_chat_template"
    given = load_template(tokenizer, "{{ bos_token }}" + TEMPLATE + "{{ eos_token }}")
    assert given(HI) == ids("[BOS]", "<|user|>hi", "[EOS]")


def chat(template, messages):
    with (
        serving(StandIn(), template=template) as server,
        httpx.Client(trust_env=False, timeout=20) as client,
    ):
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
        return client.post(f"{server.url}/v1/chat/completions", json=body)


# What published templates use beyond plain Jinja, and where transformers differs from it.
EVERYTHING = """
{%- set state = namespace(count=0) -%}
{%- for m in messages -%}
    {%- if m.role == 'skipped' %}{% continue %}{% endif -%}
    {%- set state.count = state.count + 1 -%}
    <|user|>{{ m | tojson }}{{ m | tojson(indent=1, sort_keys=true, separators=(',', ': ')) }}
    {%- set scope = 'outer' -%}
    {% generation %}{{ m.content }}{% set scope = 'inner' %}{{ loop.index }}{% endgeneration %}
    {{ scope }}
    {% if loop.index == 3 %}{% break %}{% endif %}
{% endfor -%}
{{ state.count }} {{ strftime_now('%Y') }} {{ bos_token is defined }} {{ eos_token }}
{{- tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ dict(a=1) }}
"""


def test_templates_see_what_transformers_gives_them(tmp_path):
    from transformers import AutoTokenizer

    spec = hf_folder(tmp_path, EVERYTHING)
    messages = [
        {"role": "user", "content": 'é <b> & "quoted"\n'},
        {"role": "skipped", "content": ""},
        {"role": "user", "content": "quotes <|end|>"},
        {"role": "user", "content": "too late"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    tokenizer = load_tokenizer(spec)
    assert load_template(tokenizer, None)(messages) == theirs
    text = tokenizer.decode(theirs)
    assert "é <b> &" in text and "outer" in text and "inner" not in text and "late" not in text


def test_templates_are_in_a_sandbox():
    template = load_template(load_tokenizer("byte"), "{{ messages.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        template(HI)


def test_templates_that_are_none(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("a\n{% for m in messages %}")
    with pytest.raises(ConfigError, match="line 2 is no Jinja template"):
        read_template(file)
    file.write_text("{{ messages | unheard_of }}")
    with pytest.raises(ConfigError, match=r"chat\.jinja: line 1 is no .* 'unheard_of'"):
        read_template(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(file)
    file.write_text(TEMPLATE)
    assert read_template(file) == TEMPLATE
    own = load_tokenizer(tiktoken_folder(tmp_path / "model", chat_template="{% if %}"))
    with pytest.raises(ConfigError, match=r"of tiktoken:.*: line 1 .* name another with --chat"):
        load_template(own, None)
