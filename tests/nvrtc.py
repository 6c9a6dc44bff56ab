"""Whether kernels can be compiled here, which takes no GPU."""

from __future__ import annotations

import pytest

from twilight import compiling
from twilight.errors import KernelError, MissingExtraError


def _missing() -> str | None:
    try:
        compiling.supported_archs()
    except (KernelError, MissingExtraError) as error:
        return str(error)
    return None


NVRTC = pytest.mark.skipif(_missing() is not None, reason=f"needs NVRTC: {_missing()}")
