"""Where the extra `serve` is not installed, the tests of the server are not collected."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("uvicorn") else ["test_*.py"]
