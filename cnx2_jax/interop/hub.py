"""Files from the Hugging Face hub, which huggingface_hub fetches and keeps."""

import contextlib
from pathlib import Path

from cnx2_jax.errors import UserError

SCHEME = "hf:"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")


def fetch(location: str) -> Path:
    """Fetches the weights that `hf:OWNER/NAME[@REVISION]` means, or finds them in huggingface_hub's cache.

    Returns:
      The path of `model.safetensors`, or where there is none of `pytorch_model.bin`; beside it lie the
      repository's `config.json` and `preprocessor_config.json`, if it has them.

    Raises:
      UserError: no such repository, revision or file, no right to read it, no network, or no huggingface_hub.
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
        with contextlib.suppress(errors.LocalEntryNotFoundError):  # offline, the cache is all there is
            for name in _DESCRIPTIONS:
                download(name)
        return weights
    except UserError:
        raise
    except errors.HFValidationError:
        problem = "names no repository; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION"
    except errors.GatedRepoError:
        problem = "is gated; accept its terms on the hub, then `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub; if it is private, `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = f"has no revision '{revision}'; see its branches and tags on the hub"
    except errors.LocalEntryNotFoundError:
        problem = "cannot be reached and is not in the cache; check the network, or give a file"
    except Exception as error:  # those of its HTTP library too, which is another in every few versions
        problem = f"cannot be fetched: {(str(error) or type(error).__name__).splitlines()[0]}"
    raise UserError(f"'{location}' {problem}")
