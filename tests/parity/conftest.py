"""The same network twice: ours, and Hugging Face's with our weights. Imports torch only when called."""

import numpy as np
import pytest

from cnx2_jax.interop.names import to_torch
from cnx2_jax.models import ConvNeXtV2, UperNet
from cnx2_jax.models.state import split


def hugging_face_twin(model: ConvNeXtV2, parameters: dict):
    """Returns `ConvNextV2ForImageClassification` with the weights of `model`, in evaluation mode."""
    import torch
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    config = ConvNextV2Config(
        depths=list(model.config.depths),
        hidden_sizes=list(model.config.dims),
        patch_size=model.config.patch_size,
        num_channels=model.config.in_chans,
        num_labels=model.num_classes,
        layer_norm_eps=1e-6,  # of the final norm; theirs is 1e-12, the official one 1e-6
    )
    twin = ConvNextV2ForImageClassification(config).eval()
    weights = dict(twin.named_parameters())
    for path, variable in parameters.items():
        name, value = hugging_face_name(path), np.asarray(variable[...])
        if path.endswith("kernel"):
            if value.ndim == 3:  # depthwise [rows, columns, channels] -> [channels, 1, rows, columns]
                value = value.transpose(2, 0, 1)[:, None]
            elif value.ndim == 4:  # [rows, columns, in, out] -> [out, in, rows, columns]
                value = value.transpose(3, 2, 0, 1)
            else:
                value = value.T
        weight = weights.pop(name)
        value = value.reshape(weight.shape) if "grn" in name else value  # [1, 1, 1, C] there
        assert tuple(weight.shape) == value.shape, name
        weight.data = torch.tensor(value)
    assert not weights, f"not set: {sorted(weights)}"
    return twin


def hugging_face_name(path: str) -> str:
    """Our parameter path to theirs, such as `stages.0.1.pwconv1.kernel` to
    `convnextv2.encoder.stages.0.layers.1.pwconv1.weight`."""
    *modules, leaf = path.split(".")
    leaf = {"kernel": "weight", "scale": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    match modules:
        case ["downsample_layers", "0", index]:
            modules = ["embeddings", ["patch_embeddings", "layernorm"][int(index)]]
        case ["downsample_layers", stage, index]:
            modules = ["encoder", "stages", stage, "downsampling_layer", index]
        case ["stages", stage, block, *rest]:
            rest = ["layernorm" if name == "norm" else name for name in rest]
            modules = ["encoder", "stages", stage, "layers", block, *rest]
        case ["norm"]:
            modules = ["layernorm"]
        case ["head"]:
            return f"classifier.{leaf}"
    return ".".join(["convnextv2", *modules, leaf])


def run_twin(twin, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the twin's logits and its four stage maps, channels last."""
    import torch

    maps = []
    hooks = [
        stage.register_forward_hook(lambda _, __, out: maps.append(out.permute(0, 2, 3, 1).numpy()))
        for stage in twin.convnextv2.encoder.stages
    ]
    with torch.no_grad():
        logits = twin(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, maps


@pytest.fixture(scope="session")
def twin_of():
    """The function `hugging_face_twin(model, parameters)`."""
    return hugging_face_twin


@pytest.fixture(scope="session")
def run_of_twin():
    """The function `run_twin(twin, images)`."""
    return run_twin


def hugging_face_upernet(model: UperNet):
    """Returns `UperNetForSemanticSegmentation` with the arrays of `model`, in evaluation mode."""
    import torch
    from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    arrays = {name: np.asarray(value) for name, value in split(model)[1].items()}
    config = UperNetConfig(
        backbone_config=ConvNextV2Config(
            depths=list(model.config.depths),
            hidden_sizes=list(model.config.dims),
            patch_size=model.config.patch_size,
            num_channels=model.config.in_chans,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_size=len(arrays["decode_head.bottleneck.bn.bias"]),
        pool_scales=list(model.pool_scales),
        auxiliary_in_channels=model.config.dims[2],
        auxiliary_channels=len(arrays["auxiliary_head.convs.0.bn.bias"]),
        num_labels=model.num_classes,
    )
    with torch.device("meta"):
        twin = UperNetForSemanticSegmentation(config)
    tensors = {name: torch.tensor(value) for name, value in to_torch(arrays, "huggingface").items()}
    twin.load_state_dict(tensors, assign=True)
    return twin.eval()


def run_upernet(twin, images: np.ndarray):
    """Returns the twin's logits of both heads, at the resolution of the heads, channels last, as tensors."""
    import torch

    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    maps = twin.backbone.forward_with_filtered_kwargs(pixels).feature_maps
    return [head(maps).permute(0, 2, 3, 1) for head in (twin.decode_head, twin.auxiliary_head)]


@pytest.fixture(scope="session")
def upernet_twin_of():
    """The function `hugging_face_upernet(model)`."""
    return hugging_face_upernet


@pytest.fixture(scope="session")
def run_of_upernet():
    """The function `run_upernet(twin, images)`."""
    return run_upernet
