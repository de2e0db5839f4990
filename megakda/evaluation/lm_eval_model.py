"""The model class for EleutherAI's lm_eval, on megakda's generator.

Importing this registers it as ``megakda``, and running it is lm_eval's own command line with it:

    python -m megakda.evaluation.lm_eval_model run --model megakda --model_args path=RUN --tasks ...

Encoding, truncation, rolling windows and chats are those of lm_eval's own Hugging Face class, so
that the same weights give the same scores through both.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import megakda.runtime
from megakda.config.schema import ParallelConfig, RuntimeConfig
from megakda.data.tokenizer import Tokenizer
from megakda.data.tokenizer_base import fingerprint_of
from megakda.errors import ConfigError, DataError, RuntimeMismatch
from megakda.evaluation.protocol import Generator
from megakda.inference.chat import ChatTemplate, Messages, find_template, read_template
from megakda.inference.request import SamplingParams
from megakda.runtime.distributed import rank

try:
    from jinja2 import TemplateError
    from lm_eval import utils as lm_eval_utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise RuntimeMismatch(
        f"lm_eval tasks need the lm_eval package ({error}): pip install 'megakda[eval]'"
    ) from error

DEFAULT_MAX_LENGTH = 4096
_TOGETHER = 256  # requests handed to the engine at once

_OTHER_TEMPLATE = (
    "name a template with --chat-template FILE (chat_template=FILE in lm_eval's --model_args)"
)
_log = logging.getLogger(__name__)

_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("megakda")
class MegakdaLM(TemplateLM):
    """A megakda model for lm_eval: log-likelihoods, rolling ones, and continuations.

    Under tensor and pipeline parallelism every rank evaluates the same requests; lm_eval sees one
    process on each.

    Special tokens spelled out in a text are plain text, until lm_eval asks for chats
    (`apply_chat_template`): from then on they are single tokens, in all texts, because a context
    from lm_eval no longer shows what of it the template wrote. No other tokens are added: a
    template that begins with bos_token has to write it. lm_eval's Hugging Face class reads special
    tokens in all evaluations.

    Args:
        path: a run's folder, a checkpoint, or a Hugging Face folder.
        tensor, pipeline, expert: layout, under torchrun.
        device: "cpu", "cuda", or None for what there is.
        precision: "fp32" or "bf16"; None for that of the checkpoint.
        tokenizer: another one than the checkpoint names.
        batch_size: sequences at the same time; "auto" means 16.
        max_length: tokens of context and continuation; longer ones lose their beginning.
        max_gen_toks: new tokens where a task does not say.
        prefix_token_id: what stands before a text without context; None for the token that ends
            documents. lm_eval's Hugging Face class takes the bos_token of tokenizers that have one.
        seed: of sampled continuations.
        chat_template: a Jinja file, in the place of the tokenizer's own chat template.
        max_batch_size: accepted because lm_eval passes it; has to be None.

    Raises:
        ConfigError: an argument that cannot work.
        MegakdaError: a model that cannot be loaded, see `megakda.inference.loading.open_model`.
    """

    def __init__(
        self,
        path: str,
        tensor: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        device: str | None = None,
        precision: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 16,
        max_length: int = DEFAULT_MAX_LENGTH,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        seed: int = 0,
        chat_template: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        sequences = 16 if batch_size == "auto" else _whole("batch_size", batch_size)
        length = _whole("max_length", max_length)
        if max_batch_size is not None:
            raise ConfigError(
                f"max_batch_size={max_batch_size}: the engine fills its batches itself; use "
                "batch_size, the number of sequences at the same time"
            )
        template = None if chat_template is None else read_template(Path(chat_template))
        # "cuda:0" is what lm_eval's command line says where nobody has said anything.
        runtime = RuntimeConfig(device="auto" if device in (None, "cuda:0") else device)
        where = megakda.runtime.install(runtime.device)
        from megakda.inference.engine import Engine, EngineSettings
        from megakda.inference.loading import open_model

        # lm_eval has no call for a model's end; `close` may come earlier.
        self._open = contextlib.ExitStack()
        atexit.register(self._open.close)
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
        loaded = self._open.enter_context(
            open_model(
                path, parallel, runtime, device=where, precision=precision, tokenizer=tokenizer
            )
        )
        engine = Engine(loaded, EngineSettings(max_sequences=sequences, max_context=length + 1))
        self._source = str(loaded.source)
        self._start(engine, loaded.tokenizer, length, max_gen_toks, prefix_token_id, seed, template)

    @classmethod
    def on(
        cls,
        engine: Generator,
        tokenizer: Tokenizer,
        source: str,
        max_length: int = DEFAULT_MAX_LENGTH,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        seed: int = 0,
        chat_template: str | None = None,
    ) -> MegakdaLM:
        """The same on an engine that is there already, for `max_length` + 1 tokens at least.

        `chat_template` is the template here, as `megakda.inference.chat.read_template` returns it.
        """
        model = cls.__new__(cls)
        model._open = contextlib.ExitStack()
        model._source = source
        model._start(
            engine, tokenizer, max_length, max_gen_toks, prefix_token_id, seed, chat_template
        )
        return model

    def _start(
        self,
        engine: Generator,
        tokenizer: Tokenizer,
        max_length: int,
        max_gen_toks: int,
        prefix_token_id: int | None,
        seed: int,
        template: str | None,
    ) -> None:
        super().__init__()
        self._engine, self._tokenizer = engine, tokenizer
        self._given_template = template
        self._chats: ChatTemplate | None = None  # set once lm_eval has asked for chats
        self._system_left_out = False
        self.max_length, self.max_gen_toks, self._seed = max_length, max_gen_toks, seed
        self._prefix = tokenizer.eod if prefix_token_id is None else prefix_token_id
        if not 0 <= self._prefix < tokenizer.vocab_size:
            raise ConfigError(
                f"prefix_token_id={prefix_token_id} must be in 0..{tokenizer.vocab_size - 1}"
            )

    def close(self) -> None:
        """Frees the model's process groups."""
        self._open.close()

    # ------------------------------------------------------------------ what lm_eval asks

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval keeps prompts by that it has in its cache; it asks for chats alone."""
        template = self._begin_chats().source
        return fingerprint_of(self._tokenizer.fingerprint.encode(), template.encode())

    def get_model_info(self) -> dict[str, Any]:
        """Facts for lm_eval's results file."""
        return {
            "model_source": self._source,
            "tokenizer": self._tokenizer.spec,
            "max_length": self.max_length,
            "prefix_token_id": self._prefix,
        }

    def apply_chat_template(
        self, chat_history: Messages, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text.

        A template that refuses the conversation gets it without system messages, with a warning, as
        in lm_eval's Hugging Face class: templates without a system role do this.

        Args:
            add_generation_prompt: up to where the assistant's next message begins; or else up to
                the end of the last message, which is to be continued.

        Raises:
            ConfigError: the model has no template, or one that refuses this too.
        """
        template = self._begin_chats()
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            try:
                return template.text(chat_history, not add_generation_prompt)
            except TemplateError as error:
                if len(others) == len(chat_history):
                    raise
                text = template.text(others, not add_generation_prompt)
                if not self._system_left_out and rank() == 0:
                    _log.warning("system messages are left out: the chat template says: %s", error)
                self._system_left_out = True
                return text
        except Exception as error:  # templates raise what they like
            raise ConfigError(
                f"the chat template of {self._source} cannot render a conversation of roles "
                f"{[message['role'] for message in chat_history]}: {error}; {_OTHER_TEMPLATE}"
            ) from error

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template; None where lm_eval is to apply none.

        Raises:
            ConfigError: the model has none, or not one of this name.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str) and chat_template != "default":
            raise ConfigError(
                f"apply_chat_template={chat_template!r}: of several templates megakda takes the "
                f"one named default; leave the name out, or {_OTHER_TEMPLATE}"
            )
        return self._begin_chats().source

    def _begin_chats(self) -> ChatTemplate:
        """The chat template. From now on special tokens are read in texts.

        All that lm_eval calls for chats comes here: with prompts from its cache it never has a
        conversation rendered.
        """
        if self._chats is None:
            self._chats = find_template(self._tokenizer, self._given_template)
        if self._chats is None:
            raise ConfigError(
                f"apply_chat_template: the model {self._source} has no chat template; leave the "
                f"option out, or {_OTHER_TEMPLATE}"
            )
        return self._chats

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens:
            raise ConfigError("add_special_tokens=True: megakda's tokenizers add none")
        if self._chats is not None:
            return self._tokenizer.encode_with_special(string)
        return self._tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request's continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm or rank() != 0)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Sum of the log-probabilities of whole texts, in disjoint windows where they are long."""
        pieces: list[_Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in lm_eval_utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                pieces.append((None, *lm_eval_utils.make_disjoint_window(window)))
                owners.append(owner)
        sums: list[list[float]] = [[] for _ in requests]
        scored = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            sums[owner].append(logprob)
        totals = [math.fsum(parts) for parts in sums]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same of tokens, as `TemplateLM.loglikelihood` encodes them."""
        inputs = []
        for texts, context, continuation in requests:
            if not continuation:
                raise DataError(
                    f"the continuation of {texts!r} has no token of its own: put the blank between "
                    "the two at the start of the continuation (target_delimiter of the task)"
                )
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length="
                    f"{self.max_length}: set a larger max_length"
                )
            # One token more than max_length: the last one is only predicted.
            inputs.append(tuple([*context, *continuation][-(self.max_length + 1) :]))
        # Equal sequences once; long ones first, so that the time shown as left is not too short.
        unique = sorted(set(inputs), key=lambda ids: (-len(ids), ids))
        logprobs: dict[tuple[int, ...], list[tuple[float, bool]]] = {}
        with self._bar(len(unique), "log-likelihoods", disable_tqdm) as bar:
            for batch in _in_batches(unique):
                for ids, scored in zip(
                    batch, self._engine.score([list(ids) for ids in batch]), strict=True
                ):
                    logprobs[ids] = [(s.logprob, s.rank == 1) for s in scored if s is not None]
                bar.update(len(batch))
        answers = []
        for (texts, _, continuation), ids in zip(requests, inputs, strict=True):
            counted = logprobs[ids][len(logprobs[ids]) - len(continuation) :]
            answer = (math.fsum(x for x, _ in counted), all(greedy for _, greedy in counted))
            if texts is not None:  # rolling windows are remembered as whole texts
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            answers.append(answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, which is left out."""
        answers: list[str] = []
        with self._bar(len(requests), "continuations", disable_tqdm) as bar:
            for batch in _in_batches(requests):
                asked = [self._ask(request, len(answers) + i) for i, request in enumerate(batch)]
                done = self._engine.generate([p for p, _ in asked], [s for _, s in asked])
                for request, completion in zip(batch, done, strict=True):
                    answers.append(completion.text)
                    self.cache_hook.add_partial("generate_until", request.args, completion.text)
                bar.update(len(batch))
        return answers

    def _ask(self, request: Instance, number: int) -> tuple[list[int], SamplingParams]:
        """A prompt, cut from the left to leave room, and how to continue it."""
        context, asked = request.args
        options = dict(asked)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [options.pop(name, None) for name in names]
        room = int(next((n for n in given if n is not None), self.max_gen_toks))
        # lm_eval's rule: greedy unless do_sample says otherwise or there is a temperature.
        temperature = options.pop("temperature", None)
        do_sample = options.pop("do_sample", None)
        if do_sample is None:
            do_sample = bool(temperature)
        known = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        chosen = {name: options.pop(name, value) for name, value in known.items()}
        if options:
            raise ConfigError(
                f"generation_kwargs: {', '.join(map(str, options))} of a task cannot be followed; "
                "known are until, do_sample, temperature, max_gen_toks, "
                f"{', '.join(known)}"
            )
        if room >= self.max_length:
            raise ConfigError(
                f"max_gen_toks={room} must be less than max_length={self.max_length}: set a larger "
                "max_length"
            )
        params = SamplingParams(
            max_tokens=room,
            temperature=float(1.0 if temperature is None else temperature) if do_sample else 0.0,
            stop=tuple(text for text in until if text),
            stop_token_ids=self._special_tokens(until),
            seed=self._seed + number,
            **chosen,
        )
        prompt = self.tok_encode(context)[-(self.max_length - room) :]
        return prompt or [self.prefix_token_id], params

    def _special_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Of the texts that end an answer, those that are tokens which its text never shows."""
        ids = [self._tokenizer.encode_with_special(text) for text in texts]
        return tuple(i[0] for i in ids if len(i) == 1 and not self._tokenizer.decode(i))

    def _bar(self, total: int, what: str, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or rank() != 0, leave=False)


def _in_batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[i : i + _TOGETHER] for i in range(0, len(items), _TOGETHER))


def _whole(name: str, value: int | str) -> int:
    """lm_eval hands over numbers from a command line as text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number, at least 1")
    return number


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
