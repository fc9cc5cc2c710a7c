"""`duollm generate`: text from a saved model under a policy, and what it cost.

On a terminal, text is coloured by the share of big layers that each piece cost.

Shape letters: P prompt tokens, G generated tokens, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from duollm.data.tokenizer import for_prompts
from duollm.errors import UserError
from duollm.flops import head_flops, token_flops
from duollm.measure.executor import deciding_flops
from duollm.measure.generation import Generated, generate_traced
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.routers.policies import parse_policy
from duollm.saved.model import Saved
from duollm.saved.plain_text import opened
from duollm.terminal import one_line

_SHADES = [Style(color=colour) for colour in ("#3b7dd8", "#3f9fa0", "#7f9a3c", "#cf8a2b", "#d1495b")]
_MARKS = {Branch.SKIP: "·", Branch.SMALL: "▪", Branch.BIG: "█"}
_DIGITS = {branch: str(branch.value) for branch in Branch}


@dataclass(frozen=True)
class GenerateSettings:
    """How a text is continued, and what is shown of it.

    Attributes:
        policy: a name; see `Saved.routed`.
        max_new_tokens: stop after so many tokens.
        temperature, top_p: of sampling; not used if `greedy`, or with several beams.
        num_beams: beams of a beam search; 1: none.
        seed: random seed for sampling.
        chat: the prompt is a user's turn: apply the tokenizer's chat template.
        show_routes: also print the route of each token.
        compare: also measure the speed of all big.
    """

    policy: str = "all-big"
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    greedy: bool = False
    num_beams: int = 1
    seed: int = 0
    chat: bool = False
    show_routes: bool = False
    compare: bool = True


def generate(saved: Saved, prompt: str, settings: GenerateSettings) -> None:
    """Print a continuation of the prompt as it is generated, then what it cost.

    Args:
        prompt: the text to continue; "-": read it from standard input.

    Raises:
        UserError: bad input, named in one line.
    """
    (name, model, policy), tokenizer = saved.routed(settings.policy), saved.tokenizer
    if prompt == "-":
        with opened(prompt, newline=None) as file:
            prompt = file.read()
    prompt_P = _tokenize(prompt, settings.chat, for_prompts(tokenizer)).to(model.device)
    _check_length(len(prompt_P), settings.max_new_tokens, model)
    generation = _generation_config(settings, model, tokenizer)

    console = Console(highlight=False, markup=False, emoji=False)
    print_piece(console, f"{prompt.rstrip()}\n" if settings.chat else prompt)
    torch.manual_seed(settings.seed)
    made = generate_traced(model, tokenizer, prompt_P, policy, generation, lambda *piece: print_piece(console, *piece))
    print_piece(console, "\n\n")
    print_legend(console)
    if settings.show_routes:
        print_routes(console, [str(tokenizer.decode([token])) for token in made.tokens_G], made.routes_GL)
    console.print(_cost(made, model, name, policy), soft_wrap=True)
    if settings.compare and name != "all-big":
        generation.min_new_tokens = generation.max_new_tokens = len(made.tokens_G)
        torch.manual_seed(settings.seed)
        all_big = generate_traced(model, tokenizer, prompt_P, parse_policy("all-big", model), generation)
        ratio = made.tokens_per_second / all_big.tokens_per_second
        told = f"all big: {all_big.tokens_per_second:.1f} tokens/s; this was {ratio:.2f} x as fast"
        console.print(told, soft_wrap=True)


def _tokenize(prompt: str, chat: bool, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The prompt's ids [P], wrapped as a user's turn if `chat`."""
    if not prompt.strip():
        raise UserError("the prompt is empty; give a text, or - to read it from standard input")
    if not chat:
        return torch.tensor(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise UserError("chat: the model's tokenizer has no chat template; give the whole prompt yourself")
    turn = [{"role": "user", "content": prompt.strip()}]
    return torch.tensor(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


def _check_length(prompt: int, new: int, model: DuoForCausalLM) -> None:
    most = model.config.max_position_embeddings
    if prompt >= most:
        raise UserError(f"the prompt has {prompt:,} tokens, the model takes {most:,} with what follows; shorten it")
    if prompt + new > most:
        raise UserError(
            f"max_new_tokens {new}: after {prompt:,} tokens of prompt there is room for {most - prompt:,} "
            f"(max_position_embeddings is {most:,})"
        )


def _generation_config(
    settings: GenerateSettings, model: DuoForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """The settings; the model itself says when to stop."""
    own, end = model.generation_config, tokenizer.eos_token_id
    sampling = not settings.greedy and settings.num_beams == 1
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampling else {}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        do_sample=sampling,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else end,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else end,
        **drawn,
    )


def _cost(made: Generated, model: DuoForCausalLM, name: str, policy: Policy) -> str:
    """One line: what the tokens took under the policy."""
    tokens, layers = len(made.tokens_G), model.config.num_hidden_layers
    flops = _mean_flops(made.routes_GL.tolist(), len(made.prompt_routes_PL), model) + deciding_flops(policy)
    all_big = _mean_flops([[Branch.BIG] * layers] * tokens, len(made.prompt_routes_PL), model)
    return (
        f"{name}: {tokens} tokens, {_big(made.routes_GL):.1%} big (prompt {_big(made.prompt_routes_PL):.1%}), "
        f"{flops / 1e6:,.1f} MFLOP per token ({flops / all_big:.1%} of all big), {made.tokens_per_second:.1f} tokens/s"
    )


def _big(routes: Tensor) -> float:
    return (routes == Branch.BIG).double().mean().item()


def _mean_flops(routes_GL: list[list[int]], prompt: int, model: DuoForCausalLM) -> float:
    """Forward FLOPs per new token, head included; the first is predicted by the last token of the prompt."""
    layers = sum(token_flops(model.config, route, prompt + token) for token, route in enumerate(routes_GL))
    return layers / len(routes_GL) + head_flops(model.config)


def print_piece(console: Console, piece: str, share: float | None = None) -> None:
    """Print a piece of text as it is, in the colour of its share of big layers (None: as part of the prompt)."""
    style = Style(dim=True) if share is None else _shade(share)
    console.print(Segments([Segment(piece, style)]), end="", crop=False)
    console.file.flush()


def print_legend(console: Console) -> None:
    """Say what the colours mean, where there are colours."""
    if console.color_system is None or console.no_color:
        return
    steps = [Segment(f" {index / (len(_SHADES) - 1):.0%}", shade) for index, shade in enumerate(_SHADES)]
    console.print(Segments([Segment("big layers per token:"), *steps, Segment("\n")]), end="", crop=False)


def print_routes(console: Console, tokens: Sequence[str], routes_GL: Tensor) -> None:
    """Print a line per token: a mark per layer, layer 0 first, the number of big layers, and the token."""
    marks = _marks(console.encoding)
    meanings = ", ".join(f"{marks[each]} {each.name.lower()}" for each in Branch)
    console.print(f"routes, layer 0 first: {meanings}", soft_wrap=True)
    for token, route in zip(tokens, routes_GL.tolist(), strict=True):
        share = route.count(Branch.BIG) / len(route)
        strip = "".join(marks[Branch(branch)] for branch in route)
        label = f" {route.count(Branch.BIG):>{len(str(len(route)))}} big  {one_line(token)}\n"
        console.print(Segments([Segment(strip, _shade(share)), Segment(label)]), end="", crop=False)


def _marks(encoding: str) -> dict[Branch, str]:
    """Digits where a terminal lacks the marks, as all would look the same."""
    try:
        "".join(_MARKS.values()).encode(encoding)
    except UnicodeEncodeError:
        return _DIGITS
    return _MARKS


def _shade(share: float) -> Style:
    return _SHADES[round(share * (len(_SHADES) - 1))]
