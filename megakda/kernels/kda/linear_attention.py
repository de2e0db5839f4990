"""Gated linear attention without the delta rule: the KDA kernels with one term less.

With one decay per channel this is GLA (arXiv 2312.06635), with one per head the state space dual
form of Mamba-2 (arXiv 2405.21060), where beta is the step size and v the input. Gated DeltaNet is
`chunk_kda` with one decay per head.
"""

from __future__ import annotations

import torch

from megakda.kernels.kda.checks import Options
from megakda.kernels.kda.op import run_kda


def chunk_gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention with a decaying state over whole sequences, chunk-parallel.

    Per head, with the state S in R^{K x V}:

        S <- Diag(exp g_t) S + k_t (beta_t v_t)^T,   o_t = scale * S^T q_t

    Arguments, gradients, results and errors are those of `chunk_kda`; `beta` None is 1 throughout.
    """
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        lower_bound=lower_bound,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        chunk_size=chunk_size,
        backend=backend,
        delta_rule=False,
    )
    inputs = (q, k, v, g, _ones(v) if beta is None else beta)
    o, final_state = run_kda(inputs, options)
    return o, final_state


def fused_recurrent_gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same token by token, for decoding; see `fused_recurrent_kda`."""
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        lower_bound=lower_bound,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        backend=backend,
        delta_rule=False,
    )
    inputs = (q, k, v, g, _ones(v) if beta is None else beta)
    o, final_state = run_kda(inputs, options, recurrent=True)
    return o, final_state


def _ones(v: torch.Tensor) -> torch.Tensor:
    return v.new_ones(v.shape[:3])
