"""All layouts of a transformer; if several match a file equally well, the first is used."""

from arl2_jax.weights.layouts.diffusers import DIFFUSERS
from arl2_jax.weights.layouts.wan import ARL2, WAN

LAYOUTS = (WAN, ARL2, DIFFUSERS)
