"""Where the extra `serve` is not installed, the tests of the server are not collected, other than in CI."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("uvicorn") or "CI" in os.environ else ["test_*.py"]
