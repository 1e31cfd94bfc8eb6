"""Gemma 3's sizes, as literal numbers with their sources.

Sources: the `config.json` files of google/gemma-3-1b-it and google/gemma-3-270m, and the Gemma 3
technical report (arXiv 2503.19786, section 2). What those files leave out (rope bases, the
local:global pattern) is the default of `Gemma3TextConfig` in transformers. The sizes of 4B, 12B and
27B are those of Google's `gemma` library (3.3.0, gm/nn/_gemma.py), which agrees on the smaller ones
too; only their vocabulary is that of Hugging Face's multimodal files, 64 rows longer.
"""

from dataclasses import dataclass

from gemma_grpo.errors import UserError


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of one Gemma 3 text model.

    Attributes:
        vocab_size: V, rows of the embedding, which is also the LM head.
        num_layers: transformer blocks.
        embed_dim: D, width of the residual stream.
        hidden_dim: F, width of the gated MLP.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; N is a multiple of it.
        head_dim: H. N * H need not equal D.
        sliding_window: keys that a local layer sees, the query's own included.
        pattern: every `pattern`-th layer is global, the others are local.
        query_pre_attn_scalar: queries are scaled by this to the power -1/2.
        rope_base_local: RoPE base of local layers.
        rope_base_global: RoPE base of global layers.
        rope_scale_global: divides positions in global layers (Chen et al., arXiv 2306.15595, eq.
            4): how the models from 4B up reach 128K tokens of context.
        norm_eps: added to the mean square in RMSNorm.
        scan_unroll: layers per iteration of the scan over layers. Changes no result: 1 keeps
            compile time flat in depth; num_layers runs a tiny model faster on CPU.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    query_pre_attn_scalar: float
    pattern: int = 6
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale_global: float = 1.0
    norm_eps: float = 1e-6
    scan_unroll: int = 1

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def is_global(self) -> tuple[bool, ...]:
        """For each layer, whether it attends to everything before it."""
        return tuple((layer + 1) % self.pattern == 0 for layer in range(self.num_layers))


GEMMA3_1B = Gemma3Config(
    vocab_size=262_144,
    num_layers=26,
    embed_dim=1152,
    hidden_dim=6912,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    sliding_window=512,
    query_pre_attn_scalar=256.0,
)

GEMMA3_270M = Gemma3Config(
    vocab_size=262_144,
    num_layers=18,
    embed_dim=640,
    hidden_dim=2048,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    sliding_window=512,
    query_pre_attn_scalar=256.0,
)

GEMMA3_4B = Gemma3Config(
    vocab_size=262_208,
    num_layers=34,
    embed_dim=2560,
    hidden_dim=10_240,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    sliding_window=1024,
    query_pre_attn_scalar=256.0,
    rope_scale_global=8.0,
)

GEMMA3_12B = Gemma3Config(
    vocab_size=262_208,
    num_layers=48,
    embed_dim=3840,
    hidden_dim=15_360,
    num_heads=16,
    num_kv_heads=8,
    head_dim=256,
    sliding_window=1024,
    query_pre_attn_scalar=256.0,
    rope_scale_global=8.0,
)

# The only one whose queries are not scaled by the head's width: 168 = embed_dim / num_heads.
GEMMA3_27B = Gemma3Config(
    vocab_size=262_208,
    num_layers=62,
    embed_dim=5376,
    hidden_dim=21_504,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    sliding_window=1024,
    query_pre_attn_scalar=168.0,
    rope_scale_global=8.0,
)

# The embedded model: small enough to train on two CPU cores, with every feature of the
# architecture. The window is shorter than its problems, so that local and global layers differ.
GEMMA3_NANO = Gemma3Config(
    vocab_size=512,
    num_layers=6,
    embed_dim=64,
    hidden_dim=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    sliding_window=64,
    query_pre_attn_scalar=32.0,
    scan_unroll=6,
)

CONFIGS = {
    "gemma3-nano": GEMMA3_NANO,
    "gemma3-270m": GEMMA3_270M,
    "gemma3-1b": GEMMA3_1B,
    "gemma3-4b": GEMMA3_4B,
    "gemma3-12b": GEMMA3_12B,
    "gemma3-27b": GEMMA3_27B,
}
