"""Operations that a detector needs of a framework, and tensors with Python's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Tensor = Any  # a framework's tensor
Body = Callable[[list[Tensor]], tuple[Tensor | None, list[Tensor], list[Tensor]]]


class Operations(Protocol):
    """A framework's operations on its tensors, beside `layers.Layers`; the first axis is the batch.

    Numbers and NumPy arrays take the place of tensors. Indices have the framework's dtype of indices.
    """

    def call(self, kind: str, *operands: Tensor) -> Tensor:
        """Applies an elementwise function with broadcasting; `kind` is its name in ONNX."""
        ...

    def as_float(self, x: Tensor) -> Tensor: ...

    def as_int(self, x: Tensor) -> Tensor:
        """Converts to int32."""
        ...

    def as_index(self, x: Tensor) -> Tensor: ...

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor: ...

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor: ...

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stacks along a new last axis."""
        ...

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenates along the second axis."""
        ...

    def column(self, x: Tensor, index: int) -> Tensor:
        """Returns one element of the last axis."""
        ...

    def first(self, x: Tensor, count: int) -> Tensor:
        """Returns the first elements of the last axis."""
        ...

    def every_second(self, x: Tensor) -> Tensor:
        """Returns every second row and column of a map `[B, h, w, C]`, from the first."""
        ...

    def double(self, x: Tensor) -> Tensor:
        """Repeats every row and column of a map."""
        ...

    def upsample(self, x: Tensor, name: str) -> Tensor:
        """Transposed 2x2 convolution of stride 2 with a kernel `[2, 2, in, out]`, and its bias."""
        ...

    def rows(self, table: np.ndarray, index: Tensor) -> Tensor:
        """Returns rows of a table `[n, ...]` by an index of any shape."""
        ...

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Returns `[B, k, ...]`: the rows of each `x[b]` `[n, ...]` by its index `[B, k]`."""
        ...

    def top_k(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns the largest elements of the last axis and their indices; of equal ones the first."""
        ...

    def argmax(self, x: Tensor) -> Tensor:
        """Returns the index of the first maximum of the last axis."""
        ...

    def maximum(self, x: Tensor, axis: int) -> Tensor:
        """Returns the largest value along an axis."""
        ...

    def total(self, x: Tensor, axis: int) -> Tensor:
        """Returns the sum along an axis."""
        ...

    def largest(self, x: Tensor) -> Tensor:
        """Returns the largest of all values, a scalar."""
        ...

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        ...

    def loop(
        self, body: Body, state: list[Tensor], trips: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Calls `body` `trips` times, or as long as it returns true.

        Args:
          body: maps float32 tensors to: whether to continue, a scalar, ignored with `trips`; the next state,
            of the same shapes; float32 tensors to collect.
          state: at the start.
          trips: None loops as `body` decides, and nothing is collected.

        Returns:
          The state at the end, and the collected tensors, stacked along a new first axis.
        """
        ...

    def regions(self, x: Tensor, boxes: Tensor, stride: int, bins: int) -> Tensor:
        """Cuts regions `[B, R, bins, bins, C]` from one map, as `roi_align` does.

        Boxes are `[B, R, 4]` in pixels; empty ones give 0.
        """
        ...


class Value:
    """A tensor with Python's operators, so that formulas look like formulas."""

    def __init__(self, operations: Operations, tensor: Tensor):
        self.operations, self.tensor = operations, tensor

    def apply(self, kind: str, *others: Value | float | np.ndarray) -> Value:
        """Returns an elementwise function of this and other values; see `Operations.call`."""
        operands = [other.tensor if isinstance(other, Value) else _constant(other) for other in others]
        return Value(self.operations, self.operations.call(kind, self.tensor, *operands))

    def then(self, method: str, *arguments: Any) -> Value:
        """Returns the result of a method of Operations on this value."""
        return Value(self.operations, getattr(self.operations, method)(self.tensor, *arguments))

    def where(self, other: Value | float, condition: Value) -> Value:
        """Returns this where the condition holds, and the other elsewhere."""
        return condition.apply("Where", self, other)

    def clip(self, low: float, high: float) -> Value:
        return self.apply("Max", low).apply("Min", high)

    def __add__(self, other: Value | float) -> Value:
        return self.apply("Add", other)

    def __sub__(self, other: Value | float | np.ndarray) -> Value:
        return self.apply("Sub", other)

    def __mul__(self, other: Value | float | np.ndarray) -> Value:
        return self.apply("Mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self.apply("Div", other)

    def __and__(self, other: Value) -> Value:
        return self.apply("And", other)

    def __gt__(self, other: Value | float) -> Value:
        return self.apply("Greater", other)

    def __ge__(self, other: Value | float) -> Value:
        return self.apply("GreaterOrEqual", other)

    def __lt__(self, other: Value | float) -> Value:
        return self.apply("Less", other)


def _constant(value: float | np.ndarray) -> np.ndarray | np.generic:
    return value if isinstance(value, np.ndarray) else np.float32(value)
