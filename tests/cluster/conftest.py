"""The tests beside this file need Ray, the extra [batch]: make test-batch installs it."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("ray") else ["test_cluster.py"]
