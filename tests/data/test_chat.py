"""Conversations: which tokens are answers, from the chat template to the loss mask."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakda.config import validate
from megakda.data.chat import BadChat, ChatInput, find_answers
from megakda.data.chat_corpus import conversations, prepare_stdlib_chat
from megakda.data.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_template
from megakda.data.datasets import micro_batches, prepare_data
from megakda.data.indexed import answers_prefix, check_answers, read_index, read_sidecar
from megakda.data.packed_dataset import PackedDataset
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError, DataError
from tests.data.preparing import BYTE, fail_rename, files_of, leftovers, run, write_jsonl
from tests.data.test_packed_dataset import CONTEXT, FIRST, MODES, build, modes, settings
from tests.data.test_packed_dataset import write_numbers as write_tokens
from tests.data.test_preprocess import tool
from tests.serving.test_chat import KIMI_LIKE, tiktoken_folder


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    message("system", "Be brief."),
    message("user", "Hi"),
    message("assistant", "Hello, you: né 伽\n"),
    message("user", "1+1?"),
    message("assistant", "2"),
]


def write_chats(path: Path, chats: Sequence[Any], key: str = "messages") -> Path:
    path.write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return path


def make(path: Path, chats: Sequence[Any], tokenizer: str = "byte", **more: Any) -> Any:
    """A data set of conversations."""
    kwargs = {key: more.pop(key) for key in ("workers", "on_error", "append_eod") if key in more}
    source = write_chats(path.with_suffix(".jsonl"), chats)
    return run([source], path, tokenizer_spec=tokenizer, chat=ChatInput(**more), **kwargs)


def documents_of(prefix: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each document, and which are answers."""
    info = read_index(prefix)
    check_answers(info)
    index = Path(f"{prefix}.idx").read_bytes()
    ends = np.cumsum(np.frombuffer(index, np.int32, info.sequences, offset=34))
    tokens = np.fromfile(f"{prefix}.bin", info.dtype)
    marks = np.fromfile(f"{answers_prefix(prefix)}.bin", np.uint8)
    return list(zip(np.split(tokens, ends[:-1]), np.split(marks, ends[:-1]), strict=True))


def trained(prefix: Path, tokenizer: Any = BYTE) -> list[list[str]]:
    """What each document is trained on, run by run; the end of the document is ``$``."""
    found = []
    for tokens, marks in documents_of(prefix):
        edges = np.flatnonzero(np.diff(marks, prepend=0, append=0)).reshape(-1, 2)
        runs = [tokens[a:b].tolist() for a, b in edges]
        end = tokenizer.eod
        found.append([tokenizer.decode(r) + "$" * r.count(end) for r in runs])
    return found


def test_answers_of_the_plain_template(tmp_path):
    unmarked = message("assistant", "no", weight=0), message("assistant", "nor this", train=False)
    chats = [
        TALK,
        [*TALK[:2], unmarked[0], *TALK[3:]],
        [message("user", "a"), message("assistant", "b", weight=1), unmarked[1]],
        [*TALK, message("user", "<|end|>")],
    ]
    make(tmp_path / "all", chats)
    first, second = "Hello, you: né 伽\n<|end|>", "2<|end|>"
    # The end of the document is trained on where it follows an answer.
    assert trained(tmp_path / "all") == [
        *([first, second + "$"], [second + "$"], ["b<|end|>"], [first, second]),
    ]
    text = "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|assistant|>nor this<|end|>"
    assert BYTE.decode(documents_of(tmp_path / "all")[2][0]) == text
    make(tmp_path / "last", chats, answers="last", append_eod=False)
    assert trained(tmp_path / "last") == [[second], [second], ["b<|end|>"], [second]]
    sidecar = read_sidecar(tmp_path / "last")["chat"]
    assert sidecar["answers"] == "last" and sidecar["template"] == PLAIN_TEMPLATE
    assert sidecar["answer_tokens"] == 3 * len(second) + len("b<|end|>")


def test_what_is_generated_is_what_is_trained_on(tmp_path):
    """The tokens of a prompt, then those of its answer, are the beginning of the document."""
    kimi = load_tokenizer(tiktoken_folder(tmp_path / "kimi", chat_template=KIMI_LIKE_ALL))
    for name, tokenizer, source in (
        ("plain", BYTE, PLAIN_TEMPLATE),
        ("kimi", kimi, KIMI_LIKE_ALL),
    ):
        make(tmp_path / name, [TALK], tokenizer.spec)
        ((tokens, marks),) = documents_of(tmp_path / name)
        for turn in (2, 4):
            prompt = ChatTemplate(tokenizer, source, name).tokens(TALK[:turn])
            assert tokens[: len(prompt)].tolist() == prompt
            assert not marks[len(prompt) - 1] and marks[len(prompt)]


ASSISTANT = "elif message.role == 'assistant' -%}<|im_assistant|>assistant<|im_middle|>"
KIMI_LIKE_ALL = KIMI_LIKE.replace("{%- else -%}", "{%- " + ASSISTANT + "{%- else -%}", 1)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
BARE += "{% if add_generation_prompt %}assistant: {% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content|trim }}."
    "{% endgeneration %}{% else %}Q{{ m.content }}{% endif %}{% endfor %}"
)
# Leaves what the assistant thought out of all messages but the last, as published templates do.
FORGETFUL = CHATML.replace(
    "m.content +", "(m.content if loop.last else m.content.split('</think>')[-1]) +"
)
NO_PROMPT = CHATML.partition("{% if add")[0]


def plain(tokenizer: Any, source: str, messages: Any, answers: str = "all") -> list[str]:
    text, spans = find_answers(messages, ChatTemplate(tokenizer, source, "template"), answers)
    return [text[first:last] for first, last in spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # The line end behind <|im_end|> is not part of the turn; without other ends it is its end.
        (CHATML, ["Hello, you: né 伽\n<|im_end|>", "2<|im_end|>"]),
        (INSTRUCT, [" Hello, you: né 伽\n</s>", " 2</s>"]),
        (BARE, ["Hello, you: né 伽\n\n\n", "2\n\n"]),
        (MARKED, ["Hello, you: né 伽.", "2."]),
        (KIMI_LIKE_ALL, ["Hello, you: né 伽\n<|im_end|>", "2<|im_end|>"]),
    ],
    ids=["chatml", "instruct", "bare", "marked", "kimi"],
)
def test_answers_of_any_template(source, expected):
    assert plain(BYTE, source, TALK) == expected
    assert plain(BYTE, source, TALK, "last") == expected[1:]
    assert plain(BYTE, source, [*TALK[:4], {**TALK[4], "weight": 0}]) == expected[:1]


THOUGHT = [*TALK[:2], message("assistant", "<think>hm</think>Hello"), *TALK[3:]]


@pytest.mark.parametrize(
    ("source", "messages", "problem"),
    [
        (FORGETFUL, THOUGHT, r"messages\[2\] is cannot be told.*first 3 messages alone as '<th"),
        (NO_PROMPT, TALK, r"writes '<.im_start.>assistant.n' before the answer in messages\[2\]"),
        (CHATML + "{{ 1 // 0 }}", TALK, "the chat template fails .ZeroDivisionError"),
        (
            CHATML + "{% if messages|length < 3 %}{{ raise_exception('too short') }}{% endif %}",
            TALK,
            "fails for the first 2 messages alone .TemplateError: too short",
        ),
        (MARKED.replace("== 'assistant'", "== 'tool'"), TALK, "writes nothing for the answers"),
        (
            MARKED.replace("== 'assistant'", "!= 'system'"),
            [*TALK[:4], {**TALK[4], "train": False}],
            "4 {% generation %} blocks for 2 messages",
        ),
        ("{% generation %}" + MARKED + "{% endgeneration %}", TALK, "blocks .* lie in each other"),
        (CHATML, [message("user", "\ufdd0"), *TALK[2:]], "U.FDD0"),
    ],
    ids=["forgets", "header", "fails", "fails_early", "nothing", "count", "nested", "characters"],
)  # fmt: skip
def test_templates_that_do_not_tell(source, messages, problem):
    with pytest.raises(BadChat, match=problem):
        plain(BYTE, source, messages)


def test_the_remedies_work():
    assert plain(BYTE, FORGETFUL, THOUGHT, "last") == ["2<|im_end|>"]
    assert plain(BYTE, MARKED, THOUGHT) == ["<think>hm</think>Hello.", "2."]
    asks = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    assert plain(BYTE, NO_PROMPT + asks, TALK) == plain(BYTE, CHATML, TALK)


def test_tools_and_parts_reach_the_template(tmp_path):
    source = (
        "{{ tools|length }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    )
    source += "{{ m.content }}{{ m.tool_calls|tojson }}{% endgeneration %}{% else %}"
    source += "{{ m.content[0].text }}{% endif %}{% endfor %}"
    (tmp_path / "template.jinja").write_text(source)
    call = [{"name": "add", "arguments": {"a": 1}}]
    parts = [{"type": "text", "text": "sum"}]
    record = {"tools": [{"name": "add"}], "messages": [message("user", parts)]}
    record["messages"].append({"role": "assistant", "content": None, "tool_calls": call})
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    chat = ChatInput(template=tmp_path / "template.jinja")
    run([tmp_path / "a.jsonl"], tmp_path / "out", chat=chat)
    assert BYTE.decode(documents_of(tmp_path / "out")[0][0]) == "1sum" + json.dumps(call)
    assert trained(tmp_path / "out") == [[json.dumps(call) + "$"]]


def test_special_tokens_and_edges_of_answers(tmp_path):
    """Whatever the tokenizer, what is trained on is the answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "ĠĠ", "ĊĊ", ".Ċ"])}
    merges = [("Ġ", "Ġ"), ("Ċ", "Ċ"), (".", "Ċ")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.add_tokens([AddedToken("<|im_end|>", special=True)])
    fast.save_pretrained(tmp_path / "tok")
    tokenizer = load_tokenizer(f"hf:{tmp_path / 'tok'}")
    text = "a  né\n\n<|im_end|>\n伽. \n</s>"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode_with_special(text)
    assert {text[a:b] for a, b in offsets} >= {"  ", "\n\n", "<|im_end|>", "伽", "</s>"}
    with pytest.raises(DataError, match="no chat template.*--chat-template FILE, or .* plain"):
        make(tmp_path / "none", [TALK], tokenizer.spec)

    talk = [message("user", "q"), message("assistant", " x  \n\n"), message("user", "r")]
    talk.append(message("assistant", "."))
    (tmp_path / "chatml").write_text(CHATML)
    report = make(tmp_path / "a", [talk], tokenizer.spec, template=tmp_path / "chatml")
    im_end, eod = tokenizer.encode_with_special("<|im_end|></s>")
    runs = [[*tokenizer.encode(" x  \n\n"), im_end], [*tokenizer.encode("."), im_end]]
    ((tokens, marks),) = documents_of(tmp_path / "a")
    assert tokens[marks == 1].tolist() == sum(runs, [])
    assert (report.cut_tokens, tokens[-1], marks[-1]) == (0, eod, 0)  # behind a line end

    # "assistant.\n" and an answer that begins with a line end share the token "\n\n".
    cut = [message("user", "q"), message("assistant", "\nx")]
    report = make(tmp_path / "b", [cut], tokenizer.spec, template=tmp_path / "chatml")
    assert trained(tmp_path / "b", tokenizer) == [["\n\nx"]] and report.cut_tokens == 1
    assert "1 of them on an edge" in str(report)

    # A template that ends with the end-of-document token: there is one of them.
    (tmp_path / "instruct").write_text(INSTRUCT)
    make(tmp_path / "c", [cut], tokenizer.spec, template=tmp_path / "instruct")
    ((tokens, marks),) = documents_of(tmp_path / "c")
    assert tokens.tolist().count(eod) == 1 and tokens[-1] == eod and marks[-1] == 1


BROKEN = [
    ("x", "the messages are str, not a list"),
    ([], "the messages are an empty list"),
    (["x"], r"messages\[0\] is str, not an object"),
    ([{"from": "human", "value": "x"}], r"messages\[0\] has no role .keys: from, value"),
    ([message("human", "x")], "role 'human', which is none of system, user, assistant, tool"),
    ([message("user", None)], r"messages\[0\] has no content, not text"),
    ([message("user", 1)], "content of type int"),
    ([message("user", "x")], "no answer to train on: no message is the assistant's"),
    ([message("assistant", "x", weight=0)], "no answer to train on: all have weight 0"),
    ([message("assistant", "x", weight=0.5)], "weight 0.5, which is neither 0 nor 1"),
    ([message("assistant", "x", train="no")], "train 'no', which is neither true nor false"),
    ([message("user", "x", train=True), TALK[2]], "role user: only answers can be"),
    ([message("user", "\ud800"), TALK[2]], "half of a surrogate pair"),
    ([message("assistant", [{"text": "x"}])], "the plain template takes messages with text alone"),
]


def test_broken_records(tmp_path):
    chats = [TALK, *(chat for chat, _ in BROKEN), TALK]
    report = make(tmp_path / "out", chats)
    assert (report.documents, report.broken) == (2, len(BROKEN))
    for number, record in enumerate(report.broken_listed):
        assert record.file.endswith("out.jsonl") and record.line == number + 2
        assert re.search(BROKEN[number][1], record.reason), record
    with pytest.raises(DataError, match=r"b\.jsonl:1: messages\[0\] has role 'human'"):
        make(tmp_path / "b", [[message("human", "x")]], on_error="fail")
    with pytest.raises(DataError, match="no key 'chat' .keys: messages.; see --messages-key"):
        make(tmp_path / "b", [TALK], messages_key="chat")


def test_arguments(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    source = write_chats(tmp_path / "a.jsonl", [TALK])
    for kwargs, problem in (
        ({"inputs": [tmp_path]}, r"a\.txt' is plain text, and --chat reads conversations"),
        ({"chat": ChatInput(answers="first")}, "answers .--answers. is 'first'"),
        ({"chat": ChatInput(template="no.jinja")}, "--chat-template no.jinja cannot be read"),
    ):
        with pytest.raises((DataError, ConfigError), match=problem):
            run(**{"inputs": [source], "chat": ChatInput(), "output_prefix": "out", **kwargs})
    assert read_template(Path("plain")) == PLAIN_TEMPLATE
    done = tool("a.jsonl", "--output-prefix", "out", "--answers", "last", cwd=tmp_path)
    assert done.returncode == 2 and "are for --chat" in done.stderr
    args = ("a.jsonl", "--output-prefix", "out", "--chat", "--answers", "last")
    done = tool(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out.bin, .idx, .json, .answers.bin, .answers.idx" in done.stdout
    assert trained(tmp_path / "out") == [["2<|end|>$"]]


def test_workers_and_formats_do_not_change_the_output(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [TALK[:n] for n in (3, 5)] * 40
    chats[1] = [TALK[1], {**TALK[2], "weight": 0}, TALK[1], TALK[4]]
    monkeypatch.setattr("megakda.data.readers._BLOCK_BYTES", 1000)
    one = make(tmp_path / "one", chats, workers=1)
    two = make(tmp_path / "two", chats, workers=2)
    pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    run([tmp_path / "a.parquet"], tmp_path / "three", chat=ChatInput())
    for other in ("two", "three"):
        for prefix in ("", ".answers"):
            for suffix in (".bin", ".idx"):
                name = prefix + suffix
                expected = (tmp_path / f"one{name}").read_bytes()
                assert (tmp_path / f"{other}{name}").read_bytes() == expected
    assert one.answer_tokens == two.answer_tokens


def test_another_output_takes_the_marks_away(tmp_path):
    make(tmp_path / "out", [TALK])
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.idx exists already"):
        make(tmp_path / "out", [TALK])
    texts = write_jsonl(tmp_path / "texts.jsonl", ["text"])
    run([texts], tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") != before
    assert not list(tmp_path.glob("out.answers*"))


@pytest.mark.parametrize("step", range(5))
def test_failing_rename_leaves_no_output(tmp_path, monkeypatch, step):
    fail_rename(monkeypatch, step)
    with pytest.raises(DataError, match="No space left on device"):
        make(tmp_path / "out", [TALK])
    assert os.listdir(tmp_path) == ["out.jsonl"] and leftovers(tmp_path) == []


# --- training -------------------------------------------------------------------------------------

LENGTHS = [2, 17, 18, 100, 1, 3, *np.random.default_rng(0).integers(2, 30, 40).tolist()]


def write_numbers(prefix: Path, lengths: Sequence[int] = LENGTHS) -> np.ndarray:
    """Documents whose tokens are all different, and marks of a third of them; the marks."""
    from megakda.data.indexed import write_index

    write_tokens(prefix, lengths)
    marks = (np.random.default_rng(1).random(sum(lengths)) < 0.3).astype(np.uint8)
    Path(f"{answers_prefix(prefix)}.bin").write_bytes(marks.tobytes())
    with open(f"{answers_prefix(prefix)}.idx", "wb") as stream:
        write_index(stream, np.array(lengths), marks.dtype)
    return marks


@modes
def test_rows_count_the_labels_that_are_answers(tmp_path, mode):
    """Pieces of long documents too; a label's mark counts, not that of its input."""
    marks = write_numbers(tmp_path / "numbers")
    dataset = build(settings([tmp_path / "numbers"], mode, "data.loss=answers")).train
    everything = build(settings([tmp_path / "numbers"], mode)).train
    assert isinstance(dataset, PackedDataset) and len(dataset) == len(everything) == 80
    counted = 0
    for row, whole in zip(dataset, everything, strict=True):
        assert all(torch.equal(row[name], whole[name]) for name in row if name != "loss_mask")
        real = ~row["padding_mask"]
        expected = torch.from_numpy(marks)[(row["labels"] - FIRST).clamp_min(0)].float() * real
        assert torch.equal(row["loss_mask"], expected)
        counted += int(expected.sum())
    assert 0 < counted < 80 * CONTEXT
    # Rows do not depend on what is trained on, and neither do their files.
    assert len(list((tmp_path / "cache").glob("*-pieces.npy"))) == 1


def test_worker_processes_read_the_marks(tmp_path):
    write_numbers(tmp_path / "numbers")
    dataset = build(settings([tmp_path / "numbers"], MODES[2], "data.loss=answers")).train
    masks = [
        next(micro_batches(dataset, 0, 4, rank=0, ranks=1, num_workers=workers))["loss_mask"]
        for workers in (0, 1)
    ]
    assert torch.equal(*masks) and masks[0].sum() > 0


def test_marks_that_are_missing_or_of_something_else(tmp_path):
    prefix = tmp_path / "numbers"
    config = settings([prefix], MODES[2], "data.loss=answers")
    write_tokens(prefix, LENGTHS)
    with pytest.raises(DataError, match=r"no .*answers\.bin and .*--chat, or set data.loss=all"):
        prepare_data(config)
    write_numbers(prefix)
    prepare_data(config)
    write_tokens(prefix, [LENGTHS[1], LENGTHS[0], *LENGTHS[2:]])
    with pytest.raises(DataError, match="do not mark the .* tokens of the 46 documents"):
        prepare_data(config)
    write_numbers(prefix)
    os.truncate(f"{answers_prefix(prefix)}.bin", 100)
    with pytest.raises(DataError, match="100 bytes of uint8"):
        prepare_data(config)


def test_answers_need_packing(tmp_path):
    config = settings([tmp_path / "a"], ("none", "split"), "data.loss=answers")
    with pytest.raises(ConfigError, match=r"data.loss=answers with data.packing=none.*best_fit"):
        validate(config, 1)


# --- the data set that every machine has ----------------------------------------------------------

SOURCE = '''"""Reads JSON."""
def loads(text):
    """Turns text into values.

    Like this:
        loads("1")
    """
def _private():
    """Not for everyone."""
def plain(): pass
class Reader:
    """One after the other."""
    def read(self):
        "The next one."
    def close(self): pass
class Empty: pass
'''


def test_docstrings_answer_questions():
    found = [
        [(m["role"], m["content"]) for m in messages[1:]]
        for messages in conversations(SOURCE, "json.reader")
    ]
    assert found == [
        [("user", "What is the module json.reader for?"), ("assistant", "Reads JSON.")],
        [
            ("user", "What does json.reader.loads do?"),
            ("assistant", 'Turns text into values.\n\nLike this:\n    loads("1")'),
        ],
        [
            ("user", "What is json.reader.Reader?"),
            ("assistant", "One after the other."),
            ("user", "What does the method Reader.read do?"),
            ("assistant", "The next one."),
        ],
    ]


def test_prepare_stdlib_chat(tmp_path):
    prefix = prepare_stdlib_chat(tmp_path / "data", max_bytes=300_000)
    assert prefix == tmp_path / "data" / "stdlib_chat"
    records = [json.loads(x)["messages"] for x in prefix.with_suffix(".jsonl").open()]
    found = trained(prefix)
    assert len(records) > 20 and max(map(len, records)) > 3
    for messages, runs in zip(records, found, strict=True):
        answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
        assert runs == [*answers[:-1], answers[-1] + "$"]
    stamp = Path(f"{prefix}.bin").stat().st_mtime_ns
    prepare_stdlib_chat(tmp_path / "data", max_bytes=300_000)
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == stamp
    os.unlink(f"{prefix}.answers.bin")  # made again, and the same
    prepare_stdlib_chat(tmp_path / "data", max_bytes=300_000)
    assert trained(prefix) == found and leftovers(tmp_path / "data") == []

    config = settings([prefix], MODES[2], "data=chat", "data.prepare=stdlib_chat")
    assert (config.data.loss, config.data.packing) == ("answers", "best_fit")
    prepare_data(config)
    other = settings([tmp_path / "chats"], MODES[2], "data=chat", "data.prepare=stdlib_chat")
    with pytest.raises(ConfigError, match=r"data\.paths=\[FOLDER/stdlib_chat\]"):
        prepare_data(other)
