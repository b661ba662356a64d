"""What all that watch PyTorch's operators have in common. What they look for, and what they do about it, is their own."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A mode for programs that nobody compiles: the wrapper that guards against compilation imports torch._dynamo, which takes seconds in every rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
