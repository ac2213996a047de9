"""lm-eval's model interface over an engine, one adapter at a time, and what is asked of one asked of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from roadie.errors import ConfigError
from roadie.evaluation.asking import Answer, Asking
from roadie.evaluation.likelihoods import Likelihood, Pair, in_waves, questions_of, truncated
from roadie.serving.engine import MAX_STOP_STRINGS, AdapterWish, Engine, GenerationRequest, Sampling

MAX_GENERATED_TOKENS = 256
"""Of tasks that say nothing else; lm-eval's own number."""
SEED = 1234
WAVE_TOKENS = 512
"""Of each adapter, before a context comes again: about a step, and little of a cache, for one adapter as for many."""
_RULES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass
class Crowd:
    """All adapters, asked at once. What was asked before is not asked again."""

    engine: Engine
    tokenizer: Any
    wishes: Mapping[str, AdapterWish]
    on_answer: Callable[[int], None]
    _likelihoods: dict[Pair, dict[str, Likelihood]] = field(default_factory=dict)
    _texts: dict[tuple[tuple[tuple[int, ...], str], int], dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ids, self._num_answers = count(), 0

    def likelihoods(self, name: str, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Of one adapter."""
        asked = list(in_waves(questions_of(pair for pair in pairs if pair not in self._likelihoods), WAVE_TOKENS))
        answers = iter(
            self._ask(
                GenerationRequest(
                    self._id(), question.prompt_ids, wish, Sampling(max_tokens=0), scoring=question.scoring
                )
                for question in asked
                for wish in self.wishes.values()
            )
        )
        for question in asked:
            for each in self.wishes:
                found = question.answers(next(answers).prompt_logprobs)
                for pair, likelihood in zip(question.pairs, found, strict=True):
                    self._likelihoods.setdefault(pair, {})[each] = likelihood
        return [self._likelihoods[pair][name] for pair in pairs]

    def texts(self, name: str, prompts: Sequence[tuple[tuple[int, ...], Sampling]]) -> list[str]:
        """Of one adapter: continuations of prompts, each by its rules. Equal ones get seeds of their own."""
        times: Counter[tuple[tuple[int, ...], str]] = Counter()
        keyed = {}
        for prompt_ids, rules in prompts:
            prompt = prompt_ids, repr(rules)
            times[prompt] += 1
            keyed[prompt, times[prompt]] = prompt_ids, replace(rules, seed=SEED + times[prompt])
        asked = {key: prompt for key, prompt in keyed.items() if key not in self._texts}
        answers = iter(
            self._ask(
                GenerationRequest(self._id(), prompt_ids, wish, rules)
                for prompt_ids, rules in asked.values()
                for wish in self.wishes.values()
            )
        )
        for key in asked:
            self._texts[key] = {each: next(answers).text for each in self.wishes}
        return [self._texts[key][name] for key in keyed]

    def _id(self) -> str:
        return f"evaluation-{next(self._ids)}"

    def _ask(self, requests: Iterator[GenerationRequest]) -> list[Answer]:
        return Asking(self.engine, self._count).ask(requests)

    def _count(self) -> None:
        self._num_answers += 1
        self.on_answer(self._num_answers)


class AdapterLM(TemplateLM):
    """One adapter of a crowd, as lm-eval sees a model."""

    def __init__(self, crowd: Crowd, name: str) -> None:
        super().__init__()
        self._crowd, self._name = crowd, name
        self.tokenizer = crowd.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self._crowd.engine.limits.max_context_tokens

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own caches of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template has it, as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with the tokenizer's own around it, unless it has the first of them already."""
        has_first = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        special = not has_first if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[Likelihood]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return self._crowd.likelihoods(self._name, [truncated(pair, self.max_length) for pair in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows of what the model reads, each token once."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._crowd.likelihoods(self._name, [pair for each in windows for pair in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> list[Pair]:
        rolling = utils.get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [(tuple(context), tuple(scored)) for context, scored in map(utils.make_disjoint_window, rolling)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each by the rules of its task, up to what ends them."""
        asked = [self._prompt(*request.args) for request in requests]
        texts = self._crowd.texts(self._name, [(prompt_ids, rules) for prompt_ids, rules, _ in asked])
        return [postprocess_generated_text(text, until, None) for text, (_, _, until) in zip(texts, asked, strict=True)]

    def _prompt(self, context: str, given: Mapping[str, Any]) -> tuple[tuple[int, ...], Sampling, list[str]]:
        rules = dict(normalize_gen_kwargs(dict(given), MAX_GENERATED_TOKENS))
        until, max_tokens, _ = (
            [each for each in rules.pop("until") if each],
            rules.pop("max_gen_toks"),
            rules.pop("do_sample"),
        )
        unknown = [name for name in rules if name not in _RULES]
        if unknown:
            raise ConfigError(f"got {unknown[0]!r} in the generation_kwargs of a task; wanted {', '.join(_RULES)}")
        if max_tokens >= self.max_length:
            raise ConfigError(
                f"got a task that generates {max_tokens} tokens; wanted fewer than the {self.max_length} that the context holds"
            )
        sampling = Sampling(
            max_tokens=max_tokens, stop=tuple(until[:MAX_STOP_STRINGS]), **{"temperature": 0.0, **rules}
        )
        return tuple(self.tok_encode(context)[-(self.max_length - max_tokens) :]), sampling, until
