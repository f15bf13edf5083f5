"""Read the weights of an ONNX file with numpy only.

An ONNX file is a protocol-buffer message, and the weights are in a few of its fields. So the examples do not need the
`onnx` package. Format: https://onnx.ai/onnx/repo-docs/IR.html and onnx.proto.
"""

from pathlib import Path

import numpy as np


# field numbers in onnx.proto
MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
NODE_INPUT, NODE_NAME, NODE_OP_TYPE = 1, 3, 4
TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_NAME, TENSOR_RAW_DATA = 1, 2, 8, 9
FLOAT32 = 1


def read_onnx_weights(path):
    """
    Read the float32 weights of an ONNX file that was exported from PyTorch.

    Args:
        path (`str` or `Path`):
            The file. Its weights must be inside it.

    Returns:
        `dict[str, np.ndarray]`: arrays by their PyTorch names, linear weights in PyTorch's orientation. A folded
        constant, which has no PyTorch name, has the name that the export gave it.
    """
    graph = next(value for field, value in fields(memoryview(Path(path).read_bytes())) if field == MODEL_GRAPH)
    weights, nodes = {}, []
    for field, value in fields(graph):
        if field == GRAPH_INITIALIZER:
            weights.update(read_tensor(value))
        elif field == GRAPH_NODE:
            nodes.append(list(fields(value)))
    for node in nodes:
        if text(node, NODE_OP_TYPE) == "MatMul":
            # The export transposes a linear layer's weight and names it by a number; the node has the layer's name
            used = [bytes(value).decode() for field, value in node if field == NODE_INPUT]
            name = text(node, NODE_NAME).strip("/").replace("/", ".").removesuffix(".MatMul") + ".weight"
            weights.update({name: np.ascontiguousarray(weights.pop(i).T) for i in used if i in weights})
    return weights


def read_tensor(message):
    found = list(fields(message))
    if dict(found).get(TENSOR_DATA_TYPE) != FLOAT32:
        return {}
    shape = [value for field, value in found if field == TENSOR_DIMS]
    data = next((value for field, value in found if field == TENSOR_RAW_DATA), b"")
    return {text(found, TENSOR_NAME): np.frombuffer(data, np.float32).reshape(shape)} if len(data) else {}


def text(found, number):
    return next((bytes(value).decode() for field, value in found if field == number), "")


def fields(message):
    """Yield the (field number, value) pairs of a protocol-buffer message. A value is an integer or a view of bytes."""
    position = 0
    while position < len(message):
        key, position = varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = varint(message, position)
        else:
            length, position = varint(message, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            value, position = message[position : position + length], position + length
        yield key >> 3, value


def varint(message, position):
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
