"""Training of the baselines: confidence for early exit, and expert choice with a causal predictor.

Shape letters: B batch, T tokens, L layers, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from duollm.models.branch import Branch
from duollm.routers.baselines import EarlyExitRouter, MixtureOfDepthsRouter
from duollm.routers.lesson import Lesson
from duollm.training.loop import LossFn


def confidence_loss(lesson: Lesson) -> LossFn:
    """Cross-entropy of "the prediction read off here is already the final one", at every layer of the all-big pass.

    The label is whether the head's most likely token, read off the states that enter the layer's branches, is that of
    the whole model (CALM, Schuster et al., 2022, section 3.3: the early-exit classifier).
    """
    model, router = lesson.model, lesson.router
    assert isinstance(router, EarlyExitRouter)
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        seen_LBTD: list[Tensor] = []

        def watch(layer_idx: int, states_BTD: Tensor, memory: None) -> tuple[Tensor, None]:
            seen_LBTD.append(states_BTD)
            return torch.full(states_BTD.shape[:2], int(Branch.BIG), device=states_BTD.device), None

        with torch.no_grad():
            final_BT = model(input_ids=batch_BT, policy=watch, use_cache=False).logits.argmax(-1)
            settled_LBT = torch.stack([model.lm_head(states).argmax(-1) == final_BT for states in seen_LBTD])
        confidence_LBT = torch.stack([router.confidence(layer, states) for layer, states in enumerate(seen_LBTD)])
        loss = binary_cross_entropy_with_logits(confidence_LBT, settled_LBT.float())
        return loss, {"settled_share": settled_LBT.float().mean().item()}

    return loss_fn


def expert_choice_loss(lesson: Lesson) -> LossFn:
    """CE of the model in which every layer sends its top share of each sequence to big, plus the predictor's error.

    The top is chosen over the whole sequence, as experts do, which cannot be done while decoding; the predictor
    learns, from one token's state alone, whether it is in the top (Mixture-of-Depths, Raposo et al., 2024,
    section 3.5).
    """
    model, router = lesson.model, lesson.router
    assert isinstance(router, MixtureOfDepthsRouter)
    assert lesson.budget is not None
    router.train()
    router.top_share = lesson.budget

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        router.predictor_errors.clear()
        nll = model(input_ids=batch_BT, labels=batch_BT, policy=router, use_cache=False).loss
        missed = torch.stack(router.predictor_errors).mean()
        return nll + missed, {"nll": nll.item(), "predictor_loss": missed.item()}

    return loss_fn
