"""The generator against training's own forward pass, with everything that batches can do to it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from megakda.errors import ConfigError, MegakdaError
from megakda.inference.engine import Engine, EngineSettings
from megakda.inference.request import SamplingParams
from tests.inference.models import full_logprobs, random_model, random_prompts

VARIANTS = {
    "kda": [],
    "gdn": ["model.linear.mixer=gdn"],
    "bounded": ["model.linear.gate=bounded"],
    "swish": ["model.linear.output_gate=swish"],
    "no-gate": ["model.linear.output_gate=none"],
    "no-conv": ["model.linear.conv_kernel=0"],
    "conv-8": ["model.linear.conv_kernel=8"],
    "no-full-layer": ["model.pattern=1:0", "model.last_layer_full=false"],
    "full-rope": ["model.pattern=0:1", "model.mla.rope=true"],
    "hybrid-rope": ["model.mla.rope=true"],
    "dense": ["model.ffn=dense"],
    "query-latent": ["model.mla.q_lora_rank=24"],
    "groups": ["model.moe.num_groups=4", "model.moe.top_groups=2"],
}
SETTINGS = EngineSettings(
    max_sequences=3, max_context=640, prefill_chunk=37, prefix_slots=3, page_size=16
)
CLOSE = 1e-5
FREE = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)


@pytest.fixture
def model():
    with random_model() as found:
        yield found


def distance(model, answer) -> float:
    """The largest difference between reported log-probabilities and the full forward pass's."""
    truth = full_logprobs(model, answer.prompt + answer.tokens)
    start = len(answer.prompt) - 1
    pairs = [(truth[start + i], x) for i, x in enumerate(answer.logprobs)]
    if answer.prompt_logprobs is not None:
        assert answer.prompt_logprobs[0] is None
        pairs += [(truth[i], x) for i, x in enumerate(answer.prompt_logprobs[1:])]
    worst = 0.0
    for row, x in pairs:
        worst = max(worst, abs(float(row[x.token]) - x.logprob))
        for token, logprob in x.top:
            worst = max(worst, abs(float(row[token]) - logprob))
        # Tokens that are as likely, but for rounding, may stand on either side.
        first = int((row > x.logprob + CLOSE).sum()) + 1
        last = int((row > x.logprob - CLOSE).sum())
        assert first <= x.rank <= max(first, last)
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_training(variant):
    """Every mixer: ragged prompts, more of them than slots, in chunks, with shared beginnings; one
    answer of 512 tokens while the others come and go."""
    shared = random_prompts([50])[0]
    prompts = random_prompts([1, 2, 16, 45, 80], seed=1)
    prompts += [shared + prompt[:20] for prompt in prompts]
    prompts.append(list(prompts[-1]))
    params = [
        replace(
            FREE,
            max_tokens=15 + n if n else 512,
            temperature=0.9 * (n % 2),
            seed=n,
            logprobs=3 if n else 20,
            prompt_logprobs=2 if n % 3 == 0 else None,
        )
        for n in range(len(prompts))
    ]
    # Logits of up to about 5; at twice as much, rounding alone comes near to the tolerance.
    with random_model(VARIANTS[variant], std=0.05) as model:
        engine = Engine(model, SETTINGS)
        answers = engine.generate(prompts, params)
        assert max(distance(model, answer) for answer in answers) < CLOSE
        assert [len(answer.tokens) for answer in answers] == [p.max_tokens for p in params]
        assert sum(answer.cached_tokens for answer in answers) >= 50
        engine.clear_prefixes()
        stats = engine.stats()
        assert (stats.free_sequences, stats.cache_tokens_used, stats.running) == (3, 0, 0)


@pytest.mark.parametrize("variant", ["kda", "gdn", "groups", "query-latent"])
def test_a_lean_model_computes_what_training_does(variant):
    """The same weights with and without what `make_lean` changes, in one truth of training's."""
    prompts = random_prompts([1, 40, 70])
    with random_model(VARIANTS[variant], std=0.05) as model:
        answers = Engine(model, SETTINGS).generate(prompts, replace(FREE, prompt_logprobs=1))
    with random_model(VARIANTS[variant], std=0.05, lean=False) as model:
        assert type(model.chunk.output_layer).__name__ == "ColumnParallelLinear"
        assert max(distance(model, answer) for answer in answers) < CLOSE


def test_weights_of_a_lean_model_may_change():
    """In place the joint weight sees it; a parameter with another tensor is not overlooked."""
    (prompt,) = random_prompts([20])
    with random_model() as model:
        engine = Engine(model, SETTINGS)
        mixer = model.chunk.decoder.layers[0].self_attention
        for change in ("in place", "another tensor"):
            for linear in mixer.joint_projections:
                if change == "in place":
                    linear.weight.data.mul_(0.7)
                else:
                    linear.weight.data = linear.weight.data * 0.7
            engine.clear_prefixes()
            answer = engine.generate([prompt], FREE)[0]
            with torch.enable_grad():  # takes the parameters themselves
                ids = torch.tensor([answer.prompt + answer.tokens])
                logits = model.chunk(ids, torch.arange(ids.shape[1])[None], None)[0]
            truth = logits.detach().log_softmax(-1)[len(prompt) - 1 :]
            for row, x in zip(truth, answer.logprobs, strict=False):
                assert abs(float(row[x.token]) - x.logprob) < CLOSE, change


def test_a_model_is_freed_with_its_last_reference():
    """Without waiting for the garbage collector: the next one may need the memory."""
    with random_model() as model:
        Engine(model, SETTINGS).generate([[1, 2, 3]], FREE)
        weight = weakref.ref(model.chunk.decoder.layers[1].self_attention.q_proj.weight)
        gc.collect()
        gc.disable()
        try:
            del model
        finally:
            gc.enable()
    assert weight() is None


def test_an_interrupted_step_leaves_nothing_behind(model):
    """Its states may be a token ahead of what is known: the requests end, and others are right."""
    prompts = random_prompts([50, 60])
    greedy = replace(FREE, temperature=0.0)
    engine = Engine(model, SETTINGS)
    expected = engine.generate(prompts, greedy)
    engine.clear_prefixes()
    choose, calls = engine._chooser.choose, []

    def interrupted(*arguments):
        calls.append(choose(*arguments))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    engine._chooser.choose = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, greedy)
    assert not engine.busy and engine.stats().free_sequences == 3
    again = engine.generate(prompts, greedy)
    assert [x.tokens for x in again] == [x.tokens for x in expected]
    assert max(distance(model, answer) for answer in again) < CLOSE


def test_ids_that_the_tokenizer_does_not_know(model):
    """The model has 320, the byte tokenizer 257: a prompt may hold the others, no answer does."""
    params = replace(FREE, repetition_penalty=1.5, temperature=1.0, seed=1, max_tokens=50)
    answer = Engine(model, SETTINGS).generate([[1, 300, 319]], params)[0]
    assert len(answer.tokens) == 50 and max(answer.tokens) < 257


def test_a_failure_of_the_choice_ends_the_requests_and_not_the_engine(model, monkeypatch):
    engine = Engine(model, SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("megakda.inference.choosing.choose_tokens", lambda *_: 1 / 0)
        with pytest.raises(MegakdaError, match="choosing tokens failed: ZeroDivisionError"):
            engine.generate([[1, 2]], FREE)
    assert len(engine.generate([[1, 2]], FREE)[0].tokens) == FREE.max_tokens


def test_a_request_repeats_whatever_else_is_in_the_batch(model):
    prompts = random_prompts([12, 70, 3, 25])
    params = [replace(FREE, temperature=1.1, top_p=0.9, seed=n) for n in range(4)]
    together = Engine(model, SETTINGS).generate(prompts, params)
    for prompt, one, expected in zip(prompts, params, together, strict=True):
        settings = replace(SETTINGS, max_sequences=1, prefill_chunk=7, prefix_slots=0)
        assert Engine(model, settings).generate([prompt], one)[0].tokens == expected.tokens


def test_without_a_seed_answers_differ(model):
    prompts = random_prompts([5]) * 2
    first, second = Engine(model, SETTINGS).generate(prompts, replace(FREE, temperature=1.0))
    assert first.tokens != second.tokens


def test_requests_come_and_go(model):
    """New ones join a running batch, cancelled ones leave it, and nothing of it shows."""
    prompts = random_prompts([40, 8, 21, 60, 4])
    greedy = replace(FREE, temperature=0.0, max_tokens=30)
    expected = Engine(model, SETTINGS).generate(prompts, greedy)

    engine = Engine(model, replace(SETTINGS, max_sequences=2))
    found: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    waiting = [engine.submit(prompts[0], greedy), engine.submit(prompts[1], greedy)]
    for step in range(200):
        for update in engine.step():
            found.setdefault(update.request, []).extend(update.tokens)
            if update.finish_reason:
                ended[update.request] = update.finish_reason
        if step == 4:
            waiting += [engine.submit(prompt, greedy) for prompt in prompts[2:]]
        if step == 9:
            engine.cancel(waiting[0])  # running
            engine.cancel(waiting[4])  # waiting
    assert not engine.busy
    assert ended == dict(enumerate(["cancelled", "length", "length", "length", "cancelled"]))
    for number in (1, 2, 3):
        assert found[number] == expected[number].tokens
    assert found[0] == expected[0].tokens[: len(found[0])] and 0 < len(found[0]) < 30
    engine.cancel(waiting[1])  # long over
    assert not engine.busy and engine.stats().free_sequences == 2


def test_room_for_the_longest_answer_is_kept(model):
    """Few pages: requests wait instead of being thrown out half-way, and prefixes give way."""
    prompts = random_prompts([30, 30, 30, 30])
    settings = replace(SETTINGS, cache_tokens=96, max_context=96)
    engine = Engine(model, settings)
    numbers = [engine.submit(prompt, FREE) for prompt in prompts]
    most, ended = 0, set()
    while engine.busy:
        ended |= {u.request for u in engine.step() if u.finish_reason == "length"}
        stats = engine.stats()
        most = max(most, stats.running)
        assert stats.cache_tokens_used <= 96
    assert ended == set(numbers) and most == 1  # of 64 tokens each, two would not fit


def test_prefixes_stay_where_dropping_them_would_not_help(model):
    """A request that has to wait for a running one takes nothing from the saved prefixes."""
    engine = Engine(model, replace(SETTINGS, cache_tokens=192, max_context=160))
    engine.generate(random_prompts([20, 22]), replace(FREE, max_tokens=2))
    saved = engine.stats().prefixes
    engine.submit(random_prompts([60], seed=3)[0], replace(FREE, max_tokens=60))
    engine.step()
    engine.submit(random_prompts([70], seed=4)[0], replace(FREE, max_tokens=60))
    engine.step()
    assert saved == 2 and engine.stats().prefixes >= saved
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    while engine.busy:
        engine.step()
    assert engine.stats().free_sequences == 3


def test_stop_texts_tokens_and_document_ends(model):
    (prompt,) = random_prompts([10])
    engine = Engine(model, SETTINGS)
    greedy = replace(FREE, temperature=0.0, max_tokens=40)
    whole = engine.generate([prompt], greedy)[0]
    assert whole.finish_reason == "length"

    marks = [n for n, t in enumerate(whole.tokens) if 32 < t < 127 and n > 3]
    stop = chr(whole.tokens[marks[0]])
    by_text = engine.generate([prompt], replace(greedy, stop=("never there", stop)))[0]
    first = whole.text.index(stop)
    assert by_text.finish_reason == "stop" and by_text.text == whole.text[:first]

    token = whole.tokens[12]
    by_token = engine.generate([prompt], replace(greedy, stop_token_ids=(token,)))[0]
    assert by_token.finish_reason == "stop"
    assert by_token.tokens == whole.tokens[: whole.tokens.index(token) + 1]

    ends = replace(model, end_tokens=frozenset({token}))
    by_end = Engine(ends, SETTINGS).generate([prompt], replace(greedy, ignore_eos=False))[0]
    assert (by_end.tokens, by_end.finish_reason) == (by_token.tokens, "stop")


def test_streaming_gives_the_same_text_and_can_be_left(model):
    (prompt,) = random_prompts([10])
    engine = Engine(model, SETTINGS)
    params = replace(FREE, temperature=0.8, seed=3, max_tokens=25)
    whole = engine.generate([prompt], params)[0]
    updates = list(engine.stream(prompt, params))
    assert "".join(update.text for update in updates) == whole.text
    assert updates[-1].finish_reason == "length"

    stream = engine.stream(prompt, params)
    next(stream)
    with pytest.raises(ConfigError, match="busy with other requests"):
        engine.generate([prompt], params)  # it would take the stream's updates
    with pytest.raises(ConfigError, match="busy with other requests"):
        next(engine.stream(prompt, params))
    stream.close()
    assert not engine.busy and engine.stats().free_sequences == 3


def test_scores(model):
    sequences = random_prompts([1, 30, 77])
    engine = Engine(model, SETTINGS)
    for sequence, scores in zip(sequences, engine.score(sequences), strict=True):
        truth = full_logprobs(model, sequence)
        assert scores[0] is None and len(scores) == len(sequence)
        for place, score in enumerate(scores[1:]):
            row = truth[place]
            assert score.token == sequence[place + 1]
            assert score.logprob == pytest.approx(float(row[score.token]), abs=CLOSE)
            assert (score.rank == 1) == (int(row.argmax()) == score.token)


def test_prefixes_are_saved_where_prompts_part(model):
    """The second prompt of a kind marks the place, the third begins there."""
    shared = random_prompts([41])[0]
    tails = random_prompts([9, 12, 10], seed=2)
    engine = Engine(model, SETTINGS)
    cached = []
    for tail in tails:
        answer = engine.generate([shared + tail], FREE)[0]
        assert distance(model, answer) < CLOSE
        cached.append(answer.cached_tokens)
    assert cached == [0, 0, 41]
    again = engine.generate([shared + tails[2]], FREE)[0]
    assert again.cached_tokens == len(again.prompt) - 1  # all but the token that is needed
    assert distance(model, again) < CLOSE
    assert (
        engine.generate([shared + tails[0]], replace(FREE, cache_prefix=False))[0].cached_tokens
        == 0
    )


def test_a_place_that_a_prefix_has_passed_holds_nobody_up(model):
    """Going on from a long prefix, a prompt never meets the shorter one it shares with others."""
    (long,) = random_prompts([90])
    tails = random_prompts([20, 20], seed=5)
    engine = Engine(model, SETTINGS)
    engine.generate([long], FREE)
    engine._prefixes._recent.clear()  # as after many other prompts
    engine.generate([long[:30] + tails[0]], FREE)
    for prompt in (long, long[:35] + tails[1]):
        engine.submit(prompt, FREE)
    engine.step()
    assert engine.stats().running == 2


def test_the_same_prompt_many_times_is_computed_once(model):
    (prompt,) = random_prompts([90])
    engine = Engine(model, SETTINGS)
    params = [replace(FREE, temperature=1.0, seed=n) for n in range(6)]
    answers = engine.generate([prompt] * 6, params)
    assert engine.stats().prompt_tokens == 90 + 5
    assert all(distance(model, answer) < CLOSE for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == 6


BAD = {
    "empty": ([], {}, "the prompt is empty"),
    "token": ([3, 400], {}, "those from 0 to 319"),
    "negative": ([-1], {}, "those from 0 to 319"),
    "long": ([1] * 600, {"max_tokens": 50}, "more than max_context=640"),
    "temperature": ([1], {"temperature": -0.1}, "temperature=-0.1 must be"),
    "top_p": ([1], {"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    "top_k": ([1], {"top_k": -1}, "top_k=-1"),
    "min_p": ([1], {"min_p": 1.0}, "min_p=1.0"),
    "penalty": ([1], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    "stop": ([1], {"stop": ("",)}, "stop"),
    "stop_text": ([1], {"stop": "ab"}, "stop='ab' must be a tuple"),
    "seed": ([1], {"seed": -1}, "seed=-1"),
    "logprobs": ([1], {"logprobs": 21}, "logprobs=21"),
    "max_tokens": ([1], {"max_tokens": -1}, "max_tokens=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_any_work(model, case):
    prompt, changes, message = BAD[case]
    engine = Engine(model, SETTINGS)
    with pytest.raises(ConfigError, match=message):
        engine.generate([[1, 2], prompt], [FREE, replace(FREE, **changes)])
    assert not engine.busy


def test_bad_settings():
    for changes in ({"max_sequences": 0}, {"max_context": 1}, {"page_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            replace(SETTINGS, **changes).check()
    with pytest.raises(ConfigError, match="cache_tokens=8 must be at least page_size=16"):
        replace(SETTINGS, cache_tokens=8).check()


def test_damaged_weights_are_noticed():
    with random_model(["model.ffn=dense"]) as model:
        model.chunk.decoder.final_layernorm.weight.data[0] = torch.nan
        with pytest.raises(MegakdaError, match="logits are not finite"):
            Engine(model, SETTINGS).generate([[1, 2, 3]], FREE)


def test_bf16_stays_close_to_the_full_forward():
    """Not to rounding, but to what bf16 can tell: three digits of logits of up to 5."""
    with random_model(["precision=bf16"], std=0.05) as model:
        greedy = replace(FREE, temperature=0.0, max_tokens=40)
        answer = Engine(model, SETTINGS).generate(random_prompts([30]), greedy)[0]
        truth = full_logprobs(model, answer.prompt + answer.tokens)[29:]
    pairs = zip(truth, answer.logprobs, strict=False)
    errors = [abs(float(row[x.token]) - x.logprob) for row, x in pairs]
    assert sum(errors) / len(errors) < 0.03 and max(errors) < 0.15
