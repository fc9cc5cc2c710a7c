"""What transformers' own test mixins are run against: Llama, and the duo in three ways. Run by transformers_suite.py.

The mixins are imported from an unpacked source distribution of transformers, which is no part of this repository.
"""

import unittest
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.models.auto import modeling_auto
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM, DuoModel

# The mixins look up by these names what inputs a class needs.
modeling_auto.MODEL_MAPPING_NAMES["duo"] = "DuoModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["duo"] = "DuoForCausalLM"


class ByPosition:
    """Policy under which the branches alternate from token to token and from layer to layer."""

    def begin(self, position_ids_BT: Tensor) -> Tensor:
        """Remember the positions for every layer."""
        return position_ids_BT

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Choose by position and layer."""
        return (memory + layer_idx) % len(Branch), memory


class MixedDuoModel(DuoModel):
    """The base model, whose policy is `ByPosition` unless one is given."""

    @wraps(DuoModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model under mixed routes."""
        return super().forward(*args, **{"policy": ByPosition()} | kwargs)


class MixedDuoForCausalLM(DuoForCausalLM):
    """The language model with `ByPosition` attached."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__(config)
        self.attach(ByPosition())


for mixed in (MixedDuoModel, MixedDuoForCausalLM):
    mixed.__name__ = mixed.__base__.__name__  # saved as the architecture that they are


class Tester:
    """Makes configurations and inputs, as the mixins expect it."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2

    def __init__(self, case: "Case") -> None:
        self.parent = case
        self.causal_lm_class, self.base_model_class = case.causal_lm, case.base_model

    def get_config(self) -> Any:
        """A tiny model."""
        return self.parent.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            intermediate_size=32,
            hidden_act="gelu",
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.parent.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Tensor]]:
        """A tiny model's configuration and a batch for it."""
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self.vocab_size, shape)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


# Tests of several processes need a module that the source distribution lacks.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = set()


class Case(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    PipelineTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """What the four classes have in common."""

    config_class: Any
    base_model: Any
    causal_lm: Any
    options: dict[str, Any] = {}  # noqa: RUF012
    heads: tuple[Any, ...] = ()
    model_tester: Any = None

    def setUp(self) -> None:
        """Called before each test."""
        self.model_tester = Tester(self)
        self.all_model_classes = (self.base_model, self.causal_lm, *self.heads)
        self.pipeline_model_mapping = {"feature-extraction": self.base_model, "text-generation": self.causal_lm}
        self.config_tester = ConfigTester(self, config_class=self.config_class, hidden_size=64, **self.options)

    def test_config(self) -> None:
        """The tests of configurations, which are no mixin."""
        self.config_tester.run_common_tests()


class TestLlamaCase(Case, unittest.TestCase):
    """What passes here must pass on the duo."""

    config_class, base_model, causal_lm, heads = (
        LlamaConfig,
        LlamaModel,
        LlamaForCausalLM,
        (LlamaForSequenceClassification,),
    )


class TestDuoCase(Case, unittest.TestCase):
    """All big, the default."""

    config_class, base_model, causal_lm = DuoConfig, DuoModel, DuoForCausalLM
    test_all_params_have_gradient = False  # the small FFNs have none where every token takes the big one


class TestDuoMixedCase(TestDuoCase):
    """Every branch in every layer."""

    base_model, causal_lm = MixedDuoModel, MixedDuoForCausalLM
    test_all_params_have_gradient = True


class TestDuoLayerCase(TestDuoMixedCase):
    """The same where skip bypasses the whole layer."""

    options = {"skip_scope": "layer"}  # noqa: RUF012
