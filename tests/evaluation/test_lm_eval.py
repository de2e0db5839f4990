"""lm_eval's tasks through megakda and through transformers: the same numbers, sample by sample."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from megakda.checkpoint.hf_export import export_hf
from megakda.checkpoint.hf_tokenizer import write_byte
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError, DataError
from megakda.evaluation import harness
from megakda.evaluation.lm_eval_model import Instance, MegakdaLM
from tests import jobs as training
from tests.evaluation.stand_ins import Constant

BYTE = load_tokenizer("byte")
LENGTH = 64
CHAT_LENGTH = 128  # some conversations are longer
ROWS, CHOICES, CHATS = 6, 3, 2
PUBLISHABLE = ("model.linear.head_dim_k=16", "model.linear.head_dim_v=16", "model.vocab_size=258")

END, TURN = "<|endofdocument|>", "<|turn|>"
CHAT = """
{%- for m in messages -%}
  <|turn|>{{ m.role }}: {{ m.content | trim }}{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|turn|>assistant: {% endif -%}
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without lm_eval's report on the machine, which takes longer than these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of one step, from weights so large that tokens differ in their logits."""
    out = tmp_path_factory.mktemp("run") / "run"
    training.fit((*PUBLISHABLE, "model.init_std=0.1", "train.steps=1"), corpus, str(out))
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Yaml files of a multiple-choice, a generating and a perplexity task on random texts."""
    out = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "three", "old", "new", "house", "über", "naïve"]
    rows = [
        {
            "question": " ".join(draw.choices(words, k=draw.randint(1, 18))),
            "choices": [
                " ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(CHOICES)
            ],
            "gold": draw.randrange(CHOICES),
            "answer": "e",
        }
        for _ in range(ROWS)
    ]
    # Nothing but the end-of-document token stands before the choices of the first one.
    rows[0]["question"] = ""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "rows.jsonl").write_text(text)
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(out / "rows.jsonl")},
            "cache_dir": str(out / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write = {
        "task": "local_write",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "task": "local_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[0]}}. {{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    files = []
    for task in (choice, write, rolling):
        files.append(out / f"{task['task']}.yaml")
        files[-1].write_text(json.dumps({**shared, **task}))  # JSON is yaml
    return [str(path) for path in files]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_hf(run, folder)
    return folder


@pytest.fixture(scope="module")
def hflm(exported):
    """lm_eval's own class for transformers, with a folder's tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, KimiLinearForCausalLM

    model = KimiLinearForCausalLM.from_pretrained(exported, dtype=torch.float32)

    def build(folder, length):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=32, device="cpu"
        )

    return build


@pytest.fixture(scope="module")
def both(run, exported, tasks, hflm):
    """Results of all tasks through megakda on a run, and through transformers on its export."""
    theirs = hflm(exported, LENGTH)
    ours = MegakdaLM(path=str(run), max_length=LENGTH, batch_size="3", device="cuda:0")
    try:
        return {
            name: harness.run_tasks(model, harness.find_tasks(tasks))
            for name, model in (("us", ours), ("hf", theirs))
        }
    finally:
        ours.close()


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A tokenizer's folder: bytes, two special tokens and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (end,) = tokenizer["added_tokens"]
    tokenizer["added_tokens"].append({**end, "id": 257, "content": TURN})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["megakda_tokenizer"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def chats(exported, chat_tokenizer, tasks, hflm, tmp_path_factory):
    """Results of conversations through both, on the exported model with a chat template.

    Of choices, with an example as messages of its own, and of continuations of what the assistant
    has begun to say, with an example in the message of the question.
    """
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(exported, folder)
    shutil.copytree(chat_tokenizer, folder, dirs_exist_ok=True)
    changes = {
        "local_choice": {"description": f"Choose {TURN}."},
        "local_write": {
            "gen_prefix": "I say",
            "generation_kwargs": {"until": ["\n", TURN], "max_gen_toks": 4, "do_sample": False},
        },
    }
    files = {}
    for path in map(Path, tasks):
        task = json.loads(path.read_text())
        if task["task"] in changes:
            files[task["task"]] = str(folder / path.name)
            task |= {"fewshot_split": "test", "num_fewshot": 1, **changes[task["task"]]}
            Path(files[task["task"]]).write_text(json.dumps(task))
    ours = MegakdaLM(path=str(folder), max_length=CHAT_LENGTH)
    theirs = hflm(folder, CHAT_LENGTH)
    try:
        results = {}
        for task, multiturn in (("local_choice", None), ("local_write", False)):
            found = harness.find_tasks([files[task]], limit=CHATS)
            prompting = harness.Prompting(True, "Be brief.", multiturn)
            results[task] = [harness.run_tasks(m, found, prompting) for m in (ours, theirs)]
        return results
    finally:
        ours.close()


def samples(results, task):
    return [row["resps"] for row in results["samples"][task]]


def test_log_likelihoods_are_those_of_transformers(both):
    ours, theirs = (samples(both[name], "local_choice") for name in ("us", "hf"))
    assert len(ours) == len(theirs) == ROWS
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == CHOICES
        for ((x, greedy_x),), ((y, greedy_y),) in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=1e-4) and greedy_x == greedy_y
    assert len({x for row in ours for ((x, _),) in row}) > 10


def test_texts_longer_than_the_context_roll(both):
    ours, theirs = (samples(both[name], "local_rolling") for name in ("us", "hf"))
    for ((x,),), ((y,),) in zip(ours, theirs, strict=True):
        assert x == pytest.approx(y, rel=1e-6, abs=1e-4)
    texts = [row["arguments"][0][0] for row in both["us"]["samples"]["local_rolling"]]
    assert max(map(len, texts)) > 2 * LENGTH


def test_continuations_are_those_of_transformers(both):
    ours, theirs = (samples(both[name], "local_write") for name in ("us", "hf"))
    assert ours == theirs
    assert len({text for ((text,),) in ours}) > 3


def test_chats_are_those_of_transformers(chats):
    for task, results in chats.items():
        ours, theirs = (found["samples"][task] for found in results)
        assert len(ours) == len(theirs) == CHATS
        assert [row["arguments"] for row in ours] == [row["arguments"] for row in theirs]
    ours, theirs = (samples(found, "local_choice") for found in chats["local_choice"])
    for a, b in zip(ours, theirs, strict=True):
        for ((x, greedy_x),), ((y, greedy_y),) in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=1e-4) and greedy_x == greedy_y
    assert len({x for row in ours for ((x, _),) in row}) == CHATS * CHOICES
    ours, theirs = (samples(found, "local_write") for found in chats["local_write"])
    assert ours == theirs and all(text for ((text,),) in ours)


def test_how_conversations_look(chats):
    (choice, _), (write, _) = chats["local_choice"], chats["local_write"]
    prompts = [row["arguments"][0][0] for row in choice["samples"]["local_choice"]]
    for prompt in prompts:
        start = f"{TURN}system: Be brief.\n\nChoose {TURN}.{END}{TURN}user: "
        assert prompt.startswith(start) and prompt.endswith(f"{END}{TURN}assistant: ")
        assert prompt.count(f"{TURN}user: ") == 2
    lengths = [len(prompt.replace(TURN, "t").replace(END, "e")) for prompt in prompts]
    assert min(lengths) < CHAT_LENGTH < max(lengths)
    (prompt, _), *_ = write["samples"]["local_write"][0]["arguments"]
    assert prompt.count(f"{TURN}user: ") == 1
    assert prompt.endswith(f"{END}{TURN}assistant: I say")
    assert choice["fewshot_as_multiturn"] is True and write["fewshot_as_multiturn"] is False
    assert write["chat_template"] == CHAT and write["system_instruction"] == "Be brief."


def test_scores_are_those_of_transformers(both):
    ours, theirs = (both[name]["results"] for name in ("us", "hf"))
    assert ours.keys() == theirs.keys() == {"local_choice", "local_write", "local_rolling"}
    for task in ours:
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
    assert both["us"]["config"]["max_length"] == LENGTH


def test_result_files(both, tmp_path):
    harness.write_results(both["us"], tmp_path / "deep" / "out.json")
    content = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert content["results"]["local_choice"]["acc,none"] == pytest.approx(
        both["us"]["results"]["local_choice"]["acc,none"]
    )
    assert "samples" not in content
    lines = (tmp_path / "deep" / "out.samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 * ROWS and json.loads(lines[0])["task"] == "local_choice"
    assert "local_write" in harness.table(both["us"])
    names = {"a.json": "a", "kimi-1.3b": "kimi-1.3b", "kimi-1.3b.json": "kimi-1.3b"}
    for out, stem in names.items():
        assert harness.samples_file(tmp_path / out) == tmp_path / f"{stem}.samples.jsonl"


def test_the_registered_name():
    from lm_eval.api.registry import get_model

    assert get_model("megakda") is MegakdaLM


class Recording(Constant):
    """Remembers what it was asked."""

    def generate(self, prompts, params):
        self.prompts, self.params = prompts, params
        return super().generate(prompts, params)

    def score(self, sequences):
        self.scored = sequences
        return super().score(sequences)


def on(engine, **options):
    return MegakdaLM.on(engine, BYTE, "nowhere", **{"max_length": 20, **options})


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_how_continuations_are_asked_for():
    engine = Recording("text")
    model = on(engine, max_gen_toks=5, seed=7)
    asked = requests(
        "generate_until",
        ("a prompt longer than there is room for", {"until": "x"}),
        ("b", {"until": ["x", ""], "do_sample": True, "top_p": 0.5, "max_new_tokens": 3}),
        ("c", {"temperature": 0.3, "max_gen_toks": 2}),
        ("", {"temperature": 0.3, "do_sample": False}),
    )
    assert model.generate_until(asked, disable_tqdm=True) == ["text"] * 4
    first, second, third, fourth = engine.params
    assert engine.prompts[0] == BYTE.encode("a prompt longer than there is room for")[-15:]
    assert (first.temperature, first.max_tokens, first.stop) == (0.0, 5, ("x",))
    assert (second.temperature, second.top_p, second.max_tokens) == (1.0, 0.5, 3)
    assert second.stop == ("x",) and second.seed == 8
    assert (third.temperature, third.max_tokens, third.stop) == (0.3, 2, ())
    assert fourth.temperature == 0.0 and engine.prompts[3] == [256]
    with pytest.raises(ConfigError, match="num_beams of a task cannot be followed"):
        model.generate_until(requests("generate_until", ("a", {"num_beams": 2})))
    with pytest.raises(ConfigError, match="max_gen_toks=20 must be less than max_length=20"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 20})))


def test_equal_sequences_are_scored_once_and_long_ones_cut():
    engine = Recording()
    model = on(engine)
    pairs = [("context", " a"), ("context ", "a"), ("x" * 30, "tail"), ("context", " b")]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert engine.scored == [
        BYTE.encode("x" * 17 + "tail"),
        BYTE.encode("context a"),
        BYTE.encode("context b"),
    ]
    assert found == [(-2.0, True), (-2.0, True), (-4.0, True), (-2.0, True)]
    with pytest.raises(DataError, match="has no token of its own"):
        model.loglikelihood(requests("loglikelihood", ("a", "")), disable_tqdm=True)
    with pytest.raises(ConfigError, match="21 tokens is longer than max_length=20"):
        model.loglikelihood(requests("loglikelihood", ("a", "x" * 21)), disable_tqdm=True)


def test_arguments_that_cannot_work(tasks):
    with pytest.raises(ConfigError, match="prefix_token_id=300 must be in 0..256"):
        on(Constant(), prefix_token_id=300)
    with pytest.raises(ConfigError, match="max_batch_size=8: the engine fills its batches"):
        MegakdaLM(path="x", max_batch_size=8)
    with pytest.raises(ConfigError, match="batch_size='some' must be a whole number"):
        MegakdaLM(path="x", batch_size="some")
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        MegakdaLM(path="x", chat_template="none.jinja")
    with pytest.raises(ConfigError, match="give --apply-chat-template too"):
        harness.run_tasks(on(Constant()), None, harness.Prompting(fewshot_as_multiturn=True))
    for arguments, message in (
        ({"tasks": ["none.yaml"]}, "there is no such file"),
        ({"tasks": []}, "name at least one task"),
        ({"tasks": tasks, "include_path": "none"}, "include-path='none' is no folder"),
        ({"tasks": tasks, "limit": 0}, "limit=0 must be above 0"),
        ({"tasks": tasks, "num_fewshot": -1}, "num-fewshot=-1 must be at least 0"),
        ({"tasks": tasks, "num_fewshot": 2}, "task local_choice has no split to take examples"),
    ):
        with pytest.raises(ConfigError, match=message):
            harness.find_tasks(**arguments)


def ask(role, content=""):
    return {"role": role, "content": content}


def test_special_tokens_are_read_in_chats_alone(chat_tokenizer):
    tokenizer = load_tokenizer(f"hf:{chat_tokenizer}")
    engine = Recording("text")

    def prompt_of(model, until=()):
        asked = requests("generate_until", (f"{TURN}a", {"until": list(until), "max_gen_toks": 2}))
        model.generate_until(asked, disable_tqdm=True)
        return tokenizer.decode(engine.prompts[0]), engine.params[0].stop_token_ids

    names = set()
    for template in (None, CHAT, "{{ messages }}"):
        model = MegakdaLM.on(engine, tokenizer, "here", 20, chat_template=template)
        # What ends an answer never shows in its text, whatever the prompt is.
        assert prompt_of(model, [END, "x", "<|none|>"]) == (f"{TURN}a", (256,))
        assert model.chat_template(False) is None and prompt_of(model) == (f"{TURN}a", ())
        names.add(model.tokenizer_name)  # all that lm_eval asks for where it has cached prompts
        assert prompt_of(model) == ("a", ()) and engine.prompts[0][0] == 257
        assert model.chat_template(True) == model.chat_template("default") == (template or CHAT)
        model.loglikelihood(requests("loglikelihood", (f"{TURN}a", END)), disable_tqdm=True)
        assert engine.scored == [[257, ord("a"), 256]]
    assert len(names) == 2
    with pytest.raises(ConfigError, match="apply_chat_template='tools': .* the one named default"):
        model.chat_template("tools")


def test_templates_that_refuse(caplog):
    model = on(Constant())
    for asks in (
        lambda: model.apply_chat_template([ask("user", "a")]),
        lambda: model.chat_template(True),
        lambda: model.tokenizer_name,
    ):
        with pytest.raises(ConfigError, match="nowhere has no chat template; .*--chat-template FI"):
            asks()
    template = """
{%- if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif -%}
{%- for m in messages %}<{{ m.content }}>{% endfor %}{{ '!' if add_generation_prompt }}"""
    model = on(Constant(), chat_template=template)
    for _ in range(2):
        assert model.apply_chat_template([ask("system", "s"), ask("user", "u")]) == "<u>!"
    assert [record.getMessage() for record in caplog.records] == [
        "system messages are left out: the chat template says: a user begins"
    ]
    assert model.apply_chat_template([ask("user", "u"), ask("assistant", "a ")], False) == "<u><a "
    with pytest.raises(ConfigError, match="roles .'assistant'.: a user begins; name a template"):
        model.apply_chat_template([ask("assistant", "a")])
    with pytest.raises(ConfigError, match="leaves out the last message"):
        on(Constant(), chat_template="a").apply_chat_template([ask("user", "u")], False)


def test_names(tasks):
    from lm_eval.tasks import TaskManager

    folder = str(Path(tasks[0]).parent)
    manager = TaskManager(include_path=folder, include_defaults=False)
    model = on(Constant(), max_length=400)
    with pytest.raises(ConfigError, match="'local_choic' is no task .* near: local_choice"):
        harness.find_tasks(["local_choic"], manager=manager)
    found = harness.find_tasks(["local_c*", "local_choice"], limit=3, manager=manager)
    results = harness.run_tasks(model, found)
    assert {name: len(rows) for name, rows in results["samples"].items()} == {"local_choice": 3}


def test_data_that_is_not_there(tmp_path):
    task = {
        "task": "missing",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "none.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": 0,
    }
    path = tmp_path / "missing.yaml"
    path.write_text(json.dumps(task))
    with pytest.raises(DataError, match="missing.yaml: a task or its data cannot be read .File"):
        harness.find_tasks([str(path)])
