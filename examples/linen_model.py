"""HybridAttention inside your own model, in flax.linen.

    python examples/linen_model.py

The task is that of nnx_model.py: only the memory can carry the answer from block to block.
`bridge.to_linen` makes the attention a linen module; `nnx_method` chooses what is called.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.nnx import bridge

from arl2_jax import HybridAttention

PAIRS, VALUES, WIDTH, BLOCK = 8, 6, 64, 8


class Model(linen.Module):
    """A residual layer of hybrid attention between two linear ones."""

    def setup(self):
        """Create the parts."""
        self.embed = linen.Dense(WIDTH)
        self.norm = linen.RMSNorm()
        self.attention = bridge.to_linen(HybridAttention, WIDTH, num_heads=2)
        self.head = linen.Dense(VALUES)

    def __call__(self, tokens):
        """Compute all blocks at once, for training."""
        x = self.embed(tokens)
        return self.head(x + self.attention(self.norm(x), BLOCK, nnx_method="clip"))

    def step(self, tokens, state):
        """Compute one block and the state after it, for generation."""
        x = self.embed(tokens)
        attended, state = self.attention(self.norm(x), state, nnx_method="step")
        return self.head(x + attended), state

    def init_state(self, batch):
        """Return the empty state."""
        return self.attention(batch, nnx_method="init_state")


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
    model, rng = Model(), np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), make_batch(rng)[0])
    optimizer = optax.adam(5e-3)
    opt_state = optimizer.init(params)

    def loss_fn(params, tokens, answers):
        logits = jnp.asarray(model.apply(params, tokens))[:, BLOCK:]
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

    step = jax.jit(lambda *inputs: model.apply(params, *inputs, method=Model.step))
    tokens, answers = make_batch(rng)
    empty = model.apply(params, len(tokens), method=Model.init_state)
    _, state = step(tokens[:, :BLOCK], empty)
    logits, _ = step(tokens[:, BLOCK:], state)
    right = jnp.mean(logits.argmax(-1) == answers)
    print(f"block by block: {right:.0%} right, chance is {1 / VALUES:.0%}")


if __name__ == "__main__":
    main()
