"""Generated long-context tests: exact lengths, facts and answers where they should be."""

from __future__ import annotations

import pytest

from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError
from megakda.evaluation.synthetic import (
    TASKS,
    NeedleTask,
    RecallTask,
    VariableTask,
    choose_tasks,
    make_sample,
)

BYTE = load_tokenizer("byte")
ALL = sorted(TASKS)


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A byte-level BPE tokenizer with merges, trained on some of the words that samples use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    samples = [make_sample(TASKS[name], BYTE, 3000) for name in ALL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([BYTE.decode(s.tokens) for s in samples], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )
    return load_tokenizer(f"hf:{folder}")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["bytes", "merges"])
def test_length_and_spans_are_exact(name, kind, merging):
    tokenizer = BYTE if kind == "bytes" else merging
    for length in (900, 1021, 4096):
        sample = make_sample(TASKS[name], tokenizer, length, seed=length)
        last = sample.questions[-1]
        assert last.prompt_end + last.room == length
        assert len(sample.tokens) <= length
        assert len(sample.tokens) == last.references[-1].end
        for question in sample.questions:
            assert question.references[0].start == question.prompt_end
            assert question.references[-1].end - question.prompt_end <= question.room
            for span in question.references:
                text = tokenizer.decode(sample.tokens[span.start : span.end])
                assert text.strip() == span.text
        for fact in sample.facts:
            text = tokenizer.decode(sample.tokens[fact.start : fact.end])
            assert text.strip() == fact.text
            assert fact.end <= sample.questions[0].prompt_end


@pytest.mark.parametrize("name", ALL)
def test_answers_follow_from_the_facts_alone(name):
    for index in range(4):
        sample = make_sample(TASKS[name], BYTE, 3000, index=index)
        prompt = BYTE.decode(sample.tokens[: sample.questions[0].prompt_end])
        told = " ".join(fact.text for fact in sample.facts)
        assert len(set(sample.facts)) == len(sample.facts)
        for fact in sample.facts:
            assert prompt.count(fact.text) == 1
        answers = [span.text for q in sample.questions for span in q.references]
        assert len(answers) == {
            "needle_multivalue": 4,
            "needle_multiquery": 4,
            "variable_tracking": 5,
            "associative_recall": 16,
        }.get(name, 1)
        for answer in answers:
            # Without the facts the text does not hold it: nothing can be guessed from the filler.
            assert prompt.count(answer) == told.count(answer) > 0


def test_samples_repeat_by_their_seed():
    for task in TASKS.values():
        first = make_sample(task, BYTE, 1200, seed=3)
        assert first == make_sample(task, BYTE, 1200, seed=3)
        others = {
            make_sample(task, BYTE, 1200, seed=seed, index=index).tokens
            for seed, index in ((3, 1), (4, 0), (0, 0))
        }
        assert len(others | {first.tokens}) == 4


@pytest.mark.parametrize("name", ["needle_single_1", "needle_single_2", "needle_multikey_1"])
def test_the_needle_is_at_its_depth(name):
    longest = 100  # tokens of any sentence
    for depth in (0, 0.1, 0.37, 0.5, 0.99, 1):
        sample = make_sample(TASKS[name], BYTE, 4000, depth=depth)
        (fact,) = sample.facts
        text = BYTE.decode(sample.tokens)
        first, end = text.index("Text:") + len("Text:"), text.index("\n\nQuestion:")
        # Other needles lie in the text too, and are not counted as haystack.
        others = 3 * (fact.end - fact.start) if name == "needle_multikey_1" else 0
        hay = end - first - (fact.end - fact.start)
        assert abs(fact.start - first - depth * hay) <= longest / 2 + others
        if depth == 0:
            assert fact.start - first <= others
        if depth == 1:
            assert end - fact.end <= others


def test_distractors_fill_the_haystack_of_needles():
    sample = make_sample(TASKS["needle_multikey_2"], BYTE, 4000, depth=0.5)
    text = BYTE.decode(sample.tokens)
    facts = text.count(" The secret number of")
    assert facts > 50
    keys = [part.split(" is ")[0] for part in text.split(" The secret number of ")[1:]]
    assert len(set(keys)) >= facts - 1  # the last one is cut, and may not even have its key


def test_recall_asks_soon_and_at_the_end():
    task = TASKS["associative_recall"]
    sample = make_sample(task, BYTE, 8000)
    pairs = len(sample.facts)
    assert 8 * sample.facts[-1].end >= 8000 > 8 * sample.facts[-2].end
    assert sample.questions[-1].references[0].end == 8000
    gaps = [question.prompt_end - sample.facts[-1].end for question in sample.questions]
    assert sorted(gaps) == gaps and gaps[len(gaps) // 2] < 0.3 * gaps[-1]
    assert pairs == 125
    fixed = make_sample(choose_tasks(["associative_recall"], pairs=5)[0], BYTE, 8000)
    assert len(fixed.facts) == len(fixed.questions) == 5


def test_variables_keep_the_order_of_their_chain():
    (task,) = choose_tasks(["variable_tracking"], chains=3, hops=2)
    for index in range(5):
        sample = make_sample(task, BYTE, 3000, index=index)
        names = [span.text for span in sample.questions[0].references]
        text = BYTE.decode(sample.tokens)
        places = [text.index(f" Let {name} be") for name in names]
        assert len(names) == 3 and places == sorted(places)
        assert text.count(" Let ") == 9
        assert f"be the value of {names[0]}." in text


def test_settings_replace_those_of_a_task():
    tasks = {
        task.name: task
        for task in choose_tasks(["all"], keys="numbers", values="words", haystack="repeat")
    }
    assert tasks.keys() == TASKS.keys()
    single, hard = tasks["needle_single_3"], tasks["needle_multikey_3"]
    assert isinstance(single, NeedleTask) and isinstance(hard, NeedleTask)
    assert (single.keys, single.values, single.haystack) == ("numbers", "words", "repeat")
    assert hard.haystack == "needles"
    (fact,) = make_sample(single, BYTE, 1000).facts
    key, value = fact.text.removeprefix("The secret word of ").removesuffix(".").split(" is ")
    assert key.isdigit() and value.count("-") == 2


def test_what_cannot_be_made():
    with pytest.raises(ConfigError, match="length=200 is too short for needle_multiquery.* takes"):
        make_sample(TASKS["needle_multiquery"], BYTE, 200)
    with pytest.raises(ConfigError, match="length=30 is too short for associative_recall"):
        make_sample(RecallTask("associative_recall", pairs=9), BYTE, 30)
    with pytest.raises(ConfigError, match="depth=1.5 must be between 0 and 1"):
        make_sample(TASKS["needle_single_1"], BYTE, 1000, depth=1.5)
    with pytest.raises(ConfigError, match="depth=0.5 must be None for variable_tracking"):
        make_sample(VariableTask("variable_tracking"), BYTE, 1000, depth=0.5)
    with pytest.raises(ConfigError, match="tasks='needle' must be all or of needle_single_1"):
        choose_tasks(["needle"])
    with pytest.raises(ConfigError, match="keys and values are one of words"):
        choose_tasks(["all"], keys="names")
    with pytest.raises(ConfigError, match="haystack='essay' must be one of repeat, text"):
        choose_tasks(["all"], haystack="essay")
    with pytest.raises(ConfigError, match="chains=0 must be at least 1"):
        choose_tasks(["all"], chains=0)
    with pytest.raises(ConfigError, match="name at least one"):
        choose_tasks([])
