"""Triton's interpreter at twice its speed, with the same results.

It replaces the functions of triton.language by its own at every call of a device function, of which a kernel makes
hundreds, by looking through whole modules. Once per launch is enough: nothing puts them back before its end.
"""

from __future__ import annotations

import inspect
from typing import Any


def patch_once_per_launch() -> None:
    """From here on in this process; nothing changes where this release of triton does it in another way."""
    import triton.language as tl
    from triton.runtime import interpreter

    honest: Any = getattr(interpreter, "_patch_lang", None)
    scope_class: Any = getattr(interpreter, "_LangPatchScope", None)
    if honest is None or not hasattr(scope_class, "restore"):
        return
    done: set[int] = set()
    restore = scope_class.restore

    def patch(fn: Any) -> Any:
        modules = {id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)}
        if done and modules <= done:
            return None  # a call inside of a launch, which does not look at the answer
        scope = honest(fn)
        done.update(modules)
        return scope

    def put_back(scope: Any) -> None:
        done.clear()
        restore(scope)

    interpreter._patch_lang = patch
    scope_class.restore = put_back
