"""Which modules a trace records whole."""

from __future__ import annotations

from torch import nn

import dual_layers


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is recorded whole: it has a rule, and calling it does what the rule describes and nothing else."""
    rule = dual_layers.lookup(module)
    if rule is None or getattr(module, "inplace", False) or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or _global_hooks():
        return False
    base = next(base for base in type(module).__mro__ if dual_layers.is_key(base, rule))
    return not _overrides_a_part(type(module), base)


def _global_hooks() -> bool:
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _overrides_a_part(cls: type, base: type) -> bool:
    """Whether a subclass keeps ``forward`` but replaces a method that it calls, such as ``_conv_forward``."""
    names = getattr(getattr(base.forward, "__code__", None), "co_names", ())
    return any(callable(getattr(cls, name, None)) and getattr(cls, name) is not getattr(base, name, None) for name in names)


def is_from_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's own layers, so that its failure to be traced is not the user's concern."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(module).__module__.startswith("torch.nn.modules")
