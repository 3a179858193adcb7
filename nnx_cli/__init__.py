"""Train a small language model from scratch on your own text, on the computer you already have."""

__version__ = "0.1.0"
__all__ = ["load", "prepare", "sample", "train"]
TYPE_CHECKING = False  # as typing has it, which takes time to import

if TYPE_CHECKING:
    from nnx_cli.api import load, prepare, sample, train


def __getattr__(name: str) -> object:
    """The functions of `nnx_cli.api`, which are imported when one is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnx_cli import api

    return getattr(api, name)
