"""emlens in Inspect: the model provider `emlens/<config.yaml>`, and tasks.

```
inspect eval emlens/free_form --model emlens/steered.yaml --model-role grader=openai/gpt-4o
```

Needs the extra `evals`; importing this room without it raises an error that names it.
"""

from importlib import import_module

from emlens.evals._inspect import _without_save, need_inspect

need_inspect("emlens.evals.inspect")
with _without_save():
    # anyio.abc imports it only when it is asked for
    import_module("anyio.abc._sockets")

from emlens.evals.inspect.config import ModelConfig  # noqa: E402
from emlens.evals.inspect.logs import read_log  # noqa: E402
from emlens.evals.inspect.tasks import domain, free_form  # noqa: E402

__all__ = ["ModelConfig", "domain", "free_form", "read_log"]
