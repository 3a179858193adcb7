"""The kernels in C that train on a CPU."""

from nnx_cli.kernels import attention_c, qkv_swiglu_c


def ask_for_c() -> None:
    """Find out which of them this machine has: to be done before torch's compiler, which cannot look into that."""
    for kernel in (attention_c, qkv_swiglu_c):
        kernel.is_available()
