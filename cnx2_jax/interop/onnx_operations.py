"""ONNX's operations for a detector; see `operations.Operations`. A tensor is a value's name."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cnx2_jax.interop.operations import Body

KINDS = onnx.TensorProto
BOOL, FLOAT, INT32, INT64 = KINDS.BOOL, KINDS.FLOAT, KINDS.INT32, KINDS.INT64


class Graph:
    """A graph that grows, and `operations.Operations` but for layers with weights; indices are int64.

    Args:
      reserved: names that are not to be given to anything else.

    Attributes:
      nodes: in the order of execution.
      initializers: constants and weights.
    """

    def __init__(self, reserved: Iterable[str]):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken = set(reserved)

    def node(self, kind: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Adds a node and returns the name of its first output; the others are `NAME.1` and so on."""
        name = self._unused(name)
        names = [name, *(f"{name}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Adds a constant and returns its name."""
        name = self._unused(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _unused(self, name: str) -> str:
        """Returns the name, numbered if it is taken, and takes it."""
        found, number = name, 0
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found

    def call(self, kind, *operands):
        return self._do(kind, *operands)

    def as_float(self, x):
        return self._do("Cast", x, to=FLOAT)

    def as_int(self, x):
        return self._do("Cast", x, to=INT32)

    def as_index(self, x):
        return self._do("Cast", x, to=INT64)

    def reshape(self, x, shape):
        return self._do("Reshape", x, np.array(shape))

    def transpose(self, x, order):
        return self._do("Transpose", x, perm=order)

    def stack(self, tensors):
        return self._do("Concat", *(self._do("Unsqueeze", x, np.array([-1])) for x in tensors), axis=-1)

    def join(self, tensors):
        return self._do("Concat", *tensors, axis=1)

    def column(self, x, index):
        return self._do("Gather", x, np.array(index), axis=-1)

    def first(self, x, count):
        return self._do("Slice", x, np.array([0]), np.array([count]), np.array([-1]))

    def every_second(self, x):
        last = np.array([2**31 - 1] * 2)
        return self._do("Slice", x, np.array([0, 0]), last, np.array([1, 2]), np.array([2, 2]))

    def double(self, x):
        scales = np.array([1, 1, 2, 2], np.float32)
        x = self.transpose(x, [0, 3, 1, 2])  # runtimes resize the last two axes
        options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.transpose(self._do("Resize", x, "", scales, mode="nearest", **options), [0, 2, 3, 1])

    def rows(self, table, index):
        return self._do("Gather", table, index)

    def take(self, x, index):
        return self._do("GatherND", x, self._do("Unsqueeze", index, np.array([-1])), batch_dims=1)

    def top_k(self, x, count):
        name = self.node("TopK", [x, self._operand(np.array([count]))], "top_k", outputs=2)
        return name, f"{name}.1"

    def argmax(self, x):
        return self._do("ArgMax", x, axis=-1, keepdims=0)

    def maximum(self, x, axis):
        return self._do("ReduceMax", x, np.array([axis]), keepdims=0)

    def total(self, x, axis):
        return self._do("ReduceSum", x, np.array([axis]), keepdims=0)

    def largest(self, x):
        return self._do("ReduceMax", x, keepdims=0)

    def softmax(self, x):
        return self._do("Softmax", x, axis=-1)

    def loop(self, body: Body, state: list[str], trips: int | None = None) -> tuple[list[str], list[str]]:
        outside, self.nodes = self.nodes, []  # the body reads all but its inputs from the graph around it
        prefix = self._unused("loop")
        given = [f"{prefix}.{index}" for index in range(len(state))]
        decided, state_after, found = body(given)
        again = self._do("Identity", f"{prefix}.again" if decided is None else decided)
        results = [again, *(self._do("Identity", x) for x in [*state_after, *found])]
        about = helper.make_tensor_value_info
        inputs = [about(f"{prefix}.trip", INT64, []), about(f"{prefix}.again", BOOL, [])]
        inputs += [about(name, FLOAT, None) for name in given]
        outputs = [about(again, BOOL, []), *(about(name, FLOAT, None) for name in results[1:])]
        graph = helper.make_graph(self.nodes, prefix, inputs, outputs)
        self.nodes = outside
        limit = "" if trips is None else self._operand(np.array(trips))
        start = [limit, self._operand(np.array(True)), *state]
        name = self.node("Loop", start, f"{prefix}.results", outputs=len(results) - 1, body=graph)
        names = [name, *(f"{name}.{index}" for index in range(1, len(results) - 1))]
        return names[: len(state)], names[len(state) :]

    def regions(self, x, boxes, stride, bins):
        x = self.transpose(x, [0, 3, 1, 2])
        y0, x0, y1, x1 = (self.column(boxes, index) for index in range(4))
        corners = self.reshape(self.stack([x0, y0, x1, y1]), [-1, 4])
        # The number of each region's image.
        ones = self._do("Cast", self._do("GreaterOrEqual", y0, y0), to=INT64)
        images = self._do("Sub", self._do("CumSum", ones, np.array(0)), np.array([1]))
        images = self.reshape(images, [-1])
        cut = self._do(
            "RoiAlign",
            x,
            corners,
            images,
            output_height=bins,
            output_width=bins,
            sampling_ratio=0,
            spatial_scale=1 / stride,
            coordinate_transformation_mode="half_pixel",
        )
        cut = self.transpose(cut, [0, 2, 3, 1])
        count = self._do("Shape", boxes, start=0, end=2)
        rest = self._do("Shape", cut, start=1)
        return self._do("Reshape", cut, self._do("Concat", count, rest, axis=0))

    def _operand(self, x: str | np.ndarray | np.generic) -> str:
        return x if isinstance(x, str) else self.constant("constant", x)

    def _do(self, kind: str, *operands: str | np.ndarray | np.generic, **attributes: Any) -> str:
        return self.node(kind, [self._operand(x) for x in operands], kind.lower(), **attributes)
