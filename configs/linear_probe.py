"""Linear probe: trains a linear classifier on the features of a frozen, pretrained encoder.

  cnx2 train --config linear_probe:tiny --config.data.root=IMAGES \\
      --config.init_from=runs/pretrain --workdir runs/probe
  cnx2 train --config linear_probe:smoke --workdir runs/smoke      # a minute on a CPU
  cnx2 train --config linear_probe:digits --config.init_from=runs/digits --workdir runs/probe

IMAGES holds a folder per class. Features are computed once, from images prepared as for evaluation, and
standardised; then only the head is trained, which takes minutes. `--config.data.feature_cache=FOLDER` keeps
the features for other runs. Recipes: the nine variants, and digits. `cnx2 evaluate --knn 20` evaluates an
encoder without any training.

The paper has no linear probe, so there is no accuracy to expect; masked autoencoders are made for
fine-tuning. The recipe is our own, after MAE's (arXiv 2111.06377, table 10): 90 epochs, batch 16384, 10
epochs of warm-up, no weight decay, no augmentation; AdamW instead of LARS.
"""

from cnx2_jax.models import VARIANTS
from cnx2_jax.recipes import parse_argument, use_digits, use_smoke
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults


def get_config(argument="tiny"):
    name, _ = parse_argument(argument, [*VARIANTS, "digits", "smoke"])
    config = defaults("probe")
    config.optimizer.weight_decay = 0.0
    if name == "digits":
        use_digits(config)
        config.batch_size = 128
        config.total_epochs = 100.0
        config.eval_epochs = 25.0
        config.optimizer.base_learning_rate = 2e-2
        config.optimizer.warmup_epochs = 5.0
        return config

    config.model.variant = "tiny" if name == "smoke" else name
    config.batch_size = 16384
    config.total_epochs = 90.0
    config.optimizer.base_learning_rate = 1e-4
    config.optimizer.warmup_epochs = 10.0
    if name == "smoke":
        use_smoke(config)
    return config


def sweep_lr():
    """The one value to tune for another encoder or another set of images."""
    return product(**{"optimizer.base_learning_rate": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)})
