"""Generates text and keeps the route that predicted each token, and the speed.

Shape letters: P prompt tokens, G generated tokens, L layers, D hidden, T tokens, B batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy

Show = Callable[[str, float], None]
"""Told of each piece of text as soon as it is there, and of the share of big layers that its last token cost."""


@dataclass(frozen=True)
class Generated:
    """The tokens generated after a prompt.

    Attributes:
        tokens_G: the token ids.
        routes_GL: the routes that predicted them, each that of the token before.
        prompt_routes_PL: the routes of the prompt's tokens. The last one predicted the first new token.
        tokens_per_second: speed, without the time for reading the prompt and for showing the text.
    """

    tokens_G: list[int]
    routes_GL: Tensor
    prompt_routes_PL: Tensor
    tokens_per_second: float


@torch.inference_mode()
def generate_traced(
    model: DuoForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt_P: Tensor,
    policy: Policy,
    settings: GenerationConfig,
    show: Show = lambda piece, share: None,
) -> Generated:
    """Continue one prompt under a policy. Beam search calls `show` at the end, other ways after each token."""
    model(prompt_P[None, :1])  # the first forward reads the weights from the file; not timed
    trace = _Trace(tokenizer, show)
    one_by_one = (settings.num_beams or 1) == 1
    listening = model.register_forward_hook(trace.heard)
    generate = cast(Any, model).generate  # transformers' type wants a class of its own for self
    start = time.perf_counter()
    try:
        ids = generate(prompt_P[None], settings, policy=policy, streamer=trace if one_by_one else None)[0]
    finally:
        listening.remove()
    seconds = time.perf_counter() - start
    tokens_G = ids[len(prompt_P) :].tolist()
    if one_by_one:
        routes_TL, speed = torch.cat(trace.routes), trace.tokens_per_second
    else:  # the forwards were of many beams; the one that won is run again
        routes_TL, speed = model(ids[None, :-1], policy=policy).routes[0], len(tokens_G) / seconds
        trace.show_all(tokens_G, routes_TL[-len(tokens_G) :])
        trace.end()
    return Generated(tokens_G, routes_TL[-len(tokens_G) :], routes_TL[: len(prompt_P)], speed)


class _Trace(BaseStreamer):
    """Listens to forwards for routes and to `generate` for tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, show: Show) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.held: list[tuple[int, float]] = []
        self.routes: list[Tensor] = []
        self.seconds: list[float] = []
        self.mark: float | None = None

    def heard(self, model: Any, inputs: Any, output: Any) -> None:
        """Keep the routes of a forward."""
        self.routes.append(output.routes[0])

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then token after token."""
        if self.mark is not None:
            self.seconds.append(time.perf_counter() - self.mark)
            self.show_all(value.tolist(), self.routes[-1][-1:])
        self.mark = time.perf_counter()

    def show_all(self, tokens_G: list[int], routes_GL: Tensor) -> None:
        """Show tokens, in pieces that are whole characters."""
        shares_G = (routes_GL == Branch.BIG).double().mean(-1).tolist()
        for token, share in zip(tokens_G, shares_G, strict=True):
            piece = self.decoder.step(self.tokenizer.backend_tokenizer, token)
            self.held = [] if piece is not None else [*self.held, (token, share)]
            if piece is not None:
                self.show(piece, share)

    def end(self) -> None:
        """Show the beginning of a character that was left unfinished."""
        rest = self.tokenizer.decode([token for token, _ in self.held], skip_special_tokens=True)
        if rest:
            self.show(str(rest), self.held[-1][1])

    @property
    def tokens_per_second(self) -> float:
        """The speed of decoding; the first token, which waits for the prompt, counts only if it is the only one."""
        decoding = self.seconds[1:] or self.seconds
        return len(decoding) / sum(decoding)
