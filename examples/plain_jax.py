"""The recurrence alone, `gated_delta_states`, inside plain JAX functions.

    python examples/plain_jax.py

The task is that of nnx_model.py. Tokens write to a state by the gated delta rule; every token reads
the state before its block. There is no attention at all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import gated_delta_states

PAIRS, VALUES, WIDTH, HEADS, BLOCK = 8, 6, 64, 2, 8


def init(key):
    """Return weights of the projections: q, k, v, decay, writing strength, output."""
    shapes = {
        "q": (PAIRS + VALUES, WIDTH),
        "k": (PAIRS + VALUES, WIDTH),
        "v": (PAIRS + VALUES, WIDTH),
        "decay": (PAIRS + VALUES, HEADS),
        "beta": (PAIRS + VALUES, HEADS),
        "out": (WIDTH, VALUES),
    }
    keys = jax.random.split(key, len(shapes))
    draw = lambda key, shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    return {name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def apply(params, tokens):
    """Return the logits of every token, from its read of the blocks before its own."""
    heads = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
    unit = lambda x: x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    q, k, v = (heads(tokens @ params[name]) for name in ("q", "k", "v"))
    g = -jax.nn.softplus(tokens @ params["decay"] - 4)  # log of the decay, at most 0
    beta = 2 * jax.nn.sigmoid(tokens @ params["beta"])
    states = gated_delta_states(unit(k), v, g, beta, block_size=BLOCK)
    before = states[:, :-1]  # [B, blocks, H, K, V]; the last is the state after all blocks
    blocks = unit(q).reshape(len(q), -1, BLOCK, *q.shape[2:])
    read = jnp.einsum("bmnhk,bmhkv->bmnhv", blocks, before)
    return read.reshape(*tokens.shape[:2], WIDTH) @ params["out"]


def make_batch(rng: np.random.Generator, size: int = 64):
    """Return tokens [B, 2 * BLOCK, PAIRS + VALUES] and the values asked for, [B, BLOCK]."""
    values = rng.integers(VALUES, size=(size, PAIRS))
    asked = rng.permuted(np.tile(np.arange(PAIRS), (size, 1)), axis=1)
    shown = np.concatenate([np.tile(np.eye(PAIRS), (size, 1, 1)), np.eye(VALUES)[values]], axis=2)
    question = np.concatenate([np.eye(PAIRS)[asked], np.zeros((size, BLOCK, VALUES))], axis=2)
    tokens = np.concatenate([shown, question], axis=1).astype(np.float32)
    return tokens, np.take_along_axis(values, asked, axis=1)


def main():
    """Train and test."""
    rng, params = np.random.default_rng(0), init(jax.random.key(0))
    optimizer = optax.adam(2e-2)
    opt_state = optimizer.init(params)

    def loss_fn(params, tokens, answers):
        logits = apply(params, tokens)[:, BLOCK:]
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

    tokens, answers = make_batch(rng)
    right = jnp.mean(apply(params, tokens)[:, BLOCK:].argmax(-1) == answers)
    print(f"{right:.0%} right, chance is {1 / VALUES:.0%}")


if __name__ == "__main__":
    main()
