"""The gated delta rule, states only."""

from pallas_kernels.gated_delta.api import gated_delta_states

__all__ = ["gated_delta_states"]
