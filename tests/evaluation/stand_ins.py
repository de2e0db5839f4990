"""Engines that need no model: one that knows the answers, and one that looks them up."""

from __future__ import annotations

import re

from megakda.inference.request import Completion, TokenLogprob


class Constant:
    """Writes the same text whatever the prompt; the tokens it is shown have one rank."""

    def __init__(self, text="", rank=1):
        self.text, self.rank = text, rank

    def generate(self, prompts, params):
        return [
            Completion(list(prompt), text=self.text, finish_reason="stop") for prompt in prompts
        ]

    def score(self, sequences):
        return [
            [None, *(TokenLogprob(token, -float(self.rank), self.rank) for token in ids[1:])]
            for ids in sequences
        ]


class Reader(Constant):
    """Answers from the text of the prompt alone, and so only what can be known from it."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def generate(self, prompts, params):
        answers = []
        for prompt, one in zip(prompts, params, strict=True):
            text = self.answer(self.tokenizer.decode(prompt))
            assert len(self.tokenizer.encode(text)) <= one.max_tokens
            answers.append(Completion(list(prompt), text=text, finish_reason="stop"))
        return answers

    def answer(self, text):
        if "\n\nQuestion:" not in text:  # associative recall
            name = re.search(r"(\w+):$", text)[1]
            return re.search(rf"\b{name}:(\d+)", text)[1]
        told, question = text.split("\n\nQuestion:")
        variable = re.search(r"the value (\d+),", question)
        if variable:
            held = {variable[1]}
            for name, value in re.findall(r"Let (\w+) be (?:the value of )?(\w+)\.", told):
                held |= {name} if value in held else set()
            return " " + ", ".join(sorted(held - {variable[1]}))
        facts = re.findall(r"The secret \w+ of (\S+) is ([\w-]+)\.", told)
        return " " + ", ".join(value for key, value in facts if re.search(rf"\b{key}\b", question))
