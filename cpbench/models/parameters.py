"""Which parameters a model has: the Hugging Face name and shape of each, from its configuration alone.

Pure data: no torch. What a checkpoint must hold is checked against this list (checkpoint.py); the layers themselves ask for their
parameters by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

from cpbench.models.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Parameter = tuple[str, tuple[int, ...]]  # name and shape; a linear weight is [out, in]


def parameters(config: ModelConfig, layers: int) -> Iterator[Parameter]:
    """Every parameter of the first `layers` layers and of both ends of a model, each once."""
    yield EMBEDDING, (config.vocab, config.hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (config.hidden,)
        yield from _latent_attention(config, f"{prefix}.self_attn") if config.latent else _grouped_query_attention(config, f"{prefix}.self_attn")
        yield f"{prefix}.post_attention_layernorm.weight", (config.hidden,)
        yield from _experts(config, f"{prefix}.mlp") if config.is_sparse(layer) else _swiglu(f"{prefix}.mlp", config.hidden, config.intermediate)
    yield FINAL_NORM, (config.hidden,)
    if not config.tied_embeddings:
        yield HEAD, (config.vocab, config.hidden)


def _grouped_query_attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    dim = config.head_dim
    for name, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads), ("v_proj", config.kv_heads)):
        yield f"{prefix}.{name}.weight", (heads * dim, config.hidden)
        if config.qkv_bias:
            yield f"{prefix}.{name}.bias", (heads * dim,)
    yield f"{prefix}.o_proj.weight", (config.hidden, config.heads * dim)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        yield f"{prefix}.{name}.weight", (dim,)


def _latent_attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    """Queries are projected at once, or through a normed row of `q_rank` values."""
    latent = config.latent
    assert latent is not None
    q_width = config.heads * (latent.nope_dim + latent.rope_dim)
    if latent.q_rank is None:
        yield f"{prefix}.q_proj.weight", (q_width, config.hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (latent.q_rank, config.hidden)
        yield f"{prefix}.q_a_layernorm.weight", (latent.q_rank,)
        yield f"{prefix}.q_b_proj.weight", (q_width, latent.q_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (latent.row_values, config.hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (latent.kv_rank,)
    yield f"{prefix}.kv_b_proj.weight", (config.heads * (latent.nope_dim + latent.v_dim), latent.kv_rank)
    yield f"{prefix}.o_proj.weight", (config.hidden, config.heads * latent.v_dim)
    if config.indexer:
        yield from _indexer(config, f"{prefix}.indexer")


def _indexer(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    """The only layer norm with a bias is that of the indexer's keys."""
    assert config.indexer is not None and config.latent is not None
    heads, dim = config.indexer.heads, config.indexer.dim
    yield f"{prefix}.wq_b.weight", (heads * dim, config.latent.q_rank or config.hidden)
    yield f"{prefix}.wk.weight", (dim, config.hidden)
    yield f"{prefix}.k_norm.weight", (dim,)
    yield f"{prefix}.k_norm.bias", (dim,)
    yield f"{prefix}.weights_proj.weight", (heads, config.hidden)


def _experts(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    experts = config.experts
    assert experts is not None
    yield f"{prefix}.gate.weight", (experts.count, config.hidden)
    if experts.correction:
        yield f"{prefix}.gate.e_score_correction_bias", (experts.count,)
    for index in range(experts.count):
        yield from _swiglu(f"{prefix}.experts.{index}", config.hidden, experts.intermediate)
    if experts.shared:
        yield from _swiglu(f"{prefix}.shared_experts", config.hidden, experts.shared * experts.intermediate)


def _swiglu(prefix: str, hidden: int, intermediate: int) -> Iterator[Parameter]:
    for name in ("gate_proj", "up_proj"):
        yield f"{prefix}.{name}.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)
