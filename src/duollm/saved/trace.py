"""`duollm trace`: a CSV row per token, with its losses and its route, written batch by batch.

Shape letters: B windows of a batch, T tokens of a window, N = T - 1 predicted tokens, L layers.
"""

import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from duollm.data.packed import Windows
from duollm.errors import UserError
from duollm.files import replacing
from duollm.measure.executor import policy_losses, route_digits
from duollm.models.branch import Branch
from duollm.records.facts import list_domains
from duollm.records.keys import ALL_BIG, ALL_SMALL, ORACLE, Key
from duollm.records.tokens import read_tokens
from duollm.saved.model import Saved
from duollm.saved.plain_text import PlainText
from duollm.saved.text import TextSettings, held_out_text
from duollm.terminal import show, working

COLUMNS = (
    *("domain", "document", "window", "position", "token_id", "text"),
    *("nll", "nll_all_small", "nll_all_big", "route", "big_share"),
)
_DIGITS = 6

Columns = dict[str, NDArray[Any]]
Batch = tuple[str, Windows, int]
"""A domain, some of its windows, and about how many tokens all windows have."""


def trace(saved: Saved, policy: str, text: str | None, settings: TextSettings, out: Path | None) -> None:
    """Write a row for every token: its text, its losses in nats, and the route of the token that predicts it.

    Args:
        policy: a name (see `Saved.routed`), or oracle:K for what the oracle of a run recorded.
        text: a UTF-8 file; "-": standard input; None: the test split, as much as `settings` say.
        settings: `sequence_length` and `batch_size` hold for `text` too.
        out: the CSV file; None: standard output.

    Raises:
        UserError: bad input, named in one line.
    """
    with working("trace", stderr=True):
        rows = _recorded if policy.startswith(f"{ORACLE}:") else _executed
        blocks = rows(saved, policy, text, settings)
        tokens, sums = 0, np.zeros(2)
        with ExitStack() as opened:
            file: TextIO = sys.stdout
            if out:
                temporary = opened.enter_context(replacing(out))
                file = opened.enter_context(temporary.open("w", encoding="utf-8", newline=""))
            writer = csv.writer(file, lineterminator="\n")
            for columns in blocks:
                if not tokens:
                    writer.writerow(COLUMNS)
                writer.writerows(zip(*(_cells(columns[name]) for name in COLUMNS), strict=True))
                tokens += len(columns["nll"])
                sums += [columns["nll"].sum(dtype=float), columns["big_share"].sum()]
    if out:
        nll, big = sums / tokens
        print(f"{out}: {tokens:,} tokens under {policy}, mean loss {nll:.3f} nats, {big:.1%} big")


def _executed(saved: Saved, policy: str, text: str | None, settings: TextSettings) -> Iterator[Columns]:
    """Run the text under the policy, under all small and under all big."""
    _, model, chosen = saved.routed(policy)
    levels = {name: saved.routed(name).policy for name in (ALL_SMALL, ALL_BIG) if name != policy}
    tokenizer, done, longest = saved.tokenizer, 0, model.config.max_position_embeddings
    if (settings.sequence_length or 0) > longest:
        raise UserError(f"sequence_length {settings.sequence_length}: the model takes at most {longest} tokens")
    decode = lru_cache(maxsize=None)(lambda token: str(tokenizer.decode([token])))
    show("trace", 0, 1)
    for domain, windows, total in _batches(saved, text, settings):
        ids_BT = torch.from_numpy(windows.token_ids).to(model.device)
        nll_BN, routes_BNL = policy_losses(model, ids_BT, chosen)
        losses = {name: policy_losses(model, ids_BT, level)[0] for name, level in levels.items()}
        columns = windows.columns()
        yield columns | {
            "domain": np.full(nll_BN.numel(), domain),
            "text": np.array([decode(token) for token in columns["token_id"].tolist()], dtype=object),
            "nll": nll_BN.flatten().cpu().numpy(),
            "nll_all_small": losses.get(ALL_SMALL, nll_BN).flatten().cpu().numpy(),
            "nll_all_big": losses.get(ALL_BIG, nll_BN).flatten().cpu().numpy(),
            "route": route_digits(routes_BNL.flatten(0, 1)),
            "big_share": (routes_BNL == Branch.BIG).flatten(0, 1).double().mean(-1).cpu().numpy(),
        }
        done += nll_BN.numel()
        show("trace", done, max(done, total))


def _recorded(saved: Saved, policy: str, text: str | None, settings: TextSettings) -> Iterator[Columns]:
    """What the oracle of the run recorded, domain by domain."""
    if saved.run is None or text is not None:
        raise UserError(f"policy {policy}: the oracle is recorded for a run's own text; give a run, and no text")
    for domain in list_domains(saved.run):
        tokens = read_tokens(saved.run, domain)[0]
        budgets = {f"{ORACLE}:{k}": k for k in tokens.searched()}
        if policy not in budgets:
            raise UserError(f"policy {policy}: not searched; there are {', '.join(budgets)}")
        oracle, big = tokens.oracle(budgets[policy]), Key(ALL_BIG, tokens.space.num_layers)
        yield {
            "domain": np.full(len(tokens.text), domain),
            "document": np.array(tokens.documents, dtype=object)[tokens.document_T],
            "window": tokens.window_T,
            "position": tokens.position_T,
            "token_id": tokens.file.integers("token_id"),
            "text": np.array(tokens.text, dtype=object),
            "nll": oracle.nll_T,
            "nll_all_small": tokens.policies[Key(ALL_SMALL, 0)].nll_T,
            "nll_all_big": tokens.policies[big].nll_T,
            "route": route_digits(torch.from_numpy(oracle.routes_TL)),
            "big_share": (oracle.routes_TL == Branch.BIG).mean(-1),
        }


def _batches(saved: Saved, text: str | None, settings: TextSettings) -> Iterator[Batch]:
    if text is not None:
        plain, number = PlainText(text, saved.tokenizer), 0
        length = settings.sequence_length or saved.data.sequence_length
        for ids_BT in plain.windows(length, settings.batch_size):
            numbers = list(range(number, number + len(ids_BT)))
            yield "text", Windows(ids_BT, [plain.name] * len(ids_BT), numbers), plain.all_tokens
            number += len(ids_BT)
        return
    with held_out_text(saved, settings) as (data, domains):
        size = settings.documents, settings.windows
        texts = {domain: data.windows("test", domain, *size, saved.seed) for domain in domains}
        total = sum(windows.token_ids[:, 1:].size for windows in texts.values())
        for domain, windows in texts.items():
            for start in range(0, len(windows.window), settings.batch_size):
                yield domain, windows.part(slice(start, start + settings.batch_size)), total


def _cells(column: NDArray[Any]) -> list[Any]:
    """Numbers to six digits, which is what a loss in float32 holds."""
    values = column.tolist()
    return [f"{value:.{_DIGITS}g}" for value in values] if column.dtype.kind == "f" else values
