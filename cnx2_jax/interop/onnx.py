"""ONNX: one graph of standard operations, for onnxruntime and other readers of ONNX.

The input is `images`, channels last; the outputs are those of the model. Initializers have the names of our
parameters; kernels of convolutions have ONNX's layout `[out, in, rows, columns]`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from jaxtyping import Shaped
from onnx import helper, numpy_helper

from cnx2_jax.interop.inference import InferenceModel, Results
from cnx2_jax.interop.layers import compose
from cnx2_jax.interop.onnx_operations import Graph
from cnx2_jax.kernels.pointwise import EPSILON

OPSET = 20  # the first opset with GELU
IR_VERSION = 9  # the IR version of that opset
LIMIT = 2**31 - 2**20  # bytes of weights in the file: protobuf cannot hold 2 GiB


def write(path: Path, model: InferenceModel) -> None:
    """Writes the graph for any batch size.

    Weights above `LIMIT` go into a second file beside it, `NAME.data`, to which the first refers.

    Raises:
      OSError: it cannot be written.
    """
    graph = _Graph(model)
    for name, value in compose(model, graph, "images").items():
        graph.nodes.append(helper.make_node("Identity", [value], [name], name=name))
    kind = helper.np_dtype_to_tensor_dtype(model.dtype)
    images = helper.make_tensor_value_info("images", kind, ["batch", *model.shape], _describe(model))
    outputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype)), ["batch", *result.shape]
        )
        for name, result in model.outputs.items()
    ]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "ConvNeXtV2", [images], outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="cnx2_jax",
    )
    outside = sum(value.nbytes for value in model.params.values()) > LIMIT
    onnx.save_model(proto, path, save_as_external_data=outside, location=f"{path.name}.data")
    onnx.checker.check_model(path, full_check=True)


def run(path: Path, images: Shaped[np.ndarray, "b h w c"]) -> Results:
    """Runs a file written by `write`, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {"images": images})
    if len(results) == 1:
        return results[0]
    return {output.name: result for output, result in zip(session.get_outputs(), results, strict=True)}


def _describe(model: InferenceModel) -> str:
    height, width, channels = model.shape
    if model.uint8:
        return f"[batch, {height}, {width}, {channels}], from 0 to 255"
    shares = "x / 255" if model.stored == "uint8" else "x"
    return (
        f"[batch, {height}, {width}, {channels}], ({shares} - mean) / std with mean {model.mean} "
        f"and std {model.std}, of images of {model.stored}"
    )


class _Graph(Graph):
    """Implements `layers.Layers`, and `operations.Operations` too.

    A tensor is a value's name. A layer's value has the layer's name, numbered where a layer is used again.
    """

    def __init__(self, model: InferenceModel):
        super().__init__({"images", *model.outputs, *model.params})
        self.model = model
        self._used: set[str] = set()  # parameters that are in the graph
        self.constant("epsilon", np.float32(EPSILON))
        self.constant("one", np.float32(1))
        self.constant("positions", np.array([1, 2]))
        self.constant("channels", np.array([-1]))

    def _parameter(self, name: str) -> str:
        if name in self._used:
            return name
        self._used.add(name)
        value = self.model.params[name]
        match value.ndim:
            case 3:  # depthwise [rows, columns, channels] -> [channels, 1, rows, columns]
                value = value.transpose(2, 0, 1)[:, None]
            case 4 if name.endswith(".upsample.kernel"):  # -> [in, out, rows, columns]
                value = value.transpose(2, 3, 0, 1)
            case 4:  # [rows, columns, in, out] -> [out, in, rows, columns]
                value = value.transpose(3, 2, 0, 1)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _convolve(self, x: str, name: str, **attributes: Any) -> str:
        x = self.node("Transpose", [x], f"{name}.channels_first", perm=[0, 3, 1, 2])
        inputs = [x, self._parameter(f"{name}.kernel")]
        if f"{name}.bias" in self.model.params:
            inputs.append(self._parameter(f"{name}.bias"))
        x = self.node("Conv", inputs, f"{name}.conv", **attributes)
        return self.node("Transpose", [x], name, perm=[0, 2, 3, 1])

    def normalise(self, images: str) -> str:
        x = self.node("Cast", [images], "images.float", to=onnx.TensorProto.FLOAT)
        x = self.node("Div", [x, self.constant("full", np.float32(255))], "images.share")
        mean = self.constant("mean", np.array(self.model.mean, np.float32))
        std = self.constant("std", np.array(self.model.std, np.float32))
        return self.node("Div", [self.node("Sub", [x, mean], "images.centred"), std], "images.normal")

    def patch_conv(self, x: str, name: str) -> str:
        patch = self.model.params[f"{name}.kernel"].shape[0]
        return self._convolve(x, name, kernel_shape=[patch] * 2, strides=[patch] * 2)

    def depthwise(self, x: str, name: str) -> str:
        size, _, channels = self.model.params[f"{name}.kernel"].shape
        return self._convolve(x, name, kernel_shape=[size] * 2, pads=[size // 2] * 4, group=channels)

    def layer_norm(self, x: str, name: str) -> str:
        inputs = [x, self._parameter(f"{name}.scale"), self._parameter(f"{name}.bias")]
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=EPSILON)

    def linear(self, x: str, name: str) -> str:
        x = self.node("MatMul", [x, self._parameter(f"{name}.kernel")], f"{name}.product")
        return self.node("Add", [x, self._parameter(f"{name}.bias")], name)

    def gelu(self, x: str) -> str:
        return self.node("Gelu", [x], f"{x}.gelu")

    def grn(self, x: str, name: str) -> str:
        squares = self.node("ReduceSumSquare", [x, "positions"], f"{name}.squares")
        squares = self.node("Add", [squares, "epsilon"], f"{name}.squares_above_0")
        norm = self.node("Sqrt", [squares], f"{name}.norm")
        mean = self.node("ReduceMean", [norm, "channels"], f"{name}.mean")
        mean = self.node("Add", [mean, "epsilon"], f"{name}.mean_above_0")
        response = self.node("Div", [norm, mean], f"{name}.response")
        scale = self.node("Mul", [response, self._parameter(f"{name}.gamma")], f"{name}.change")
        scale = self.node("Add", [scale, "one"], f"{name}.scale")
        x = self.node("Mul", [x, scale], f"{name}.scaled")
        return self.node("Add", [x, self._parameter(f"{name}.beta")], name)

    def add(self, x: str, y: str) -> str:
        return self.node("Add", [x, y], f"{y}.residual")

    def mean(self, x: str) -> str:
        return self.node("ReduceMean", [x, "positions"], "mean_of_positions", keepdims=0)

    def conv(self, x: str, name: str) -> str:
        size = self.model.params[f"{name}.kernel"].shape[0]
        return self._convolve(x, name, kernel_shape=[size] * 2, pads=[size // 2] * 4)

    def scale_shift(self, x: str, name: str, scale: np.ndarray, shift: np.ndarray) -> str:
        x = self.node("Mul", [x, self.constant(f"{name}.factor", scale)], f"{name}.scaled")
        return self.node("Add", [x, self.constant(f"{name}.shift", shift)], name)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], f"{x}.relu")

    def resample(self, x: str, name: str, rows: np.ndarray, columns: np.ndarray) -> str:
        x = self._product("yh,bhwc->bywc", x, f"{name}.rows", rows)
        return self._product("xw,bywc->byxc", x, f"{name}.columns", columns)

    def _product(self, equation: str, x: str, name: str, weights: np.ndarray) -> str:
        return self.node("Einsum", [self.constant(f"{name}.weights", weights), x], name, equation=equation)

    def upsample(self, x: str, name: str) -> str:
        x = self.node("Transpose", [x], f"{name}.channels_first", perm=[0, 3, 1, 2])
        inputs = [x, self._parameter(f"{name}.kernel"), self._parameter(f"{name}.bias")]
        x = self.node("ConvTranspose", inputs, f"{name}.conv", kernel_shape=[2, 2], strides=[2, 2])
        return self.node("Transpose", [x], name, perm=[0, 2, 3, 1])

    def concatenate(self, maps: Sequence[str], name: str) -> str:
        return self.node("Concat", list(maps), name, axis=-1)
