"""Run training steps of a jitted JAX function, in a process of its own that `wakesleep_ext.benchmark.elsewhere` times.

The inputs are an `.npz` file, written by `steps.Problem.to_bytes`. Arrays `recognition.0`, `recognition.1`, ... are
the weights `[in, out]` and the bias of each layer in turn. A result is the losses of both phases.

This file imports only JAX and NumPy, so that the process has no threads of torch.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

Network = list[tuple[Array, Array]]
State = dict[str, Any]


def forward(network: Network, h: Array) -> Array:
    *hidden, (weight, bias) = network
    for inner_weight, inner_bias in hidden:
        h = jnp.tanh(h @ inner_weight + inner_bias)
    return h @ weight + bias


def wake_loss(generative: Network, recognition: Network, x: Array, num_samples: int, key: Array) -> Array:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.wake_theta_loss`."""
    mu, logvar = jnp.split(forward(recognition, x), 2, -1)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, (num_samples, *mu.shape))
    logits = forward(generative, z)
    return (jax.nn.softplus(logits) - x * logits).sum() / (num_samples * len(x))


def sleep_loss(recognition: Network, generative: Network, num_dreams: int, keys: tuple[Array, Array]) -> Array:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.sleep_phi_loss`."""
    z = jax.random.normal(keys[0], (num_dreams, len(generative[0][0])))
    x = jax.random.bernoulli(keys[1], jax.nn.sigmoid(forward(generative, z))).astype(jnp.float32)
    mu, logvar = jnp.split(forward(recognition, x), 2, -1)
    terms = logvar + jnp.square(z - mu) * jnp.exp(-logvar) + np.log(2 * np.pi)
    return 0.5 * terms.sum() / num_dreams


def descend(loss: Callable[[Network], Array], state: State, step: Array, adam: dict[str, float]) -> tuple[State, Array]:
    """Take a step of Adam (Kingma & Ba, 2015)."""
    value, gradient = jax.value_and_grad(loss)(state["network"])
    first, second = adam["beta1"], adam["beta2"]
    mean = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state["mean"], gradient)
    square = jax.tree.map(lambda v, g: second * v + (1 - second) * g * g, state["square"], gradient)
    rate, root = adam["learning_rate"] / (1 - first**step), jnp.sqrt(1 - second**step)
    network = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + adam["epsilon"]), state["network"], mean, square
    )
    return {"network": network, "mean": mean, "square": square}, value


def train(state: State, grey: Array, batch: Array, *, num_samples: int, white: int, adam: dict[str, float]) -> Any:
    """Run a wake phase and a sleep phase. Return the new state, and both losses."""
    key, *keys = jax.random.split(state["key"], 5)
    step = state["step"] + 1
    x = jax.random.bernoulli(keys[0], grey[batch] / white).astype(jnp.float32)
    recognition = state["recognition"]["network"]
    wake = partial(wake_loss, recognition=recognition, x=x, num_samples=num_samples, key=keys[1])
    generative, of_wake = descend(wake, state["generative"], step, adam)
    sleep = partial(sleep_loss, generative=generative["network"], num_dreams=len(batch), keys=(keys[2], keys[3]))
    recognition, of_sleep = descend(sleep, state["recognition"], step, adam)
    return {"key": key, "step": step, "generative": generative, "recognition": recognition}, (of_wake, of_sleep)


def read(problem: Any, name: str) -> State:
    """Return a network of the problem and the initial state of its optimizer."""
    arrays = [jnp.asarray(problem[each]) for each in problem.files if each.startswith(f"{name}.")]
    network = list(zip(arrays[::2], arrays[1::2], strict=True))
    mean, square = (jax.tree.map(jnp.zeros_like, network) for _ in range(2))
    return {"network": network, "mean": mean, "square": square}


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


def start(problem: Any) -> tuple[Any, State, tuple[Array, Array]]:
    """Return the jitted step, its first state, and its other arguments. The step reuses the memory of its state."""
    adam = {name: float(problem[name]) for name in ("learning_rate", "beta1", "beta2", "epsilon")}
    step = partial(train, num_samples=int(problem["num_samples"]), white=int(problem["white"]), adam=adam)
    state = {
        "key": jax.random.key(int(problem["seed"])),
        "step": jnp.zeros((), jnp.float32),
        "generative": read(problem, "generative"),
        "recognition": read(problem, "recognition"),
    }
    return jax.jit(step, donate_argnums=0), state, (jnp.asarray(problem["grey"]), jnp.asarray(problem["batch"]))


def main() -> None:
    problem = np.load(io.BytesIO(sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))))
    if os.environ["JAX_PLATFORMS"] == "cpu":  # XLA starts as many threads as the process has processors
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(problem["threads"]) :])
    jax.config.update("jax_default_matmul_precision", "float32")  # on a GPU, the default is TF32
    run, state, data = start(problem)
    memory = run.lower(state, *data).compile().memory_analysis()
    state, losses = run(state, *data)
    answer({"result": [float(loss) for loss in losses], "peak_bytes": memory.temp_size_in_bytes})
    for line in sys.stdin.buffer:
        begin = perf_counter()
        for _ in range(int(line)):
            state, losses = run(state, *data)
        jax.block_until_ready((state, losses))
        answer(perf_counter() - begin)


if __name__ == "__main__":
    main()
