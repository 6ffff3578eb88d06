"""FCMAE pretraining (paper, section 3 and table 8; official TRAINING.md).

  cnx2 train --config pretrain:tiny --config.data.root=IMAGES --workdir runs/pretrain

IMAGES is any folder of images; the paper uses ImageNet's `train/`. Recipes: the eight variants of the paper
and timm's small, with `epochs=`: 800 by default, as in the paper's tables; 1600 in TRAINING.md and for the
paper's final models, such as `pretrain:base,epochs=1600`. Batch 4096, peak learning rate 1.5e-4 x 4096 /
256 = 2.4e-3. The paper trains ConvNeXt-B for 800 epochs in 7.7 hours on 256 TPU v3 cores.

`images=` is how many images there are, for sets smaller than ImageNet, such as `pretrain:atto,images=3000`.
Own choices, not tuned: the batch is four times the square root of the number of images, at least 64 and
4096 for ImageNet, and the peak learning rate goes by the batch's square root (`recipes.use_batch_for`),
because a batch of 4096 leaves no updates. 800 epochs stay: few images give few updates per epoch. Warm-up
stays a twentieth of the run. docs/small.md has a measured case.

Differences from the official code:
- Initial weights: a normal of deviation 0.02 cut at +-2. The official code re-initialises with deviation
  1.0 by accident (its issue 64).
- Weight decay: kernels only. The official pretraining code also decays GRN and the mask token; its
  fine-tuning code does not. `--config.optimizer.decay_grn=true` decays them too.
- Validation: 1% of the images is held out if there is no validation split (`data.val_fraction`). The
  official code trains on all.
- Steps: an epoch is every image, and an incomplete batch is filled from the next epoch. The official code
  drops each epoch's incomplete batch. On all 1,281,167 images of ImageNet, 800 epochs are 250,228 steps
  here and 249,600 there; without the held-out 1% they are 247,726 here.
- Visible patches: see `models.fcmae.visible_count`; the same number at the mask ratio of the paper.

  cnx2 train --config pretrain:digits --workdir runs/digits

pretrains a small network on scikit-learn's 1,797 embedded digits in about a minute on a CPU;
`pretrain:scenes` does so on the scenes of `segment:digits`; `pretrain:smoke` runs a few steps of the recipe
above on made-up images.
"""

from cnx2_jax.models import VARIANTS
from cnx2_jax.recipes import IMAGENET_IMAGES, parse_argument, use_batch_for, use_digits, use_scenes, use_smoke
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*VARIANTS, "digits", "scenes", "smoke"], epochs=0.0, images=0)
    config = defaults("pretrain")
    if name in ("digits", "scenes"):
        digits = name == "digits"
        (use_digits if digits else use_scenes)(config)
        config.batch_size = 128
        config.total_epochs = options["epochs"] or (25.0 if digits else 10.0)
        config.eval_epochs = 10.0 if digits else 5.0
        config.optimizer.base_learning_rate = 2e-3
        config.optimizer.warmup_epochs = 3.0 if digits else 0.75
        config.optimizer.b2 = 0.95
        config.data.crop_scale = (0.5, 1.0) if digits else (0.4, 1.0)
        config.data.flip = False  # a mirrored 2 is not a 2
        config.model.decoder_dim = 64
        return config

    config.model.variant = "tiny" if name == "smoke" else name
    config.total_epochs = options["epochs"] or 800.0
    config.optimizer.base_learning_rate = 1.5e-4
    use_batch_for(options["images"] or IMAGENET_IMAGES, config, 64, 4096)
    config.optimizer.warmup_epochs = config.total_epochs / 20 if options["images"] else 40.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.95
    config.data.crop_scale = (0.2, 1.0)
    config.data.val_fraction = 0.01
    if name == "smoke":
        use_smoke(config)
    return config


def sweep_mask_ratio():
    """Around the paper's 0.6 (section 3.1). Losses at different ratios do not compare; fine-tune first."""
    return product(**{"model.mask_ratio": (0.4, 0.5, 0.6, 0.7, 0.8)})


def sweep_lr():
    """Around the recipe's rate, for another batch size or set of images."""
    return product(**{"optimizer.base_learning_rate": (5e-5, 1.5e-4, 5e-4, 1.5e-3)})
