"""Decima's decisions in compiled code: for training episodes, where a pass over few small graphs is all overhead."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from netllm_pl.kernels import njit

Floats = npt.NDArray[np.float32]


class Layers(NamedTuple):
    """Three linear layers, weights (in, out)."""

    w1: Floats
    b1: Floats
    w2: Floats
    b2: Floats
    w3: Floats
    b3: Floats


class Weights(NamedTuple):
    """Those of a `DecimaNet`; `tasks.job_scheduling.playing` copies them."""

    prep: Layers
    message: Layers
    update: Layers
    job: Layers
    group: Layers
    stage: Layers
    executors: Layers


@njit(nogil=True)
def decide(net, nodes, edges, heights, job_nodes, caps, stages, of_stage, of_executors):  # type: ignore[no-untyped-def]
    """Draw a stage, a number among ``stages``, and how many executors it gets."""
    if len(stages) == 0:
        return -1, 1
    hidden, jobs, group, owner, first = embed(net, nodes, edges, heights, job_nodes)
    features, size = nodes.shape[1], hidden.shape[1]
    inputs = np.empty(features + 3 * size, np.float32)
    inputs[features + 2 * size :] = group
    scores = np.empty(len(stages), np.float32)
    for k in range(len(stages)):
        node = stages[k]
        inputs[:features] = nodes[node]
        inputs[features : features + size] = hidden[node]
        inputs[features + size : features + 2 * size] = jobs[owner[node]]
        scores[k] = squashed(net.stage, inputs)
    k = drawn(scores, of_stage)
    j = owner[stages[k]]
    told = np.empty(len(net.executors.w1), np.float32)
    shared = len(told) - 2 * size - 1  # features that all nodes of a job have in common
    told[:shared] = nodes[first[j], :shared]
    told[shared : shared + size] = jobs[j]
    told[shared + size : shared + 2 * size] = group
    everyone = np.round(caps[j] / nodes[first[j], 0])
    scores = np.empty(caps[j], np.float32)
    for count in range(caps[j]):
        told[-1] = count / everyone
        scores[count] = squashed(net.executors, told)
    return k, 1 + drawn(scores, of_executors)


@njit()
def embed(net, nodes, edges, heights, job_nodes):  # type: ignore[no-untyped-def]
    """Embed nodes, jobs and all there is; tell the job of each node, and the first node of each job.

    Nodes go by height, and each one's message to all its parents, which are higher.
    """
    size, features = len(net.prep.b3), nodes.shape[1]
    hidden = np.empty((len(nodes), size), np.float32)
    received = np.zeros((len(nodes), size), np.float32)
    for height in range(heights.max() + 1):
        for node in range(len(nodes)):
            if heights[node] != height:
                continue
            base = leaky(net.prep, nodes[node])
            if height > 0:
                hidden[node] = base + leaky(net.update, received[node])
            else:  # as published, sinks stay as they are where no stage at all has a child
                hidden[node] = leaky(net.update, base) if len(edges) > 0 else base
            message = leaky(net.message, hidden[node])
            for edge in range(len(edges)):
                if edges[edge, 1] == node:
                    received[edges[edge, 0]] += message
    owner, first = np.empty(len(nodes), np.int64), np.empty(len(job_nodes), np.int64)
    jobs, group = np.zeros((len(job_nodes), size), np.float32), np.zeros(size, np.float32)
    inputs, node = np.empty(features + size, np.float32), 0
    for j in range(len(job_nodes)):
        first[j] = node
        for _ in range(job_nodes[j]):
            inputs[:features], inputs[features:] = nodes[node], hidden[node]
            jobs[j] += leaky(net.job, inputs)
            owner[node] = j
            node += 1
        group += leaky(net.group, jobs[j])
    return hidden, jobs, group, owner, first


@njit()
def leaky(layers, inputs):  # type: ignore[no-untyped-def]
    """Run an encoder's network on one row."""
    first = linear(layers.w1, layers.b1, inputs)
    second = linear(layers.w2, layers.b2, np.where(first > 0, first, np.float32(0.2) * first))
    return linear(layers.w3, layers.b3, np.where(second > 0, second, np.float32(0.2) * second))


@njit()
def squashed(layers, inputs):  # type: ignore[no-untyped-def]
    """Run a head on one row."""
    first = np.tanh(linear(layers.w1, layers.b1, inputs))
    return linear(layers.w3, layers.b3, np.tanh(linear(layers.w2, layers.b2, first)))[0]


@njit()
def linear(weights, bias, inputs):  # type: ignore[no-untyped-def]
    """Multiply one row; the inner loop runs over neighbours in memory, which the compiler makes vectors of."""
    outputs = bias.copy()
    for i in range(len(inputs)):
        for o in range(len(outputs)):
            outputs[o] += inputs[i] * weights[i, o]
    return outputs


@njit()
def drawn(scores, uniform):  # type: ignore[no-untyped-def]
    """Draw from the softmax of scores."""
    chances = np.exp(scores - scores.max())
    wanted = uniform * chances.sum()
    passed = 0.0
    for k in range(len(chances) - 1):
        passed += chances[k]
        if wanted < passed:
            return k
    return len(chances) - 1
