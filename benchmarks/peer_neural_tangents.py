"""neural-tangents on one network and one set of inputs, for ``benchmarks.ntk``: a server of lines on stdin and stdout.

Run by the Python of ``make bench-peers``, so it imports neither torch nor ticketlab::

    python peer_neural_tangents.py PROBLEM.npz METHOD ...

The file holds the inputs x [n, in], w1, b1, ... of a ReLU network (weights [out, in]) and, of a masked one, m1, m2,
... The parameters are the layers or, with masks, the vector of the kept weights and every bias, scattered into zeros.
Once every METHOD has been compiled and has run, it prints ``ready``; then it answers ``METHOD`` with the seconds of
one run and ``save METHOD PATH`` with the path, where the kernel lies as [n, out, n, out].
"""

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # neural-tangents imports TensorFlow, which talks

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np

# Not AUTO: it is one of these, and its authors warn of wrong results on CPU.
IMPLEMENTATIONS = {
    "jacobian-contraction": nt.NtkImplementation.JACOBIAN_CONTRACTION,
    "ntk-vector-products": nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    "structured-derivatives": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
}

Layers = list[tuple[jax.Array, jax.Array]]


def network(layers: Layers, x: jax.Array) -> jax.Array:
    """Logits [n, out]; weights [in, out], as stax has them."""
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def read(arrays: dict[str, np.ndarray]) -> tuple[Callable, Layers | jax.Array]:
    """The function to differentiate and the point: of every parameter, or of the live vector where there are masks."""
    indices = range(1, 1 + sum(name.startswith("w") for name in arrays))
    layers = [(arrays[f"w{i}"].T, arrays[f"b{i}"]) for i in indices]
    if "m1" not in arrays:
        return network, jax.tree.map(jnp.asarray, layers)
    kept = [np.flatnonzero(arrays[f"m{i}"].T) for i in indices]
    parts = [part for (w, b), index in zip(layers, kept, strict=True) for part in (w.flatten()[index], b)]
    ends = np.cumsum([len(part) for part in parts])[:-1]

    def live(vector: jax.Array, x: jax.Array) -> jax.Array:
        split = jnp.split(vector, ends)
        weights = [
            jnp.zeros(w.size, w.dtype)
            .at[index]
            .set(part, unique_indices=True, indices_are_sorted=True)
            .reshape(w.shape)
            for (w, _), index, part in zip(layers, kept, split[::2], strict=True)
        ]
        return network(list(zip(weights, split[1::2], strict=True)), x)

    return live, jnp.asarray(np.concatenate(parts))


def kernels(path: str, methods: list[str]) -> dict[str, Callable[[], jax.Array]]:
    """What computes the kernel [n, n, out, out] by each method, compiled and warm."""
    with np.load(path) as file:
        arrays = dict(file)
    f, point = read(arrays)
    x = jnp.asarray(arrays["x"])

    def compiled(method: str) -> Callable[[], jax.Array]:
        kernel_fn = nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=IMPLEMENTATIONS[method])
        kernel = jax.jit(lambda inputs, parameters: kernel_fn(inputs, None, parameters))
        return lambda: kernel(x, point).block_until_ready()

    found = {method: compiled(method) for method in methods}
    for kernel in found.values():
        kernel()
    return found


def serve(found: dict[str, Callable[[], jax.Array]]) -> None:
    """Answer lines until there are no more."""
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split(maxsplit=2):
            case ["save", method, path]:
                np.save(path.strip(), np.asarray(found[method]()).transpose(0, 2, 1, 3))
                print(path.strip(), flush=True)
            case [method]:
                began = time.perf_counter()
                found[method]()
                print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    serve(kernels(sys.argv[1], sys.argv[2:]))
