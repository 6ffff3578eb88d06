"""Semantic segmentation with UperNet (paper, appendix A.4; the authors' ConvNeXt, semantic_segmentation/).

  cnx2 train --config segment:tiny --config.data.root=ADEChallengeData2016 \\
      --config.init_from=runs/finetuned --workdir runs/segment
  cnx2 train --config segment:tiny --config.data.source=masks --config.data.root=FOLDER \\
      --config.data.classes=names.txt --workdir runs/mine
  cnx2 train --config segment:smoke --workdir runs/smoke      # a minute on a CPU

Recipes: the eight variants of the paper and timm's small at 512 px, `base_22k`, `large_22k` and `huge_22k` at
640 px for weights that were fine-tuned on ImageNet-22K, and `digits`. Batch 16, 160,000 steps, learning rate
1e-4, which falls linearly to 0 after a linear warm-up of 1,500 steps. `--config.init_from` is a classifier or
a pretraining run of the same variant, or weights converted by `cnx2 convert`; if it is empty, training starts
from scratch.

Expected mIoU on ADE20K with one scale, after FCMAE pretraining and fine-tuning on ImageNet-1K, in percent:
base 52.1, large 53.7, huge 55.0, and huge_22k 57.0. Not yet reproduced here.

Uncertain values: the paper gives the grid that it searched (`--sweep paper`), not what it chose. Layer
decay 0.9 and the drop path rates of tiny, small, base and large are those of ConvNeXt's published configs;
huge has large's, and variants below tiny the lowest of the grid. `num_layers` of the decay by stage is 6 up
to tiny and 12 above, as there. V2's table does not say whether it tested at one scale or at several.

Differences from the official code:
- Precision: it trains base and smaller ones with automatic mixed precision. The default here is float32;
  `--config.model.dtype=bfloat16` is the fast choice.
- Testing: ConvNeXt's configs at 512 px test on whole images; here a window slides over them in every recipe,
  which is what mmsegmentation's own configs of UperNet do at 640 px. `--config.eval_window` sets its side.
- Maps are resized by the nearest pixel centre, where OpenCV rounds down: edges differ by up to a pixel.

  cnx2 train --config segment:digits --config.init_from=runs/scenes --workdir runs/segmented

segments made-up scenes of scikit-learn's digits in minutes on a CPU; `pretrain:scenes` is its pretraining.
mIoU is 0.80 from scratch and 0.81 after pretraining, one run of each (docs/segmentation.md).
"""

from cnx2_jax.models import VARIANTS
from cnx2_jax.recipes import parse_argument, use_scenes
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults

LARGE_IMAGES = ("base_22k", "large_22k", "huge_22k")
DROP_PATH = {"tiny": 0.4, "small": 0.3, "base": 0.4, "large": 0.4, "huge": 0.4}


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*VARIANTS, *LARGE_IMAGES, "digits", "smoke"], steps=0)
    config = defaults("segment")
    config.data.augment = "distort"
    config.optimizer.schedule = "poly"
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay_type = "stage"
    if name == "digits":
        use_scenes(config)
        config.batch_size = 4  # many updates: half as many of twice the images learn much less
        config.total_steps = options["steps"] or 6000
        config.eval_epochs = 1.0  # 2000 steps
        config.model.channels = 32
        config.model.auxiliary_channels = 32
        config.model.pool_scales = (1, 2)  # the coarsest map has 4x4 positions
        config.model.dropout = 0.0  # so narrow a network learns less with it
        # 3.2e-2 for a batch of 4. Half of that learns a little less, a quarter or less much less.
        config.optimizer.base_learning_rate = 2.048
        config.optimizer.warmup_steps = 50
        config.optimizer.b2 = 0.99
        config.optimizer.clip_norm = 1.0
        config.optimizer.layer_decay = 0.8
        config.data.augment = ""  # scenes have colours of their own
        config.data.resize_long = config.data.resize_short = 64
        config.data.eval_long = config.data.eval_short = 64
        # A ratio below 1 pads images with 0. From scratch, as biases are 0, the stem's LayerNorm then meets
        # zero variance, and the gradient of the stem's bias is thousands of times that of everything else.
        config.data.ratio_range = (1.0, 1.25)
        config.data.flip = False  # a mirrored 2 is not a 2
        return config

    variant = "tiny" if name == "smoke" else name.removesuffix("_22k")
    side = 640 if name in LARGE_IMAGES else 512
    config.model.variant = variant
    config.model.drop_path = DROP_PATH.get(variant, 0.1)
    config.image_size = (side, side)
    config.batch_size = 16
    config.total_steps = options["steps"] or 160_000
    config.eval_epochs = 12.5  # nearly 16,000 steps of ADE20K
    config.optimizer.base_learning_rate = 1.6e-3  # 1e-4 for a batch of 16
    config.optimizer.warmup_steps = 1500
    config.optimizer.layer_decay = 0.9
    config.data.source = "ade20k"
    config.data.resize_short = config.data.eval_short = side
    config.data.resize_long = config.data.eval_long = 4 * side
    if name == "smoke":
        config.image_size = (64, 64)
        config.batch_size = 4
        config.total_steps = 6
        config.log_steps = 1
        config.model.variant = "atto"
        config.model.channels, config.model.auxiliary_channels = 64, 32
        config.optimizer.warmup_steps = 2
        config.data.source = "scenes:16"
        config.data.resize_short = config.data.eval_short = 64
        config.data.resize_long = config.data.eval_long = 256
    return config


def sweep_paper():
    """The paper's grid (appendix A.4)."""
    return product(
        **{
            "optimizer.layer_decay": (0.8, 0.9),
            "optimizer.base_learning_rate": (1.6e-3, 3.2e-3, 4.8e-3),
            "model.drop_path": (0.1, 0.2, 0.3, 0.4),
        }
    )
