"""`duollm generate`: text from a saved model under a policy, and what it cost.

Shape letters: P prompt tokens, G generated tokens, L layers.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
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
from duollm.options import LARGEST_COUNT
from duollm.routers.policies import parse_policy
from duollm.standalone.coloured import print_legend, print_piece, print_routes
from duollm.standalone.saved import Saved

_TEMPERATURES = 1e-3, 1e3
"""Beyond these the logits of half precision overflow, or are all the same."""


def generate(options: Namespace) -> None:
    """Print a continuation of the prompt as it comes, then what it cost.

    Raises:
        UserError: bad input, named in one line.
    """
    _check(options)
    saved = Saved.at(Path(options.model), "auto")
    (name, model, policy), tokenizer = saved.routed(options.policy), saved.tokenizer
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    prompt_P = _tokenize(prompt, options.chat, for_prompts(tokenizer)).to(model.device)
    _check_length(len(prompt_P), options.max_new_tokens, model)
    settings = _settings(options, model, tokenizer)

    console = Console(highlight=False, markup=False, emoji=False)
    print_piece(console, f"{prompt.rstrip()}\n" if options.chat else prompt)
    torch.manual_seed(options.seed)
    made = generate_traced(model, tokenizer, prompt_P, policy, settings, lambda *piece: print_piece(console, *piece))
    print_piece(console, "\n\n")
    print_legend(console)
    if options.show_routes:
        print_routes(console, [str(tokenizer.decode([token])) for token in made.tokens_G], made.routes_GL)
    console.print(_cost(made, model, name, policy), soft_wrap=True)
    if not options.no_compare and name != "all-big":
        settings.min_new_tokens = settings.max_new_tokens = len(made.tokens_G)
        torch.manual_seed(options.seed)
        all_big = generate_traced(model, tokenizer, prompt_P, parse_policy("all-big", model), settings)
        console.print(_comparison(made, all_big), soft_wrap=True)


def _check(options: Namespace) -> None:
    coldest, hottest = _TEMPERATURES
    if not options.greedy and not coldest <= options.temperature <= hottest:
        raise UserError(
            f"--temperature must be from {coldest:g} to {hottest:g}, got {options.temperature:g}; "
            "--greedy takes the likeliest"
        )
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {options.top_p:g}")
    for flag, number in (("--max-new-tokens", options.max_new_tokens), ("--num-beams", options.num_beams)):
        if number < 1:
            raise UserError(f"{flag} must be at least 1, got {number}")
        if number > LARGEST_COUNT:
            raise UserError(f"{flag} must be at most {LARGEST_COUNT:,}, got {number}")


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("the prompt is to come from standard input, which is closed; give a text")
    try:
        prompt = sys.stdin.read()
        prompt.encode()  # a byte that is no text may have come through as a lone surrogate
    except UnicodeError:
        raise UserError("the prompt from standard input is not UTF-8; convert it to UTF-8") from None
    return prompt


def _tokenize(prompt: str, chat: bool, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The prompt's ids [P], wrapped as a user's turn if `chat`."""
    if not prompt.strip():
        raise UserError("the prompt is empty; give a text, or - to read it from standard input")
    if not chat:
        return torch.tensor(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise UserError("--chat: the model's tokenizer has no chat template; leave --chat out")
    turn = [{"role": "user", "content": prompt.strip()}]
    return torch.tensor(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


def _check_length(prompt: int, new: int, model: DuoForCausalLM) -> None:
    most = model.config.max_position_embeddings
    if prompt >= most:
        raise UserError(f"the prompt has {prompt:,} tokens, the model takes {most:,} with what follows; shorten it")
    if prompt + new > most:
        raise UserError(
            f"--max-new-tokens {new}: after {prompt:,} tokens of prompt there is room for {most - prompt:,} "
            f"(max_position_embeddings is {most:,})"
        )


def _settings(options: Namespace, model: DuoForCausalLM, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """What the command line says; when to stop is the model's own."""
    own, end = model.generation_config, tokenizer.eos_token_id
    sampling = not options.greedy and options.num_beams == 1
    drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if sampling else {}
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
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


def _comparison(made: Generated, all_big: Generated) -> str:
    ratio = made.tokens_per_second / all_big.tokens_per_second
    return f"all big: {all_big.tokens_per_second:.1f} tokens/s; this was {ratio:.2f} x as fast"


def _big(routes: Tensor) -> float:
    return (routes == Branch.BIG).double().mean().item()


def _mean_flops(routes_GL: list[list[int]], prompt: int, model: DuoForCausalLM) -> float:
    """Forward FLOPs per new token, head included; the first is predicted by the last token of the prompt."""
    layers = sum(token_flops(model.config, route, prompt + token) for token, route in enumerate(routes_GL))
    return layers / len(routes_GL) + head_flops(model.config)
