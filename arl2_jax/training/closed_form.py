"""Least squares for the parameters that read a layer's memory, with the state fixed.

Stage 1 minimizes, layer by layer and at the teacher's own input, the squared error after Wo of

    sum over heads h of  g_h y_h P_v,h Wo_h   against   (softmax over past and block
                                                         - softmax inside the block) Wo

with y = (qm S) / sqrt(D) read from a state of values that P_v has not touched (S is linear in its
values), qm = l2norm(rope(q P_q)) and g = sigmoid(x Wg). Both sides are zero in a clip's first
block.

In P_v the error is quadratic, so F^T F and F^T R of the features F = [g_1 y_1, ..., g_H y_H]
determine it: two C x C matrices for any number of tokens (`value_sums`, `solve_values`). With P_q
and Wg it is a nonlinear least-squares problem without the recurrence: `newton_step` takes one
Gauss-Newton step on all three by conjugate gradients, preconditioned by Kronecker factors of the
curvature (K-FAC, arXiv 1503.05671).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.nn.rope import Rope, rotate
from arl2_jax.sharding import constrain

# Weight of the distance from the present value, and least curvature, relative to the mean diagonal
# of a normal matrix or factor: regularizes directions that few tokens cover.
RIDGE = 1e-2
# Share of the preconditioner that is added to the curvature (Levenberg and Marquardt).
DAMPING = 0.5
CG_STEPS = 8
_VALUE_STEPS = 60
_STEP_LENGTHS = (1.0, 0.5, 0.25, 0.125)
_EXACT = jax.lax.Precision.HIGHEST


class Readings(NamedTuple):
    """Queries and states that a layer reads with, for a batch of clips and their copies.

    Attributes:
      q: queries before P_q, [2 B, n, H, D].
      states: before each block, of values before P_v, [B, blocks, H, D, D].
      x: input of the layer's attention, [2 B, n, C].
      target: what the memory should add before Wo, [2 B, n, H, D].
      weights: of the squared error of each copy, [2 B].
      rope: rotary positions; None for none.
    """

    q: Float[Array, "both n h d"]
    states: Float[Array, "b blocks h k v"]
    x: Float[Array, "both n c"]
    target: Float[Array, "both n h d"]
    weights: Float[Array, "both"]
    rope: Rope | None


class Readout(NamedTuple):
    """P_q and P_v, [H, D, D], and the columns of Wg, [H, C, 1]; or one value for each of them."""

    phi_q: Any
    phi_v: Any
    gate: Any


class ValueSums(NamedTuple):
    """Sums over tokens of weighted products, which give the error as a function of P_v.

    Attributes:
      gram: F^T F of the gated reads before P_v, [C, C] float32.
      cross: F^T R with R the target before Wo, [C, C] float32.
    """

    gram: Float[Array, "c c"]
    cross: Float[Array, "c c"]


class Factors(NamedTuple):
    """Kronecker factors of the curvature of one matrix a head, [H, I, I] and [H, O, O]."""

    inputs: Float[Array, "h i i"]
    outputs: Float[Array, "h o o"]


def value_sums(readout: Readout, readings: Readings) -> ValueSums:
    """Compute the sums over a batch that `solve_values` needs."""
    features = _gated_reads(readout, readings)[0]
    flat = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], -1)
    features, target = flat(features), flat(readings.target)
    weighted = features * readings.weights[:, None, None]
    product = lambda x: _replicated(jnp.einsum("bnc,bnd->cd", weighted, x, precision=_EXACT))
    return ValueSums(product(features), product(target))


def solve_values(
    sums: ValueSums, output: Float[Array, "c c"], start: Float[Array, "h d d"], ridge: float = RIDGE
) -> Float[Array, "h d d"]:
    """Compute the P_v of all heads that minimizes the error after Wo.

        sum |sum_h F_h P_h Wo_h - R Wo|^2 + sum_h ridge_h |P_h - start_h|^2

    by conjugate gradients on its normal equations, preconditioned by each head's diagonal block.
    They start at `start` and lower the sum in every step, so the error never rises.

    Args:
      sums: as `value_sums` returns them.
      output: Wo, [C, C].
      start: present P_v.
      ridge: relative to the mean diagonal of the head's own normal matrix.
    """
    heads, width, _ = start.shape
    blocks = lambda x: x.reshape(heads, width, heads, width)
    output = output.astype(jnp.float32)
    whole = jnp.matmul(output, output.T, precision=_EXACT)
    gram, metric = blocks(sums.gram), blocks(whole)
    right = blocks(jnp.matmul(sums.cross, whole, precision=_EXACT))
    own = lambda x: jnp.einsum("hdhe->hde", x)
    least = ridge * _mean_diagonal(own(gram)) * _mean_diagonal(own(metric))

    def normal(p):
        mixed = jnp.einsum("hdge,gef->hdgf", gram, p, precision=_EXACT)
        return jnp.einsum("hdgf,gfha->hda", mixed, metric, precision=_EXACT)

    factors = Factors(own(gram), own(metric))
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda p: normal(p) + least * p,
        own(right) - normal(start),
        maxiter=_VALUE_STEPS,
        M=_inverse_of(_damped(factors, ridge**0.5)),
    )
    return start + change


def squared_error(readout: Readout, readings: Readings, output: Float[Array, "c c"]) -> Array:
    """Compute the weighted sum of the squared error after Wo over a batch."""
    return _replicated(jnp.sum(jnp.square(_residual(readout, readings, output))))


def errors_along(
    readout: Readout, readings: Readings, output: Float[Array, "c c"], step: Readout
) -> Float[Array, "steps"]:
    """Compute the squared errors after steps scaled by each of `_STEP_LENGTHS`."""
    moved = lambda t: jax.tree.map(lambda a, b: a + t * b, readout, step)
    return jnp.stack([squared_error(moved(t), readings, output) for t in _STEP_LENGTHS])


def curvature(
    readout: Readout, readings: Readings, output: Float[Array, "c c"], key: Array
) -> tuple[Readout, Readout]:
    """Compute half the gradient of `squared_error` and Kronecker factors of its curvature.

    The factors come from the gradients of a random linear function of the residual with respect
    to each matrix's output: the gate's logits, q P_q and the read times P_v.

    Args:
      readout, readings, output: the layer, its batch, and Wo.
      key: random key of that function.

    Returns:
      (gradient, factors), each a `Readout`.
    """

    def tapped(taps: Readout):
        return _residual(readout, readings, output, taps)

    features, logits = _gated_reads(readout, readings)
    q = readings.q.astype(jnp.float32)
    x = readings.x.astype(jnp.float32)
    zeros = Readout(jnp.zeros_like(q), jnp.zeros_like(q), jnp.zeros_like(logits))
    residual, pull = jax.vjp(tapped, zeros)
    by_token = pull(residual)[0]
    probed = pull(jax.random.normal(key, residual.shape))[0]
    matrix = lambda i, o: jnp.einsum(_PRODUCT[i.ndim], i, o, precision=_EXACT)
    inputs = Readout(q, features, x)
    gradient = jax.tree.map(matrix, inputs, by_token)

    def factors(i, o):
        size = jnp.sum(jnp.square(o), axis=-1)
        weigh = "bnh,bnc,bnd->hcd" if i.ndim == 3 else "bnh,bnhc,bnhd->hcd"
        weighted = jnp.einsum(weigh, size, i, i, precision=_EXACT)
        outputs = jnp.einsum("bnhd,bnhe->hde", o, o, precision=_EXACT)
        return Factors(_replicated(weighted), _replicated(outputs))

    return jax.tree.map(_replicated, gradient), jax.tree.map(factors, inputs, probed)


_PRODUCT = {3: "bnc,bnho->hco", 4: "bnhc,bnho->hco"}


def curvature_times(
    readout: Readout, readings: Readings, output: Float[Array, "c c"], direction: Readout
) -> Readout:
    """Multiply a direction by the Gauss-Newton matrix of a batch, J^T J."""
    function = lambda readout: _residual(readout, readings, output)
    _, push = jax.linearize(function, readout)
    return jax.tree.map(_replicated, jax.linear_transpose(push, readout)(push(direction))[0])


def newton_step(
    gradient: Readout, factors: Readout, multiply: Callable[[Readout], Readout]
) -> Readout:
    """Compute a damped Gauss-Newton step by preconditioned conjugate gradients.

    Solves (J^T J + damping M) s = -gradient, with M the Kronecker factors.

    Args:
      gradient: half the gradient of the squared error.
      factors: `Factors` of every matrix, sums over all batches.
      multiply: maps a direction to J^T J times it, summed over all batches.
    """
    leaf = lambda x: isinstance(x, Factors)
    damped = jax.tree.map(_scaled, factors, is_leaf=leaf)
    inverses = jax.tree.map(_inverse_of, damped, is_leaf=leaf)
    invert = lambda r: jax.tree.map(lambda f, x: f(x), inverses, r)
    apply = lambda s: jax.tree.map(lambda f, x: f.inputs @ x @ f.outputs, damped, s, is_leaf=leaf)
    step = jax.tree.map(jnp.zeros_like, gradient)
    rest = jax.tree.map(jnp.negative, gradient)
    z = invert(rest)
    direction, size = z, _dot(rest, z)
    for _ in range(CG_STEPS):
        image = _plus(multiply(direction), DAMPING, apply(direction))
        length = size / (_dot(direction, image) + 1e-30)
        step, rest = _plus(step, length, direction), _plus(rest, -length, image)
        z = invert(rest)
        size, before = _dot(rest, z), size
        direction = _plus(z, size / (before + 1e-30), direction)
    return step


def take_step(readout: Readout, step: Readout, before: float, along: Iterable[float]):
    """Take the step length with the least error, or no step: (readout, its error).

    P_q keeps the norm of the identity.
    """
    best, length = min(zip((before, *along), (0.0, *_STEP_LENGTHS), strict=True))
    readout = _plus(readout, length, step)
    # Queries have unit length, so the scale of P_q is free; an optimizer's steps depend on it.
    norm = jnp.linalg.norm(readout.phi_q, axis=(1, 2), keepdims=True)
    phi_q = readout.phi_q * (readout.phi_q.shape[-1] ** 0.5 / norm)
    return readout._replace(phi_q=phi_q), best


def _residual(
    readout: Readout, readings: Readings, output: Float[Array, "c c"], taps: Readout | None = None
) -> Float[Array, "both n c"]:
    """Compute the weighted difference after Wo; taps are added to each matrix's output."""
    features, _ = _gated_reads(readout, readings, taps)
    added = jnp.einsum("bnhd,hde->bnhe", features, readout.phi_v)
    if taps is not None:
        added = added + taps.phi_v
    difference = added - readings.target.astype(jnp.float32)
    after = difference.reshape(readings.x.shape) @ output.astype(jnp.float32)
    return after * jnp.sqrt(readings.weights)[:, None, None]


def _gated_reads(readout: Readout, readings: Readings, taps: Readout | None = None):
    """Compute gated reads before P_v, [B, n, H, D] float32, and gate logits [B, n, H, 1]."""
    z = jnp.einsum("bnhd,hde->bnhe", readings.q.astype(jnp.float32), readout.phi_q)
    logits = jnp.einsum("bnc,hco->bnho", readings.x.astype(jnp.float32), readout.gate)
    if taps is not None:
        z, logits = z + taps.phi_q, logits + taps.gate
    z = rotate(z, readings.rope)
    q = z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-6)
    clips, blocks = readings.states.shape[:2]
    q = rearrange(q, "(b s) (m n) h k -> b s m n h k", b=clips, m=blocks)
    read = jnp.einsum("bmhkv,bsmnhk->bsmnhv", readings.states, q).reshape(readings.q.shape)
    return jax.nn.sigmoid(logits) * read * read.shape[-1] ** -0.5, logits


def _scaled(factors: Factors) -> Factors:
    """Return damped factors whose Kronecker product has the scale of the curvature."""
    inputs, outputs = _damped(factors, RIDGE)
    trace = _mean_diagonal(factors.outputs) * factors.outputs.shape[-1]
    return Factors(inputs, outputs / trace)


def _damped(factors: Factors, ridge: float) -> Factors:
    add = lambda x: x + ridge * _mean_diagonal(x) * jnp.eye(x.shape[-1])
    return Factors(*map(add, factors))


def _inverse_of(factors: Factors) -> Callable[[Array], Array]:
    """Return a function that multiplies by the inverse of the factors' Kronecker product."""
    left, right = map(jnp.linalg.inv, factors)
    return lambda x: jnp.matmul(jnp.matmul(left, x, precision=_EXACT), right, precision=_EXACT)


def _mean_diagonal(x: Float[Array, "h d d"]) -> Float[Array, "h 1 1"]:
    """Return the mean diagonal, bounded away from zero for heads whose inputs are zero."""
    return jnp.trace(x, axis1=1, axis2=2)[:, None, None] / x.shape[-1] + 1e-20


def _replicated(x: Array) -> Array:
    """Replicate small sums on every device."""
    return constrain(x, PartitionSpec())


def _plus(x: Any, factor: Any, y: Any) -> Any:
    return jax.tree.map(lambda a, b: a + factor * b, x, y)


def _dot(x: Any, y: Any) -> Array:
    products = jax.tree.map(jnp.vdot, x, y)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))
