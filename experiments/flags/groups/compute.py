"""How the model is computed; never what it computes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments.flags.field import flag
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from prelnroberta.config import RobertaPreLayerNormConfig
    from prelnroberta.model.encoder import Execution


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    dtype: str = flag("float32", "Precision of activations.", choices=["float32", "bfloat16"])
    remat: str = flag(
        "none",
        "What the backward pass recomputes instead of storing. dots: everything but matrix "
        "products. full: whole blocks.",
        choices=["none", "dots", "full"],
    )
    attention: str = flag(
        "auto",
        "Attention kernel: XLA, splash (TPU) or cuDNN (GPU). auto: the fused kernel of the device "
        "where it can be used; a kernel requires --attention_probs_dropout_prob=0.",
        choices=["auto", "xla", "splash", "cudnn"],
        on_resume="free",
    )
    scan_layers: bool | None = flag(
        None, "Loop over one compiled layer. Default: unrolled on CPU, a loop elsewhere."
    )

    def execution(self, logits_chunk_size: int = 0) -> Execution:
        """The settings as the modules take them."""
        import jax.numpy as jnp

        from prelnroberta.model.encoder import Execution

        return Execution(
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            attention=self.attention,
            scan_layers=self.scan_layers,
            logits_chunk_size=logits_chunk_size,
        )

    def check_attention(
        self, config: RobertaPreLayerNormConfig, length: int, platform: str | None = None
    ) -> None:
        """Raises InputError, before any work, for an --attention that cannot train such rows.

        Args:
            length: tokens in a row.
            platform: what the step is compiled for; None: this process's.
        """
        if self.attention in ("auto", "xla"):
            return
        import jax
        import jax.numpy as jnp

        from prelnroberta.model.attention_kernels import unsupported_reasons

        platform = platform or jax.default_backend()
        dtype = jnp.dtype(self.dtype)
        if reasons := unsupported_reasons(self.attention, config, dtype, length, True, platform):
            raise InputError(
                f"--attention={self.attention} does not support {', '.join(reasons)}: leave it at "
                "auto"
            )
