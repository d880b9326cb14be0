"""What the cost model knows of a policy: the sizes of a Llama, and the parameters that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.presets import require_sizes, with_preset
from megatron_sip.errors import ConfigError


@dataclass(frozen=True)
class ModelSizes:
    """A Llama: RMSNorm, SwiGLU, grouped queries. `untied` says that the LM head has a matrix of its own."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    untied: bool

    def __post_init__(self) -> None:
        counts = [value for value in vars(self).values() if not isinstance(value, bool)]
        if min(counts) < 1:
            raise ValueError(f"every size of a model must be at least 1: {self}")

    @property
    def layer_matmul_parameters(self) -> int:
        """Parameters of one layer that a token is multiplied with: q, k, v, output and the three of SwiGLU."""
        attention = 2 * self.hidden_size * self.kv_channels * (self.num_attention_heads + self.num_query_groups)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def output_and_mlp_parameters(self) -> int:
        """Those of them that are behind attention: its output and the three of SwiGLU."""
        return self.hidden_size * (self.kv_channels * self.num_attention_heads + 3 * self.ffn_hidden_size)

    @property
    def matmul_parameters(self) -> int:
        """N of the formulas: those of all layers, without LM head, embedding and norms."""
        return self.num_layers * self.layer_matmul_parameters

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head, which are the embedding's where the two are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, as they are published: with embedding, norms, and the LM head once."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.matmul_parameters + norms + (2 if self.untied else 1) * self.head_parameters

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers that one token leaves in the cache: a key and a value in each layer."""
        return 2 * self.num_layers * self.num_query_groups * self.kv_channels


def model_sizes(model: ModelConfig) -> ModelSizes:
    """The sizes that `model`, with what its preset fills in, describes.

    Raises:
        ConfigError: a size is missing; the message names the flag.
    """
    model = with_preset(model)
    require_sizes(model)
    if model.vocab_size is None:
        raise ConfigError("--vocab-size is not given, and the preset leaves it to the tokenizer; give it")
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return ModelSizes(
        **{name: int(getattr(model, name)) for name in names},
        vocab_size=model.vocab_size,
        untied=bool(model.untie_embeddings_and_output_weights),
    )
