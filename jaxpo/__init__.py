"""jaxpo: direct preference optimisation in JAX."""

import os

# Of transformers only tokenizers are used: its advice to install PyTorch would mislead.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
