"""A plain GPT in torch alone, in nanoGPT's manner: what somebody would write who trains a small model by hand.

Shape letters: B batch, T tokens, D hidden, H heads, d width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention


class GPT(nn.Module):
    """Learned positions, blocks of attention and an FFN with GELU, a tied head.

    Args:
        inner: width of the FFNs.
        fused: whether attention is torch's fused kernel; otherwise three plain operations.
    """

    def __init__(self, vocab: int, width: int, layers: int, heads: int, inner: int, length: int, fused: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, inner, fused) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the mean nll of the next token."""
        hidden_BTD = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        logits_BTV = self.norm(hidden_BTD[:, :-1]) @ self.tokens.weight.T
        return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.attend(self.norms[0](hidden_BTD))
        return hidden_BTD + self.down(gelu(self.up(self.norms[1](hidden_BTD))))

    def attend(self, states_BTD: Tensor) -> Tensor:
        query, key, value = self.qkv(states_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed_BHTd = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores_BHTT = query @ key.mT * query.shape[-1] ** -0.5
            later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            mixed_BHTd = scores_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1) @ value
        out: Tensor = self.out(mixed_BHTd.transpose(1, 2).flatten(2))
        return out
