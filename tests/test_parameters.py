"""Facts of parameters are declared once, where the parameters are made."""

import dataclasses
import re

import jax
import pytest

from arl2_jax import models
from arl2_jax.config import GatedDeltaConfig
from arl2_jax.errors import ConfigError
from arl2_jax.parameters import ParameterFacts, declare, facts_of
from arl2_jax.training.optimizer import path_name


def paths(cfg):
    return [
        path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(models.param_shapes(cfg))
    ]


@pytest.mark.parametrize("init", ["published", "by_block"])
def test_every_parameter_has_its_facts(cfg, init):
    cfg = dataclasses.replace(cfg, memory_init=init, delta=GatedDeltaConfig(block_tokens=12))
    for path in paths(cfg):
        facts = facts_of(path)
        shape = models.param_shapes(cfg)
        for name in path.split("/"):
            shape = shape[name]
        assert len(facts.axes) == len(shape.shape), path
        # Moments and averages have the path of their parameter at their end.
        assert facts_of(f"opt_state/1/mu/{path}") is facts


def test_what_optimizers_and_casts_rest_on(cfg):
    """Vectors neither decay nor go to Muon; what steers the network or the state is float32."""
    steering = r"scale$|modulation$|A_log|dt_bias|beta_bias|(a|b|gate)_proj|time_"
    for path in paths(cfg):
        facts = facts_of(path)
        vector = re.search(r"(bias|scale|A_log|modulation)$", path) is not None
        assert facts.decay != vector, path
        assert facts.keep_float32 == bool(re.search(steering, path)), path
        inside = re.search(r"blocks/\d+/.*(/[qkvo]/|/fc\d/|lora_|phi_)", path) and not vector
        assert facts.matrix == bool(inside), path


def test_silence_and_contradiction_are_errors():
    with pytest.raises(ConfigError, match="the parameter blocks/0/delta/new has no facts") as error:
        facts_of("blocks/0/delta/new")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="declared twice"):
        declare({"ffn/fc1/kernel": ParameterFacts((None, None))})
    with pytest.raises(ConfigError, match="has no facts"):
        facts_of("blocks/0/other_ffn/fc1/kernel")  # whole names alone
    declare({"twice/named": ParameterFacts(()), "(twice|thrice)/named": ParameterFacts(())})
    with pytest.raises(ConfigError, match="has several facts"):
        facts_of("twice/named")
