"""The checkpoint of a narrow ResNet-10, as the evaluators' tests have it."""

from tests.fastssl.evaluate.conftest import patch_shards as patch_shards
from tests.fastssl.evaluate.conftest import run_dir as run_dir
