"""HybridAttention inside your own model, in Flax NNX.

    python examples/nnx_model.py

The first block of a sequence shows pairs of a key and a value; the second asks for the values.
Attention is softmax inside a block, so that only the memory can carry the answer across.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from arl2_jax import HybridAttention

PAIRS, VALUES, WIDTH, BLOCK = 8, 6, 64, 8


class Model(nnx.Module):
    """A residual layer of hybrid attention between two linear ones."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(PAIRS + VALUES, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = HybridAttention(WIDTH, num_heads=2, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VALUES, rngs=rngs)

    def __call__(self, tokens):
        """Compute all blocks at once, for training."""
        x = self.embed(tokens)
        return self.head(x + self.attention.clip(self.norm(x), BLOCK))

    def step(self, tokens, state):
        """Compute one block and the state after it, for generation."""
        x = self.embed(tokens)
        attended, state = self.attention.step(self.norm(x), state)
        return self.head(x + attended), state


def make_batch(rng: np.random.Generator, size: int = 64):
    """Return tokens [B, 2 * BLOCK, PAIRS + VALUES] and the values asked for, [B, BLOCK]."""
    values = rng.integers(VALUES, size=(size, PAIRS))
    asked = rng.permuted(np.tile(np.arange(PAIRS), (size, 1)), axis=1)
    shown = np.concatenate([np.tile(np.eye(PAIRS), (size, 1, 1)), np.eye(VALUES)[values]], axis=2)
    question = np.concatenate([np.eye(PAIRS)[asked], np.zeros((size, BLOCK, VALUES))], axis=2)
    tokens = np.concatenate([shown, question], axis=1).astype(np.float32)
    return tokens, np.take_along_axis(values, asked, axis=1)


def main():
    """Train, then answer block by block."""
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    optimizer = optax.adam(5e-3)
    opt_state, rng = optimizer.init(params), np.random.default_rng(0)

    def loss_fn(params, tokens, answers):
        logits = nnx.merge(graph, params)(tokens)[:, BLOCK:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    @jax.jit
    def train_step(params, opt_state, tokens, answers):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, answers)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(101):
        params, opt_state, loss = train_step(params, opt_state, *make_batch(rng))
        if i % 20 == 0:
            print(f"step {i:3d}  loss {loss:.3f}")

    model, (tokens, answers) = nnx.merge(graph, params), make_batch(rng)
    _, state = model.step(tokens[:, :BLOCK], model.attention.init_state(len(tokens)))
    logits, _ = model.step(tokens[:, BLOCK:], state)
    right = jnp.mean(logits.argmax(-1) == answers)
    print(f"block by block: {right:.0%} right, chance is {1 / VALUES:.0%}")


if __name__ == "__main__":
    main()
