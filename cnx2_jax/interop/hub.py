"""Downloads files from the Hugging Face hub with huggingface_hub, which caches them."""

import contextlib
from pathlib import Path

from cnx2_jax.errors import UserError

SCHEME = "hf:"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")


def fetch(location: str) -> Path:
    """Downloads the weights of `hf:OWNER/NAME[@REVISION]`, or finds them in huggingface_hub's cache.

    Returns:
      The path of `model.safetensors`, or of `pytorch_model.bin` if there is none. The repository's
      `config.json` and `preprocessor_config.json` are in the same folder, if it has them.

    Raises:
      UserError: the repository, revision or file does not exist or must not be read, the network is down, or
        huggingface_hub is not installed.
    """
    repository, _, revision = location.removeprefix(SCHEME).partition("@")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"'{location}' needs huggingface_hub; pip install 'cnx2_jax[hub]'") from None

    def download(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
        except errors.RemoteEntryNotFoundError:
            return None

    try:
        weights = next((path for name in _WEIGHTS if (path := download(name))), None)
        if weights is None:
            raise UserError(
                f"'{location}' has neither {' nor '.join(_WEIGHTS)}; fetch its file and give its path"
            )
        with contextlib.suppress(errors.LocalEntryNotFoundError):  # offline, only the cache is available
            for name in _DESCRIPTIONS:
                download(name)
        return weights
    except UserError:
        raise
    except errors.HFValidationError:
        problem = "is not the name of a repository; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
    except errors.GatedRepoError:
        problem = "is gated; accept its terms on the hub, then `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub; if it is private, `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = f"has no revision '{revision}'; choose one of its branches and tags on the hub"
    except errors.LocalEntryNotFoundError:
        problem = "cannot be reached and is not in the cache; check the network, or give a file"
    except Exception as error:  # also the errors of its HTTP library, which changes between versions
        problem = f"cannot be fetched: {(str(error) or type(error).__name__).splitlines()[0]}"
    raise UserError(f"'{location}' {problem}")
