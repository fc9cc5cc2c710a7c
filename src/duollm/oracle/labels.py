"""Labels for routers: losses of training tokens under many routes.

Shape letters: W windows, T tokens, N = T - 1 predictions of a window, R routes, L layers, S kinds of loss,
B windows at a time, D hidden, V vocabulary.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duollm.errors import UserError
from duollm.files import replacing
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.fixed import draw_patterns, pattern_losses
from duollm.oracle.search import loss_tables
from duollm.routes.space import RouteSpace

LABELS = Path("labels", "losses.safetensors")
"""Where a run folder keeps the labels."""

LARGEST_LABELLED = 2**14
"""The largest space whose tokens are labelled with the losses of all routes. Above it, a pool of routes is drawn."""

_ROUTES_OF_A_BUDGET = 32
_MEAN_ROUTES = 32
_POOL_LOGITS = 2**24
"""When labelling with a pool, batch windows up to this many logits. The tree search fills the GEMMs with one window."""


@dataclass(frozen=True)
class Labels:
    """Losses of windows of training text under routes, minus each token's mean over the routes.

    Attributes:
        space: the route space to which the ids belong.
        token_ids_WT: the windows.
        route_ids_R: all routes of the space, or a pool of them, ascending.
        losses_SWNR: float16, nats. `TEXT`: the nll of the token that follows in the text. `EXPECTED`: its
            expectation when the token is drawn from the mean prediction of random routes, which has no luck in it.
    """

    space: RouteSpace
    token_ids_WT: Tensor
    route_ids_R: Tensor
    losses_SWNR: Tensor

    def with_big(self, fewest: int, most: int) -> Tensor:
        """Return the indices, ascending, of the routes with `fewest` to `most` big layers.

        Raises:
            UserError: there is no such route.
        """
        big_R = self.space.count_big(self.route_ids_R)
        indices = ((big_R >= fewest) & (big_R <= most)).nonzero()[:, 0]
        if not len(indices):
            raise UserError(f"no route with {fewest} .. {most} big layers was labelled; add it to big_layers")
        return indices

    def losses(self, indices: Tensor, text_weight: float) -> Tensor:
        """Return the losses of some routes, minus their mean, float32 [W, N, R], as a mixture of TEXT and EXPECTED.

        The mean of a route over all tokens always comes from TEXT, where it hardly depends on luck.

        Args:
            text_weight: weight of TEXT; EXPECTED has the remaining weight.
        """
        text_WNR, expected_WNR = self.losses_SWNR[..., indices].float()
        mixed_WNR = text_weight * text_WNR + (1 - text_weight) * expected_WNR
        mixed_WNR += (text_WNR - mixed_WNR).mean((0, 1))
        return mixed_WNR - mixed_WNR.mean(-1, keepdim=True)


TEXT, EXPECTED = 0, 1


@torch.inference_mode()
def label_windows(
    model: DuoForCausalLM,
    token_ids_WT: Tensor,
    space: RouteSpace,
    route_ids_R: Tensor | None = None,
    seed: int = 0,
    memory_bytes: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Labels:
    """Compute the losses of all tokens of the windows under routes.

    If all routes are labelled, the context is "reference": only the token's own route varies, as it will when every
    token decides for itself. The tokens before it take random routes. Each window has its own probability of a big
    layer, so that every route occurs beside routes of all budgets. A pool of routes needs no search: each route is run
    over whole windows (context "shared").

    Args:
        route_ids_R: the pool, ascending; None for all routes.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    pooled = max(1, _POOL_LOGITS // (token_ids_WT.shape[1] * model.config.vocab_size))
    together = 1 if route_ids_R is None else pooled
    tables, started, done = [], time.perf_counter(), 0
    for ids_BT in token_ids_WT.to(model.device).split(together):
        wanted_SND = _wanted(model, ids_BT, space, generator)
        if route_ids_R is None:
            routes_BTL = torch.stack([_random_routes(space, ids_BT.shape[1], generator) for _ in ids_BT])
            table_SBNR = loss_tables(
                model, ids_BT, space, wanted_SND, "reference", routes_BTL, memory_bytes=memory_bytes
            )
        else:
            counted_BN, routes_RL = ids_BT[:, 1:] >= 0, space.decode(route_ids_R.to(model.device))
            table_SNR = pattern_losses(model, ids_BT, counted_BN, wanted_SND, routes_RL)
            table_SBNR = table_SNR.unflatten(1, counted_BN.shape)
        tables.append((table_SBNR - table_SBNR.mean(-1, keepdim=True)).half().cpu())
        done += len(ids_BT)
        rate = done * (ids_BT.shape[1] - 1) / (time.perf_counter() - started)
        report(f"labels  window {done}/{len(token_ids_WT)}  {rate:,.1f} tokens/s")
    labelled_R = torch.arange(space.size) if route_ids_R is None else route_ids_R.cpu()
    return Labels(space, token_ids_WT.cpu(), labelled_R, torch.cat(tables, dim=1))


def routes_to_label(space: RouteSpace, big_layers: list[int], number: int | None, seed: int) -> Tensor | None:
    """Return up to `number` random routes for every budget and its neighbours, or None for all routes of the space.

    Without a number, these are all routes if there are at most `LARGEST_LABELLED`, else 32 per budget.
    """
    if number is None and space.size <= LARGEST_LABELLED:
        return None
    possible = space.big_layers
    nearest = [min(range(len(possible)), key=lambda place: abs(possible[place] - k)) for k in big_layers]
    around = {big for place in nearest for big in possible[max(0, place - 1) : place + 2]}
    return torch.from_numpy(draw_patterns(space, sorted(around), number or _ROUTES_OF_A_BUDGET, seed))


def save_labels(labels: Labels, path: Path) -> None:
    """Write labels as one safetensors file (docs/formats.md)."""
    tensors = {"token_ids": labels.token_ids_WT, "route_ids": labels.route_ids_R, "losses": labels.losses_SWNR}
    facts = {"space": json.dumps(labels.space.facts)}
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, facts)


def load_labels(path: Path) -> Labels:
    """Read what `save_labels` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            space = RouteSpace.from_facts(json.loads(file.metadata()["space"]))
            return Labels(space, *(file.get_tensor(name) for name in ("token_ids", "route_ids", "losses")))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable file of labels ({error}); delete it to make it anew") from None


def _wanted(model: DuoForCausalLM, ids_BT: Tensor, space: RouteSpace, generator: torch.Generator) -> Tensor:
    """The head's embeddings of the next tokens, and their means under the mean prediction, [2, B * N, D]."""
    weight_VD = model.lm_head.weight
    expected_BND = mean_prediction(model, ids_BT[:, :-1], space, generator) @ weight_VD
    return torch.stack([weight_VD[ids_BT[:, 1:].flatten()], expected_BND.flatten(0, 1)])


def _random_routes(space: RouteSpace, tokens: int, generator: torch.Generator) -> Tensor:
    """A route for each token, [T, L]. Every window has its own probabilities of the branches."""
    shares_C = torch.rand(space.base, generator=generator, device=generator.device)
    places_J = torch.from_numpy(space.place_values).to(generator.device)
    digits = torch.multinomial(shares_C, tokens * len(places_J), replacement=True, generator=generator)
    return space.decode((digits.view(tokens, -1) * places_J).sum(-1))


def mean_prediction(model: DuoForCausalLM, ids_BT: Tensor, space: RouteSpace, generator: torch.Generator) -> Tensor:
    """Return the mean of the predictions of random routes, each taken by all tokens: probabilities [B, T, V]."""
    route_ids = torch.randint(space.size, (_MEAN_ROUTES,), generator=generator, device=generator.device)
    total_BTV = torch.zeros(*ids_BT.shape, model.config.vocab_size, dtype=torch.float32, device=ids_BT.device)
    for route in space.decode(route_ids):
        total_BTV += model(input_ids=ids_BT, routes=route, use_cache=False).logits.float().softmax(-1)
    return total_BTV / _MEAN_ROUTES
